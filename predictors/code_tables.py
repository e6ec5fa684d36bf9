"""Latencies as tables over the codes of architectures: smooth, and a million of them in well under a second.

The logarithm of a latency is a constant, plus an entry for each choice, plus an entry for each pair of choices:

    log latency(x) = constant + sum over i of T_i[x_i] + sum over i < j of T_ij[x_i, x_j]

fitted by ridge regression; or the same of the latency itself, which layers that run one after the other add up to.
Measurements of one device scatter independently of those of another, so tables fitted on many architectures say more
about a device than each of its measurements does.

Notation: n architectures, d choices, S devices, p entries; `codes` (n, d) integers, `log_ms` (n, S), `entries` (p, S).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from hardware_profiles.files import write_bytes

SCHEMA = "fitnest.code_tables"
VERSION = 2
MOST_PAIR_ENTRIES = 1500  # beyond that the fit takes minutes
PAIR_SCALE = 0.5  # an entry of a pair pays four times the ridge of a single one
RIDGES = tuple(10.0**power for power in np.arange(-2, 4.5, 0.5))
ROWS_AT_ONCE = 8192  # so that what a look-up touches stays in the cache
LEAST = 0.5  # of the shortest latency fitted on: no sum of milliseconds is told to be less


@dataclass(frozen=True, eq=False)
class CodeTables:
    """Tables of one device or several.

    Attributes:
        options: how many options each of the d choices has.
        pairs: whether there are tables of pairs.
        constant: (S,), the logarithm of milliseconds, or milliseconds.
        entries: (p, S), the tables one after the other: those of single choices, then those of pairs.
        least_ms: (S,), nan for a device whose tables add up to the logarithm; else they add up to milliseconds, of
            which there are at least so many.
    """

    options: tuple[int, ...]
    pairs: bool
    constant: np.ndarray
    entries: np.ndarray
    least_ms: np.ndarray

    @classmethod
    def fit(
        cls,
        codes: np.ndarray,
        log_ms: np.ndarray,
        options: Sequence[int] | None = None,
        *,
        milliseconds: bool = False,
    ) -> CodeTables:
        """Fit on codes (n, d) and log-latencies (n, S), where NaN stands for what was not measured.

        Pairs are used where there are at least two measurements for each of their entries (and not more entries than
        `MOST_PAIR_ENTRIES`). The ridge of each device is the one with the smallest leave-one-out error.

        Args:
            options: how many options each choice has; by default one more than its largest code.
            milliseconds: try sums of milliseconds, too: each device gets those with the smaller leave-one-out error of
                the logarithm. Such tables cannot be `combined`.

        Raises ValueError for codes out of range or a device with fewer than 3 measurements.
        """
        codes = np.asarray(codes)
        sizes = tuple(int(code) + 1 for code in codes.max(axis=0)) if options is None else tuple(map(int, options))
        _check_codes(codes, sizes)
        if log_ms.ndim != 2 or len(log_ms) != len(codes):
            raise ValueError(f"expected log-latencies of shape ({len(codes)}, devices), got {log_ms.shape}")
        known = ~np.isnan(log_ms)
        fewest = int(known.sum(axis=0).min())
        if fewest < 3:
            raise ValueError(f"expected at least 3 measurements of each device, got {fewest}")
        pair_entries = sum(a * b for a, b in combinations(sizes, 2))
        pairs = 0 < pair_entries <= min(MOST_PAIR_ENTRIES, fewest // 2)
        inputs = encode(codes, sizes, pairs)
        shape = (inputs.shape[1], log_ms.shape[1])
        tables = cls(sizes, pairs, np.zeros(shape[1]), np.zeros(shape), np.full(shape[1], np.nan))
        for mask in np.unique(known, axis=1).T:  # devices measured on the same architectures are fitted together
            columns = np.flatnonzero((known == mask[:, None]).all(axis=0))
            tables._fit(columns, inputs[mask], log_ms[np.ix_(mask, columns)], milliseconds)
        return tables

    def _fit(self, columns: np.ndarray, inputs: np.ndarray, log_ms: np.ndarray, milliseconds: bool) -> None:
        """Set the tables of some devices, which were measured on the same architectures."""
        self.entries[:, columns], self.constant[columns], left_out = _ridge(inputs, log_ms)
        if not milliseconds:
            return
        ms = np.exp(log_ms)
        least = LEAST * ms.min(axis=0)
        entries, constant, left_out_ms = _ridge(inputs, ms)
        errors = (left_out - log_ms) ** 2, (np.log(np.maximum(left_out_ms, least)) - log_ms) ** 2
        better = errors[1].mean(axis=0) < errors[0].mean(axis=0)
        chosen = columns[better]
        self.entries[:, chosen], self.constant[chosen] = entries[:, better], constant[better]
        self.least_ms[chosen] = least[better]

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """The inputs (n, p) that the tables are linear in."""
        _check_codes(codes, self.options)
        return encode(codes, self.options, self.pairs)

    def log_ms(self, codes: np.ndarray) -> np.ndarray:
        """Log-latencies (n, S) of codes (n, d)."""
        codes = np.asarray(codes)
        _check_codes(codes, self.options)
        result = np.empty((len(codes), len(self.constant)))
        for start in range(0, len(codes), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            result[rows] = self._looked_up(np.ascontiguousarray(codes[rows].T, dtype=np.int64))
        summed = ~np.isnan(self.least_ms)
        if summed.any():
            result[:, summed] = np.log(np.maximum(result[:, summed], self.least_ms[summed]))
        return result

    def _looked_up(self, columns: np.ndarray) -> np.ndarray:
        total = np.broadcast_to(self.constant, (columns.shape[1], len(self.constant))).copy()
        scale = 1.0
        for size, (i, j), table in self._tables():
            index = columns[i] if j is None else columns[i] * size + columns[j]
            scale = 1.0 if j is None else PAIR_SCALE
            total += np.take(scale * table, index, axis=0)
        return total

    def _tables(self) -> Iterator[tuple[int, tuple[int, int | None], np.ndarray]]:
        """(options of the second choice, (first, second or None), entries) of each table."""
        start = 0
        for i, size in enumerate(self.options):
            yield 1, (i, None), self.entries[start : start + size]
            start += size
        for i, j in combinations(range(len(self.options)), 2) if self.pairs else ():
            size = self.options[j]
            yield size, (i, j), self.entries[start : start + self.options[i] * size]
            start += self.options[i] * size

    def combined(self, weights: np.ndarray, constant: float, more: np.ndarray | None = None) -> CodeTables:
        """Tables of one device: constant + sum of weights (S,) times these tables + `more` (p,) entries.

        Raises ValueError for tables that add up to milliseconds, since logarithms are what is combined.
        """
        if not np.isnan(self.least_ms).all():
            raise ValueError("tables that add up to milliseconds cannot be combined; fit them with milliseconds=False")
        entries = self.entries @ weights + (0.0 if more is None else more)
        total = np.array([constant + float(self.constant @ weights)])
        return CodeTables(self.options, self.pairs, total, entries[:, None], np.full(1, np.nan))

    def save(self, path: str | Path) -> None:
        """Write it as npz, whole or not at all."""
        stream = io.BytesIO()
        np.savez_compressed(
            stream,
            schema=np.array(SCHEMA),
            version=np.array(VERSION),
            options=np.array(self.options, dtype=np.int64),
            pairs=np.array(self.pairs),
            constant=self.constant,
            entries=self.entries,
            least_ms=self.least_ms,
        )
        write_bytes(Path(path), stream.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> CodeTables:
        """Read back what `save` wrote; raises ValueError, saying what is wrong, for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["schema"]) != SCHEMA:
                    raise ValueError(f"its schema is {str(file['schema'])!r}, expected {SCHEMA!r}")
                if int(file["version"]) != VERSION:
                    raise ValueError(f"its version is {int(file['version'])}, this program reads {VERSION}")
                options = tuple(int(size) for size in file["options"])
                tables = cls(options, bool(file["pairs"]), file["constant"], file["entries"], file["least_ms"])
        except (KeyError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no tables that can be read ({error}); fit them again") from None
        width = encode(np.zeros((1, len(options)), dtype=np.int64), options, tables.pairs).shape[1]
        devices = tables.least_ms.shape
        if len(devices) != 1 or tables.constant.shape != devices or tables.entries.shape != (width, *devices):
            raise ValueError(f"{path} is damaged: {tables.entries.shape} entries for options {options}; fit them again")
        return tables


def encode(codes: np.ndarray, options: Sequence[int], pairs: bool) -> np.ndarray:
    """One-hot codes of choices, then of pairs of choices times `PAIR_SCALE`: (n, p)."""
    rows = np.arange(len(codes))

    def one_hot(index: np.ndarray, size: int, value: float) -> np.ndarray:
        block = np.zeros((len(codes), size))
        block[rows, index] = value
        return block

    blocks = [one_hot(codes[:, i], size, 1.0) for i, size in enumerate(options)]
    for i, j in combinations(range(len(options)), 2) if pairs else ():
        blocks.append(one_hot(codes[:, i] * options[j] + codes[:, j], options[i] * options[j], PAIR_SCALE))
    return np.hstack(blocks)


def _ridge(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries (p, S), constant (S,) and each target (n, S) as predicted from the others.

    The ridge of each column is the one with the smallest leave-one-out error.
    """
    mean_input, mean = inputs.mean(axis=0), targets.mean(axis=0)
    centred = inputs - mean_input
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values = np.maximum(values, 0.0)
    projected = centred @ vectors  # (n, p)
    products = projected.T @ (targets - mean)
    squares = projected**2
    best = np.full(targets.shape[1], np.inf)
    entries, residuals = np.zeros((inputs.shape[1], targets.shape[1])), np.zeros(targets.shape)
    for ridge in RIDGES:
        solved = products / (values + ridge)[:, None]
        leverage = squares @ (1 / (values + ridge)) + 1 / len(inputs)
        residual = (targets - mean - projected @ solved) / (1 - leverage)[:, None].clip(1e-6)
        error = (residual**2).mean(axis=0)
        better = error < best
        best[better] = error[better]
        entries[:, better], residuals[:, better] = (vectors @ solved)[:, better], residual[:, better]
    return entries, mean - mean_input @ entries, targets - residuals


def _check_codes(codes: np.ndarray, options: Sequence[int]) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(options) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"expected integer codes of shape (n, {len(options)}), got {codes.dtype} {codes.shape}")
    if codes.size and (codes.min() < 0 or (codes.max(axis=0) >= np.array(options)).any()):
        raise ValueError(f"expected codes below {tuple(options)}, got up to {tuple(codes.max(axis=0).tolist())}")
