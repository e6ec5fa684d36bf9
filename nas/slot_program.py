"""The best architecture for a sum over slots, or for the largest of slots, by dynamic programming.

A slot costs what its choices and the precision it is fed with say. Slots share few choices (the resolution, the width
and the depth of a stage), so that architectures are paths: a state is the shared choices decided so far that a later
slot still reads, and the precision of the tensor made last; a row is one way for a slot to go from a state to another.
The path of least cost is found exactly, from the last slot to the first, without listing architectures.

Notation: a slot has r rows; costs of rows are arrays (r,), one for each slot; k columns of a `CostTable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search_spaces import CostTable, SearchSpace

MOST_ROWS = 40_000  # over all slots: what is lowered in a few seconds at most
RowCosts = Sequence[np.ndarray]


class TooManyRows(RuntimeError):
    """Slots with more combinations of choices than can be listed."""


@dataclass(frozen=True, eq=False)
class Slotwise:
    """The rows of one slot, sorted by the state they start from.

    codes: (r, d), of which those that the slot reads count.
    costs: (r, k), finite.
    origin, target: (r,), the states before and after the slot.
    starts: where the rows of each state begin, for every state before the slot.
    """

    reads: tuple[int, ...]
    codes: np.ndarray
    costs: np.ndarray
    origin: np.ndarray
    target: np.ndarray
    starts: np.ndarray

    def of(self, state: int) -> slice:
        """The rows that start from a state."""
        end = self.starts[state + 1] if state + 1 < len(self.starts) else len(self.origin)
        return slice(int(self.starts[state]), int(end))


class SlotProgram:
    """All paths of architectures with legal codes and finite costs.

    Args:
        table: of the costs.
        legal: the codes of each choice that may be used, by its place.

    Raises TooManyRows. Without `slots` no architecture has finite costs.
    """

    def __init__(self, table: CostTable, legal: Sequence[Sequence[int]]) -> None:
        self.table, self.space = table, table.space
        self.legal = [np.asarray(codes, np.int64) for codes in legal]
        self._index = {choice.name: i for i, choice in enumerate(self.space.choices)}
        self.slots = self._without_dead_ends(self._listed())

    def path(self, costs: RowCosts, togo: Sequence[np.ndarray], *, largest: bool = False) -> list[int]:
        """The row of each slot on the path of least cost; `togo` is what `least_togo` says of the same costs."""
        state, rows = 0, []
        for slot, cost, left in zip(self.slots, costs, togo[1:], strict=True):
            here = slot.of(state)
            rest = left[slot.target[here]]
            through = np.maximum(cost[here], rest) if largest else cost[here] + rest
            rows.append(here.start + int(np.argmin(through)))
            state = int(slot.target[rows[-1]])
        return rows

    def least_togo(self, costs: RowCosts, *, largest: bool = False) -> list[np.ndarray]:
        """The least cost from each state to the end, before each slot and after the last: the sum of the rows of a
        path, or the largest of them. Infinite where rows of infinite cost are all there is."""
        togo = [np.zeros(1 + int(self.slots[-1].target.max()))]
        for slot, cost in zip(reversed(self.slots), reversed(costs), strict=True):
            rest = togo[0][slot.target]
            through = np.maximum(cost, rest) if largest else cost + rest
            togo.insert(0, np.minimum.reduceat(through, slot.starts))
        return togo

    def least(self, costs: RowCosts, *, largest: bool = False) -> tuple[float, list[int]]:
        """(cost, rows) of the path of least cost; infinite costs keep rows out, and may leave no path."""
        togo = self.least_togo(costs, largest=largest)
        return float(togo[0][0]), self.path(costs, togo, largest=largest)

    def codes(self, rows: Sequence[int]) -> np.ndarray:
        """The canonical architecture (d,) of a path."""
        codes = np.array([codes[0] for codes in self.legal])
        for slot, row in zip(self.slots, rows, strict=True):
            read = list(slot.reads)
            codes[read] = slot.codes[row, read]
        return np.array(self.space.from_codes(codes).codes)

    # listing -------------------------------------------------------------------------------------------

    def _listed(self) -> list[Slotwise]:
        """Slot by slot, every state that is reached and every row from there."""
        count = len(self.space.choices)
        reads = [tuple(sorted(self._index[name] for name in slot.reads)) for slot in self.space.slots]
        states = np.zeros((1, count + 1), np.int64)  # codes, and the precision that the next slot is fed with
        held: set[int] = set()
        slots: list[Slotwise] = []
        total = 0
        for place, wanted in enumerate(reads):
            rows, origin = states, np.arange(len(states))
            for choice in (i for i in wanted if i not in held):
                held.add(choice)
                rows, origin = self._with_options(rows, origin, choice, held)
                if total + len(rows) > MOST_ROWS:
                    raise TooManyRows(f"more than {MOST_ROWS} combinations at {self.space.slots[place].name}")
            total += len(rows)
            costs, made = self.table.slot_costs(place, rows[:, :count], rows[:, count])
            held &= {choice for later in reads[place + 1 :] for choice in later}
            after = np.concatenate([np.where(_mask(held, count), rows[:, :count], 0), made[:, None]], axis=1)
            states, target = _distinct(after, [*self._sizes(), int(made.max()) + 1])
            slots.append(Slotwise(wanted, rows[:, :count], costs, origin, target, np.zeros(0, np.int64)))
        return slots

    def _sizes(self) -> list[int]:
        return [len(choice.options) for choice in self.space.choices]

    def _with_options(
        self, rows: np.ndarray, origin: np.ndarray, choice: int, held: set[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each row once for every legal code of a choice, or for the first where the choice changes nothing."""
        legal = self.legal[choice]
        counts = np.where(self._active(rows, choice, held), len(legal), 1)
        which = np.repeat(np.arange(len(rows)), counts)
        place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        grown = rows[which]
        grown[:, choice] = legal[place]
        return grown, origin[which]

    def _active(self, rows: np.ndarray, choice: int, held: set[int]) -> np.ndarray:
        """Whether a choice changes the network, as far as the choices that are held tell."""
        active = np.ones(len(rows), bool)
        for name, options in self.space.choices[choice].active_if:
            parent = self._index[name]
            if parent in held:
                counting = [self.space.choices[parent].code_of(option) for option in options]
                active &= np.isin(rows[:, parent], counting) & self._active(rows, parent, held)
        return active

    @staticmethod
    def _without_dead_ends(slots: list[Slotwise]) -> list[Slotwise]:
        """Only rows of finite cost on a path from the first slot to the last; sorted, states numbered anew."""
        finite = [np.isfinite(slot.costs).all(axis=1) for slot in slots]
        reached = [np.ones(1, bool)]
        for slot, fine in zip(slots, finite, strict=True):
            after = np.zeros(1 + int(slot.target.max()), bool)
            after[slot.target[fine & reached[-1][slot.origin]]] = True
            reached.append(after)
        left = reached[-1]
        kept: list[Slotwise] = []
        for place in range(len(slots) - 1, -1, -1):
            slot = slots[place]
            rows = np.flatnonzero(finite[place] & reached[place][slot.origin] & left[slot.target])
            if not len(rows):
                return []
            rows = rows[np.argsort(slot.origin[rows], kind="stable")]
            alive = np.zeros(len(reached[place]), bool)
            alive[slot.origin[rows]] = True
            origin = (np.cumsum(alive) - 1)[slot.origin[rows]]
            target = (np.cumsum(left) - 1)[slot.target[rows]]
            starts = np.flatnonzero(np.diff(origin, prepend=-1))
            kept.insert(0, Slotwise(slot.reads, slot.codes[rows], slot.costs[rows], origin, target, starts))
            left = alive
        return kept


def _mask(held: set[int], count: int) -> np.ndarray:
    return np.isin(np.arange(count), list(held))


def _distinct(rows: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows, the place of each row among them) of codes (n, d) below `sizes`."""
    varying = np.flatnonzero((rows != rows[0]).any(axis=0)).tolist()
    keys = np.zeros(len(rows), np.int64)
    for column in varying:  # few, and there are no more combinations of them than rows were listed
        keys = np.unique(keys * sizes[column] + rows[:, column], return_inverse=True)[1].ravel()
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first], place.ravel()


def program_of(table: CostTable, legal: Mapping[str, Sequence[int]]) -> tuple[SlotProgram | None, bool]:
    """(program, whether it has all legal architectures).

    Where those are too many combinations of choices, the first and the last legal option of each choice are kept; None
    where that is too much too.
    """
    space: SearchSpace = table.space
    whole = [list(legal[choice.name]) for choice in space.choices]
    for codes in (whole, [sorted({each[0], each[-1]}) for each in whole]):
        try:
            return SlotProgram(table, codes), codes == whole
        except TooManyRows:
            continue
    return None, False
