"""What families of spaces share: reading settings, conditions on depth, the choice of a precision, square inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import NoReturn, TypeVar

from search_spaces.layers import Layer, Shape
from search_spaces.precision import PRECISIONS
from search_spaces.space import Choice, Condition, InputShape, Values

Item = TypeVar("Item")

SMALLEST_RESOLUTION, LARGEST_RESOLUTION = 8, 224  # pixels


@dataclass(frozen=True, slots=True)
class SettingReader:
    """Reads the settings of one family: refuses what no network can take and gives the rest one form.

    One form, so that settings which mean the same make the same space: whole numbers are `int` (never 2.0 or a
    numpy integer), options are sorted.
    """

    family: str

    def refuse(self, name: str, got: object, expected: str) -> NoReturn:
        """Raises ValueError naming the setting."""
        raise ValueError(f"space {self.family}: {name} = {got!r}: expected {expected}")

    def number(self, name: str, value: object, low: float, high: float = math.inf) -> int | float:
        """A number from `low` to `high`, as an int where it is whole."""
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
        if not low <= number <= high or math.isinf(number):
            self.refuse(name, value, f"a number {_range(low, high)}")
        return int(number) if number.is_integer() else number

    def whole(self, name: str, value: object, low: int = 1, high: float = math.inf) -> int:
        """A whole number from `low` to `high`."""
        number = self.number(name, value, low, high)
        if not isinstance(number, int):
            self.refuse(name, value, f"a whole number {_range(low, high)}")
        return number

    def wholes(self, name: str, values: object, low: int = 1, high: float = math.inf) -> tuple[int, ...]:
        """Whole numbers in the order given."""
        return tuple(self.whole(name, value, low, high) for value in self._listed(name, values))

    def numbers(self, name: str, values: object, low: float) -> tuple[int | float, ...]:
        """Numbers of at least `low`, in the order given."""
        return tuple(self.number(name, value, low) for value in self._listed(name, values))

    def whole_options(self, name: str, values: object, low: int = 1, high: float = math.inf) -> tuple[int, ...]:
        """Distinct whole numbers, at least one, sorted."""
        return tuple(sorted(self._distinct(name, self.wholes(name, values, low, high))))

    def number_options(self, name: str, values: object, low: float) -> tuple[int | float, ...]:
        """Distinct numbers of at least `low`, at least one, sorted."""
        return tuple(sorted(self._distinct(name, self.numbers(name, values, low))))

    def flag(self, name: str, value: object) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def flags(self, name: str, values: object) -> tuple[bool, ...]:
        """True or false, in the order given."""
        listed = self._listed(name, values)
        flags = tuple(value for value in listed if isinstance(value, bool))
        if len(flags) != len(listed):
            self.refuse(name, values, "true or false each")
        return flags

    def flag_options(self, name: str, values: object) -> tuple[bool, ...]:
        """Distinct flags, at least one, false first."""
        return tuple(sorted(self._distinct(name, self.flags(name, values))))

    def one_of(self, name: str, value: object, known: Iterable[str]) -> str:
        """A known word."""
        if not isinstance(value, str) or value not in known:
            self.refuse(name, value, f"one of {', '.join(known)}")
        return value

    def precisions(self, name: str, values: object) -> tuple[str, ...]:
        """Names of precisions, distinct, at least one, in the order given: the first is that of the largest network."""
        names = [self.one_of(name, value, PRECISIONS) for value in self._listed(name, values)]
        return tuple(self._distinct(name, names))

    def _listed(self, name: str, values: object) -> tuple[object, ...]:
        if isinstance(values, str) or not isinstance(values, Iterable):
            self.refuse(name, values, "a list")
        return tuple(values)

    def _distinct(self, name: str, values: Sequence[Item]) -> Sequence[Item]:
        if not values:
            self.refuse(name, list(values), "at least one option")
        if len(set(values)) != len(values):
            self.refuse(name, list(values), "no option twice")
        return values


def _range(low: float, high: float) -> str:
    return f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"


def deeper_than(index: int, depth: str, depths: Sequence[int]) -> tuple[Condition, ...]:
    """When block `index` exists: the options of the choice `depth` above it; no condition where all are."""
    present = tuple(option for option in depths if option > index)
    return () if len(present) == len(depths) else ((depth, present),)


def precision_choice(layer: str, precisions: tuple[str, ...], *active_if: Condition) -> Choice:
    """The gene of a layer with weights."""
    return Choice(f"{layer}.precision", precisions, "precision", active_if)


def in_patches(layers: Iterable[Layer], patches: int) -> tuple[Layer, ...]:
    """The layers of a slot that runs in `patches` patches a side (`Network.patch_stage`)."""
    return tuple(layers) if patches == 1 else tuple(replace(layer, patches=patches) for layer in layers)


def square_input(channels: int) -> InputShape:
    """Images whose side is the choice `resolution`."""
    return partial(_square_input, channels)


def _square_input(channels: int, values: Values) -> Shape:
    side = int(values["resolution"])
    return (channels, side, side)
