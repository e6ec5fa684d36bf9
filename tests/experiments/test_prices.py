"""Shared prices: amounts summed by hand, and written out so that a cost model charges the same."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.prices import Price, coefficients, families_in, priced

PRICES = (
    Price("kernel", ("conv", "pointwise", "Swish"), "count"),
    Price("mac", ("conv", "pointwise"), "macs"),
    Price("byte", ("Swish", "pointwise"), "bytes"),
)
ROW = {
    "conv.fp32.count": 2.0,
    "conv.fp32.macs": 100.0,
    "conv.fp32.bytes": 7.0,  # no price is of it
    "pointwise.fp32.count": 1.0,
    "pointwise.fp32.macs": 30.0,
    "pointwise.fp32.bytes": 5.0,
    "Swish.fp32.count": 3.0,
    "Swish.fp32.bytes": 11.0,
}


def test_amounts_are_sums_over_the_families_that_share() -> None:
    np.testing.assert_array_equal(priced([ROW, {}], PRICES), [[6, 130, 16], [0, 0, 0]])


def test_a_family_without_any_price_is_refused() -> None:
    with pytest.raises(ValueError, match="no price for the family 'add'"):
        priced([{"add.fp32.count": 1.0}], PRICES)


def test_written_out_for_the_families_that_are_covered() -> None:
    covered = families_in([ROW])
    assert covered == ["conv", "pointwise"]  # our networks have no Swish
    assert coefficients(PRICES, [0.5, 2.0, 3.0], covered) == {
        "conv.fp32.count": 0.5,
        "pointwise.fp32.count": 0.5,
        "conv.fp32.macs": 2.0,
        "pointwise.fp32.macs": 2.0,
        "pointwise.fp32.bytes": 3.0,
    }
