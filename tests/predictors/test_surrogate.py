"""Gaussian processes over codes, against scikit-learn's and finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from predictors.surrogate import Encoding, GaussianProcess, kernel, loss, ordered_choices, standardized

ENCODING = Encoding((3, 4, 1, 2), (False, True, True, False), (0, 1, 2, 3))


def random_codes(count: int, rng: np.random.Generator, encoding: Encoding = ENCODING) -> np.ndarray:
    return rng.integers(encoding.counts, size=(count, len(encoding.counts)))


def test_distance_counts_choices_that_differ_and_steps_of_ordered_ones() -> None:
    codes = np.array([[0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 1, 0, 1]])
    bits = ENCODING.bits(codes)
    weights = ENCODING.weights(np.array([0.5, 0.7, 9.0, 0.2]), np.ones(ENCODING.option.max() + 1))
    distance = -np.log(kernel(weights, bits, bits))
    np.testing.assert_allclose(distance[0], [0, 0.5, 0.7, 0.7 / 3 + 0.2], atol=1e-12)
    np.testing.assert_allclose(distance[1, 3], 0.5 + 0.7 / 3 + 0.2)


def test_choices_that_are_alike_share_the_strengths_of_their_options() -> None:
    encoding = Encoding((3, 3, 3), (False,) * 3, (0, 0, 1))
    strengths = np.array([1.0, 4.0, 6.0, 1.0, 1.0, 1.0])  # of the options of the first two choices, and of the third
    bits = encoding.bits(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 2]]))
    distance = -np.log(kernel(encoding.weights(np.array([1.0, 2.0, 0.5]), strengths), bits, bits))
    np.testing.assert_allclose(distance[0], [0, (1 + 4) / 2, 2 * (1 + 4) / 2, 2 * (1 + 6) / 2, 0.5], atol=1e-12)


def test_what_is_left_out_is_what_a_process_without_it_predicts(rng: np.random.Generator) -> None:
    encoding = Encoding((4, 5, 3), (False, True, False), (0, 1, 2))
    codes, values = random_codes(25, rng, encoding), rng.standard_normal(25)
    weights = rng.uniform(0.1, 1, len(encoding.owner))
    targets = (values - values.mean()) / values.std()
    left_out = GaussianProcess.given(encoding, codes, values, weights, 0.1).left_out()
    bits = encoding.bits(codes)
    for row in range(25):
        others = np.arange(25) != row
        gram = kernel(weights, bits[others], bits[others]) + 0.1 * np.eye(24)
        expected = kernel(weights, bits[row : row + 1], bits[others]) @ np.linalg.solve(gram, targets[others])
        assert left_out[row] == pytest.approx(float(expected[0]), abs=1e-9)


def test_predictions_are_those_of_scikit_learn_on_the_same_kernel(rng: np.random.Generator) -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    encoding = Encoding((4, 5, 3), (False, False, False), (0, 1, 2))
    codes, asked = random_codes(40, rng, encoding), random_codes(30, rng, encoding)
    values = 5 + 3 * rng.standard_normal(40)
    scales, noise = np.array([0.3, 1.2, 0.1]), 0.05
    weights = encoding.weights(scales, np.ones(12))
    process = GaussianProcess.given(encoding, codes, values, weights, noise)

    one_hot = [
        np.concatenate([np.eye(n)[c] for n, c in zip((4, 5, 3), x.T, strict=True)], axis=1) for x in (codes, asked)
    ]
    # exp(-scale * |difference|^2 / 2) is an RBF of length 1 / sqrt(scale)
    other = GaussianProcessRegressor(RBF(np.repeat(scales**-0.5, (4, 5, 3))), alpha=noise, optimizer=None)
    targets = (values - values.mean()) / values.std()
    other.fit(one_hot[0], targets)
    mean, deviation = other.predict(one_hot[1], return_std=True)
    gram = other.kernel_(one_hot[0]) + noise * np.eye(40)
    amplitude = targets @ np.linalg.solve(gram, targets) / 40
    found = process.predict(asked)
    np.testing.assert_allclose(found[0], values.mean() + values.std() * mean, rtol=1e-4)  # single precision
    np.testing.assert_allclose(found[1], values.std() * deviation * np.sqrt(amplitude), rtol=1e-3)


def test_gradient_of_the_loss_by_finite_differences(rng: np.random.Generator) -> None:
    encoding = Encoding((3, 4, 1, 3), (False, True, True, False), (0, 1, 2, 0))
    bits, targets = encoding.bits(random_codes(25, rng, encoding)), rng.standard_normal(25)
    parameters = rng.normal(-1, 1, 4 + encoding.option.max() + 1 + 1)
    _, gradient = loss(parameters, encoding, bits, targets)
    for index in range(len(parameters)):
        step = np.zeros(len(parameters))
        step[index] = 1e-5
        up, down = (loss(parameters + sign * step, encoding, bits, targets)[0] for sign in (1, -1))
        assert gradient[index] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-6)


def test_a_fit_learns_which_choice_matters_and_predicts_what_it_did_not_see(rng: np.random.Generator) -> None:
    encoding = Encoding((4,) * 5, (True, False, True, False, True), tuple(range(5)))
    effect = np.array([0.0, 3.0, -1.0, 2.0])

    def figure(codes: np.ndarray) -> np.ndarray:
        return np.asarray(2.0 * codes[:, 0] + effect[codes[:, 1]])

    codes, asked = random_codes(60, rng, encoding), random_codes(200, rng, encoding)
    process = GaussianProcess.fit(encoding, codes, figure(codes))
    importance = np.bincount(encoding.owner, process.bit_weights)
    assert min(importance[:2]) > max(importance[2:])
    mean, deviation = process.predict(asked)
    seen = {(a, b) for a, b, *_ in codes.tolist()}
    known = np.array([(a, b) in seen for a, b, *_ in asked.tolist()])
    error = np.abs(mean - figure(asked))  # of figures from -1 to 9
    assert error[known].mean() < 0.005 and error.mean() < 0.2
    assert (deviation > 0).all()


def test_scales_rest_on_rows_from_all_of_them(rng: np.random.Generator) -> None:
    """The first choice matters where the second one has other options than those of the first half of the rows."""
    encoding = Encoding((4,) * 3, (False,) * 3, tuple(range(3)))
    codes = random_codes(240, rng, encoding)
    codes[:120, 1], codes[120:, 1] = 0, np.maximum(codes[120:, 1], 1)
    process = GaussianProcess.fit(encoding, codes, 3.0 * codes[:, 0] * (codes[:, 1] > 0))
    importance = np.bincount(encoding.owner, process.bit_weights)
    assert importance[0] > 3 * importance[2]


def test_values_that_are_all_the_same(rng: np.random.Generator) -> None:
    process = GaussianProcess.fit(ENCODING, random_codes(5, rng), np.full(5, 7.0))
    mean, deviation = process.predict(random_codes(9, rng))
    np.testing.assert_allclose(mean, 7.0)
    assert np.isfinite(deviation).all()
    assert standardized(np.full(3, 2.0))[1:] == (2.0, 1.0)


def test_ordered_choices_are_rising_or_falling_numbers() -> None:
    options = [(1, 2, 3), (3.0, 2, 1), (1, 3, 2), ("a", "b"), (False, True)]
    assert ordered_choices(options) == (True, True, False, False, False)
