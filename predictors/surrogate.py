"""Gaussian processes over codes: what a search believes of an expensive figure, and how sure it is of it.

Notation: n architectures, d choices, b bits; codes (n, d) are option indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SCALES = (1e-3, 1e2)  # bounds of the scale of a choice
USUAL_SCALE, SPREAD = 0.3, 2.0  # centre of the prior on scales, and its deviation on logarithms
STRENGTHS, STRENGTH_SPREAD = (1e-2, 1e2), 1.0  # the same of options, around 1
NOISES = (1e-4, 1.0)  # bounds of the variance of noise over that of the signal
USUAL_NOISE = 1e-2
LEAST_VARIANCE = 1e-5  # over that of the signal
FITTED_ROWS = 100  # that scales are found on; the process itself rests on all rows
ITERATIONS = 25


@dataclass(frozen=True)
class Encoding:
    """Codes as 0/1 vectors whose weighted squared distance counts the choices that differ.

    An ordered choice is a thermometer (code 2 of 4 options: 1, 1, 0), so that far options are far apart; another one
    has a one for its option, at half the weight since two places differ. Choices with the same number in `alike` have
    the same options, and share how strongly each of them sets an architecture apart.
    """

    counts: tuple[int, ...]
    ordered: tuple[bool, ...]
    alike: tuple[int, ...]

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """(n, d) -> (n, b), float64."""
        columns = []
        for column, (count, ordered) in enumerate(zip(self.counts, self.ordered, strict=True)):
            places = np.arange(1, count) if ordered else np.arange(count)
            code = codes[:, column, None]
            columns.append(code >= places if ordered else code == places)
        return np.concatenate(columns, axis=1).astype(np.float64)

    @cached_property
    def _sizes(self) -> list[int]:
        """Bits of each choice."""
        pairs = zip(self.counts, self.ordered, strict=True)
        return [count - 1 if ordered else count for count, ordered in pairs]

    @cached_property
    def owner(self) -> np.ndarray:
        """The choice of each bit, (b,)."""
        return np.repeat(np.arange(len(self.counts)), self._sizes)

    @cached_property
    def option(self) -> np.ndarray:
        """The strength of each bit, (b,), as a number from 0: choices that are alike share theirs."""
        told = zip(self.alike, self._sizes, strict=True)
        pairs = [(group, place) for group, size in told for place in range(size)]
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        return np.array([numbers[pair] for pair in pairs], np.int64)

    @cached_property
    def weight(self) -> np.ndarray:
        """Of each bit, (b,), so that with strengths of 1 a choice at its two ends is at distance one."""
        pairs = zip(self.counts, self.ordered, strict=True)
        return np.concatenate(
            [np.full(count - 1, 1 / max(count - 1, 1)) if ordered else np.full(count, 0.5) for count, ordered in pairs]
        )

    def weights(self, scales: np.ndarray, strengths: np.ndarray) -> np.ndarray:
        """Of each bit, (b,), from the scales (d,) of choices and the strengths of options."""
        return np.asarray(scales[self.owner] * strengths[self.option] * self.weight)


def kernel(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-distance) of bits a (n, b) and b (m, b), each bit that differs counting its weight; their type is kept."""
    root = np.sqrt(weights).astype(a.dtype)
    a, b = a * root, b * root
    exponent = (2 * a) @ b.T
    exponent -= (a**2).sum(axis=1)[:, None]
    exponent -= (b**2).sum(axis=1)[None, :]
    np.minimum(exponent, 0, out=exponent)
    return np.asarray(np.exp(exponent, out=exponent))


@dataclass(frozen=True)
class GaussianProcess:
    """A process of standardized values with the kernel exp(-distance), fitted.

    Each choice has a scale of its own (automatic relevance determination) and each option a strength, found with the
    noise by maximizing the marginal likelihood; a broad prior on their logarithms keeps the many choices of a large
    space in check. A choice with a small scale acts almost linearly, so that additive figures are learned from few
    values (COMBO, arXiv 1907.04870, has such kernels over graphs of choices).
    """

    encoding: Encoding
    bit_weights: np.ndarray  # (b,)
    noise: float  # its variance over that of the signal
    offset: float
    unit: float  # what values are divided by, after the offset
    amplitude: float  # variance of the signal, in units
    bits: np.ndarray
    factor: np.ndarray  # lower Cholesky factor of the kernel and noise of the rows
    weights: np.ndarray

    @classmethod
    def fit(cls, encoding: Encoding, codes: np.ndarray, values: np.ndarray) -> GaussianProcess:
        """Fit on codes (n, d) and finite values (n,); of many rows, the scales are found on every second, third, ..."""
        from scipy.optimize import minimize

        bits, targets = encoding.bits(codes), standardized(values)[0]
        some = slice(None, None, -(-len(values) // FITTED_ROWS))
        choices, options = len(encoding.counts), int(encoding.option.max()) + 1
        bounds = [np.log(SCALES)] * choices + [np.log(STRENGTHS)] * options + [np.log(NOISES)]
        start = np.log([*[USUAL_SCALE] * choices, *[1.0] * options, USUAL_NOISE])
        found = minimize(
            loss, start, args=(encoding, bits[some], targets[some]), jac=True, bounds=bounds, method="L-BFGS-B",
            options={"maxiter": ITERATIONS},
        )  # fmt: skip
        scales, strengths = np.exp(found.x[:choices]), np.exp(found.x[choices:-1])
        return cls.given(encoding, codes, values, encoding.weights(scales, strengths), float(np.exp(found.x[-1])))

    @classmethod
    def given(
        cls, encoding: Encoding, codes: np.ndarray, values: np.ndarray, bit_weights: np.ndarray, noise: float
    ) -> GaussianProcess:
        """The process with these weights of bits (b,) and this noise, on codes (n, d) and values (n,)."""
        from scipy.linalg import cho_solve, cholesky

        bits, targets, offset, unit = encoding.bits(codes), *standardized(values)
        factor = cholesky(kernel(bit_weights, bits, bits) + noise * np.eye(len(values)), lower=True)
        weights = cho_solve((factor, True), targets)
        amplitude = _amplitude(targets, weights)
        return cls(encoding, bit_weights, noise, offset, unit, amplitude, bits, factor, weights)

    def predict(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (n,) of the figure itself, without the noise of measuring it."""
        from scipy.linalg import solve_triangular

        # single precision is several times faster, and its error far below the deviations
        bits = self.encoding.bits(codes).astype(np.float32)
        cross = kernel(self.bit_weights, self.bits.astype(np.float32), bits)
        half = solve_triangular(self.factor.astype(np.float32), cross, lower=True, check_finite=False)
        variance = np.maximum(1.0 - np.einsum("ij,ij->j", half, half), LEAST_VARIANCE) * self.amplitude
        return self.offset + self.unit * (self.weights @ cross), self.unit * np.sqrt(variance)

    def left_out(self) -> np.ndarray:
        """What the process would predict (n,) of each of its rows, in units, from the others alone."""
        from scipy.linalg import solve_triangular

        root = solve_triangular(self.factor, np.eye(len(self.weights)), lower=True, check_finite=False)
        targets = self.factor @ (self.factor.T @ self.weights)
        return np.asarray(targets - self.weights / np.einsum("ij,ij->j", root, root))


def loss(parameters: np.ndarray, encoding: Encoding, bits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Negative log marginal likelihood with the amplitude at its best, plus the prior; and the gradient.

    Args:
        parameters: logarithms of the scales (d,), of the strengths of options, and of the noise.
        bits: (n, b).
        targets: (n,).
    """
    from scipy.linalg import cho_solve, cholesky

    choices, count, noise = len(encoding.counts), len(targets), float(np.exp(parameters[-1]))
    bit_weights = encoding.weights(np.exp(parameters[:choices]), np.exp(parameters[choices:-1]))
    similar = kernel(bit_weights, bits, bits)
    factor = cholesky(similar + noise * np.eye(count), lower=True, check_finite=False)
    inverse = cho_solve((factor, True), np.eye(count), check_finite=False)
    weights = inverse @ targets
    amplitude = _amplitude(targets, weights)
    away = np.append((parameters[:choices] - np.log(USUAL_SCALE)) / SPREAD, parameters[choices:-1] / STRENGTH_SPREAD)
    value = 0.5 * count * np.log(amplitude) + float(np.log(np.diag(factor)).sum()) + 0.5 * float(away @ away)
    sensitivity = np.outer(weights, weights) / amplitude - inverse
    weighted = sensitivity * similar
    # half the sum over pairs of weighted * (bit_i - bit_j)^2, for each bit
    per_bit = weighted.sum(axis=1) @ bits - np.einsum("ib,ib->b", bits, weighted @ bits)
    per_bit *= bit_weights
    gradient = np.append(
        np.bincount(encoding.owner, per_bit, choices) + away[:choices] / SPREAD,
        np.bincount(encoding.option, per_bit) + away[choices:] / STRENGTH_SPREAD,
    )
    return value, np.append(gradient, -0.5 * noise * np.trace(sensitivity))


def standardized(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(values - offset) / unit, offset, unit; the unit of values that are all the same is 1."""
    offset, unit = float(values.mean()), float(values.std()) or 1.0
    return (values - offset) / unit, offset, unit


def _amplitude(targets: np.ndarray, weights: np.ndarray) -> float:
    return max(float(targets @ weights) / len(targets), 1e-12)  # 0 where all values are the same


def ordered_choices(options: Sequence[Sequence[object]]) -> tuple[bool, ...]:
    """Which choices have rising or falling numbers as options."""
    return tuple(map(_is_ordered, options))


def _is_ordered(options: Sequence[object]) -> bool:
    numbers = [o for o in options if isinstance(o, int | float) and not isinstance(o, bool)]
    return len(numbers) == len(options) and numbers in (sorted(numbers), sorted(numbers, reverse=True))
