"""Fitting several devices at once: recovery of made prices, what is shared, what is not bent, what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from predictors.pooled import fit_pooled, predict_networks_left_out

Made = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def made(rng: np.random.Generator) -> Made:
    """Amounts (40, 5), prices (4, 5) of four devices around a common list, and exact latencies (4, 40)."""
    amounts = rng.lognormal(0, 1, (40, 5))
    common = np.array([1.0, 0.3, 2.0, 0.1, 0.7])
    speeds = np.array([0.02, 1.0, 5.0, 300.0])
    prices = speeds[:, None] * common * rng.uniform(0.6, 1.6, (4, 5))
    return amounts, prices, prices @ amounts.T


def test_prices_of_exact_latencies_are_found(made: Made) -> None:
    amounts, prices, latency_ms = made
    np.testing.assert_allclose(fit_pooled(amounts, latency_ms, penalty=1e-9), prices, rtol=1e-2)


def test_a_heavy_penalty_leaves_one_price_list_and_a_speed_each(made: Made) -> None:
    amounts, _, latency_ms = made
    fitted = fit_pooled(amounts, latency_ms, penalty=1e6)
    ratio = fitted / fitted[0]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
    assert (np.abs(np.log10(ratio[:, 0] / [1, 50, 250, 15000])) < 0.3).all()


def test_a_device_with_three_measurements_borrows_the_rest(made: Made, rng: np.random.Generator) -> None:
    amounts, _, latency_ms = made
    pooled_errors, own_errors = [], []
    for _ in range(8):
        truth = 3 * np.array([0.8, 0.3, 2.0, 0.15, 0.5]) @ amounts.T
        ran = rng.choice(40, 3, replace=False)
        known = np.vstack([latency_ms, np.full(40, np.nan)])
        known[-1, ran] = truth[ran]
        pooled_errors.append(np.abs(amounts @ fit_pooled(amounts, known)[-1] / truth - 1).mean())
        own = np.linalg.lstsq(amounts[ran], truth[ran], rcond=None)[0]  # five prices of three measurements
        own_errors.append(np.abs(amounts @ own / truth - 1).mean())
    assert np.mean(pooled_errors) < 0.1 and np.mean(pooled_errors) < 0.6 * np.mean(own_errors)


def test_one_wild_measurement_does_not_bend_the_prices(made: Made) -> None:
    amounts, _, latency_ms = made
    wild = latency_ms.copy()
    wild[1, 7] /= 3  # plain least squares of relative errors would be off by 31 % at worst
    fitted = fit_pooled(amounts, wild, penalty=1e-6)
    np.testing.assert_allclose(fitted @ amounts.T, latency_ms, rtol=0.05)


def test_prices_are_never_negative(rng: np.random.Generator) -> None:
    amounts = rng.lognormal(0, 1, (15, 8))
    latency_ms = rng.lognormal(0, 1, (3, 15))  # nothing to do with the amounts
    latency_ms[rng.random((3, 15)) < 0.3] = np.nan
    assert (fit_pooled(amounts, latency_ms) >= 0).all()


def test_units_do_not_matter(made: Made, rng: np.random.Generator) -> None:
    amounts, _, latency_ms = made
    noisy = latency_ms * rng.lognormal(0, 0.2, latency_ms.shape)
    unit = np.array([1e9, 1e-3, 1.0, 1e6, 50.0])
    predicted = fit_pooled(amounts, noisy) @ amounts.T
    np.testing.assert_allclose(fit_pooled(amounts * unit, noisy * 1e3) @ (amounts * unit).T / 1e3, predicted, rtol=1e-6)


def test_a_network_left_out_is_left_out_on_all_devices(made: Made) -> None:
    amounts, _, latency_ms = made
    latency_ms[2, 5] = np.nan
    group = np.arange(40)
    group[11] = group[10]
    predicted = predict_networks_left_out(amounts, latency_ms, group)
    assert np.isnan(predicted[2, 5]) and np.isnan(predicted).sum() == 1
    changed = latency_ms.copy()
    changed[:, 10:12] *= 7  # what it knows of either tells it nothing of the other, wherever it ran
    np.testing.assert_array_equal(predict_networks_left_out(amounts, changed, group)[:, 10:12], predicted[:, 10:12])
    rest = np.arange(40) != 20
    expected = fit_pooled(amounts[rest], latency_ms[:, rest]) @ amounts[20]
    np.testing.assert_allclose(predicted[:, 20], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("latency_ms", "message"),
    [
        (np.ones((2, 3)), r"each of 4 networks a device, got shape \(2, 3\)"),
        (np.ones(4), r"got shape \(4,\)"),
        (np.array([[1.0, 2, 3, 0]]), "positive latencies"),
        (np.array([[1.0, 2, 3, np.inf]]), "positive latencies"),
        (np.array([[1.0, 2, 3, 4], [np.nan] * 4]), "a device without any latency"),
    ],
)
def test_wrong_latencies_are_refused(latency_ms: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_pooled(np.ones((4, 2)), latency_ms)
