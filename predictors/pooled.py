"""One additive model of latency on several devices at once, for when each alone has too few measurements.

Notation: k devices, n networks, d features; `matrix` (n, d) amounts, `latency_ms` (k, n) with NaN where a device did
not run a network, `coefficients` (k, d).

The coefficients of device i are `speed_i * common_f * multiplier_if`, all non-negative. `common` is the price list that
the devices share, `speed` how far a device is from it, and the multipliers, near 1, what is its own. So devices borrow
from each other what their own measurements leave open (regularized multi-task learning, Evgeniou and Pontil, 2004).
"""

from __future__ import annotations

import numpy as np

PENALTY = 0.003  # on a squared departure of a multiplier from 1, beside the mean squared relative error
TOLERANCE = 0.15  # relative error up to which a measurement counts in full (Huber's loss)
RIDGE = 1e-4  # on the common prices, in units of each feature's root mean square
ROUNDS = 8  # of alternating between common prices and devices; the prices settle within a few


def fit_pooled(matrix: np.ndarray, latency_ms: np.ndarray, penalty: float = PENALTY) -> np.ndarray:
    """Non-negative coefficients (k, d) of least relative error under Huber's loss.

    A network that a device mispredicts by more than `TOLERANCE` pulls with a constant force instead of a growing one:
    among twenty networks, one that runs on an unusual path must not bend the prices of all others.

    Raises ValueError for shapes that do not fit, a latency that is no positive number, a device with no latency.
    """
    _check(matrix, latency_ms)
    ran = [np.flatnonzero(~np.isnan(row)) for row in latency_ms]
    tasks = [(matrix[some], row[some]) for row, some in zip(latency_ms, ran, strict=True)]
    multipliers = np.ones((len(tasks), matrix.shape[1]))
    speeds = _first_speeds(latency_ms)
    weights = [np.ones(len(some)) for some in ran]
    common = np.zeros(matrix.shape[1])
    for _ in range(ROUNDS):
        common = _common_prices(tasks, speeds[:, None] * multipliers, weights)
        for i, (amounts, measured) in enumerate(tasks):
            relative = weights[i][:, None] * amounts * common / measured[:, None]
            speeds[i] = _scale_of(relative @ multipliers[i], weights[i])
            multipliers[i] = _multipliers(relative * speeds[i], weights[i], penalty)
            error = amounts @ (speeds[i] * common * multipliers[i]) / measured - 1
            weights[i] = np.sqrt(TOLERANCE / np.maximum(np.abs(error), TOLERANCE))
    return speeds[:, None] * common * multipliers


def predict_networks_left_out(
    matrix: np.ndarray, latency_ms: np.ndarray, group: np.ndarray, penalty: float = PENALTY
) -> np.ndarray:
    """Latencies (k, n) of each network by coefficients that saw no network of its `group` (n,), on any device.

    NaN where the device did not run the network.
    """
    predicted = np.full(latency_ms.shape, np.nan)
    for number in np.unique(group):
        out = group == number
        predicted[:, out] = fit_pooled(matrix[~out], latency_ms[:, ~out], penalty) @ matrix[out].T
    return np.where(np.isnan(latency_ms), np.nan, predicted)


def _check(matrix: np.ndarray, latency_ms: np.ndarray) -> None:
    if latency_ms.ndim != 2 or latency_ms.shape[1] != len(matrix):
        raise ValueError(f"expected a latency of each of {len(matrix)} networks a device, got shape {latency_ms.shape}")
    known = latency_ms[~np.isnan(latency_ms)]
    if not (np.isfinite(known).all() and (known > 0).all()):
        raise ValueError("expected positive latencies in ms, and NaN where a device did not run a network")
    if np.isnan(latency_ms).all(axis=1).any():
        raise ValueError("a device without any latency: leave it out")


def _first_speeds(latency_ms: np.ndarray) -> np.ndarray:
    """How slow each device (k,) is beside the mean of those that ran the same networks."""
    logarithm = np.log(latency_ms)
    return np.exp(np.nanmean(logarithm - np.nanmean(logarithm, axis=0), axis=1))


def _common_prices(
    tasks: list[tuple[np.ndarray, np.ndarray]], scales: np.ndarray, weights: list[np.ndarray]
) -> np.ndarray:
    """The prices (d,) that fit all devices, each counting once however many networks it ran."""
    rows, targets = [], []
    for (amounts, measured), scale, weight in zip(tasks, scales, weights, strict=True):
        share = weight / np.sqrt(len(measured))
        rows.append((share / measured)[:, None] * amounts * scale)
        targets.append(share)
    stacked = np.vstack(rows)
    unit = np.sqrt((stacked**2).sum(axis=0) / len(tasks))
    unit[unit == 0] = 1.0
    count = len(unit)
    ridge = np.sqrt(RIDGE * len(tasks)) * np.eye(count)
    return _nnls(np.vstack([stacked / unit, ridge]), np.concatenate([*targets, np.zeros(count)])) / unit


def _scale_of(predicted: np.ndarray, target: np.ndarray) -> float:
    """The factor that brings `predicted` (n,) nearest to `target` (n,); 1 where nothing is predicted."""
    square = float(predicted @ predicted)
    return float(predicted @ target) / square if square else 1.0


def _multipliers(relative: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """A device's own multipliers (d,), drawn towards 1."""
    share = 1 / np.sqrt(len(weight))
    count = relative.shape[1]
    stacked = np.vstack([relative * share, np.sqrt(penalty) * np.eye(count)])
    return _nnls(stacked, np.concatenate([weight * share, np.full(count, np.sqrt(penalty))]))


def _nnls(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls

    return nnls(matrix, target, maxiter=100 * matrix.shape[1])[0]
