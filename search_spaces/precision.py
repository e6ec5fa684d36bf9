"""Numeric precisions a layer may be built with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of the weights and of the activations of one layer.

    `fp32` computes in floating point. Every other precision is uniform affine quantization: weights
    symmetric and per output channel, activations asymmetric and per tensor (arXiv 1712.05877).
    """

    name: str
    weight_bits: int
    activation_bits: int

    @property
    def is_quantized(self) -> bool:
        return self.weight_bits < 32

    def __str__(self) -> str:
        return self.name


FP32 = Precision("fp32", 32, 32)
INT8 = Precision("int8", 8, 8)

PRECISIONS = {precision.name: precision for precision in (FP32, INT8)}


def precision_of(name: str) -> Precision:
    """The precision called `name`; raises ValueError naming the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}") from None
