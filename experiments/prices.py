"""Prices that several families of layers share, so that few of them are fitted: what they are of, and written out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.fitted import rounded
from hardware_profiles.cost_model import FAMILIES


@dataclass(frozen=True, slots=True)
class Price:
    """Milliseconds a unit of `quantity`, the same for all `families`."""

    name: str
    families: tuple[str, ...]
    quantity: str


def priced(rows: Iterable[Mapping[str, float]], prices: Sequence[Price]) -> np.ndarray:
    """Amounts of each price in the features of n networks, (n, len(prices)).

    Raises ValueError for a family that pays no price at all: it would count as zero.
    """
    columns: dict[tuple[str, str], list[int]] = {}
    for number, price in enumerate(prices):
        for family in price.families:
            columns.setdefault((family, price.quantity), []).append(number)
    known = {family for family, _ in columns}
    found = []
    for row in rows:
        totals = np.zeros(len(prices))
        for feature, amount in row.items():
            family, _, quantity = feature.split(".")
            if family not in known:
                raise ValueError(f"no price for the family {family!r}; add it to one that it shares")
            for number in columns.get((family, quantity), ()):
                totals[number] += amount
        found.append(totals)
    return np.array(found).reshape(-1, len(prices))


def families_in(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The families of our cost model that some network has."""
    return sorted({feature.partition(".")[0] for row in rows for feature in row} & set(FAMILIES))


def coefficients(prices: Sequence[Price], values: Iterable[float], covered: Iterable[str]) -> dict[str, float]:
    """Each price, in ms, written out for the covered families that pay it: `family.fp32.quantity` -> ms a unit."""
    covered = set(covered)
    return {
        f"{family}.fp32.{price.quantity}": rounded(value)
        for price, value in zip(prices, values, strict=True)
        for family in price.families
        if family in covered
    }
