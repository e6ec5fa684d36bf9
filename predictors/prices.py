"""The prices of a new device from about ten measured networks, one price for each feature of a network.

A network's latency is the sum of its amounts (`hardware_profiles.cost_model.features`, and a constant) times prices:

    log latency(x) = log sum over f of base_f exp(theta_f) amount_f(x) + noise,    theta ~ N(0, covariance)

`base` is the price list that a model stands around: that of a known device, or `TYPICAL`. theta is how far the new
device departs from it: as a whole, in a quantity (starting kernels, MACs, bytes), in a precision, in a family of
kernels, in pairs of these, and in each price alone (`DEPARTURES`). So one int8 network tells about all int8 kernels,
and features of fp32 and int8 are never lumped together. All bases and a small grid of noises are fitted and
averaged with their marginal likelihoods as weights (Bayesian model averaging, Hoeting et al. 1999); the marginal
likelihood is Laplace's (MacKay 1992). The average of price lists is again one price list.

Notation: n networks, d features, k measured networks, M models (points of the grid), B price lists to stand around.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist

import numpy as np

from hardware_profiles.cost_model import AdditiveModel, features, shape_features
from predictors.regression import matrix_of
from search_spaces import Network

CONSTANT = "constant.any.count"
# What a core takes that moves a byte in the time of a multiply-accumulate, in that time. Only where to begin: the
# departures below allow each to be off by a factor of e and more.
TYPICAL = {"count": 5e3, "macs": 1.0, "bytes": 1.0, "weight_bytes": 0.3}
# Standard deviation of the logarithm of what features share: the whole device, or their quantity (q), precision (p),
# family (f), or pairs of them. Chosen while looking at the measurements of experiments/benchmarks/new_device.py, whose
# errors are for that reason not those of a blind test.
DEPARTURES = {"": 3.0, "q": 1.0, "p": 0.7, "f": 0.5, "fp": 0.3, "qp": 0.5, "fq": 0.5, "fqp": 0.3}
NOISES = np.geomspace(0.01, 0.32, 6)  # standard deviations of the logarithm, alike before seeing data
BLEND = 0.2  # share of TYPICAL in a known device's list, so that a price of zero can grow
INFORMATIVE = 0.7  # share of the samples; the rest are random, which a device unlike its model needs
STEPS, LONGEST_STEP, TOLERANCE = 30, 1.0, 1e-4  # of Gauss and Newton's iteration, in theta
SPREAD_ROWS = 64  # networks over which the spread of predictions is looked at
SMALLEST_WEIGHT = 1e-3  # models with less say nothing about the spread
Z_90 = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class KnownDevice:
    """A device with a model; `precision` is that of all its prices where it has only one, else ""."""

    name: str
    model: AdditiveModel
    precision: str = ""

    def own(self, kernel: str) -> str:
        """What the device's model calls a kernel `family.precision`, or a feature of it."""
        family, precision, *quantity = kernel.split(".")
        return ".".join([family, self.precision or precision, *quantity])

    def has(self, kernel: str) -> bool:
        """Whether it has a price for a kernel `family.precision`."""
        return self.own(kernel) in self.model.supported


@dataclass(frozen=True, eq=False)
class Amounts:
    """Features of n networks: `matrix` (n, d) in the order of `names`; the last is a constant."""

    names: tuple[str, ...]
    matrix: np.ndarray

    @classmethod
    def of(cls, networks: Sequence[Network]) -> Amounts:
        rows = [{**features(network), CONSTANT: 1.0} for network in networks]
        names = (*sorted({name for row in rows for name in row} - {CONSTANT}), CONSTANT)
        return cls(names, matrix_of(rows, names))


@dataclass(frozen=True, eq=False)
class Bases:
    """Price lists to stand around: logarithms (B, d), and the prior weight (B,) of each."""

    names: tuple[str, ...]
    log_prices: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class FittedPrices:
    """Prices (d,) in ms; `left_out_ms` (k,) is what is predicted of each sample without it; `relative_error` is half
    the 90 % interval as a share of a prediction; `sources` says how much of the average stands around which list."""

    prices_ms: np.ndarray
    left_out_ms: np.ndarray
    relative_error: float
    sources: Mapping[str, float]


def covariance(names: Sequence[str]) -> np.ndarray:
    """Prior covariance (d, d) of the departures of features `family.precision.quantity`."""
    parts = dict(zip("fpq", np.array([name.split(".") for name in names]).T, strict=True))
    alike = {letter: part[:, None] == part[None, :] for letter, part in parts.items()}
    total = np.zeros((len(names), len(names)))
    for shared, deviation in DEPARTURES.items():
        together = np.ones_like(total, dtype=bool)
        for letter in shared:
            together &= alike[letter]
        total += deviation**2 * together
    return total


def bases_of(amounts: Amounts, networks: Sequence[Network], known: Sequence[KnownDevice]) -> Bases:
    """The typical prices with half the weight, and those of the known devices with the other half.

    A known device of one precision has that price in all. What it has no price for is typical, in its own proportion.
    """
    typical = np.array([TYPICAL[name.rpartition(".")[2]] for name in amounts.names])
    total = amounts.matrix.sum(axis=0)
    shapes: dict[str, float] = {}
    for network in networks if any(device.model.prices_shapes for device in known) else ():
        for name, amount in shape_features(network.layers).items():
            shapes[name] = shapes.get(name, 0.0) + amount
    names, lists = ["typical"], [typical]
    for device in known:
        own = _own_prices(device, amounts.names, total, shapes)
        priced = own > 0
        if priced.any():
            unit = (total[priced] @ own[priced]) / (total[priced] @ typical[priced])
            names.append(device.name)
            lists.append((1 - BLEND) * np.where(priced, own, unit * typical) + BLEND * unit * typical)
    others = len(lists) - 1
    weights = [0.5 if others else 1.0, *[0.5 / max(others, 1)] * others]
    return Bases(tuple(names), np.log(lists), np.array(weights))


def _own_prices(
    device: KnownDevice, names: Sequence[str], total: np.ndarray, shapes: Mapping[str, float]
) -> np.ndarray:
    """Prices (d,) of a known device, 0 where it has none; prices of shapes are spread over the MACs of the family."""
    prices = device.model.coefficients
    own = np.array([prices.get(device.own(name), 0.0) for name in names])
    own[names.index(CONSTANT)] = device.model.constant_ms
    for name, amount in shapes.items():
        macs = f"{name.rpartition('.')[0]}.macs"
        if macs in names:
            place = names.index(macs)
            own[place] += prices.get(device.own(name), 0.0) * amount / total[place]
    return own


def choose_networks(networks: Sequence[Network], count: int, seed: int) -> np.ndarray:
    """Which of n networks to measure on a device nobody knows: indices (count,), the informative ones first.

    One by one, each is the network whose measurement leaves the least variance in all predictions (V-optimal design,
    linearised at the typical prices); then random ones.

    Raises ValueError when there are fewer than `count` networks.
    """
    if not 0 < count <= len(networks):
        raise ValueError(f"expected between 1 and {len(networks)} samples, got {count}")
    amounts = Amounts.of(networks)
    shares = _shares(amounts.matrix, bases_of(amounts, networks, ()).log_prices)[0][0]
    left = shares @ covariance(amounts.names) @ shares.T  # (n, n), by those chosen so far
    noise = float(np.median(NOISES)) ** 2
    chosen: list[int] = []
    for _ in range(ceil(INFORMATIVE * count)):
        gain = (left**2).sum(axis=0) / (np.diag(left) + noise)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        left = left - np.outer(left[:, best], left[best]) / (left[best, best] + noise)
    others = np.setdiff1d(np.arange(len(networks)), chosen)
    random = np.random.default_rng(seed).choice(others, count - len(chosen), replace=False)
    return np.concatenate([np.array(chosen), random])


def fit_prices(amounts: Amounts, chosen: np.ndarray, latency_ms: np.ndarray, bases: Bases) -> FittedPrices:
    """Fit every model on samples latency_ms (k,) at the rows `chosen` of the networks, and average them."""
    samples, log_ms = amounts.matrix[chosen], np.log(latency_ms)
    base = np.repeat(np.arange(len(bases.names)), len(NOISES))  # (M,)
    noise = np.tile(NOISES**2, len(bases.names))
    prior = covariance(amounts.names)
    unit = log_ms.mean() - _log_sum(samples, bases.log_prices).mean(axis=1)  # (B,)
    around = bases.log_prices[base] + unit[base][:, None]  # (M, d)
    found = _solve(samples, log_ms, around, prior, noise)
    evidence = found.log_evidence + np.log(bases.weights[base])
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    prices = weights @ np.exp(found.log_prices)
    spread = _spread(amounts.matrix, prices, found, weights, prior, noise)
    shares = np.bincount(base, weights, len(bases.names))
    return FittedPrices(
        prices,
        np.exp(_left_out(log_ms, weights, found)),
        Z_90 * spread,
        {name: round(float(share), 4) for name, share in zip(bases.names, shares, strict=True)},
    )


@dataclass(frozen=True, eq=False)
class _Solved:
    """The most probable prices of M models, and what follows from linearising there.

    `log_prices` (M, d); `duals` (M, k) and `inverses` (M, k, k): the inverse covariance of the samples, and that times
    what they say; `shares` (M, k, d): of each feature in the latency of each sample; `log_evidence` (M,).
    """

    log_prices: np.ndarray
    duals: np.ndarray
    inverses: np.ndarray
    shares: np.ndarray
    log_evidence: np.ndarray


def _log_sum(matrix: np.ndarray, log_prices: np.ndarray) -> np.ndarray:
    """Log-latencies (M, n) of amounts (n, d) at log-prices (M, d)."""
    return np.log(np.exp(log_prices) @ matrix.T)


def _shares(matrix: np.ndarray, log_prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share (M, n, d) of each feature in each latency, which is the gradient of its logarithm (M, n)."""
    parts = np.exp(log_prices)[:, None, :] * matrix
    total = parts.sum(axis=2)
    return parts / total[:, :, None], np.log(total)


def _solve(
    samples: np.ndarray, log_ms: np.ndarray, around: np.ndarray, prior: np.ndarray, noise: np.ndarray
) -> _Solved:
    """Gauss-Newton from `around` (M, d), with variances `prior` (d, d) of the departures and `noise` (M,)."""
    theta = np.zeros_like(around)
    eye = np.eye(len(log_ms))
    for step in range(STEPS):
        shares, predicted = _shares(samples, around + theta)
        across = shares @ prior  # (M, k, d)
        inverses = np.linalg.inv(across @ shares.transpose(0, 2, 1) + noise[:, None, None] * eye)
        pull = log_ms - predicted + np.einsum("mkd,md->mk", shares, theta)
        duals = np.einsum("mkj,mj->mk", inverses, pull)
        move = np.einsum("mkd,mk->md", across, duals) - theta
        longest = np.abs(move).max()
        if longest < TOLERANCE or step == STEPS - 1:
            break
        theta = theta + move * np.minimum(1.0, LONGEST_STEP / np.abs(move).max(axis=1, keepdims=True).clip(TOLERANCE))
    residual = log_ms - predicted
    # theta' prior^-1 theta = duals' (shares prior shares') duals, since theta = prior shares' duals
    penalty = np.einsum("mk,mk->m", duals, np.einsum("mkd,md->mk", shares, theta))
    fit = -0.5 * ((residual**2).sum(axis=1) / noise + penalty)
    return _Solved(around + theta, duals, inverses, shares, fit + 0.5 * np.linalg.slogdet(inverses)[1])


def _left_out(log_ms: np.ndarray, weights: np.ndarray, found: _Solved) -> np.ndarray:
    """Logarithms (k,) that the average, fitted without a sample, predicts for it; without fitting again.

    A Gaussian process predicts a sample from the others as y - dual / precision with variance 1 / precision (Rasmussen
    and Williams 2006, 5.4.2); a model's weight without the sample is its weight over the density it gave to it. It is
    exact but for the linearisation.
    """
    precisions = np.einsum("mkk->mk", found.inverses)
    gap = found.duals / precisions
    log_density = 0.5 * (np.log(precisions) - gap**2 * precisions)
    log_weight = np.log(weights.clip(1e-300))[:, None] - log_density
    weight = np.exp(log_weight - log_weight.max(axis=0))
    return log_ms - (weight * gap).sum(axis=0) / weight.sum(axis=0)


def _spread(
    matrix: np.ndarray,
    prices: np.ndarray,
    found: _Solved,
    weights: np.ndarray,
    prior: np.ndarray,
    noise: np.ndarray,
) -> float:
    """Standard deviation of the logarithm of a new measurement around the average, averaged over networks: noise, doubt
    within models and between them."""
    some = matrix[:: max(len(matrix) // SPREAD_ROWS, 1)]
    heavy = weights > SMALLEST_WEIGHT
    share = weights[heavy] / weights[heavy].sum()
    shares, predicted = _shares(some, found.log_prices[heavy])  # (m, rows, d), (m, rows)
    across = shares @ prior
    before = np.einsum("mrd,mrd->mr", across, shares)
    toward = across @ found.shares[heavy].transpose(0, 2, 1)  # (m, rows, k)
    explained = np.einsum("mrk,mkj,mrj->mr", toward, found.inverses[heavy], toward)
    between = (predicted - np.log(some @ prices)) ** 2
    variance = share @ (np.maximum(before - explained, 0.0) + between + noise[heavy][:, None])
    return float(np.sqrt(variance.mean()))
