"""Gaussian processes over codes: what a search believes of an expensive figure, and how sure it is of it.

Notation: n architectures, d choices; codes (n, d) are option indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SQUARED_LENGTHS = (1e-3, 1e2)  # bounds of the inverse squared length scales
NOISES = (1e-6, 1.0)  # bounds of the noise variance over the signal's
JITTER = 1e-8


@dataclass(frozen=True)
class Encoding:
    """Codes as 0/1 vectors whose squared distance counts the choices that differ.

    An ordered choice is a thermometer (code 2 of 4 options: 1, 1, 0), so that far options are far apart; another one
    has a one for its option, at half the weight since two places differ.
    """

    counts: tuple[int, ...]
    ordered: tuple[bool, ...]

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """(n, d) -> (n, number of bits), float64."""
        columns = []
        for column, (count, ordered) in enumerate(zip(self.counts, self.ordered, strict=True)):
            places = np.arange(1, count) if ordered else np.arange(count)
            code = codes[:, column, None]
            columns.append(code >= places if ordered else code == places)
        return np.concatenate(columns, axis=1).astype(np.float64)

    @property
    def owner(self) -> np.ndarray:
        """The choice of each bit."""
        pairs = zip(self.counts, self.ordered, strict=True)
        return np.repeat(np.arange(len(self.counts)), [count - 1 if ordered else count for count, ordered in pairs])

    @property
    def weight(self) -> np.ndarray:
        """Of each bit, so that a choice at its two ends is at distance one."""
        pairs = zip(self.counts, self.ordered, strict=True)
        return np.concatenate(
            [np.full(count - 1, 1 / max(count - 1, 1)) if ordered else np.full(count, 0.5) for count, ordered in pairs]
        )


class GaussianProcess:
    """A zero-mean process of standardized values with the kernel exp(-sum of scale_j * distance_j).

    Each choice has a scale of its own (automatic relevance determination), found with the noise by maximizing the
    marginal likelihood; a broad prior on their logarithms keeps the many choices of a large space in check. A choice
    with a small scale acts almost linearly, so that additive figures are learned from few values (COMBO, arXiv
    1907.04870, has such kernels over graphs of choices).

    Args:
        encoding: of the codes.
        restarts: scales to start from; the second and later ones are random.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self._parameters = np.log(np.concatenate([np.full(len(encoding.counts), 0.3), [1e-2]]))

    def fit(self, codes: np.ndarray, values: np.ndarray, iterations: int = 40) -> GaussianProcess:
        """Fit on codes (n, d) and values (n,); starts from the scales of the last fit."""
        from scipy.linalg import cho_factor, cho_solve
        from scipy.optimize import minimize

        self._bits = self.encoding.bits(codes)
        self._mean, self._deviation = float(values.mean()), float(values.std()) or 1.0
        targets = (values - self._mean) / self._deviation
        bounds = [tuple(np.log(SQUARED_LENGTHS))] * len(self.encoding.counts) + [tuple(np.log(NOISES))]
        found = minimize(
            self._loss, self._parameters, args=(targets,), jac=True, bounds=bounds, method="L-BFGS-B",
            options={"maxiter": iterations},
        )  # fmt: skip
        self._parameters = found.x
        kernel = self._kernel(self._bits, self._bits) + self._noise * np.eye(len(values))
        self._factor = cho_factor(kernel, lower=True)
        self._weights = cho_solve(self._factor, targets)
        self._amplitude = float(targets @ self._weights) / len(values)
        return self

    def predict(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (n,) of the figure itself, without the noise of measuring it."""
        from scipy.linalg import solve_triangular

        cross = self._kernel(self.encoding.bits(codes), self._bits)
        mean = cross @ self._weights
        half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
        variance = np.maximum(1.0 - np.einsum("ij,ij->j", half, half), 1e-9) * self._amplitude
        return self._mean + self._deviation * mean, self._deviation * np.sqrt(variance)

    @property
    def _noise(self) -> float:
        return float(np.exp(self._parameters[-1])) + JITTER

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        root = np.sqrt(np.exp(self._parameters[:-1])[self.encoding.owner] * self.encoding.weight)
        a, b = a * root, b * root
        squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
        return np.exp(-np.maximum(squared, 0.0))

    def _loss(self, parameters: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log marginal likelihood with the amplitude at its best, plus the prior; and the gradient."""
        from scipy.linalg import cho_factor, cho_solve

        self._parameters = parameters
        count, bits = len(targets), self._bits
        kernel = self._kernel(bits, bits)
        factor = cho_factor(kernel + self._noise * np.eye(count), lower=True)
        weights = cho_solve(factor, targets)
        amplitude = float(targets @ weights) / count
        centre = np.log(0.3)
        prior = 0.5 * float((((parameters[:-1] - centre) / 2.0) ** 2).sum())
        loss = 0.5 * count * np.log(amplitude) + float(np.log(np.diag(factor[0])).sum()) + prior
        inverse = cho_solve(factor, np.eye(count))
        sensitivity = np.outer(weights, weights) / amplitude - inverse
        weighted = sensitivity * kernel
        # sum over pairs of weighted * (bit_i - bit_j)^2, for each bit
        per_bit = 2 * (weighted.sum(axis=1) @ bits**2 - np.einsum("ib,ib->b", bits, weighted @ bits))
        per_choice = np.bincount(self.encoding.owner, per_bit * self.encoding.weight, len(self.encoding.counts))
        gradient = 0.5 * np.exp(parameters[:-1]) * per_choice + (parameters[:-1] - centre) / 4.0
        noise_gradient = -0.5 * np.exp(parameters[-1]) * np.trace(sensitivity)
        return loss, np.append(gradient, noise_gradient)


def ordered_choices(options: Sequence[Sequence[object]]) -> tuple[bool, ...]:
    """Which choices have numbers as options, which lie in an order."""
    return tuple(all(isinstance(o, int | float) and not isinstance(o, bool) for o in each) for each in options)
