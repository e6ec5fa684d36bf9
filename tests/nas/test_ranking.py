"""Ranking: the statistics against definitions, tables and another library, and regrets by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nas.ranking import (
    ROUNDING,
    bootstrap,
    chance_tau,
    kendall_tau,
    noise_bound,
    picks,
    regrets,
    standard_error,
    tau_gain,
)
from predictors.regression import spearman_rho

# statistics ----------------------------------------------------------------------------------------------


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """By the definition: over all pairs."""
    agree = ties_x = ties_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        agree += int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]))
        ties_x += x[i] == x[j]
        ties_y += y[i] == y[j]
    pairs = len(x) * (len(x) - 1) // 2
    return float(agree / math.sqrt((pairs - ties_x) * (pairs - ties_y)))


def ranks(x: np.ndarray) -> np.ndarray:
    return np.array([sum(x < v) + (sum(x == v) + 1) / 2 for v in x])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 1000])  # with and without ties
def test_rank_correlations_are_those_of_their_definitions(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(levels, size=9).astype(float)
    y = x + rng.integers(levels, size=9)
    assert kendall_tau(x, y) == pytest.approx(tau_b(x, y)) == stats.kendalltau(x, y).statistic
    assert spearman_rho(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert kendall_tau(x, -x) == spearman_rho(x, -x) == pytest.approx(-1.0)


def test_a_correlation_with_equals_only_is_not_defined() -> None:
    x, y = np.arange(4.0), np.full(4, 0.5)
    for statistic in (kendall_tau, spearman_rho):
        assert statistic(x, y) is None and statistic(y, x) is None
        assert bootstrap(statistic, (x, y), np.random.default_rng(0), 20).low is None


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    x = np.random.default_rng(1).normal(2.0, 3.0, 400)
    found = bootstrap(lambda a, b: float((a + b).mean()), (x, -x / 2), np.random.default_rng(0), 4000)
    middle, half = (x / 2).mean(), 1.645 * (x / 2).std() / 20
    assert found.value == pytest.approx(middle)
    assert [found.low, found.high] == pytest.approx([middle - half, middle + half], abs=0.1 * half)


def test_pairs_are_drawn_together_and_undefined_draws_left_out() -> None:
    x = np.array([1.0, 2.0, 3.0])
    found = bootstrap(kendall_tau, (x, 10 * x), np.random.default_rng(0), 200)  # a ninth of the draws are constant
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    again = [bootstrap(kendall_tau, (x, x[::-1] ** 2), np.random.default_rng(3), 50) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("count", "tau"), [(4, 1.0), (5, 0.8), (6, 11 / 15), (7, 13 / 21), (8, 16 / 28), (9, 0.5), (10, 21 / 45)]
)  # the published table: two-tailed, 10 %
def test_chance_is_that_of_kendalls_table(count: int, tau: float) -> None:
    assert chance_tau(count) == pytest.approx(tau)


def test_chance_is_that_of_all_orders() -> None:
    assert chance_tau(2) is None and chance_tau(3) is None
    for count in (4, 5, 6):
        pairs = list(itertools.combinations(range(count), 2))
        orders = list(itertools.permutations(range(count)))
        taus = np.array([sum(1 if o[i] < o[j] else -1 for i, j in pairs) for o in orders]) / len(pairs)
        bound = min(t for t in set(taus[taus > 0]) if np.mean(np.abs(taus) >= t - 1e-9) <= 0.1 + 1e-9)
        assert chance_tau(count) == pytest.approx(bound)


@pytest.mark.parametrize("count", [5, 6, 10, 11, 12])  # where a tau at the bound is less than it by rounding
def test_a_tau_at_the_bound_reaches_it(count: int) -> None:
    bound = chance_tau(count)
    assert bound is not None
    pairs = count * (count - 1) // 2
    inversions = round((1 - bound) * pairs / 2)
    for extra, reached in ((0, True), (1, False)):
        order, rest = list(range(count)), inversions + extra
        while rest:  # exchange neighbours in order: one inversion more
            i = next(i for i in range(count - 1) if order[i] < order[i + 1])
            order[i : i + 2] = order[i + 1], order[i]
            rest -= 1
        tau = kendall_tau(np.array(order), np.arange(count))
        assert tau is not None and (tau >= bound - ROUNDING) == reached
        assert (-tau <= ROUNDING - bound) == reached


def test_the_gain_over_a_baseline_is_a_difference_of_two_taus() -> None:
    x, baseline, y = np.array([1, 2, 4, 3]), np.array([2, 1, 4, 3]), np.arange(4)
    assert tau_gain(x, baseline, y) == pytest.approx(4 / 6 - 2 / 6)
    assert tau_gain(x, np.ones(4), y) is None and tau_gain(np.ones(4), x, y) is None
    same = bootstrap(tau_gain, (x, 10 * x, y), np.random.default_rng(0), 100)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_equals_seldom_look_like_a_gain_and_a_real_one_does() -> None:
    rng = np.random.default_rng(0)
    quality = np.linspace(0, 3, 12)
    claimed = {1.0: 0, 0.1: 0}
    for noise in claimed:  # of the accuracies to be judged; that of the baseline is 1
        for _ in range(100):
            columns = [quality + sd * rng.normal(size=12) for sd in (noise, 1.0, 0.1)]
            low = bootstrap(tau_gain, columns, rng, 100).low
            claimed[noise] += low is not None and low > ROUNDING
    assert claimed[1.0] <= 8 and claimed[0.1] >= 50


def test_standard_errors_of_shares() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 98) == pytest.approx(math.sqrt(0.99 * 0.01 / 98)) == standard_error(0.0, 98)
    drawn = np.random.default_rng(0).binomial(500, 0.8, 20_000) / 500
    assert standard_error(0.8, 500) == pytest.approx(drawn.std(), rel=0.02)


@pytest.mark.parametrize("comparisons", [1, 2, 7, 63])
def test_the_noise_bound_is_that_of_the_normal_distribution(comparisons: int) -> None:
    assert noise_bound(comparisons) == pytest.approx(stats.norm.isf(0.05 / comparisons))
    assert noise_bound() == pytest.approx(1.6448536)


# regrets -------------------------------------------------------------------------------------------------


def test_regrets_by_hand_with_ties() -> None:
    macs = np.array([20, 10, 30, 20])
    alone = np.array([0.80, 0.70, 0.78, 0.75])
    inherited = np.array([0.6, 0.6, 0.7, 0.7])
    found = picks(macs, alone, inherited)
    assert [p.budget_macs for p in found] == [10, 20, 30]
    assert [p.best for p in found] == [1, 0, 0]
    assert [(p.within, p.comparisons) for p in found] == [(1, 1), (3, 2), (4, 3)]
    assert [p.picked for p in found] == [1, 3, 3]  # at 30 two have 0.7: the one with fewer MACs
    assert regrets(found, alone) == pytest.approx([0.0, 0.05, 0.05])
    largest = picks(macs, alone, macs)
    assert [p.picked for p in largest] == [1, 0, 2]  # at 20 two have 20 MACs: the first
    assert regrets(largest, alone) == pytest.approx([0.0, 0.0, 0.02])
    equal = picks(macs, alone, np.full(4, 0.5))
    assert [p.picked for p in equal] == [1, 1, 1]
    assert regrets(equal, alone) == pytest.approx([0.0, 0.10, 0.10])


@pytest.mark.parametrize("seed", range(5))
def test_regrets_are_those_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    macs, alone, score = rng.permutation(12) + 1, rng.random(12), rng.random(12)
    expected = []
    for budget in sorted(macs):
        fits = [i for i in range(12) if macs[i] <= budget]
        expected.append(max(alone[i] for i in fits) - alone[max(fits, key=lambda i: score[i])])
    assert regrets(picks(macs, alone, score), alone) == pytest.approx(expected)
    assert not regrets(picks(macs, alone, 3 * alone), alone).any()
