"""Transfer to a new device: against the same averages written as loops with scipy's densities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from predictors import CodeTables, NotFitted, TransferredPredictor, choose_samples

CODES = np.array(list(product(range(3), repeat=4)))  # 81 architectures


def devices(rng: np.random.Generator, count: int, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Latencies (81, count) of devices that share structure: without noise, and measured."""
    shared, own = rng.uniform(0, 0.6, size=(3, 4, 2)), rng.uniform(0, 0.1, size=(3, 4, count))
    tables = shared @ rng.dirichlet([1, 1], size=count).T + own
    logs = tables[CODES, np.arange(4)].sum(axis=1) + rng.uniform(-1, 3, size=count)
    return np.exp(logs), np.exp(logs + noise * rng.normal(size=logs.shape))


def models(
    devices: np.ndarray, features: np.ndarray, chosen: np.ndarray, log_ms: np.ndarray
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Of each model its weight, and the means and variances (n,) of new measurements of log-latencies."""
    z = np.log(devices) - np.log(devices).mean(axis=0)
    z = np.column_stack([z, z.mean(axis=1)])  # nobody's device: what all have in common
    f = (features - features.mean(axis=0)) / features.std(axis=0) / np.sqrt(features.shape[1])
    count = z.shape[1]
    for s, (slope, p), mix, (residual, q), noise in product(
        range(count), [(0.1, 0.8), (0.5, 0.2)], (0.0, 0.7), [(0.0, 0.8), (0.2, 0.2)], np.geomspace(0.01, 0.32, 6)
    ):
        squared = np.array([np.mean((z[:, t] - z[:, s]) ** 2) for t in range(count)])
        unit = np.sort(squared)[1:7].mean()
        like = np.array([0.0 if t == s else np.exp(-squared[t] / (2 * unit)) for t in range(count)])
        like /= like.sum()
        kernel = 100.0 + slope**2 * np.outer(z[:, s], z[:, s]) + residual**2 * f @ f.T
        for t in range(count):
            kernel += mix**2 * like[t] * np.outer(z[:, t] - z[:, s], z[:, t] - z[:, s])
        covariance = kernel[np.ix_(chosen, chosen)] + noise**2 * np.eye(len(chosen))
        weight = p * q * multivariate_normal(z[chosen, s], covariance).pdf(log_ms)
        mean = z[:, s] + kernel[:, chosen] @ np.linalg.solve(covariance, log_ms - z[chosen, s])
        explained = (kernel[:, chosen] * np.linalg.solve(covariance, kernel[chosen]).T).sum(axis=1)
        yield weight, mean, np.diag(kernel) - explained + noise**2


def oracle(devices: np.ndarray, features: np.ndarray, chosen: np.ndarray, log_ms: np.ndarray) -> np.ndarray:
    """The averaged prediction (n,) of log-latencies."""
    weights, means, _ = map(np.array, zip(*models(devices, features, chosen, log_ms), strict=True))
    return np.asarray(weights @ means / weights.sum())


def test_predicts_the_average_over_all_models(rng: np.random.Generator) -> None:
    known, measured = devices(rng, 5)
    features = rng.normal(size=(81, 3))
    chosen = rng.choice(81, 7, replace=False)
    predictor = TransferredPredictor().fit(known[:, :4], chosen, measured[chosen, 4], features=features)
    expected = oracle(known[:, :4], features, chosen, np.log(measured[chosen, 4]))
    np.testing.assert_allclose(np.log(predictor.predict(known[:, :4], features).mean_ms), expected, atol=1e-5)


@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_the_spread_is_that_of_new_measurements_around_the_average(rng: np.random.Generator, noise: float) -> None:
    """Noise, doubt within models and between them: the variance of their mixture, averaged over architectures."""
    known, measured = devices(rng, 5, noise)
    features, chosen = rng.normal(size=(81, 3)), rng.choice(81, 5, replace=False)
    logs = np.log(measured[chosen, 4])
    predictor = TransferredPredictor().fit(known[:, :4], chosen, measured[chosen, 4], features=features)
    weights, means, variances = map(np.array, zip(*models(known[:, :4], features, chosen, logs), strict=True))
    weights /= weights.sum()
    around = ((means - weights @ means) ** 2 + variances).mean(axis=1)
    assert predictor.to_json()["spread"] == pytest.approx(np.sqrt(weights @ around), rel=0.02)
    assert weights @ around > 1.1 * weights @ variances.mean(axis=1)


def test_left_out_errors_are_those_of_fitting_again(rng: np.random.Generator) -> None:
    known, measured = devices(rng, 4, noise=0.1)
    features = rng.normal(size=(81, 2))
    chosen = rng.choice(81, 6, replace=False)
    predictor = TransferredPredictor().fit(known[:, :3], chosen, measured[chosen, 3], features=features)
    logs = np.log(measured[chosen, 3])
    again = [oracle(known[:, :3], features, np.delete(chosen, i), np.delete(logs, i))[chosen[i]] for i in range(6)]
    report = predictor.report()
    assert report["left_out"]["mape"] == pytest.approx(np.abs(np.exp(again - logs) - 1).mean(), rel=1e-3)
    assert report["samples"] == 6 and report["interval_learned_on"] == "the samples"
    widest = np.abs(again - logs).max()  # six residuals are too few for 90 %
    np.testing.assert_allclose(report["interval"], [np.expm1(-widest), np.expm1(widest)], rtol=1e-3)


@pytest.mark.parametrize(("count", "place"), [(8, 8), (9, 9), (10, 10), (19, 18), (20, 19)])
def test_with_few_known_devices_the_interval_holds_nine_of_ten_samples(
    rng: np.random.Generator, count: int, place: int
) -> None:
    """Counting the new one among them, nine of ten: the largest of 8, the 18th of 19."""
    known, measured = devices(rng, 3, noise=0.1)
    chosen = rng.choice(81, count, replace=False)
    told = measured[chosen, 2]
    errors = []
    for i in range(count):
        again = TransferredPredictor().fit(known[:, :2], np.delete(chosen, i), np.delete(told, i))
        errors.append(abs(np.log(again.predict(known[:, :2]).mean_ms[chosen[i]] / told[i])))
    report = TransferredPredictor().fit(known[:, :2], chosen, told).report()
    assert np.log1p(report["interval"][1]) == pytest.approx(sorted(errors)[place - 1], rel=1e-3)


def test_a_copy_of_a_known_device_is_recognised(rng: np.random.Generator) -> None:
    known, _ = devices(rng, 8)
    target = 3.7 * known[:, 2]
    chosen = choose_samples(known, 8, seed=1)
    predictor = TransferredPredictor().fit(known, chosen, target[chosen], names=[f"d{i}" for i in range(8)])
    np.testing.assert_allclose(predictor.predict(known).mean_ms, target, rtol=0.01)
    sources = predictor.report()["sources"]
    assert max(sources, key=sources.__getitem__) == "d2"


def test_a_unit_of_time_changes_nothing(rng: np.random.Generator) -> None:
    known, measured = devices(rng, 6)
    chosen = np.arange(0, 80, 8)
    slow = TransferredPredictor().fit(known[:, :5], chosen, measured[chosen, 5]).predict(known[:, :5])
    fast = TransferredPredictor().fit(known[:, :5] * 9, chosen, measured[chosen, 5] / 1e3).predict(known[:, :5] * 9)
    np.testing.assert_allclose(fast.mean_ms * 1e3, slow.mean_ms, rtol=1e-4)


def test_intervals_cover_measurements_of_a_new_device(rng: np.random.Generator) -> None:
    inside, widths = [], []
    for _ in range(12):
        known, measured = devices(rng, 8, noise=0.05)
        chosen = rng.choice(81, 10, replace=False)
        predictor = TransferredPredictor().fit(
            known[:, :7], chosen, measured[chosen, 7], measured_ms=measured[:, :7], groups=list("abcdefg")
        )
        assert predictor.report()["interval_learned_on"] == 7
        rest = np.setdiff1d(np.arange(81), chosen)
        found = predictor.predict(known[rest, :7])
        inside.append(((found.low_ms <= measured[rest, 7]) & (measured[rest, 7] <= found.high_ms)).mean())
        widths.append(np.log(found.high_ms / found.low_ms).mean() / 2)
    assert 0.82 < np.mean(inside) < 0.97
    assert np.mean(widths) < 0.2  # 1.64 standard deviations of the noise alone are 0.08


def test_known_devices_are_sampled_as_the_new_one_was(rng: np.random.Generator) -> None:
    """With samples chosen from the other machines' latencies, widths are those of fitting each known device by hand."""
    known, measured = devices(rng, 7, noise=0.05)
    groups, seen = list("aabcde"), []

    def choose(source_ms: np.ndarray) -> np.ndarray:
        rows = choose_samples(source_ms, 8, seed=4)
        seen.append((np.log(source_ms) - np.log(source_ms).mean(axis=0), rows))
        return rows

    chosen = choose(known[:, :6])
    predictor = TransferredPredictor().fit(
        known[:, :6], chosen, measured[chosen, 6], groups=groups, measured_ms=measured[:, :6], choose=choose
    )
    for s, (told, _) in enumerate(seen[1:]):
        z = np.log(known[:, [t for t in range(6) if groups[t] != groups[s]]])
        np.testing.assert_allclose(told, z - z.mean(axis=0), atol=1e-9)
    assert len(seen) == 7
    factor = learned(known, measured, groups, [rows for _, rows in seen[1:]])
    assert np.log1p(predictor.report()["interval"][1]) == pytest.approx(
        factor * predictor.to_json()["spread"], rel=0.02
    )


def learned(known: np.ndarray, measured: np.ndarray, groups: list[str], rows: list[np.ndarray]) -> float:
    """Errors over spreads of known devices, each fitted at its rows: how large nine of ten are, machines alike."""
    ratios, weights = [], []
    for s, group in enumerate(groups):
        others = [t for t, other in enumerate(groups) if other != group]
        alone = TransferredPredictor().fit(known[:, others], rows[s], measured[rows[s], s])
        rest = np.setdiff1d(np.flatnonzero(np.isfinite(measured[:, s])), rows[s])
        error = np.abs(np.log(measured[rest, s] / alone.predict(known[:, others]).mean_ms[rest]))
        ratios.append(error / alone.to_json()["spread"])
        weights.append(np.full(len(rest), 1 / groups.count(group) / len(rest)))
    order = np.argsort(np.concatenate(ratios))
    passed = np.cumsum(np.concatenate(weights)[order]) >= 0.9 * len(set(groups)) - 1e-9
    return float(np.concatenate(ratios)[order][np.flatnonzero(passed)[0]])


def test_known_devices_teach_by_what_was_measured_on_them(rng: np.random.Generator) -> None:
    """With holes in the measurements of two devices; a third, with three samples measured, teaches nothing."""
    known, measured = devices(rng, 8, noise=0.05)
    chosen = rng.choice(81, 10, replace=False)
    told, rest = measured[chosen, 7], np.setdiff1d(np.arange(81), chosen)
    measured[chosen[:6], 0] = measured[rest[:50], 1] = measured[chosen[3:], 6] = np.nan
    predictor = TransferredPredictor().fit(known[:, :7], chosen, told, measured_ms=measured[:, :7])
    assert predictor.report()["interval_learned_on"] == 6
    without = TransferredPredictor().fit(known[:, :6], chosen, told, measured_ms=measured[:, :6])
    rows = [chosen[6:], *[chosen] * 5]
    factor = learned(known, measured, list("abcdef"), rows)
    width, spread = np.log1p(without.report()["interval"][1]), without.to_json()["spread"]
    assert without.report()["interval_learned_on"] == 6 and width == pytest.approx(factor * spread, rel=0.02)
    measured[chosen[3:], 2:6] = np.nan  # three are left
    predictor.fit(known[:, :7], chosen, told, measured_ms=measured[:, :7])
    assert predictor.report()["interval_learned_on"] == "the samples"


def test_devices_of_one_machine_do_not_vouch_for_each_other(rng: np.random.Generator) -> None:
    known, measured = devices(rng, 6, noise=0.0)
    twins = np.column_stack([known[:, :5], known[:, :5] * 2])  # each device twice
    chosen = np.arange(0, 80, 8)
    apart = TransferredPredictor().fit(twins, chosen, measured[chosen, 5], groups=list("abcdeabcde")).report()
    together = TransferredPredictor().fit(twins, chosen, measured[chosen, 5]).report()
    assert apart["interval_learned_on"] == 5 and together["interval_learned_on"] == 10
    assert apart["interval"][1] > 2 * together["interval"][1]


def test_every_device_of_a_machine_counts_and_all_machines_alike(rng: np.random.Generator) -> None:
    """Errors on some devices of one machine of five are large: they are a tenth, then a fifth of all errors."""
    known, measured = devices(rng, 6, noise=0.0)
    twins = np.column_stack([known[:, :5], known[:, :1] * 2])  # the first machine has two devices
    chosen = np.arange(0, 80, 8)
    rest = np.setdiff1d(np.arange(81), chosen)

    def width(rough: list[int], share: float) -> float:
        of_known = twins.copy()
        picked = rng.choice(rest, round(share * len(rest)), replace=False)
        of_known[np.ix_(picked, rough)] *= 100.0
        predictor = TransferredPredictor()
        predictor.fit(twins, chosen, measured[chosen, 5], groups=list("abcdea"), measured_ms=of_known)
        return float(np.log1p(predictor.report()["interval"][1]))

    smooth, one, both = width([], 0.0), width([5], 0.9), width([0, 5], 0.9)
    assert smooth < one < 3 * smooth  # 0.9 / 2 / 5 of the errors are of a hundred times: less than a tenth
    assert both > 10 * one  # now it is more


def test_tables_say_what_the_predictor_says(rng: np.random.Generator) -> None:
    known, measured = devices(rng, 6)
    tables = CodeTables.fit(CODES, np.log(known[:, :5]))
    source_ms, features = np.exp(tables.log_ms(CODES)), tables.encode(CODES)
    chosen = np.arange(0, 80, 5)
    for more in (None, features):
        predictor = TransferredPredictor().fit(source_ms, chosen, measured[chosen, 5], features=more)
        expected = predictor.predict(source_ms, more).mean_ms
        np.testing.assert_allclose(np.exp(predictor.tables(tables).log_ms(CODES)[:, 0]), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="expected tables of 5 devices with 12 entries, got 4 devices and 12 entries"):
        predictor.tables(CodeTables.fit(CODES, np.log(known[:, :4])))
    with pytest.raises(ValueError, match="expected tables of 5 devices with 12 entries, got 5 devices and 36 entries"):
        predictor.tables(CodeTables.fit(CODES[:, :3], np.log(known[:, :5])))


def test_the_first_half_of_the_samples_is_the_least_known(rng: np.random.Generator) -> None:
    known, _ = devices(rng, 4)
    z = np.log(known) - np.log(known).mean(axis=0)
    kernel = 100 + z @ z.T / 4
    noise = float(np.median(np.geomspace(0.01, 0.32, 6))) ** 2
    expected: list[int] = []
    for _ in range(5):
        part = kernel[np.ix_(expected, expected)] + noise * np.eye(len(expected))
        explained = np.einsum("ij,jk,ik->i", kernel[:, expected], np.linalg.inv(part), kernel[:, expected])
        left = np.diag(kernel) - explained
        left[expected] = -1
        expected.append(int(np.argmax(left)))
    chosen = choose_samples(known, 10, seed=3)
    assert chosen[:5].tolist() == expected
    assert len(set(chosen.tolist())) == 10
    assert np.array_equal(chosen, choose_samples(known, 10, seed=3))
    assert not np.array_equal(chosen[5:], choose_samples(known, 10, seed=4)[5:])
    assert all(choose_samples(known, 5, seed)[:3].tolist() == expected[:3] for seed in range(3))


def test_saves_and_loads(rng: np.random.Generator, tmp_path: Path) -> None:
    known, measured = devices(rng, 6)
    chosen, features = np.arange(0, 80, 8), rng.normal(size=(81, 2))
    predictor = TransferredPredictor().fit(
        known[:, :5], chosen, measured[chosen, 5], features=features, provenance={"device": "mine"}
    )
    predictor.save(tmp_path / "mine.json")
    loaded = TransferredPredictor.load(tmp_path / "mine.json")
    assert loaded.report() == predictor.report() and loaded.provenance == {"device": "mine"}
    for name in ("mean_ms", "low_ms", "high_ms"):
        found, expected = (getattr(p.predict(known[:, :5], features), name) for p in (loaded, predictor))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "fitnest.latency_predictor"}, "not a saved transferred predictor"),
        ({"version": 0}, "version 0, this program reads 1"),
        ({"coefficients": [1.0]}, "damaged transferred predictor"),
        ({"weights": [1.0]}, "damaged transferred predictor"),
        ({"feature_scale": [1.0]}, "damaged transferred predictor"),
        ({"half_width": None}, "damaged transferred predictor"),
    ],
)
def test_refuses_other_files(rng: np.random.Generator, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    known, measured = devices(rng, 3)
    path = tmp_path / "mine.json"
    TransferredPredictor().fit(known[:, :2], np.arange(5), measured[:5, 2]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        TransferredPredictor.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        TransferredPredictor.load(path)


def test_one_known_device_is_enough(rng: np.random.Generator) -> None:
    known, _ = devices(rng, 1)
    chosen = np.arange(0, 80, 8)
    predictor = TransferredPredictor().fit(known, chosen, 2 * known[chosen, 0])
    np.testing.assert_allclose(predictor.predict(known).mean_ms, 2 * known[:, 0], rtol=0.01)


def test_says_what_is_wrong(rng: np.random.Generator) -> None:
    known, measured = devices(rng, 3)
    with pytest.raises(NotFitted, match="call fit"):
        TransferredPredictor().predict(known)
    wrong: list[tuple[Any, Any, str]] = [
        ([0, 1, 2], [1, 1, 1], "at least 4 distinct samples"),
        ([0, 1, 2, 2, 3], [1] * 5, "distinct samples"),
        ([0, 1, 2, 81], [1] * 4, "rows 0 to 80"),
        ([0, 1, 2, 3], [1] * 3, "one latency for each of 4"),
        ([0, 1, 2, 3], [1, 1, 1, 0], "positive latencies in ms"),
        ([0.5, 1, 2, 3], [1] * 4, "rows that were measured"),
    ]
    for chosen, latency, said in wrong:
        with pytest.raises(ValueError, match=said):
            TransferredPredictor().fit(known, np.array(chosen), latency)
    with pytest.raises(ValueError, match="positive latencies of the known devices"):
        TransferredPredictor().fit(-known, np.arange(4), measured[:4, 0])
    predictor = TransferredPredictor().fit(known, np.arange(4), measured[:4, 0])
    with pytest.raises(ValueError, match=r"source_ms of shape \(81, 3\)"):
        predictor.predict(known[:, :2])
    with pytest.raises(ValueError, match="positive latencies of the known devices"):
        predictor.predict(-known)
    with pytest.raises(ValueError, match=r"features of shape \(81, 0\), got \(81, 1\)"):
        predictor.predict(known, np.zeros((81, 1)))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"features": np.full((81, 1), np.nan)}, r"finite features of shape \(81, d\), got \(81, 1\)"),
        ({"measured_ms": measured[:, :2]}, r"measurements of shape \(81, 3\), got \(81, 2\)"),
        ({"names": ["a", "b"]}, "names of 3 known devices, got 2"),
        ({"groups": list("abcd")}, "groups of 3 known devices, got 4"),
    ]
    for given, said in refused:
        with pytest.raises(ValueError, match=said):
            TransferredPredictor().fit(known, np.arange(4), measured[:4, 0], **given)
    with pytest.raises(ValueError, match="between 1 and 81 samples"):
        choose_samples(known, 82, seed=0)
