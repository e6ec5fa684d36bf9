"""How well one order of networks agrees with another, what picking by it costs, and what of that may be noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
ROUNDING = 1e-9  # two taus that differ by less are equal: they were added up in another order


@dataclass(frozen=True)
class Correlation:
    """A rank correlation, or a difference of two, and its 90 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float | None:
    """Kendall's tau-b of x and y (n,), which allows for ties; None where x or y is constant."""
    above_x, above_y = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    pairs = math.sqrt(np.sum(above_x**2) * np.sum(above_y**2))
    return float(np.sum(above_x * above_y)) / pairs if pairs else None


def tau_gain(x: np.ndarray, baseline: np.ndarray, y: np.ndarray) -> float | None:
    """How much larger Kendall's tau-b of x and y is than that of the baseline and y; None where one is not defined."""
    taus = kendall_tau(x, y), kendall_tau(baseline, y)
    return None if taus[0] is None or taus[1] is None else taus[0] - taus[1]


def bootstrap(
    statistic: Callable[..., float | None],
    columns: Sequence[np.ndarray],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Correlation:
    """The statistic of columns (n,) each, and the middle 90 % of it when their n rows are drawn anew, with replacement.

    Draws in which it is not defined are left out.
    """
    count = len(columns[0])
    draws = rng.integers(count, size=(resamples, count))
    found = [value for draw in draws if (value := statistic(*(column[draw] for column in columns))) is not None]
    value = statistic(*columns)
    if value is None or not found:
        return Correlation(value, None, None)
    low, high = np.quantile(found, (0.05, 0.95))
    return Correlation(value, float(low), float(high))


def chance_tau(count: int) -> float | None:
    """The smallest tau that at most 10 % of the random orders of `count` reach, up or down; None where none is.

    Exact, from the number of orders with each number of inversions (Kendall 1938); compare with `ROUNDING`.
    """
    orders = np.ones(1)
    for length in range(2, count + 1):
        orders = np.convolve(orders, np.ones(length)) / length
    pairs = count * (count - 1) // 2
    tau = 1 - 2 * np.arange(pairs + 1) / max(pairs, 1)
    both_tails = 2 * np.cumsum(orders)
    rare = tau[(both_tails <= 0.1 + 1e-12) & (tau > 0)]
    return float(rare[-1]) if len(rare) else None


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent images: binomial, with one success and one failure added.

    Without those (Laplace's rule) a share of 0 or 1 would have no error at all.
    """
    expected = (share * count + 1) / (count + 2)
    return math.sqrt(expected * (1 - expected) / count)


def noise_bound(comparisons: int = 1) -> float:
    """Standard errors that the largest of so many differences of equals exceeds in 5 % of cases at most, or the
    smallest falls below: 1.645 for one, more for more (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.05 / comparisons)


@dataclass(frozen=True)
class Pick:
    """What a rule picks out of the networks within a budget, and what would have been best: indices of networks."""

    budget_macs: int
    picked: int
    best: int
    within: int

    @property
    def comparisons(self) -> int:
        """How many other networks the picked one is compared with, to find the best; 1 where there is none."""
        return max(1, self.within - 1)


def picks(macs: np.ndarray, alone: np.ndarray, score: np.ndarray) -> list[Pick]:
    """For each distinct number of MACs as a budget: the network within it that has the highest score.

    Args:
        macs, alone, score: (n,) costs, accuracies when trained alone, and what the rule maximizes.

    Of equals (in score, or for the best in `alone`) it is the one with the fewest MACs, then the first.
    """
    order = np.argsort(macs, kind="stable")
    found = []
    for budget in np.unique(macs):
        within = order[macs[order] <= budget]
        picked, best = (int(within[np.argmax(values[within])]) for values in (score, alone))
        found.append(Pick(int(budget), picked, best, len(within)))
    return found


def regrets(picked: Sequence[Pick], alone: np.ndarray) -> np.ndarray:
    """How much better than each pick the best network within its budget is when trained alone, 0 or more."""
    return np.array([alone[pick.best] - alone[pick.picked] for pick in picked])
