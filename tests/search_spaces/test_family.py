"""Readers of settings; what they refuse is tested with the families that use them."""

from __future__ import annotations

import numpy as np
import pytest

from search_spaces.family import SettingReader, deeper_than, precision_choice, square_input

READ = SettingReader("toy")


def test_numbers_get_one_form() -> None:
    assert repr(READ.number("n", np.float32(2.0), 1)) == "2"
    assert repr(READ.number("n", 2.5, 1)) == "2.5"
    assert repr(READ.whole("n", np.int16(7))) == "7"
    assert READ.whole_options("n", (3, 1.0, 2)) == (1, 2, 3)
    assert READ.wholes("n", [3, 1, 3]) == (3, 1, 3)
    assert READ.number_options("n", {2, 0.5}, 0) == (0.5, 2)
    assert READ.flag_options("n", [True, False]) == (False, True)
    assert READ.precisions("n", ["int8", "fp32"]) == ("int8", "fp32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "3", True, [3], 0, 11])
def test_what_is_not_a_number_in_range(value: object) -> None:
    with pytest.raises(ValueError, match=r"space toy: n = .*: expected a number from 1 to 10"):
        READ.number("n", value, 1, 10)


def test_blocks_exist_from_their_depth_on() -> None:
    assert deeper_than(0, "depth", (1, 2, 4)) == ()
    assert deeper_than(1, "depth", (1, 2, 4)) == (("depth", (2, 4)),)
    assert deeper_than(3, "depth", (1, 2, 4)) == (("depth", (4,)),)


def test_precision_choices_and_inputs() -> None:
    gene = precision_choice("head", ("fp32", "int8"), ("depth", (2,)))
    assert (gene.name, gene.role, gene.active_if) == ("head.precision", "precision", (("depth", (2,)),))
    assert square_input(3)({"resolution": 24}) == (3, 24, 24)
