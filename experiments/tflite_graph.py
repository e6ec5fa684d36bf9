"""Operators and tensor shapes of a TFLite file, read without TensorFlow, as the features of the cost model.

A .tflite file is a FlatBuffer: a table starts with the distance back to its vtable, which holds for each field the
distance from the table to its value, or 0 where the value is the default. Only the fields that are needed here are
read; their numbers are those of TFLite's schema, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hardware_profiles.cost_model import accumulate

IDENTIFIER = b"TFL3"
INT8_TYPE = 9
OPERATORS = {
    0: "add",
    1: "average_pool",
    3: "conv",
    4: "depthwise",
    9: "linear",
    17: "max_pool",
    22: "reshape",
    25: "softmax",
    40: "average_pool",  # a mean over the image
}
WEIGHTED = ("conv", "depthwise", "linear")
INT8_BIAS_BYTES, SCALE_BYTES = 4, 4  # of an output channel, as `Layer.weight_bytes` counts them
IMAGE_BYTES = 5  # of an element of the image: four as a float, one as an integer

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of a graph: the shapes of the activations it reads and of its output, as (batch, ..., channels)."""

    kind: str
    in_shapes: tuple[Shape, ...]
    weight_shape: Shape
    out_shape: Shape

    @property
    def macs(self) -> int:
        """Multiply-accumulates; a weight is (out, height, width, in), (1, height, width, out) or (out, in)."""
        if self.kind == "linear":
            return prod(self.weight_shape)
        if self.kind == "depthwise":
            return prod(self.out_shape) * prod(self.weight_shape[1:3])
        return prod(self.out_shape) * prod(self.weight_shape[1:]) if self.kind == "conv" else 0

    @property
    def family(self) -> str:
        """The family of the cost model."""
        return "pointwise" if self.kind == "conv" and self.weight_shape[1:3] == (1, 1) else self.kind


class _Table:
    """A table of a FlatBuffer at a place in the file."""

    def __init__(self, content: bytes, place: int) -> None:
        self.content, self.place = content, place
        self.vtable = place - self._unpack("<i", place)
        self.fields = (self._unpack("<H", self.vtable) - 4) // 2

    def _unpack(self, form: str, place: int) -> int:
        return int(struct.unpack_from(form, self.content, place)[0])

    def _field(self, number: int) -> int:
        """Where the value is; 0 where the file leaves it out."""
        if number >= self.fields:
            return 0
        offset = self._unpack("<H", self.vtable + 4 + 2 * number)
        return self.place + offset if offset else 0

    def integer(self, number: int, form: str = "<i") -> int:
        place = self._field(number)
        return self._unpack(form, place) if place else 0

    def _vector(self, number: int) -> range:
        """Places of the four-byte entries of a vector."""
        place = self._field(number)
        if not place:
            return range(0)
        start = place + self._unpack("<I", place)
        return range(start + 4, start + 4 + 4 * self._unpack("<I", start), 4)

    def integers(self, number: int) -> tuple[int, ...]:
        return tuple(self._unpack("<i", place) for place in self._vector(number))

    def tables(self, number: int) -> list[_Table]:
        return [_Table(self.content, place + self._unpack("<I", place)) for place in self._vector(number)]


def read_operators(path: Path) -> list[Operator]:
    """The operators of the first graph in a .tflite file, in the order in which they run.

    Raises ValueError, naming the file, for anything else, a graph that is not int8, or an operator that is not in
    `OPERATORS`.
    """
    content = path.read_bytes()
    if content[4:8] != IDENTIFIER:
        raise ValueError(f"{path.name}: expected a TFLite file, with {IDENTIFIER!r} at byte 4, got {content[4:8]!r}")
    try:
        model = _Table(content, struct.unpack_from("<I", content)[0])
        return list(_operators(model))
    except (struct.error, IndexError) as error:
        raise ValueError(f"{path.name}: a damaged TFLite file ({error})") from None
    except LookupError as error:
        raise ValueError(f"{path.name}: {error.args[0]}") from None


def _operators(model: _Table) -> Iterator[Operator]:
    # an operator's code was one byte (field 0) before there were more than 127 of them (field 3)
    codes = [max(code.integer(0, "<b"), code.integer(3)) for code in model.tables(1)]
    graph = model.tables(2)[0]
    tensors = graph.tables(0)
    for operator in graph.tables(3):
        code = codes[operator.integer(0, "<I")]
        if code not in OPERATORS:
            raise LookupError(f"operator {code} of TFLite's schema; expected one of {sorted(OPERATORS)}")
        sources, made = operator.integers(1), tensors[operator.integers(2)[0]]
        kind = OPERATORS[code]
        if made.integer(1, "<b") != INT8_TYPE:
            raise LookupError(f"a {kind} makes a tensor of type {made.integer(1, '<b')}; expected int8, {INT8_TYPE}")
        activations = sources[: 2 if kind == "add" else 1]
        weight = tensors[sources[1]].integers(0) if kind in WEIGHTED else ()
        shapes = tuple(tensors[source].integers(0) for source in activations)
        yield Operator(kind, shapes, weight, made.integers(0))


def graph_features(operators: Sequence[Operator]) -> dict[str, float]:
    """Features as `cost_model.features` gives them for our networks; a last softmax is not counted.

    Our networks end with the classifier, and a softmax over ten classes is nothing beside it.
    """
    totals: dict[str, float] = {}
    for operator in operators:
        if operator.kind == "softmax" and operator is operators[-1]:
            continue
        moved = sum(map(prod, operator.in_shapes)) + prod(operator.out_shape)
        channels = operator.out_shape[-1] if operator.weight_shape else 0
        stored = prod(operator.weight_shape) + channels * (INT8_BIAS_BYTES + SCALE_BYTES) if channels else 0
        accumulate(totals, f"{operator.family}.int8", operator.macs, moved, stored)
    accumulate(totals, "quantize.int8", 0, IMAGE_BYTES * prod(operators[0].in_shapes[0]), 0)
    return totals
