"""Fitting non-negative coefficients on relative error, and judging them on what was left out.

Notation: n networks, d features; `matrix` (n, d) amounts, `latency_ms` (n,), `coefficients` (d,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np

RIDGE = 1e-4


def matrix_of(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    """Features as a matrix of shape (n, d), in the order of `names`; an absent feature is zero."""
    return np.array([[row.get(name, 0.0) for name in names] for row in rows], dtype=np.float64).reshape(
        len(rows), len(names)
    )


def with_constant(matrix: np.ndarray) -> np.ndarray:
    """A last column of ones: (n, d) -> (n, d + 1)."""
    return np.column_stack([matrix, np.ones(len(matrix))])


def fit_coefficients(matrix: np.ndarray, latency_ms: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Non-negative coefficients (d,) of least squared relative error.

    The ridge is on coefficients in units of each feature's own root mean square, so that it treats counts and
    bytes alike; it keeps features that grow together from swinging between folds.
    """
    from scipy.optimize import nnls

    relative = matrix / latency_ms[:, None]
    scale = np.sqrt((relative**2).mean(axis=0))
    scale[scale == 0] = 1.0
    count = matrix.shape[1]
    stacked = np.vstack([relative / scale, np.sqrt(ridge * len(latency_ms)) * np.eye(count)])
    target = np.concatenate([np.ones(len(latency_ms)), np.zeros(count)])
    return nnls(stacked, target, maxiter=100 * count)[0] / scale


FEWEST_GROUPS = 5  # that can be folds


def folds_of(
    matrix: np.ndarray, folds: int, rng: np.random.Generator, groups: Sequence[object] | None = None
) -> np.ndarray:
    """A fold number for each of the n rows; equal rows share a fold, so that none is predicted from its twin.

    Rows of one of `groups` (n,) share a fold too, where there are enough of them.
    """
    if groups is not None and len(set(groups)) >= FEWEST_GROUPS:
        names = list(dict.fromkeys(groups))
        number = dict(zip(names, rng.permutation(len(names)) % folds, strict=True))
        return np.array([number[name] for name in groups])
    unique, group = np.unique(matrix, axis=0, return_inverse=True)
    return (rng.permutation(len(unique)) % folds)[group.ravel()]


def predict_left_out(matrix: np.ndarray, latency_ms: np.ndarray, fold: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Latency (n,) of each row by the coefficients fitted on the rows of the other folds."""
    predicted = np.empty(len(latency_ms))
    for number in np.unique(fold):
        out = fold == number
        predicted[out] = matrix[out] @ fit_coefficients(matrix[~out], latency_ms[~out], ridge)
    return predicted


def spearman_rho(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rho of x and y (n,); None where x or y is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def scores(predicted_ms: np.ndarray, latency_ms: np.ndarray) -> dict[str, float | None]:
    """How far predictions are off, as shares of the measured latency, and whether they rank alike (Spearman)."""
    error = np.abs(predicted_ms / latency_ms - 1)
    return {
        "mape": float(error.mean()),
        "median_error": float(np.median(error)),
        "max_error": float(error.max()),
        "within_10_percent": float((error <= 0.1).mean()),
        "spearman": spearman_rho(predicted_ms, latency_ms),
    }


def relative_interval(predicted_ms: np.ndarray, latency_ms: np.ndarray, coverage: float = 0.9) -> tuple[float, float]:
    """Half-width, as a share of the prediction, that covers a new network; and the coverage it has.

    Split conformal prediction (arXiv 1604.04173) on left-out residuals: the ceil(coverage * (n + 1))-th smallest.
    With fewer than 9 networks for 90 % that is beyond the largest, which is returned with its n / (n + 1).
    """
    residual = np.sort(np.abs(latency_ms / predicted_ms - 1))
    count = len(residual)
    rank = min(ceil(coverage * (count + 1)), count)
    return float(residual[rank - 1]), rank / (count + 1)
