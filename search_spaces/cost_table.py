"""Costs of many architectures at once: sums over layers, or the largest of slots, looked up slot by slot.

What a slot costs depends on the choices it reads and on the precision of the tensor it is fed with, and on nothing
else (`layers.chain` holds that). So one number for each combination that occurs is enough, and the cost of n
architectures is a few look-ups in arrays. Combinations are lowered when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from search_spaces.layers import INPUT, PREV, Layer, chain
from search_spaces.precision import FP32, Precision
from search_spaces.space import SearchSpace, Slot

SlotCost = Callable[[Sequence[Layer], Precision], Sequence[float]]
ROWS_AT_ONCE = 1 << 15  # of one number each: what stays in a core's cache
FEWEST_ROWS = 1 << 12  # at once, however many numbers a row has
MOST_COMBINATIONS = 1 << 24  # of one slot, for which an index of four bytes each is kept
UNSEEN = -1


class CostTable:
    """Costs that are sums over slots, or the largest of slots, for the architectures of a space given as codes.

    Args:
        space: whose architectures.
        cost: k numbers for the layers of one slot, which read each other and one tensor of the precision given:
            `PREV`, or `INPUT` in the first slot.
        width: k.
        dtype: int64 keeps whole numbers exact; float64 sums in the order of the slots.
        maxima: so many of the k, the last ones, are not summed: the largest of all slots counts, at least 0.
    """

    def __init__(
        self, space: SearchSpace, cost: SlotCost, width: int = 1, dtype: type = np.float64, maxima: int = 0
    ) -> None:
        self.space = space
        self.width = width
        self.dtype = dtype
        self.maxima = maxima
        self._rows_at_once = max(ROWS_AT_ONCE // width, FEWEST_ROWS)
        self._precisions: list[Precision] = [FP32]  # the image's comes first
        self._slots = [_SlotTable(space, slot, cost, width, dtype, self._precisions) for slot in space.slots]

    def costs(self, codes: np.ndarray) -> np.ndarray:
        """Costs of n architectures: codes (n, number of choices) -> (n, k).

        Codes of inactive choices change nothing. Raises ValueError for another shape or a code out of range.
        """
        codes = np.asarray(codes)
        self._check(codes)
        step = self._rows_at_once
        parts = [self._part(codes[start : start + step]) for start in range(0, len(codes), step)]
        return np.concatenate(parts) if parts else np.zeros((0, self.width), self.dtype)

    def _part(self, codes: np.ndarray) -> np.ndarray:
        columns = np.ascontiguousarray(codes.T, dtype=np.int64)
        total: np.ndarray = np.zeros((codes.shape[0], self.width), self.dtype)
        fed_with = np.zeros(codes.shape[0], np.int64)
        summed = self.width - self.maxima
        largest: np.ndarray = np.zeros((codes.shape[0], self.maxima), self.dtype)
        for slot in self._slots:
            row = slot.rows(columns, fed_with)
            values = slot.values.take(row, axis=0)
            total += values  # whole rows: of the maxima too, which are replaced below
            if self.maxima:
                np.maximum(largest, values[:, summed:], out=largest)
            fed_with = slot.makes.take(row)
        total[:, summed:] = largest
        return total

    def slot_costs(self, slot: int, codes: np.ndarray, fed_with: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Costs (n, k) of one slot alone, by its place, and the precision (n,) that it makes.

        Of codes (n, number of choices) only those that the slot reads count. A precision is a number that the table
        gave it, 0 that of the image, which the first slot is fed with.
        """
        table = self._slots[slot]
        row = table.rows(np.ascontiguousarray(codes.T, dtype=np.int64), np.asarray(fed_with, np.int64))
        return table.values.take(row, axis=0), table.makes.take(row)

    def _check(self, codes: np.ndarray) -> None:
        counts = np.array([len(choice.options) for choice in self.space.choices])
        if codes.ndim != 2 or codes.shape[1] != len(counts) or codes.dtype.kind not in "iu":
            raise ValueError(f"expected whole codes of shape (n, {len(counts)}), got {codes.dtype} {codes.shape}")
        if codes.size and (codes.min() < 0 or (codes.max(axis=0) >= counts).any()):
            worst = int(np.argmax((codes.max(axis=0) >= counts) | (codes.min(axis=0) < 0)))
            raise ValueError(f"a code of {self.space.choices[worst].name} is not in 0..{counts[worst] - 1}")


class _SlotTable:
    """What is known of one slot: for each combination seen, its costs and the precision of what it makes."""

    def __init__(
        self,
        space: SearchSpace,
        slot: Slot,
        cost: SlotCost,
        width: int,
        dtype: type,
        precisions: list[Precision],
    ) -> None:
        names = [choice.name for choice in space.choices]
        self.slot, self.cost, self.precisions = slot, cost, precisions
        self.source = INPUT if slot is space.slots[0] else PREV
        self.read = [(names.index(name), space.choice(name)) for name in slot.reads]
        self.combinations = prod(len(choice.options) for _, choice in self.read)
        self.values: np.ndarray = np.zeros((0, width), dtype)
        self.makes = np.zeros(0, np.int64)
        self.row_of: dict[int, int] = {}
        self.row_of_layers: dict[tuple[int, ...], tuple[int, tuple[Layer, ...]]] = {}  # by their ids, kept alive here
        self.index = np.zeros(0, np.int32)  # combination -> row, as far as a table of them is reasonable

    def rows(self, columns: np.ndarray, fed_with: np.ndarray) -> np.ndarray:
        """Rows of `values` and `makes` for codes (number of choices, n) and indices of precisions (n,)."""
        keys = fed_with.copy()
        for column, choice in self.read:
            keys *= len(choice.options)
            keys += columns[column]
        self._grow_index()
        if not len(self.index):  # too many combinations to list
            seen, inverse = np.unique(keys, return_inverse=True)
            self._learn([key for key in seen.tolist() if key not in self.row_of])
            return np.array([self.row_of[key] for key in seen.tolist()])[inverse.ravel()]
        rows = self.index.take(keys)
        if rows.size and rows.min() == UNSEEN:
            self._learn(np.unique(keys[rows == UNSEEN]).tolist())
            rows = self.index.take(keys)
        return rows

    def _grow_index(self) -> None:
        wanted = len(self.precisions) * self.combinations
        if wanted > MOST_COMBINATIONS:
            self.index = self.index[:0]
        elif len(self.index) < wanted:
            self.index = np.concatenate([self.index, np.full(wanted - len(self.index), UNSEEN, np.int32)])

    def _learn(self, keys: Sequence[int]) -> None:
        """Lower the slot for combinations that are new, and keep what they cost."""
        if not keys:
            return
        costs: list[Sequence[float]] = []
        makes: list[int] = []
        for key in keys:
            precision, layers = self._lowered(key)
            # two depths of a stage lower most of its blocks to the very same layers
            same = (precision, *map(id, layers))
            if same not in self.row_of_layers:
                cost, made = self._costed(layers, self.precisions[precision])
                self.row_of_layers[same] = (len(self.makes) + len(makes), layers)
                costs.append(cost)
                makes.append(made)
            self.row_of[key] = row = self.row_of_layers[same][0]
            if len(self.index):
                self.index[key] = row
        if costs:
            self.values = np.concatenate([self.values, np.array(costs, self.values.dtype)])
            self.makes = np.concatenate([self.makes, np.array(makes, np.int64)])

    def _lowered(self, key: int) -> tuple[int, tuple[Layer, ...]]:
        """The index of the precision that a combination is fed with, and the layers of the slot."""
        values = {}
        for _, choice in reversed(self.read):
            key, code = divmod(key, len(choice.options))
            values[choice.name] = choice.options[code]
        return key, self.slot.lower(values)

    def _costed(self, raw: tuple[Layer, ...], precision: Precision) -> tuple[Sequence[float], int]:
        """What layers cost that are fed with a precision, and the index of the precision that they make."""
        layers = chain(raw, self.source, precision)
        made = layers[-1].precision if layers else precision
        if made not in self.precisions:
            self.precisions.append(made)
        return self.cost(layers, precision), self.precisions.index(made)
