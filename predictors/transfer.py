"""The latency of a new device from about ten measurements, with the help of devices that are known.

Everything is in logarithms, so that a device twice as fast is a shift. Known device s has the centred log-latency
z_s(x); the new one is taken to be near one of them, nobody knows which:

    log latency(x) = a + (1 + b) z_s(x) + sum over t of c_t (z_t(x) - z_s(x)) + f(x) + noise

The mean of all known devices is one more of them, for a device that is like none in particular. a is free;
b ~ N(0, slope^2); c_t ~ N(0, (mix * w_st)^2), w_st weighing the devices that are like s; f is linear in the
features, of standard deviation `residual`; the noise has one standard deviation. For given s, slope, mix, residual and
noise this is a Gaussian process over the architectures. All combinations of a small grid are fitted in closed form and
averaged with their marginal likelihoods as weights (Bayesian model averaging, Hoeting et al. 1999), so nothing is
tuned on the new device beyond its ten measurements. The average is again linear in the log-latencies of the
known devices and in the features: a handful of coefficients is all there is to save.

Notation: n architectures, S known devices, d features, k measured architectures, M models (points of the grid).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.files import write_text
from predictors.code_tables import CodeTables
from predictors.latency import NotFitted
from predictors.regression import scores

SCHEMA = "fitnest.transferred_predictor"
VERSION = 1
COVERAGE = 0.9
FEWEST_SAMPLES = 4
FEWEST_DEVICES = 4  # known devices (groups of them) from which the width of intervals can be learned
SHIFT = 10.0  # standard deviation of a: any unit of time, any speed
SLOPES = ((0.1, 0.8), (0.5, 0.2))  # (standard deviation, prior weight)
MIXES = ((0.0, 0.5), (0.7, 0.5))
RESIDUALS = ((0.0, 0.8), (0.2, 0.2))
NOISES = np.geomspace(0.01, 0.32, 6)  # of the logarithm, alike before seeing data
NEIGHBOURS = 6  # the mean distance to that many nearest devices is the unit in which likeness is measured
SPREAD_ROWS = 64  # architectures over which the spread of predictions is averaged
SMALLEST_WEIGHT = 1e-3  # models with less say nothing about the spread


@dataclass(frozen=True, eq=False)
class Latencies:
    """Predicted latencies (n,) in milliseconds with their 90 % intervals."""

    mean_ms: np.ndarray
    low_ms: np.ndarray
    high_ms: np.ndarray


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of n architectures: centred log-latencies (n, S) and scaled features (n, d)."""

    devices: np.ndarray
    features: np.ndarray

    def rows(self, index: np.ndarray) -> _Known:
        return _Known(self.devices[index], self.features[index])


@dataclass(frozen=True, eq=False)
class _Average:
    """An average over models: a linear function, its spread, and what it says of each sample without that sample.

    constant + devices @ coefficients (S,) + features @ feature_coefficients (d,). `spread` is the standard deviation
    of a new measurement around it, averaged over architectures; `left_out` (k,) are logarithms; `weights` (S,) say
    how much of the average stands around each known device.
    """

    constant: float
    coefficients: np.ndarray
    feature_coefficients: np.ndarray
    spread: float
    left_out: np.ndarray
    weights: np.ndarray

    def log_ms(self, known: _Known) -> np.ndarray:
        return self.constant + known.devices @ self.coefficients + known.features @ self.feature_coefficients


class TransferredPredictor:
    """Latency of a new device, learned from a few measurements of it and the latencies of known devices.

    The 90 % interval is the spread that the averaged models predict, times a factor learned by treating each known
    device in turn as the new one (with its latencies at the same samples, or at those chosen the same way); with fewer
    than four known devices it is the residual of the leave-one-out errors on the samples which covers 90 % (k >= 9) or
    the largest.
    """

    def __init__(self) -> None:
        self._average: _Average | None = None
        self._sources: tuple[str, ...] = ()
        self._centre = np.zeros(0)
        self._feature_centre = np.zeros(0)
        self._feature_scale = np.zeros(0)
        self._half_width = 0.0
        self._report: dict[str, Any] = {}
        self._provenance: dict[str, Any] = {}

    @property
    def _fitted(self) -> _Average:
        if self._average is None:
            raise NotFitted("this predictor is not fitted; call fit(source_ms, chosen, latency_ms) or load(path)")
        return self._average

    @property
    def provenance(self) -> dict[str, Any]:
        """How the latencies it was fitted on were measured."""
        _ = self._fitted
        return dict(self._provenance)

    def fit(
        self,
        source_ms: np.ndarray,  # (n, S)
        chosen: Sequence[int] | np.ndarray,  # (k,)
        latency_ms: Sequence[float] | np.ndarray,  # (k,)
        *,
        features: np.ndarray | None = None,  # (n, d)
        names: Sequence[str] | None = None,  # (S,)
        groups: Sequence[str] | None = None,  # (S,)
        measured_ms: np.ndarray | None = None,  # (n, S)
        choose: Callable[[np.ndarray], np.ndarray] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> TransferredPredictor:
        """Fit on n architectures whose latencies on S known devices are known, of which k were measured.

        Args:
            source_ms: latencies of the known devices, best of predictors or tables (`CodeTables`), which have less
                noise than measurements. Anything positive that grows as a latency does will serve, such as MACs.
            chosen: rows of `source_ms` that were measured on the new device (see `choose_samples`).
            latency_ms: what was measured, in the order of `chosen`.
            features: numbers that describe the architectures (one-hot codes, bytes, counts), for what no known device
                explains; they matter with more samples than ten.
            names: of the known devices, for the report.
            groups: known devices of one group (batch sizes of one machine) are one device when the width of intervals
                is learned.
            measured_ms: measurements of the known devices where `source_ms` was smoothed, NaN where there are none: the
                width of intervals is learned on them. By default `source_ms`.
            choose: how `chosen` were, as a function from latencies of known devices (n, any number) to rows. Each known
                device in the place of the new one then gets the samples that would have been chosen for it; with
                `chosen`, which its own latencies had a part in, intervals come out too narrow.
            provenance: how the new device was measured.

        Raises ValueError, saying what was expected, for fewer than four distinct samples, shapes that do not fit
        each other or latencies that are not positive.
        """
        source_ms, chosen, latency = np.asarray(source_ms, float), np.asarray(chosen), np.asarray(latency_ms, float)
        _check_samples(source_ms, chosen, latency)
        count = source_ms.shape[1]
        described = np.zeros((len(source_ms), 0)) if features is None else np.asarray(features, float)
        if described.ndim != 2 or len(described) != len(source_ms) or not np.isfinite(described).all():
            raise ValueError(f"expected finite features of shape ({len(source_ms)}, d), got {described.shape}")
        named = _labels(names, count, "names")
        self._centre = np.log(source_ms).mean(axis=0)
        self._feature_centre = described.mean(axis=0)
        self._feature_scale = _scale(described)
        known = self._known(source_ms, described)
        average = _fit(known, chosen, np.log(latency))
        measured = source_ms if measured_ms is None else np.asarray(measured_ms, float)
        if measured.shape != source_ms.shape:
            raise ValueError(f"expected measurements of shape {source_ms.shape}, got {measured.shape}")
        ratios = _pretended(known, choose or (lambda _: chosen), np.log(measured), _labels(groups, count, "groups"))
        self._average, self._sources = average, named
        self._half_width = _half_width(average, ratios, np.log(latency))
        self._report = {
            "samples": len(chosen),
            "left_out": scores(np.exp(average.left_out), latency),
            "interval": [float(np.expm1(-self._half_width)), float(np.expm1(self._half_width))],
            "interval_learned_on": len(ratios) or "the samples",
            "sources": {name: round(float(weight), 4) for name, weight in zip(named, average.weights, strict=True)},
        }
        self._provenance = dict(provenance or {})
        return self

    def _known(self, source_ms: np.ndarray, features: np.ndarray) -> _Known:
        return _Known(np.log(source_ms) - self._centre, (features - self._feature_centre) / self._feature_scale)

    def predict(self, source_ms: np.ndarray, features: np.ndarray | None = None) -> Latencies:
        """Latencies of n architectures, from those on the known devices (n, S) and, if fitted with them, features."""
        average, source_ms = self._fitted, np.asarray(source_ms, float)
        described = np.zeros((len(source_ms), 0)) if features is None else np.asarray(features, float)
        for what, got, width in (("source_ms", source_ms, len(self._centre)), ("features", described, self._width)):
            if got.ndim != 2 or got.shape != (len(source_ms), width):
                raise ValueError(f"expected {what} of shape ({len(source_ms)}, {width}), got {got.shape}")
        if not (np.isfinite(source_ms) & (source_ms > 0)).all():
            raise ValueError("expected positive latencies of the known devices")
        return self.interval(np.exp(average.log_ms(self._known(source_ms, described))))

    @property
    def _width(self) -> int:
        return len(self._feature_centre)

    def interval(self, mean_ms: np.ndarray) -> Latencies:
        """Predictions (n,) with their intervals."""
        _ = self._fitted
        return Latencies(mean_ms, mean_ms * np.exp(-self._half_width), mean_ms * np.exp(self._half_width))

    def tables(self, known: CodeTables) -> CodeTables:
        """The prediction as tables over codes, from tables of the known devices; see `CodeTables.log_ms`.

        Of a predictor fitted without features, or with `known.encode(codes)` as features.
        """
        average = self._fitted
        if self._width not in (0, len(known.entries)) or len(known.constant) != len(self._centre):
            raise ValueError(
                f"expected tables of {len(self._centre)} devices with {self._width or 'any number of'} entries, "
                f"got {len(known.constant)} devices and {len(known.entries)} entries"
            )
        constant = average.constant - float(self._centre @ average.coefficients)
        if not self._width:
            return known.combined(average.coefficients, constant)
        more = average.feature_coefficients / self._feature_scale
        return known.combined(average.coefficients, constant - float(self._feature_centre @ more), more)

    def report(self) -> dict[str, Any]:
        """Errors on each sample predicted from the others, the interval, and which known devices it is like.

        `left_out` as of `LatencyPredictor.report`. Samples chosen to be informative are unlike each other, so that
        their left-out errors are larger than those of other architectures. `interval` is relative to the prediction.
        """
        _ = self._fitted
        return json.loads(json.dumps(self._report))

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def to_json(self) -> dict[str, Any]:
        average = self._fitted
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "constant": average.constant,
            "sources": list(self._sources),
            "centre": self._centre.tolist(),
            "coefficients": average.coefficients.tolist(),
            "weights": average.weights.tolist(),
            "feature_centre": self._feature_centre.tolist(),
            "feature_scale": self._feature_scale.tolist(),
            "feature_coefficients": average.feature_coefficients.tolist(),
            "spread": average.spread,
            "left_out": average.left_out.tolist(),
            "half_width": self._half_width,
            "report": self._report,
            "provenance": self._provenance,
        }

    @classmethod
    def load(cls, path: str | Path) -> TransferredPredictor:
        """Read back what `save` wrote; raises ValueError, saying what is wrong, for any other file."""
        return cls.from_json(_read(Path(path)), path)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], path: str | Path) -> TransferredPredictor:
        """Read back what `to_json` gave; `path` is where it was, for the message of a ValueError."""
        try:
            found = cls()
            found._sources = tuple(map(str, document["sources"]))
            found._centre = _vector(document["centre"], len(found._sources))
            found._feature_centre = _vector(document["feature_centre"])
            found._feature_scale = _vector(document["feature_scale"], found._width)
            found._half_width = float(document["half_width"])
            found._report, found._provenance = dict(document["report"]), dict(document["provenance"])
            found._average = _Average(
                float(document["constant"]),
                _vector(document["coefficients"], len(found._sources)),
                _vector(document["feature_coefficients"], found._width),
                float(document["spread"]),
                _vector(document["left_out"]),
                _vector(document["weights"], len(found._sources)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged transferred predictor ({error!r}); fit it again") from None
        return found


def choose_samples(source_ms: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows (count,) of `source_ms` (n, S) to measure on a new device: half are informative, half are random.

    The first half is chosen one by one, each the architecture that is least known so far, judged by a Gaussian process
    in which the new device is drawn like the known ones (the greedy maximal information gain of arXiv 0912.3995). Those
    are extreme architectures, on which a device unlike all known ones is extreme, too: the random half keeps it honest.

    Raises ValueError when there are fewer than `count` architectures.
    """
    source_ms = np.asarray(source_ms, float)
    _check_sources(source_ms)
    if not 0 < count <= len(source_ms):
        raise ValueError(f"expected between 1 and {len(source_ms)} samples, got {count}")
    rng = np.random.default_rng(seed)
    logs = np.log(source_ms)
    deviations = (logs - logs.mean(axis=0)) / np.sqrt(logs.shape[1])
    unexplained = np.column_stack([np.full(len(logs), SHIFT), deviations])  # (n, S + 1), by those chosen so far
    noise = float(np.median(NOISES)) ** 2
    chosen: list[int] = []
    for _ in range(ceil(count / 2)):
        variance = (unexplained**2).sum(axis=1)
        variance[chosen] = -1.0
        row = int(np.argmax(variance))
        chosen.append(row)
        direction = unexplained[row] / np.sqrt(variance[row])
        left = np.sqrt(noise / (variance[row] + noise))
        unexplained = unexplained - np.outer(unexplained @ direction, direction) * (1 - left)
    others = np.setdiff1d(np.arange(len(logs)), chosen)
    return np.concatenate([np.array(chosen), rng.choice(others, count - len(chosen), replace=False)])


# the average over models ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Models:
    """A grid of models without their noise: `centre` (M,) is the device each stands around, the rest as above."""

    centre: np.ndarray
    slope: np.ndarray
    mix: np.ndarray
    residual: np.ndarray
    log_prior: np.ndarray


def _grid(devices: int, features: int) -> _Models:
    mixes = MIXES if devices > 1 else MIXES[:1]
    residuals = RESIDUALS if features else RESIDUALS[:1]
    points = list(product([(s, 1.0) for s in range(devices)], SLOPES, mixes, residuals))
    centre, slope, mix, residual = (np.array([point[part][0] for point in points]) for part in range(4))
    prior = np.array([prod(weight for _, weight in point) for point in points])
    return _Models(centre.astype(int), slope, mix, residual, np.log(prior))


def _likeness(devices: np.ndarray) -> np.ndarray:
    """Weights (S, S) of other devices around each: rows sum to 1, the diagonal is 0."""
    count = devices.shape[1]
    if count == 1:
        return np.zeros((1, 1))
    products = devices.T @ devices / len(devices)
    distance = np.maximum(np.diag(products)[:, None] + np.diag(products) - 2 * products, 0.0)
    near = np.sort(distance, axis=1)[:, 1 : 1 + NEIGHBOURS].mean(axis=1)
    weights = np.exp(-distance / np.maximum(2 * near, 1e-12)[:, None])
    np.fill_diagonal(weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _covariance(models: _Models, likeness: np.ndarray, a: _Known, b: _Known) -> np.ndarray:
    """Prior covariance (M, a, b) of log-latencies without noise."""
    count = likeness.shape[0]
    slopes = a.devices.T[:, :, None] * b.devices.T[:, None, :]  # (S, a, b)
    mixed = np.empty_like(slopes)
    for s in range(count):
        apart_a, apart_b = a.devices - a.devices[:, [s]], b.devices - b.devices[:, [s]]
        mixed[s] = (apart_a * likeness[s]) @ apart_b.T
    alike = a.features @ b.features.T
    return (
        SHIFT**2
        + models.slope[:, None, None] ** 2 * slopes[models.centre]
        + models.mix[:, None, None] ** 2 * mixed[models.centre]
        + models.residual[:, None, None] ** 2 * alike
    )


def _variance(models: _Models, likeness: np.ndarray, known: _Known) -> np.ndarray:
    """The diagonal (M, n) of `_covariance` of architectures with themselves."""
    devices = known.devices
    mixed = np.stack([(devices - devices[:, [s]]) ** 2 @ likeness[s] for s in range(likeness.shape[0])])  # (S, n)
    return (
        SHIFT**2
        + models.slope[:, None] ** 2 * (devices.T**2)[models.centre]
        + models.mix[:, None] ** 2 * mixed[models.centre]
        + models.residual[:, None] ** 2 * (known.features**2).sum(axis=1)
    )


def _fit(known: _Known, chosen: np.ndarray, log_ms: np.ndarray) -> _Average:
    """Fit every model on samples log_ms (k,), at rows `chosen` of what is known, and average them."""
    if known.devices.shape[1] == 1:
        return _fit_around(known, chosen, log_ms)
    with_mean = np.column_stack([known.devices, known.devices.mean(axis=1)])
    average = _fit_around(_Known(with_mean, known.features), chosen, log_ms)

    def shared_out(values: np.ndarray) -> np.ndarray:
        """What belongs to the mean (the last) belongs to all alike."""
        return values[:-1] + values[-1] / (len(values) - 1)

    return replace(average, coefficients=shared_out(average.coefficients), weights=shared_out(average.weights))


def _fit_around(known: _Known, chosen: np.ndarray, log_ms: np.ndarray) -> _Average:
    """The same with models that stand around each column of `known.devices`."""
    samples = known.rows(chosen)
    models, likeness = _grid(known.devices.shape[1], known.features.shape[1]), _likeness(known.devices)
    values, vectors = np.linalg.eigh(_covariance(models, likeness, samples, samples))
    residual = log_ms - samples.devices.T[models.centre]  # (M, k)
    rotated = np.einsum("mij,mi->mj", vectors, residual)[:, :, None]
    variances = np.maximum(values, 0.0)[:, :, None] + NOISES**2  # (M, k, noises)
    evidence = models.log_prior[:, None] - 0.5 * (rotated**2 / variances + np.log(variances)).sum(axis=1)
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    duals = np.einsum("mij,mjg->mig", vectors, rotated / variances)  # inverse covariance times residual
    precisions = np.einsum("mij,mjg->mig", vectors**2, 1 / variances)  # diagonal of the inverse covariance
    constant, coefficients, features = _collapsed(models, likeness, samples, weights, duals)
    average = _Average(
        constant,
        coefficients,
        features,
        0.0,
        _left_out(log_ms, weights, duals, precisions),
        np.bincount(models.centre, weights.sum(axis=1), known.devices.shape[1]),
    )
    spread = _spread(known, samples, average, models, likeness, weights, duals, vectors, variances)
    return _Average(**{**vars(average), "spread": spread})


def _collapsed(
    models: _Models, likeness: np.ndarray, samples: _Known, weights: np.ndarray, duals: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The weighted mean of all models as (constant, coefficients (S,), feature coefficients (d,))."""
    share = weights.sum(axis=1)  # (M,)
    dual = np.einsum("mg,mig->mi", weights, duals)  # (M, k)
    coefficients = np.zeros(likeness.shape[0])
    for s in range(len(coefficients)):
        around = models.centre == s
        toward = dual[around] @ samples.devices  # (m, S): how the samples pull along each device
        apart = (models.mix[around, None] ** 2 * (toward - toward[:, [s]]) * likeness[s]).sum(axis=0)
        coefficients += apart
        coefficients[s] += share[around].sum() + (models.slope[around] ** 2 * toward[:, s]).sum() - apart.sum()
    features = samples.features.T @ (models.residual[:, None] ** 2 * dual).sum(axis=0)
    return SHIFT**2 * float(dual.sum()), coefficients, features


def _left_out(log_ms: np.ndarray, weights: np.ndarray, duals: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    """What the average, fitted without a sample, predicts for it: (k,), exactly, without fitting again.

    A Gaussian process predicts a sample from the others as y - dual / precision with variance 1 / precision; a model's
    weight without the sample is its weight divided by the density it gave to it.
    """
    gap = duals / precisions  # (M, k, noises)
    log_density = 0.5 * (np.log(precisions) - gap**2 * precisions)
    with np.errstate(divide="ignore"):
        log_weight = np.log(weights)[:, None, :] - log_density
    weight = np.exp(log_weight - log_weight.max(axis=(0, 2), keepdims=True))
    return log_ms - (weight * gap).sum(axis=(0, 2)) / weight.sum(axis=(0, 2))


def _spread(
    known: _Known,
    samples: _Known,
    average: _Average,
    models: _Models,
    likeness: np.ndarray,
    weights: np.ndarray,  # (M, noises)
    duals: np.ndarray,  # (M, k, noises)
    vectors: np.ndarray,  # (M, k, k)
    variances: np.ndarray,  # (M, k, noises)
) -> float:
    """Standard deviation of a new measurement around the average: noise, doubt within models and between them."""
    step = max(len(known.devices) // SPREAD_ROWS, 1)
    some = known.rows(np.arange(0, len(known.devices), step))
    heavy = weights.sum(axis=1) > SMALLEST_WEIGHT
    part = _Models(**{name: value[heavy] for name, value in vars(models).items()})
    across = _covariance(part, likeness, some, samples)  # (m, rows, k)
    prior = _variance(part, likeness, some)  # (m, rows)
    share = weights[heavy] / weights[heavy].sum()
    predicted = some.devices.T[part.centre][:, :, None] + across @ duals[heavy]  # (m, rows, noises)
    explained = (across @ vectors[heavy]) ** 2 @ (1 / variances[heavy])
    between = (predicted - average.log_ms(some)[None, :, None]) ** 2
    total = np.maximum(prior[:, :, None] - explained, 0.0) + between + NOISES**2
    return float(np.sqrt((share[:, None, :] * total).sum(axis=(0, 2)).mean()))


# intervals -----------------------------------------------------------------------------------------------


def _pretended(
    known: _Known, choose: Callable[[np.ndarray], np.ndarray], log_measured: np.ndarray, groups: Sequence[str]
) -> list[list[np.ndarray]]:
    """With each device in the place of the new one: |error| / spread of what was measured on it, by groups."""
    if len(set(groups)) < FEWEST_DEVICES:
        return []
    ratios: dict[str, list[np.ndarray]] = {}
    for s, group in enumerate(groups):
        others = _Known(known.devices[:, [other != group for other in groups]], known.features)
        chosen = np.asarray(choose(np.exp(others.devices)))
        rest = np.setdiff1d(np.arange(len(known.devices)), chosen)
        usable = chosen[np.isfinite(log_measured[chosen, s])]
        asked = rest[np.isfinite(log_measured[rest, s])]
        if len(usable) < FEWEST_SAMPLES or not len(asked):
            continue
        average = _fit(others, usable, log_measured[usable, s])
        ratio = np.abs(log_measured[asked, s] - average.log_ms(others)[asked]) / average.spread
        ratios.setdefault(group, []).append(ratio)
    return list(ratios.values()) if len(ratios) >= FEWEST_DEVICES else []


def _half_width(average: _Average, ratios: Sequence[Sequence[np.ndarray]], log_ms: np.ndarray) -> float:
    """Half the 90 % interval of a logarithm."""
    if ratios:  # every group counts alike, and every device in it, whatever the number of measurements
        each = [ratio for group in ratios for ratio in group]
        pooled = np.concatenate(each)
        sizes = [len(group) for group in ratios for _ in group]
        weight = np.concatenate(
            [np.full(len(ratio), 1 / (size * len(ratio))) for ratio, size in zip(each, sizes, strict=True)]
        )
        order = np.argsort(pooled)
        place = int(np.searchsorted(np.cumsum(weight[order]), COVERAGE * len(ratios) - 1e-9))  # shares are rounded
        return float(pooled[order][min(place, len(pooled) - 1)]) * average.spread
    residual = np.sort(np.abs(log_ms - average.left_out))
    return float(residual[min(ceil(COVERAGE * (len(residual) + 1)), len(residual)) - 1])


# checks --------------------------------------------------------------------------------------------------


def _scale(features: np.ndarray) -> np.ndarray:
    """What to divide features (n, d) by so that their kernel is 1 on average."""
    deviation = features.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0) * np.sqrt(max(features.shape[1], 1))


def _check_sources(source_ms: np.ndarray) -> None:
    if source_ms.ndim != 2 or not source_ms.size:
        raise ValueError(f"expected latencies of shape (architectures, known devices), got {source_ms.shape}")
    if not (np.isfinite(source_ms) & (source_ms > 0)).all():
        raise ValueError("expected positive latencies of the known devices; leave out a device or architecture without")


def _check_samples(source_ms: np.ndarray, chosen: np.ndarray, latency: np.ndarray) -> None:
    _check_sources(source_ms)
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"expected the rows that were measured, got {chosen.dtype} of shape {chosen.shape}")
    if latency.shape != chosen.shape:
        raise ValueError(f"expected one latency for each of {len(chosen)} samples, got shape {latency.shape}")
    if len(np.unique(chosen)) < FEWEST_SAMPLES or len(np.unique(chosen)) < len(chosen):
        raise ValueError(f"expected at least {FEWEST_SAMPLES} distinct samples, got {chosen.tolist()}")
    if chosen.min() < 0 or chosen.max() >= len(source_ms):
        raise ValueError(f"expected samples among rows 0 to {len(source_ms) - 1}, got {chosen.tolist()}")
    if not (np.isfinite(latency) & (latency > 0)).all():
        raise ValueError(f"expected positive latencies in ms, got {latency.tolist()}")


def _labels(labels: Sequence[str] | None, count: int, what: str) -> tuple[str, ...]:
    if labels is None:
        return tuple(f"device {index}" for index in range(count))
    if len(labels) != count:
        raise ValueError(f"expected {what} of {count} known devices, got {len(labels)}")
    return tuple(labels)


def _vector(values: Sequence[float], length: int | None = None) -> np.ndarray:
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or (length is not None and len(vector) != length):
        raise ValueError(f"expected {length} numbers, got shape {vector.shape}")
    return vector


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a saved transferred predictor") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a saved transferred predictor; expected a JSON object with schema {SCHEMA!r}")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{path} is a transferred predictor of version {document.get('version')!r}, this program reads {VERSION}; "
            "fit it again"
        )
    return document
