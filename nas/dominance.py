"""Dominance and hypervolume of points, less being better in every objective."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np


def dominated(costs: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """Which rows a kept row dominates, shape (n,) bool; less is better.

    A row is dominated when another is worse beyond the noise nowhere, and better beyond it somewhere, or equal
    within it everywhere: a lead within the noise counts for nothing. Rows are taken best first (by the first
    objective, then the next). Being equal within the noise is not transitive, so rows that were dropped for the
    sake of one that is itself dropped get a second chance.

    Args:
        costs: (n, objectives), finite.
        noise: (objectives,) relative noise of each objective; none without it.
    """
    order = np.lexsort(costs.T[::-1])
    kept = _kept_within(costs, order, noise) if noise is not None and noise.any() else _kept(costs, order)
    out = np.ones(len(costs), dtype=bool)
    out[list(kept)] = False
    return out


def _kept(costs: np.ndarray, order: np.ndarray) -> Iterator[int]:
    """Rows that no other row equals or beats; of equal ones the first.

    A row can only be beaten by one before it in lexical order. For two objectives the least second cost so far
    decides, for three the staircase of the last two (H. T. Kung and others, 1975), else row by row.
    """
    objectives = costs.shape[1]
    if objectives == 1:
        yield from order[:1].tolist()
    elif objectives == 2:
        second = costs[order, 1]
        least_before = np.minimum.accumulate(np.append(np.inf, second))[:-1]
        yield from order[second < least_before].tolist()
    elif objectives == 3:
        steps_y, steps_z = [-np.inf], [np.inf]  # y does not fall, z falls
        for i, y, z in zip(order.tolist(), costs[order, 1].tolist(), costs[order, 2].tolist(), strict=True):
            at = bisect_right(steps_y, y)
            if steps_z[at - 1] <= z:
                continue
            end = at
            while end < len(steps_z) and steps_z[end] >= z:
                end += 1
            steps_y[at:end], steps_z[at:end] = [y], [z]
            yield i
    else:
        left = order
        while len(left):
            yield int(left[0])
            left = left[(costs[left] < costs[left[0]]).any(axis=1)]


def _kept_within(costs: np.ndarray, order: np.ndarray, noise: np.ndarray) -> list[int]:
    kept: list[int] = []
    for i in order.tolist():
        if not any(_no_worse(costs[k], costs[i], noise) for k in kept):  # so what i is no worse than, it beats
            kept = [k for k in kept if not _no_worse(costs[i], costs[k], noise)]
            kept.append(i)
    for i in order.tolist():
        if i not in kept and not any(
            _no_worse(costs[k], costs[i], noise) or _no_worse(costs[i], costs[k], noise) for k in kept
        ):
            kept.append(i)
    return kept


def _no_worse(a: np.ndarray, b: np.ndarray, noise: np.ndarray) -> bool:
    """Whether a is worse than b beyond the noise nowhere."""
    return bool((a <= b + noise * np.maximum(np.abs(a), np.abs(b))).all())


def beaten_by(costs: np.ndarray, others: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Which rows (n, objectives) one of the others (m, objectives) dominates beyond the noise, shape (n,) bool."""
    rows = costs[:, None]
    margin = noise * np.maximum(np.abs(rows), np.abs(others))
    as_good = (others <= rows + margin).all(axis=2)
    better = (others < rows - margin).any(axis=2)
    return np.asarray((as_good & better).any(axis=1))


def hypervolume(costs: np.ndarray, reference: np.ndarray) -> float:
    """Volume between a set of points and a reference point, less is better; exact, by slicing along the last objective.

    Args:
        costs: (n, objectives); points not better than the reference everywhere count nothing.
        reference: (objectives,).
    """
    costs = costs[(costs < reference).all(axis=1)]
    return _volume(costs, reference) if len(costs) else 0.0


def _volume(costs: np.ndarray, reference: np.ndarray) -> float:
    """The same of one point or more, all of them better than the reference."""
    objectives = costs.shape[1]
    if objectives == 1:
        return float(reference[0] - costs.min())
    costs = costs[np.argsort(costs[:, -1], kind="stable")]
    heights = np.diff(np.append(costs[:, -1], reference[-1]))
    if objectives == 2:
        return float((heights * (reference[0] - np.minimum.accumulate(costs[:, 0]))).sum())
    costs = costs[~dominated(costs)]
    heights = np.diff(np.append(costs[:, -1], reference[-1]))
    slices = [(i, height) for i, height in enumerate(heights.tolist()) if height > 0]
    return sum(height * _volume(costs[: i + 1, :-1], reference[:-1]) for i, height in slices)
