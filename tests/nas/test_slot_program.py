"""Programmes over slots: how many rows they may have. That their paths are the best is tested with the limits."""

from __future__ import annotations

import pytest

from nas import slot_program
from nas.slot_program import program_of
from search_spaces import CostTable
from tests.nas import tiny


def test_rows_are_counted_over_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    space = tiny.space()
    table = CostTable(space, lambda layers, fed_with: [float(len(layers))])
    legal = {choice.name: range(len(choice.options)) for choice in space.choices}
    program, _ = program_of(table, legal)
    assert program is not None
    rows = [len(slot.codes) for slot in program.slots]
    assert max(rows) < sum(rows) - 1
    for most, fits in ((sum(rows), True), (sum(rows) - 1, False), (max(rows), False)):
        monkeypatch.setattr(slot_program, "MOST_ROWS", most)
        assert program_of(table, legal)[1] == fits
