"""Prices of a new device against a search for the most probable ones, refitting, and designs by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from hardware_profiles import AdditiveModel, features
from hardware_profiles.cost_model import shape_features
from predictors import KnownDevice, choose_networks
from predictors import prices as module
from predictors.prices import Amounts, Bases, bases_of, covariance, fit_prices
from search_spaces import MobileNet, Network

NAMES = ("conv.fp32.macs", "conv.int8.macs", "pointwise.int8.macs", "pointwise.int8.bytes", module.CONSTANT)
NOISE = 0.05


def made(seed: int, count: int = 30) -> tuple[Amounts, Bases, np.ndarray]:
    """Random amounts, one price list, and latencies of prices that depart from it."""
    rng = np.random.default_rng(seed)
    amounts = Amounts(NAMES, rng.uniform(0.0, 1.0, (count, len(NAMES))))
    base = np.log(rng.uniform(0.5, 2.0, len(NAMES)))
    latency_ms = amounts.matrix @ np.exp(base + rng.normal(0, 0.5, len(NAMES)))
    noisy = latency_ms * np.exp(rng.normal(0, NOISE, count))
    return amounts, Bases(("typical",), base[None], np.ones(1)), noisy


def most_probable(amounts: np.ndarray, base: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
    """Prices that minimise the negative log posterior, by a general optimiser."""
    inverse = np.linalg.inv(covariance(NAMES))
    base = base + np.log(latency_ms).mean() - np.log(amounts @ np.exp(base)).mean()

    def loss(theta: np.ndarray) -> float:
        residual = np.log(latency_ms) - np.log(amounts @ np.exp(base + theta))
        return float(residual @ residual / NOISE**2 + theta @ inverse @ theta) / 2

    found = minimize(loss, np.zeros(len(base)), method="BFGS", options={"gtol": 1e-8})
    return np.exp(base + found.x)


def test_the_prior_says_what_features_share() -> None:
    found = covariance(NAMES)
    d = {letters: value**2 for letters, value in module.DEPARTURES.items()}
    assert found[0, 0] == pytest.approx(sum(d.values()))
    assert found[0, 1] == pytest.approx(d[""] + d["q"] + d["f"] + d["fq"])  # conv MACs in two precisions
    assert found[1, 2] == pytest.approx(d[""] + d["q"] + d["p"] + d["qp"])  # int8 MACs of two families
    assert found[2, 3] == pytest.approx(d[""] + d["f"] + d["p"] + d["fp"])  # one kernel, two quantities
    assert found[0, 3] == pytest.approx(d[""]) and (np.linalg.eigvalsh(found) > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_prices_are_the_most_probable(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOISES", np.array([NOISE]))
    amounts, bases, latency_ms = made(seed)
    chosen = np.arange(8)
    fitted = fit_prices(amounts, chosen, latency_ms[chosen], bases)
    wanted = most_probable(amounts.matrix[chosen], bases.log_prices[0], latency_ms[chosen])
    assert fitted.prices_ms == pytest.approx(wanted, rel=2e-3)
    assert fitted.sources == {"typical": 1.0}


def test_left_out_predictions_are_nearly_those_of_fitting_again() -> None:
    amounts, bases, latency_ms = made(4)
    chosen = np.arange(10)
    fitted = fit_prices(amounts, chosen, latency_ms[chosen], bases)
    for out in chosen:
        kept = np.delete(chosen, out)
        again = amounts.matrix[out] @ fit_prices(amounts, kept, latency_ms[kept], bases).prices_ms
        assert fitted.left_out_ms[out] == pytest.approx(again, rel=0.03)


def test_left_out_predictions_weigh_price_lists_as_fitting_again_does() -> None:
    amounts, bases, latency_ms = made(3)
    chosen = np.arange(8)
    both = Bases(("one", "other"), np.concatenate([bases.log_prices, bases.log_prices[:, ::-1]]), np.full(2, 0.5))
    fitted = fit_prices(amounts, chosen, latency_ms[chosen], both)
    for out in chosen:
        kept = np.delete(chosen, out)
        again = amounts.matrix[out] @ fit_prices(amounts, kept, latency_ms[kept], both).prices_ms
        assert fitted.left_out_ms[out] == pytest.approx(again, rel=0.01)


def test_lists_that_disagree_make_the_interval_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the law of total variance, from fits around one list each."""
    monkeypatch.setattr(module, "NOISES", np.array([NOISE]))
    amounts, bases, latency_ms = made(4)
    other = bases.log_prices[0] + np.random.default_rng(4).normal(0, 2, len(NAMES))
    lists, samples = np.stack([bases.log_prices[0], other]), (np.arange(3), latency_ms[:3])
    both = fit_prices(amounts, *samples, Bases(("one", "other"), lists, np.full(2, 0.5)))
    within = between = 0.0
    for name, log_prices in zip(("one", "other"), lists, strict=True):
        alone = fit_prices(amounts, *samples, Bases((name,), log_prices[None], np.ones(1)))
        apart = np.log(amounts.matrix @ alone.prices_ms) - np.log(amounts.matrix @ both.prices_ms)
        within += both.sources[name] * (alone.relative_error / module.Z_90) ** 2
        between += both.sources[name] * float(np.mean(apart**2))
    assert both.relative_error == pytest.approx(module.Z_90 * np.sqrt(within + between), rel=1e-3)
    assert between > 0.3 * within


def test_known_devices_share_half_of_the_weight() -> None:
    amounts, _, _ = made(0)
    known = [KnownDevice(name, AdditiveModel({"conv.fp32.macs": 1.0})) for name in "abc"]
    assert bases_of(amounts, (), known[:2]).weights.tolist() == [0.5, 0.25, 0.25]
    assert bases_of(amounts, (), known[:1]).weights.tolist() == [0.5, 0.5]
    assert bases_of(amounts, (), ()).weights.tolist() == [1.0]


def test_what_a_known_device_has_no_price_for_is_typical_in_its_own_proportion() -> None:
    """It takes four times what is typical for what it has prices for: 1 MAC at 10 and 3 at 2, instead of 4 at 1."""
    names = ("conv.fp32.macs", "linear.fp32.count", "linear.fp32.macs", module.CONSTANT)
    amounts = Amounts(names, np.array([[0.25, 7.0, 2.0, 1.0], [0.75, 9.0, 1.0, 1.0]]))
    model = AdditiveModel({"conv.fp32.macs": 10.0, "linear.fp32.macs": 2.0})
    bases = bases_of(amounts, (), [KnownDevice("it", model)])
    assert bases.names == ("typical", "it")
    expected = [0.8 * 10 + 0.2 * 4, 4 * 5e3, 0.8 * 2 + 0.2 * 4, 4 * 5e3]
    np.testing.assert_allclose(np.exp(bases.log_prices), [[1, 5e3, 1, 5e3], expected])


def test_a_price_list_that_explains_the_samples_gets_the_weight() -> None:
    amounts, _, _ = made(5)
    rng = np.random.default_rng(0)
    lists = np.log(rng.uniform(0.5, 2.0, (2, len(NAMES)))) + rng.normal(0, 2.0, (2, len(NAMES)))
    latency_ms = 100 * amounts.matrix @ np.exp(lists[1])
    fitted = fit_prices(amounts, np.arange(6), latency_ms[:6], Bases(("typical", "right"), lists, np.full(2, 0.5)))
    assert fitted.sources["right"] > 0.8
    assert amounts.matrix @ fitted.prices_ms == pytest.approx(latency_ms, rel=0.05)


def test_what_was_believed_of_a_price_list_counts_as_much_as_the_samples() -> None:
    amounts, bases, latency_ms = made(7)
    lists = np.concatenate([bases.log_prices, bases.log_prices[:, ::-1]])
    odds = []
    for first in (0.5, 0.9):
        both = Bases(("typical", "other"), lists, np.array([first, 1 - first]))
        sources = fit_prices(amounts, np.arange(4), latency_ms[:4], both).sources
        odds.append(sources["typical"] / sources["other"])
    assert odds[1] / odds[0] == pytest.approx(9, rel=0.01)


def test_a_device_of_one_precision_has_its_prices_in_all() -> None:
    model = AdditiveModel({"conv.int8.macs": 1.0})
    assert KnownDevice("one", model, "int8").own("conv.fp32.macs") == "conv.int8.macs"
    assert KnownDevice("any", model).own("conv.fp32.macs") == "conv.fp32.macs"
    assert KnownDevice("one", model, "int8").has("conv.fp32") and not KnownDevice("any", model).has("conv.fp32")


def test_more_noise_makes_wider_intervals() -> None:
    amounts, bases, _ = made(6)
    exact = amounts.matrix @ np.exp(bases.log_prices[0])
    normal = np.random.default_rng(1).normal(0, 1, len(exact))
    widths = []
    for noise in (0.01, 0.05, 0.2):
        noisy = exact * np.exp(noise * normal)
        widths.append(fit_prices(amounts, np.arange(20), noisy[:20], bases).relative_error)
    assert widths == sorted(widths) and widths[0] < 0.04 and 0.2 < widths[-1] < 0.6


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    space, rng = MobileNet(resolutions=(8,), widths=(8, 16), depths=(1, 2, 3)), np.random.default_rng(0)
    return [space.lower(space.sample(rng)) for _ in range(40)]


def test_the_first_samples_leave_the_least_variance(networks: list[Network]) -> None:
    """Against conditioning the Gaussian process on each candidate in turn."""
    chosen = choose_networks(networks, 10, 0)
    assert len(set(chosen.tolist())) == 10
    amounts = Amounts.of(networks)
    typical = [module.TYPICAL[name.rpartition(".")[2]] for name in amounts.names]
    shares = amounts.matrix * typical
    shares /= shares.sum(axis=1, keepdims=True)
    prior = shares @ covariance(amounts.names) @ shares.T
    noise = float(np.median(module.NOISES)) ** 2

    def variance(rows: list[int]) -> float:
        across = prior[:, rows]
        left = prior - across @ np.linalg.inv(prior[np.ix_(rows, rows)] + noise * np.eye(len(rows))) @ across.T
        return float(np.trace(left))

    taken: list[int] = []
    for found in chosen[:7].tolist():
        best = min(variance([*taken, row]) for row in range(len(networks)) if row not in taken)
        assert variance([*taken, found]) == pytest.approx(best)
        taken.append(found)


def test_the_rest_of_the_samples_are_random(networks: list[Network]) -> None:
    first, second = (choose_networks(networks, 10, seed).tolist() for seed in (0, 1))
    assert first[:7] == second[:7] and first[7:] != second[7:]
    assert choose_networks(networks, 10, 0).tolist() == first
    with pytest.raises(ValueError, match="between 1 and 40 samples, got 41"):
        choose_networks(networks, 41, 0)


def test_the_list_of_a_device_that_prices_shapes_adds_up_to_its_latencies(networks: list[Network]) -> None:
    amounts, rng = Amounts.of(networks), np.random.default_rng(3)
    names = {name for network in networks for name in (*features(network), *shape_features(network.layers))}
    model = AdditiveModel({name: float(rng.uniform(1e-6, 2e-6)) for name in sorted(names)}, 0.5)
    assert model.prices_shapes
    bases = bases_of(amounts, networks, [KnownDevice("gpu", model)])
    total = amounts.matrix.sum(axis=0) @ np.exp(bases.log_prices[1])
    assert total == pytest.approx(sum(model.latency_ms(network) for network in networks))
