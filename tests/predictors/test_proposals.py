"""Proposals, against volumes counted by brute force and properties of what is proposed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from predictors import proposals
from predictors.proposals import (
    Compressed,
    Domain,
    Results,
    bounds,
    keys,
    non_dominated,
    normal_cdf,
    propose,
    rank_correlation,
)
from predictors.surrogate import GaussianProcess


def results_of(codes: np.ndarray, costs: np.ndarray, constraints: np.ndarray | None = None) -> Results:
    return Results(codes, costs, np.zeros((len(codes), 0)) if constraints is None else constraints)


def slow_front(costs: np.ndarray) -> list[int]:
    """Places that no other row is better than, the first of equal ones, by comparing all pairs in Python."""
    found = []
    for i, a in enumerate(costs):
        better = [
            j
            for j, b in enumerate(costs)
            if all(y <= x for x, y in zip(a, b, strict=True))
            and (any(y < x for x, y in zip(a, b, strict=True)) or j < i)
        ]
        if not better:
            found.append(i)
    return found


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_non_dominated_rows(objectives: int, rng: np.random.Generator) -> None:
    costs = rng.integers(6, size=(60, objectives)).astype(float)
    assert np.flatnonzero(non_dominated(costs)).tolist() == slow_front(costs)
    assert non_dominated(costs[:0]).shape == (0,)


def test_normal_cdf_is_close_to_the_exact_one() -> None:
    z = np.linspace(-7, 7, 2001)
    exact = np.array([NormalDist().cdf(x) for x in z])
    assert np.abs(normal_cdf(z) - exact).max() < 2e-4
    assert (np.diff(normal_cdf(z)) >= 0).all()


def test_compressed_costs_rise_are_straight_below_the_median_and_logarithmic_above(rng: np.random.Generator) -> None:
    costs = np.exp(3 * rng.standard_normal(50))
    compressed = Compressed(costs)
    beyond = np.linspace(costs.min() - 5, costs.max() + 5, 200)
    assert (np.diff(compressed(beyond)) > 0).all()
    median, best_tenth = np.median(costs), np.quantile(costs, 0.1)
    unit = median - best_tenth
    asked = median + unit * np.array([-3.0, -1, 0, np.e - 1, np.e**2 - 1])
    np.testing.assert_allclose(compressed(asked), [-3, -1, 0, 1, 2], atol=1e-9)
    assert np.isfinite(Compressed(np.full(4, 2.0))(np.array([1.0, 2.0, 3.0]))).all()


def test_rank_correlation_is_scipys(rng: np.random.Generator) -> None:
    from scipy.stats import spearmanr

    a, b = rng.integers(5, size=30), rng.standard_normal(30)
    assert rank_correlation(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic)
    assert rank_correlation(np.ones(4), np.arange(4)) == 0.0


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_gains_of_exact_costs_are_the_hypervolume_that_they_add(
    objectives: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all costs known, the best proposals are those that add most, counted on a fine grid or random points."""
    monkeypatch.setattr(proposals, "SHORTLIST", 40)
    domain = Domain((5, 5, 5), (True,) * 3, exact={i: lambda c, i=i: costs_of(c)[:, i] for i in range(objectives)})
    table = rng.random((125, objectives))

    def costs_of(codes: np.ndarray) -> np.ndarray:
        return np.asarray(table[codes @ [25, 5, 1]])

    codes = domain.every()[rng.choice(125, 20, replace=False)]
    corner = np.full(objectives, 0.9)
    proposed = propose(domain, results_of(codes, costs_of(codes)), 1, rng, reference=corner.tolist())

    points = rng.random((40_000, objectives)) * 0.9
    free = points[~np.array([(c <= points).all(axis=1) for c in costs_of(codes)]).any(axis=0)]
    every = domain.every()
    added = np.array([(c <= free).all(axis=1).sum() for c in costs_of(every)])
    assert added[(every == proposed[0]).all(axis=1)][0] >= 0.85 * added.max()


def test_a_batch_is_chosen_for_what_its_members_add_to_each_other(rng: np.random.Generator) -> None:
    """Two candidates that dominate nearly the same are not both proposed while another part of the front is open."""
    costs = {0: (0.1, 0.8), 1: (0.11, 0.79), 2: (0.8, 0.1), 3: (0.95, 0.95), 4: (0.96, 0.96)}
    exact = {i: lambda c, i=i: np.array([costs[int(code)][i] for code in c[:, 0]]) for i in range(2)}
    domain = Domain((5,), (False,), exact=exact)
    known = np.array([[3], [4]])
    for _ in range(5):
        done = results_of(known, np.array([costs[3], costs[4]]))
        proposed = propose(domain, done, 2, rng, reference=[1.0, 1.0])
        assert 2 in proposed and len({0, 1} & set(proposed.ravel().tolist())) == 1


def test_what_runs_is_believed_and_nothing_is_proposed_twice(rng: np.random.Generator) -> None:
    costs = {0: (0.1, 0.8), 1: (0.11, 0.79), 2: (0.9, 0.15), 3: (0.95, 0.95), 4: (0.96, 0.96)}
    exact = {i: lambda c, i=i: np.array([costs[int(code)][i] for code in c[:, 0]]) for i in range(2)}
    domain = Domain((5,), (False,), exact=exact)
    done = results_of(np.array([[3], [4]]), np.array([costs[3], costs[4]]))
    running = np.array([[0]])
    assert propose(domain, done, 1, rng, reference=[1.0, 1.0], taken=keys(running)).tolist() == [[1]]
    assert propose(domain, done, 1, rng, reference=[1.0, 1.0], running=running).tolist() == [[2]]
    assert propose(domain, done, 9, rng, running=running, taken=keys(np.array([[2]]))).tolist() == [[1]]
    assert not len(propose(domain, done, 9, rng, running=running, taken=keys(np.array([[1], [2]]))))


@pytest.mark.parametrize("counts", [(3, 3, 2), (4,) * 12], ids=["enumerated", "evolved"])
def test_proposals_are_new_canonical_allowed_and_repeatable(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "BROOD", 300)

    def canonical(codes: np.ndarray) -> np.ndarray:
        codes = codes.copy()
        codes[codes[:, 0] == 0, 1] = 0
        return codes

    domain = Domain(counts, (True,) * len(counts), (), canonical, lambda codes: codes[:, -1] == 0)
    rng = np.random.default_rng(3)
    codes = domain.first(5, frozenset(), rng)
    assert len(keys(codes)) == len(codes) == 5
    results = results_of(codes, np.stack([codes.sum(axis=1), -(codes[:, 0] ** 2.0)], axis=1))
    proposed = propose(domain, results, 4, np.random.default_rng(8))
    np.testing.assert_array_equal(proposed, propose(domain, results, 4, np.random.default_rng(8)))
    assert len(keys(proposed) | keys(codes)) == len(proposed) + len(codes)
    both = np.concatenate([codes, proposed])
    assert (both[:, -1] == 0).all() and not both[both[:, 0] == 0, 1].any()


def test_linear_algebra_runs_on_one_thread_and_on_as_many_as_before_afterwards(rng: np.random.Generator) -> None:
    import scipy.linalg  # noqa: F401  its library is another one than that of NumPy

    def threads() -> list[int]:
        return [library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"]

    seen: list[list[int]] = []

    def costs_of(codes: np.ndarray) -> np.ndarray:
        seen.append(threads())
        return codes.sum(axis=1).astype(float)

    domain = Domain((4, 4), (True, True), exact={0: costs_of})
    codes = domain.first(5, frozenset(), rng)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = threads()
        propose(domain, results_of(codes, np.stack([codes.sum(axis=1), -codes[:, 0]], axis=1) * 1.0), 2, rng)
        assert threads() == before
    assert len(before) >= 2 and set(before) == {2}
    assert len(seen) > 2 and {count for counts in seen for count in counts} == {1}


def test_the_library_of_scipy_is_held_to_one_thread_before_anything_else_loads_it() -> None:
    script = """
from predictors.proposals import one_thread
from threadpoolctl import threadpool_info
with one_thread():
    import scipy.linalg
    print([each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"])
"""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment |= {"OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {1}


def test_an_evolution_goes_on_from_what_promises_most(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 14 choices that each count: random architectures are far from the best."""
    monkeypatch.setattr(proposals, "BROOD", 200)
    monkeypatch.setattr(proposals, "PARENTS", 20)

    class Known:
        def gains(self, codes: np.ndarray) -> np.ndarray:
            return np.asarray(42.0 - codes.sum(axis=1))

    domain = Domain((4,) * 14, (True,) * 14)
    codes = domain.random(20, rng)
    results = results_of(codes, codes.sum(axis=1)[:, None] * 1.0)
    region: Any = Known()
    pool, gains = proposals._candidates(domain, results, region, keys(codes), rng)
    assert gains.max() > 36 and len(keys(pool) | keys(codes)) == len(pool) + 20
    np.testing.assert_array_equal(gains, 42 - pool.sum(axis=1))


def test_what_breaks_a_constraint_takes_nothing_from_what_is_to_be_gained(rng: np.random.Generator) -> None:
    costs = np.array([0.05, 0.85, 0.3, 0.8, 0.82, 0.9])
    domain = Domain((6,), (False,), exact={i: lambda codes: costs[codes[:, 0]] for i in range(2)})
    known = np.array([[0], [5]])
    done = results_of(known, np.stack([costs[[0, 5]]] * 2, axis=1), np.array([[1.0], [-1.0]]))
    assert propose(domain, done, 1, rng, reference=[1.0, 1.0]).tolist() == [[2]]


def test_values_are_compressed_where_that_tells_more_of_what_is_left_out(rng: np.random.Generator) -> None:
    from scipy.stats import spearmanr

    domain = Domain((4,) * 5, (True,) * 5)
    codes, chosen = domain.random(40, rng), set()
    for _ in range(6):
        values = codes @ rng.standard_normal(5) + rng.standard_normal(40)
        values += rng.choice([0.0, 1e3]) * (codes[:, 0] + codes[:, 1] == 5) * rng.random(40)
        told = {
            compressed: spearmanr(GaussianProcess.fit(domain.encoding, codes, each).left_out(), values).statistic
            for compressed, each in ((False, values), (True, Compressed(values)(values)))
        }
        belief = proposals._Belief.fitted(domain.encoding, codes, values)
        assert isinstance(belief.transform, Compressed) == (told[True] > told[False])
        chosen.add(type(belief.transform))
    assert len(chosen) == 2


def test_first_architectures_are_spread_and_end_with_the_space(rng: np.random.Generator) -> None:
    domain = Domain((4, 2), (False, False))
    spread = domain.spread(8, rng)
    assert [np.bincount(column).tolist() for column in spread.T] == [[2, 2, 2, 2], [4, 4]]
    assert len(domain.first(20, frozenset(), rng)) == 8
    assert len(domain.first(20, keys(np.array([[0, 0], [3, 1]])), rng)) == 6


def test_first_ones_of_a_rare_kind_are_random_of_its_kind() -> None:
    """Random ones do not meet it, and yet they are not the first of all."""
    domain = Domain((26,) * 3, (False,) * 3, allowed=lambda codes: (codes == codes[:, :1]).all(axis=1))
    found = [domain.first(5, frozenset(), np.random.default_rng(seed))[:, 0].tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and max(found[0]) > 5 and len(set(found[0])) == 5


def test_first_ones_do_not_depend_on_the_order_in_which_others_were_taken() -> None:
    domain = Domain((4,) * 20, (True,) * 20, allowed=lambda codes: codes[:, :14].sum(axis=1) <= 1)
    known = [np.r_[np.eye(14, dtype=np.int64)[i % 14], np.unravel_index(i, (4,) * 6)] for i in range(200)]
    found = []
    for order in (known, known[::-1]):
        taken: set[bytes] = set()
        for row in order:  # one by one: sets of the same are not in the same order
            taken |= keys(row[None])
        found.append(domain.first(6, taken, np.random.default_rng(0)))
    np.testing.assert_array_equal(*found)


OUTSIDE = [[3] * 14 + [int(code) for code in f"{number:06}"] for number in range(4444) if max(f"{number}") < "4"]


@pytest.mark.parametrize(("most", "taken"), [(8, []), (0, [[0] * 20]), (0, [*OUTSIDE, [0] * 20])])
def test_regions_that_random_architectures_hardly_meet_have_first_ones_too(
    rng: np.random.Generator, most: int, taken: list[list[int]]
) -> None:
    """One of 1000 random ones lies in the one region, one of 200 million in the other, of which one is known."""
    domain = Domain((4,) * 20, (True,) * 20, allowed=lambda codes: codes[:, :14].sum(axis=1) <= most)
    known = keys(np.array(taken, np.int64).reshape(-1, 20))
    found = domain.first(24, known, rng)
    assert len(found) == len(np.unique(found, axis=0)) == 24
    assert (found[:, :14].sum(axis=1) <= most).all() and not keys(found) & known
    assert all(len(np.unique(column)) > 1 for column in found[:, 14:].T)  # not relatives of one alone


def test_constraints_are_learned(rng: np.random.Generator) -> None:
    """Half of the space is infeasible, and the better half: proposals go to the other."""
    domain = Domain((6, 6, 6), (True,) * 3)
    codes = domain.first(40, frozenset(), rng)
    costs = np.stack([-codes[:, 0] - 0.1 * codes[:, 1], codes[:, 2] * 1.0], axis=1)
    told = codes[:, :1] - 2.5
    proposed = propose(domain, results_of(codes, costs, told), 8, rng)
    assert (proposed[:, 0] <= 2).mean() >= 0.75
    proposed = propose(domain, results_of(codes, costs), 8, rng)
    assert (proposed[:, 0] > 2).mean() >= 0.75
    nowhere = propose(domain, results_of(codes, costs, codes[:, :1] + 0.5), 2, rng)
    assert len(nowhere) == 2  # nothing is feasible: proposals go on


def test_a_constraint_that_was_never_broken_changes_nothing(rng: np.random.Generator) -> None:
    domain = Domain((6, 6, 6), (True,) * 3)
    codes = domain.first(40, frozenset(), rng)
    costs = np.stack([-codes[:, 0] - 0.1 * codes[:, 1], codes[:, 2] * 1.0], axis=1)
    for told in (codes[:, :1] - 5.0, np.where(codes[:, :1] > 3, np.nan, -1.0)):
        found, expected = (
            propose(domain, results_of(codes, costs, constraints), 8, np.random.default_rng(4))
            for constraints in (told, None)
        )
        np.testing.assert_array_equal(found, expected)


def test_a_constraint_is_met_at_zero_and_where_nobody_says_that_it_is_not() -> None:
    told = np.array([[0.0, -1.0], [-1.0, 1e-9], [np.nan, 0.0], [np.nan, 2.0], [-3.0, -3.0]])
    assert results_of(np.zeros((5, 1), int), np.zeros((5, 1)), told).feasible.tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert results_of(np.zeros((2, 1), int), np.zeros((2, 1))).feasible.tolist() == [True, True]


def test_bounds_are_told_or_those_of_front_and_results() -> None:
    costs = np.array([[0.0, 10.0], [5.0, 0.0], [9.0, 9.0], [10.0, 10.0]])
    results = results_of(np.zeros((4, 1), int), costs)
    assert bounds(results, [7.0, np.nan])[1][0] == 7.0
    np.testing.assert_allclose(bounds(results)[1], [np.quantile(costs[:, 0], 0.9), 11.0])
    assert (bounds(results)[0] < 0).all()
    infeasible = Results(results.codes, costs, np.array([[1.0], [-1], [-1], [np.nan]]))
    assert bounds(infeasible)[1][1] == pytest.approx(np.quantile(costs[:, 1], 0.9))


def test_many_results_are_cut_to_the_informative_ones(rng: np.random.Generator) -> None:
    costs = rng.random((700, 2))
    results = results_of(np.arange(700)[:, None], costs)
    kept = results.informative()
    assert len(kept.codes) == len(keys(kept.codes)) == proposals.LEARNED
    np.testing.assert_array_equal(costs[kept.codes[:, 0]], kept.costs)
    assert set(slow_front(costs)) <= set(kept.codes[:, 0].tolist())


def test_the_informative_ones_are_those_that_may_be_had(rng: np.random.Generator) -> None:
    """What breaks a constraint is better in every cost, and yet no more than the even pick of the others has of it."""
    costs = np.concatenate([1 + rng.random((350, 2)), rng.random((350, 2))])
    broken = np.repeat([-1.0, 1.0], 350)[:, None]
    kept = results_of(np.arange(700)[:, None], costs, broken).informative()
    assert set(slow_front(costs[:350])) <= set(kept.codes[:, 0].tolist())
    assert (kept.constraints < 0).sum() > 0.6 * proposals.LEARNED and (kept.constraints > 0).any()


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_a_search_beats_random_ones(objectives: int, rng: np.random.Generator) -> None:
    """After 20 random and 20 proposed of 1,024 the best weighted sum is better than that of most random searches."""
    domain = Domain((4,) * 5, (False,) * 5)
    effects = rng.standard_normal((objectives, 5, 4))

    def costs_of(codes: np.ndarray) -> np.ndarray:
        return np.stack([sum(e[i][codes[:, i]] for i in range(5)) for e in effects], axis=1)

    codes = domain.first(20, frozenset(), rng)
    for _ in range(4):
        codes = np.concatenate([codes, propose(domain, results_of(codes, costs_of(codes)), 5, rng)])

    def dominated_share(chosen: np.ndarray) -> float:
        every = costs_of(domain.every())
        return float((costs_of(chosen)[:, None] <= every[None]).all(axis=2).any(axis=0).mean())

    by_chance = [dominated_share(domain.random(40, rng)) for _ in range(20)]
    assert dominated_share(codes) > np.quantile(by_chance, 0.9)
