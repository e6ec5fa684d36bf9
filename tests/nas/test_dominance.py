"""Dominance and hypervolume against brute force and closed forms, and how long they take."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from nas.dominance import beaten_by, dominated, hypervolume


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_exactly_the_rows_that_nothing_beats_are_kept_and_the_first_of_equals(
    objectives: int, rng: np.random.Generator
) -> None:
    for _ in range(40):
        costs = rng.integers(-3, 3, (25, objectives)).astype(float)
        for i, row in enumerate(costs):
            beaten = any((other <= row).all() and (other < row).any() for other in costs)
            repeated = any((other == row).all() for other in costs[:i])
            assert dominated(costs)[i] == (beaten or repeated)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_is_that_of_counted_unit_cells(objectives: int, rng: np.random.Generator) -> None:
    for _ in range(10):
        costs, reference = rng.integers(0, 6, (9, objectives)), np.full(objectives, 5)
        cells = itertools.product(range(5), repeat=objectives)
        expected = sum(any((row <= cell).all() for row in costs) for cell in cells)
        assert hypervolume(costs.astype(float), reference.astype(float)) == pytest.approx(expected)


def test_beaten_by_counts_only_leads_beyond_the_noise() -> None:
    costs, others = np.array([[1.0, 10.0], [2.0, 5.0], [1.0, 4.0]]), np.array([[0.99, 8.0], [2.0, 4.99]])
    assert beaten_by(costs, others, np.zeros(2)).tolist() == [True, True, False]
    assert beaten_by(costs, others, np.array([0.05, 0.05])).tolist() == [True, False, False]
    assert beaten_by(costs, others, np.array([0.05, 0.3])).tolist() == [False, False, False]


@pytest.mark.parametrize(("count", "objectives", "seconds"), [(10_000, 2, 0.05), (500, 3, 1.0), (200, 4, 5.0)])
def test_hypervolume_is_fast(count: int, objectives: int, seconds: float, rng: np.random.Generator) -> None:
    costs = -np.abs(rng.normal(size=(count, objectives)))
    costs /= np.linalg.norm(costs, axis=1, keepdims=True)
    start = time.process_time()
    hypervolume(costs, np.zeros(objectives))
    assert time.process_time() - start < seconds


@pytest.mark.parametrize("objectives", [2, 3])
def test_dominance_of_many_points_is_fast(objectives: int, rng: np.random.Generator) -> None:
    costs = -np.abs(rng.normal(size=(100_000, objectives)))
    costs /= np.linalg.norm(costs, axis=1, keepdims=True)
    start = time.process_time()
    assert not dominated(costs).any()
    assert time.process_time() - start < 3
