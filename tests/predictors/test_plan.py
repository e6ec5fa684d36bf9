"""The choice of what to measure, against determinants."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from predictors.plan import most_uncertain


def determinant(rows: np.ndarray, ridge: float) -> float:
    return float(np.linalg.det(rows.T @ rows + ridge * np.eye(rows.shape[1])))


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_each_choice_gains_the_most_determinant(rng: np.random.Generator, ridge: float) -> None:
    measured, candidates = rng.random((6, 3)), rng.random((9, 3))
    together = np.concatenate([measured, candidates])
    scale = np.sqrt((together**2).mean(axis=0))
    known = measured / scale
    left = set(range(9))
    for chosen in most_uncertain(measured, candidates, 4, ridge):
        gains = {row: determinant(np.vstack([known, candidates[row] / scale]), ridge * 6) for row in left}
        assert gains[chosen] == max(gains.values())
        left.remove(chosen)
        known = np.vstack([known, candidates[chosen] / scale])


def test_a_feature_that_was_never_measured_comes_first(rng: np.random.Generator) -> None:
    measured, candidates = rng.random((20, 4)), 0.1 * rng.random((30, 4))
    measured[:, 3] = 0
    candidates[:, 3] = 0
    candidates[17, 3] = 1e-6  # in whatever unit
    assert most_uncertain(measured, candidates, 1) == [17]


def test_nothing_is_chosen_twice_and_no_more_than_there_is(rng: np.random.Generator) -> None:
    assert sorted(most_uncertain(rng.random((5, 2)), rng.random((4, 2)), 9)) == [0, 1, 2, 3]
    assert most_uncertain(rng.random((5, 2)), np.ones((3, 2)), 2) == [0, 1]


def test_what_is_chosen_makes_coefficients_surer_than_chance_does(rng: np.random.Generator) -> None:
    measured, candidates = rng.random((4, 3)), rng.random((12, 3)) ** 3
    chosen = most_uncertain(measured, candidates, 3)
    volumes = [determinant(np.vstack([measured, candidates[list(some)]]), 0) for some in combinations(range(12), 3)]
    assert determinant(np.vstack([measured, candidates[chosen]]), 0) > np.quantile(volumes, 0.9)
