"""Cost tables against lowering each network and summing its layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from search_spaces import CostTable, Layer, MobileNet, Precision, SearchSpace, cost_table

SPACE = MobileNet(
    resolutions=(8, 12), widths=(8, 16), depths=(1, 2), kernels=(3, 5), expansions=(1, 2), squeeze_excite=(False, True)
)


def sizes(layers: Sequence[Layer], _: Precision) -> tuple[int, int]:
    return sum(layer.macs for layer in layers), sum(layer.weight_bytes for layer in layers)


def random_codes(space: SearchSpace, count: int, seed: int = 0) -> np.ndarray:
    """Codes of which not all are canonical."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(len(choice.options), size=count) for choice in space.choices], axis=1)


def summed(codes: np.ndarray) -> list[list[int]]:
    networks = [SPACE.lower(SPACE.from_codes(row)) for row in codes]
    return [[network.macs, network.model_bytes] for network in networks]


def test_sums_over_slots_are_those_of_the_networks_to_the_last_bit() -> None:
    codes = random_codes(SPACE, 60)
    table = CostTable(SPACE, sizes, 2, np.int64)
    costs = table.costs(codes)
    assert costs.dtype == np.int64
    assert costs.tolist() == summed(codes)
    assert table.costs(codes[:7].astype(np.uint8)).tolist() == summed(codes[:7])
    assert table.costs(codes[:0]).shape == (0, 2)


def test_a_slot_with_too_many_combinations_for_an_index_is_looked_up_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost_table, "MOST_COMBINATIONS", 40)
    monkeypatch.setattr(cost_table, "ROWS_AT_ONCE", 16)
    codes = random_codes(SPACE, 50, seed=1)
    table = CostTable(SPACE, sizes, 2, np.int64)
    assert table.costs(codes).tolist() == table.costs(codes).tolist() == summed(codes)


def test_a_cost_sees_the_precision_that_the_slot_is_fed_with() -> None:
    """The int8 stem makes the first block's input quantized, however the block itself is."""
    plain = SPACE.smallest
    stem = SPACE.build({"stem.precision": "int8"})
    table = CostTable(SPACE, lambda layers, fed_with: (float(bool(layers) and fed_with.is_quantized),))
    assert table.costs(SPACE.encode([plain, stem]))[:, 0].tolist() == [0, 1]


def test_a_combination_is_lowered_once() -> None:
    asked: list[str] = []

    def cost(layers: Sequence[Layer], _: Precision) -> tuple[int]:
        asked.append(layers[0].name if layers else "")
        return (1,)

    table = CostTable(SPACE, cost)
    codes = random_codes(SPACE, 30, seed=2)
    table.costs(codes)
    before = len(asked)
    assert before > len(SPACE.slots)
    table.costs(codes[::-1])
    assert len(asked) == before


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        (np.zeros((3, 2), int), "expected whole codes of shape"),
        (np.zeros(len(SPACE.choices), int), "expected whole codes of shape"),
        (np.zeros((3, len(SPACE.choices))), "float64"),
        (np.full((1, len(SPACE.choices)), -1), r"a code of resolution is not in 0\.\.1"),
        (np.eye(1, len(SPACE.choices), 1, dtype=int) * 9, r"a code of stem\.width is not in"),
    ],
)
def test_codes_that_are_none_are_refused(codes: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CostTable(SPACE, sizes, 2, np.int64).costs(codes)
