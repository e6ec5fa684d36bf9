"""LINAS as the authors' code does it (arXiv 2205.10358, 2312.13301): budgets, regressions, operators, survivors."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def module(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("linas")


@pytest.fixture
def light(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With fewer candidates and smaller grids: what is tested here does not depend on them."""
    for name, value in (("PREDICTED", 400), ("ALPHAS", [1.0]), ("COSTS", [10.0])):
        monkeypatch.setattr(module, name, value)
    return module


class Measured:
    """A sum over choices against one that falls; remembers what it was asked, a batch at a time."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        self.batches.append(codes.copy())
        return np.stack(
            [1.0 + codes.sum(axis=1), 40.0 - (codes * np.arange(1, codes.shape[1] + 1)).sum(axis=1)], axis=1
        )

    @property
    def rows(self) -> list[bytes]:
        return [row.tobytes() for batch in self.batches for row in batch]


def test_settings_are_those_of_the_authors(module: ModuleType) -> None:
    assert (module.POPULATION, module.PREDICTED, module.FOLDS) == (50, 20_000, 5)
    assert (module.CROSSOVER, module.CROSSOVER_ETA, module.MUTATION, module.MUTATION_ETA) == (0.9, 15, 0.02, 20)
    np.testing.assert_allclose(module.ALPHAS, [i / 10 for i in range(1, 101)])
    np.testing.assert_array_equal(module.COSTS, range(1, 101))


def test_populations_are_measured_until_the_budget_and_what_is_known_once_more(light: ModuleType) -> None:
    counts = np.full(4, 3)  # 81 architectures
    measured = Measured()
    light.linas(measured, counts, 130, np.random.default_rng(0))
    assert [len(batch) for batch in measured.batches] == [50, 50, 30]
    assert all(((batch >= 0) & (batch < 3)).all() for batch in measured.batches)
    for batch in measured.batches[1:]:
        assert len({row.tobytes() for row in batch}) == len(batch)  # of one population none twice
    assert len(set(measured.rows)) < 130
    few = Measured()
    light.linas(few, counts, 20, np.random.default_rng(0))
    assert [len(batch) for batch in few.batches] == [20]


def test_what_is_known_is_kept_out_where_that_is_asked(light: ModuleType) -> None:
    measured = Measured()
    light.linas(measured, np.full(5, 3), 120, np.random.default_rng(0), unique=True)
    known = {row.tobytes() for row in measured.batches[0]}
    for batch in measured.batches[1:]:
        fresh = {row.tobytes() for row in batch}
        assert len(fresh) == len(batch) and not fresh & known
        known |= fresh
    assert sum(map(len, measured.batches)) == 120


def test_the_last_architecture_of_a_space_is_found(module: ModuleType, rng: np.random.Generator) -> None:
    """It is seldom among the random ones that a round begins with."""
    counts = np.full(7, 3)
    every = np.indices(counts).reshape(7, -1).T
    banned = frozenset(row.tobytes() for row in every[:-1])
    assert module.nsga2(Measured(), counts, rng, banned).tolist() == [[2] * 7]


def test_every_objective_has_a_regression_of_all_that_was_measured(
    light: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, np.ndarray]] = []
    fitted = light.fitted

    def kept(codes: np.ndarray, values: np.ndarray, counts: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        told.append((len(codes), values))
        np.testing.assert_array_equal(values, Measured()(codes)[:, len(told) % 2 - 1])
        return fitted(codes, values, counts)

    monkeypatch.setattr(light, "fitted", kept)
    light.linas(Measured(), np.full(5, 3), 130, np.random.default_rng(0))
    assert [count for count, _ in told] == [50, 50, 100, 100]


def test_a_round_predicts_20000_of_which_the_first_are_random_and_the_last_the_best(
    module: ModuleType, rng: np.random.Generator
) -> None:
    counts, asked = np.full(6, 4), []

    def costs_of(codes: np.ndarray) -> np.ndarray:
        asked.append(codes.copy())
        return Measured()(codes)

    last = module.nsga2(costs_of, counts, rng, frozenset())
    assert sum(map(len, asked)) == 20_000 and {len(codes) for codes in asked} == {50}
    assert 0.15 < (asked[0] == 0).mean() < 0.35
    assert len(last) == len({row.tobytes() for row in last}) == 50
    every = Measured()(np.indices(counts).reshape(6, -1).T)
    front = {(total, every[every[:, 0] == total, 1].min()) for total in every[:, 0]}
    assert len(front) == 19 and front <= {tuple(each) for each in Measured()(last).tolist()}


def ridge(bits: np.ndarray, values: np.ndarray, alpha: float) -> Callable[[np.ndarray], np.ndarray]:
    """By the normal equations of centred columns."""
    centre, mean = bits.mean(axis=0), values.mean()
    gram = (bits - centre).T @ (bits - centre) + alpha * np.eye(bits.shape[1])
    slopes = np.linalg.solve(gram, (bits - centre).T @ (values - mean))
    return lambda asked: (asked - centre) @ slopes + mean


def eye(codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.stack([[float(c == o) for c, n in zip(row, counts, strict=True) for o in range(n)] for row in codes])


def test_sums_are_predicted_by_the_ridge_regression_of_least_percentage_error(
    module: ModuleType, rng: np.random.Generator
) -> None:
    counts = np.array([3, 4, 2, 3])
    codes, asked = rng.integers(counts, size=(50, 4)), rng.integers(counts, size=(30, 4))
    bits = eye(codes, counts)
    np.testing.assert_array_equal(module.one_hot(codes, counts), bits)
    values = -(300 + bits @ rng.normal(0, 30, bits.shape[1]) + rng.normal(0, 25, 50))  # costs of what is maximized
    errors = []
    for alpha in np.arange(1, 101) / 10:
        folds = []
        for fold in np.array_split(np.arange(50), 5):
            kept = np.setdiff1d(np.arange(50), fold)
            predicted = ridge(bits[kept], values[kept], alpha)(bits[fold])
            folds.append(np.mean(np.abs((predicted - values[fold]) / values[fold])))
        errors.append(np.mean(folds))
    best = (np.arange(1, 101) / 10)[int(np.argmin(errors))]
    np.testing.assert_allclose(
        module.fitted(codes, values, counts)(asked), ridge(bits, values, best)(eye(asked, counts)), rtol=1e-6
    )


def test_what_is_no_sum_is_predicted_by_the_support_vector_machine(
    module: ModuleType, rng: np.random.Generator
) -> None:
    counts = np.full(3, 2)
    codes = rng.integers(counts, size=(50, 3))
    values = 200.0 + 100.0 * (codes[:, 0] ^ codes[:, 1])  # no sum over choices is closer than 50
    assert np.abs(module.fitted(codes, values, counts)(codes) - values).max() < 20


def test_crossover_spreads_children_as_in_the_paper_of_it(module: ModuleType, rng: np.random.Generator) -> None:
    """Deb and Agrawal (1995): half of the spread factors are below 1, with P(b < x) = x^16 / 2, and 1 - x^-16 / 2."""
    a, b = np.full((4000, 10), 400.0), np.full((4000, 10), 600.0)
    low, high = np.full(10, -1e7), np.full(10, 1e7)
    child = module.crossed(a, b, low, high, rng)
    used = child != a
    assert used.mean() == pytest.approx(0.45, abs=0.01)  # half of the choices of 90 % of the pairs
    assert (~used).all(axis=1).mean() == pytest.approx(0.1 + 0.9 * 0.5**10, abs=0.02)
    assert child[used].mean() == pytest.approx(500, abs=5)
    spread = np.abs(child[used] - 500) / 100
    for x, share in ((0.9, 0.9**16 / 2), (0.97, 0.97**16 / 2), (1.03, 1 - 1.03**-16 / 2), (1.1, 1 - 1.1**-16 / 2)):
        assert (spread < x).mean() == pytest.approx(share, abs=0.015)
    assert (module.crossed(a, a, low, high, rng) == a).all()
    near = module.crossed(a, b, np.full(10, 399.5), np.full(10, 600.5), rng)
    assert near.min() >= 399.5 and near.max() <= 600.5


def test_mutation_moves_two_of_a_hundred_by_little(module: ModuleType, rng: np.random.Generator) -> None:
    """Deb and Goyal (1996): in the middle of a wide range P(step > t) = (1 - t)^21 of the range, both ways."""
    x = np.full((20_000, 20), 50.0)
    out = module.mutated(x, np.zeros(20), np.full(20, 100.0), rng)
    moved = out[out != x] - 50
    assert (out != x).mean() == pytest.approx(0.02, abs=0.001)
    assert (moved > 0).mean() == pytest.approx(0.5, abs=0.02)
    for step in (0.02, 0.05, 0.1):
        assert (np.abs(moved) > 100 * step).mean() == pytest.approx((1 - step) ** 21, abs=0.02)
    edge = module.mutated(np.zeros((5000, 20)), np.zeros(20), np.ones(20), rng)
    assert edge.min() == 0 and edge.max() <= 1


def test_tournaments_are_won_by_rank_then_by_crowding(module: ModuleType) -> None:
    """Of two parents the better one is in three of four tournaments; children stay near one of theirs."""
    codes, counts = np.array([[200], [800]]), np.array([1000])

    def share_near_first(rank: list[int], crowding: list[float]) -> float:
        rng = np.random.default_rng(0)
        made = [module.mated(codes, np.array(rank), np.array(crowding), counts, rng) for _ in range(40)]
        assert made[0].shape == (50, 1)
        return float((np.concatenate(made) < 500).mean())

    assert share_near_first([0, 1], [0.0, 9.0]) == pytest.approx(0.75, abs=0.04)
    assert share_near_first([1, 0], [9.0, 0.0]) == pytest.approx(0.25, abs=0.04)
    assert share_near_first([0, 0], [2.0, 1.0]) == pytest.approx(0.75, abs=0.04)
    assert share_near_first([1, 1], [1.0, np.inf]) == pytest.approx(0.25, abs=0.04)


def test_ranks_are_those_of_peeling_fronts_off(module: ModuleType, rng: np.random.Generator) -> None:
    costs = rng.integers(5, size=(40, 2)).astype(float)
    left, level, expected = set(range(40)), 0, np.zeros(40, int)
    while left:
        front = {i for i in left if not any((costs[j] <= costs[i]).all() and (costs[j] < costs[i]).any() for j in left)}
        expected[list(front)] = level
        left, level = left - front, level + 1
    np.testing.assert_array_equal(module.ranks(costs), expected)


def test_crowding_and_survivors_by_hand(module: ModuleType) -> None:
    front = np.array([[0.0, 10.0], [4.0, 6.0], [5.0, 5.0], [10.0, 0.0]])
    np.testing.assert_allclose(module.crowding_of(front), [np.inf, 0.5 + 0.5, 0.6 + 0.6, np.inf])
    everything = np.concatenate([front, front + 1])
    assert set(module.survivors(everything, 3).tolist()) == {0, 3, 2}
    assert set(module.survivors(everything, 6).tolist()) == {0, 1, 2, 3, 4, 7}
