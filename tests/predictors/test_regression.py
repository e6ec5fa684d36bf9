"""Fitting and judging against closed forms, hand-written numbers and another solver."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from predictors.regression import (
    fit_coefficients,
    folds_of,
    matrix_of,
    predict_left_out,
    relative_interval,
    scores,
    with_constant,
)


def test_features_become_columns_and_absent_ones_zero() -> None:
    rows = [{"a": 1.0, "b": 2.0}, {"b": 3.0}]
    assert matrix_of(rows, ["b", "a"]).tolist() == [[2, 1], [3, 0]]
    assert matrix_of([], ["a", "b"]).shape == (0, 2)
    assert with_constant(np.array([[5.0], [6.0]])).tolist() == [[5, 1], [6, 1]]


def test_one_feature_has_a_closed_form() -> None:
    amount, latency = np.array([[1.0], [2.0], [5.0]]), np.array([2.0, 3.0, 12.0])
    ratio = amount[:, 0] / latency
    expected = ratio.sum() / ((1 + 0.1) * (ratio**2).sum())
    assert fit_coefficients(amount, latency, ridge=0.1)[0] == pytest.approx(expected, rel=1e-9)


def test_fit_agrees_with_another_solver_and_is_never_negative(rng: np.random.Generator) -> None:
    matrix = rng.random((30, 5)) * 10.0 ** np.arange(5)
    latency = matrix @ [1.0, 0.5, 0.0, 1e-3, 1e-4] * rng.uniform(0.8, 1.2, 30)
    found = fit_coefficients(matrix, latency, ridge=0.0)
    # bounded least squares of the relative error, columns scaled so that its tolerances suit all
    scale = 10.0 ** np.arange(5)
    other = lsq_linear(matrix / scale / latency[:, None], np.ones(30), bounds=(0, np.inf), tol=1e-13).x / scale
    assert (found >= 0).all()
    assert matrix @ found == pytest.approx(matrix @ other, rel=1e-5)


def test_a_feature_that_never_occurs_gets_no_price() -> None:
    matrix = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert fit_coefficients(matrix, np.array([3.0, 6.0]), ridge=0.0) == pytest.approx([3.0, 0.0])


def test_each_row_is_predicted_from_the_other_folds_only(rng: np.random.Generator) -> None:
    matrix, fold = rng.random((12, 2)) + 0.1, np.arange(12) % 4
    latency = matrix @ [1.0, 2.0]
    latency[fold == 2] *= 7  # the others must not see it, and it must not see itself
    left_out = predict_left_out(matrix, latency, fold, ridge=0.0)
    assert left_out[fold == 2] == pytest.approx(matrix[fold == 2] @ [1.0, 2.0])
    assert not np.allclose(left_out[fold == 0], latency[fold == 0])


def test_twins_share_a_fold(rng: np.random.Generator) -> None:
    matrix = np.repeat(rng.random((20, 3)), 2, axis=0)
    fold = folds_of(matrix, 5, rng)
    assert (fold[::2] == fold[1::2]).all()
    assert np.bincount(fold).tolist() == [8] * 5


def test_scores_by_hand() -> None:
    found = scores(np.array([1.1, 1.0, 6.0, 4.0]), np.array([1.0, 2.0, 4.0, 4.2]))
    errors = [0.1, 0.5, 0.5, 0.2 / 4.2]
    assert found["mape"] == pytest.approx(sum(errors) / 4)
    assert found["median_error"] == pytest.approx(0.3)
    assert found["max_error"] == pytest.approx(0.5)
    assert found["within_10_percent"] == pytest.approx(0.25)  # 1.1 / 1.0 - 1 is just above 0.1 in floats
    # ranks 2 1 4 3 against 1 2 3 4: 1 - 6 * 4 / (4 * 15)
    assert found["spearman"] == pytest.approx(0.6)


def test_what_is_constant_has_no_rank_correlation() -> None:
    constant, growing = np.full(3, 2.0), np.array([1.0, 2.0, 3.0])
    for pair in ((constant, growing), (growing, constant), (constant, constant)):
        assert scores(*pair)["spearman"] is None
    assert scores(growing, constant)["mape"] == pytest.approx(1 / 3)


def test_the_interval_is_the_conformal_quantile() -> None:
    predicted = np.ones(19)
    latency = 1 + np.arange(1, 20) / 100
    assert relative_interval(predicted, latency) == pytest.approx((0.18, 0.9))  # the 18th of 19
    assert relative_interval(predicted[:8], latency[:8]) == pytest.approx((0.08, 8 / 9))  # too few: the largest


def test_the_interval_covers_as_often_as_it_says(rng: np.random.Generator) -> None:
    hits = 0
    for _ in range(400):
        latency = np.exp(rng.normal(0, 0.2, 40))
        half, _ = relative_interval(np.ones(39), latency[:39])
        hits += abs(latency[39] - 1) <= half
    assert 0.86 <= hits / 400 <= 0.94


def test_what_was_measured_together_is_left_out_together() -> None:
    matrix = np.arange(24.0)[:, None]
    rng = np.random.default_rng(0)
    groups = [f"process {i // 4}" for i in range(24)]
    fold = folds_of(matrix, 10, rng, groups)
    assert len(set(fold)) == 6 and all(len(set(fold[i : i + 4])) == 1 for i in range(0, 24, 4))
    few = folds_of(matrix, 10, rng, [i // 8 for i in range(24)])  # three groups are too few
    assert len(set(few)) == 10
