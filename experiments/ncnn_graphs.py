"""Networks as ncnn's benchmark holds them: .param files read to operators with shapes, and their additive features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hardware_profiles.cost_model import accumulate, accumulate_shape, has_fast_algorithm

FLOAT_BYTES = 4
UNSET = -233  # ncnn's mark for an axis that is not there, and for an equal share of a slice
NOTHING_RUNS = {"Input", "Split", "MemoryData", "Noop"}
SAME_SHAPE = {
    "BinaryOp",
    "Clip",
    "Eltwise",
    "HardSigmoid",
    "HardSwish",
    "Noop",
    "ReLU",
    "ShuffleChannel",
    "Sigmoid",
    "Softmax",
    "Split",
    "Swish",
}
CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise", "DeconvolutionDepthWise")
FAMILY_OF = {
    "ReLU": "relu",
    "Clip": "relu6",
    "HardSwish": "hardswish",
    "HardSigmoid": "hardsigmoid",
    "Softmax": "softmax",
    "Flatten": "reshape",
    "Reshape": "reshape",
    "Permute": "permute",
    "InnerProduct": "linear",
    "Reduction": "average_pool",
}
INPUT_OF = {"FastestDet": (3, 352, 352)}  # the file leaves it to ncnn's benchmark program, which says so

Shape = tuple[int, ...]  # (channels, height, width) or (features,), as in our networks


@dataclass(frozen=True, slots=True)
class Operator:
    """One line of an ncnn graph: its type, tensors, and numbered parameters as text."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[int, str]

    def integer(self, number: int, default: int = 0) -> int:
        return int(float(self.parameters.get(number, default)))

    def shape_hints(self) -> list[Shape]:
        """Output shapes where the file gives them: per output the number of axes, then width, height, channels."""
        numbers = [int(text) for text in self.parameters.get(-23330, "0").split(",")][1:]
        return [tuple(reversed(numbers[i + 1 : i + 1 + numbers[i]])) for i in range(0, len(numbers), 4)]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operator that runs, as a cost model sees it.

    `family` is that of our cost model, or ncnn's name of the operator where our networks have no such layer.
    """

    family: str
    macs: int
    moved_bytes: int
    weight_bytes: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    channels: tuple[int, int] = (0, 0)


def read_operators(text: str) -> list[Operator]:
    """The graph in a .param file, in topological order; raises ValueError for a file that is none."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "7767517":
        raise ValueError(f"not an ncnn param file: expected 7767517 in the first line, got {lines[:1]}")
    found = []
    for words in filter(None, (line.split() for line in lines[2:])):
        first, last = 4 + int(words[2]), 4 + int(words[2]) + int(words[3])
        parameters = {int(key): value for key, _, value in (word.partition("=") for word in words[last:])}
        found.append(Operator(words[0], tuple(words[4:first]), tuple(words[first:last]), parameters))
    return found


def output_shapes(operator: Operator, shapes: Sequence[Shape]) -> list[Shape]:
    """From the hints, or derived for the types of operator in the measured graphs that have no hints."""
    hints = operator.shape_hints()
    if hints:
        return hints
    kind, integer = operator.kind, operator.integer
    if kind == "Input":
        return [(integer(2), integer(1), integer(0))]
    first = shapes[0]
    if kind in ("Convolution", "ConvolutionDepthWise", "Pooling"):
        pooling = kind == "Pooling"
        kernel, stride, pad = integer(1), integer(2 if pooling else 3, 1), integer(3 if pooling else 4)
        size = [(axis + 2 * pad - kernel) // stride + 1 for axis in first[1:]]
        return [(first[0] if pooling else integer(0), *size)]
    if kind == "Padding":
        return [
            (
                first[0] + integer(7) + integer(8),
                first[1] + integer(0) + integer(1),
                first[2] + integer(2) + integer(3),
            )
        ]
    if kind == "Permute" and integer(0) == 3:
        return [(first[1], first[2], first[0])]
    if kind == "Reshape":
        wanted = [axis for axis in (integer(2, UNSET), integer(1, UNSET), integer(0, UNSET)) if axis != UNSET]
        rest = prod(first) // prod(axis for axis in wanted if axis > 0)
        return [tuple(axis if axis > 0 else rest for axis in wanted)]
    if kind == "Concat":
        axis = integer(0)
        return [(*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])]
    if kind == "Slice" and set(operator.parameters.get(-23300, "").split(",")[1:]) == {str(UNSET)}:
        share = first[0] // len(operator.outputs)
        return [(share, *first[1:])] * len(operator.outputs)
    if kind == "Interp":
        height, width = (float(operator.parameters.get(number, "1")) for number in (1, 2))
        return [(first[0], round(first[1] * height), round(first[2] * width))]
    if kind.endswith("DetectionOutput"):
        return [()]  # as many boxes as it finds: next to nothing
    if kind in SAME_SHAPE:
        return [first] * len(operator.outputs)
    raise ValueError(f"cannot derive the shape of a {kind} (parameters {dict(operator.parameters)})")


def family_of(operator: Operator, channels: int) -> str:
    """The family of our cost model, or the operator's own name where our networks have no such layer."""
    kind, integer = operator.kind, operator.integer
    if kind == "Pooling":
        return "average_pool" if integer(0) else "max_pool"
    if kind == "BinaryOp":
        return {0: "add", 2: "multiply"}.get(integer(0), kind)
    if kind == "Eltwise":
        return {0: "multiply", 1: "add"}.get(integer(0), kind)
    if kind in ("Convolution", "ConvolutionDepthWise"):
        groups = integer(7, 1)
        if groups > 1:
            return "depthwise" if groups == channels == integer(0) else "grouped"
        return "pointwise" if integer(1) == 1 else "conv"
    return FAMILY_OF.get(kind, kind)


def kernels(operators: Sequence[Operator], input_shape: Shape | None = None) -> Iterator[Kernel]:
    """What runs, in order; `input_shape` where the graph does not tell it."""
    shapes: dict[str, Shape] = {}
    for operator in operators:
        sources = [shapes[name] for name in operator.inputs]
        given = [input_shape] if operator.kind == "Input" and input_shape else None
        made = given or output_shapes(operator, sources)
        shapes.update(zip(operator.outputs, made, strict=True))
        if operator.kind in NOTHING_RUNS:
            continue
        weights, biases, macs = 0, 0, 0
        if operator.kind in CONVOLUTIONS:
            weights, biases = operator.integer(6), operator.integer(0) * operator.integer(5)
            transposed = operator.kind.startswith("Deconvolution")
            macs = weights * prod((sources if transposed else made)[0][1:])
        elif operator.kind == "InnerProduct":
            weights, biases = operator.integer(2), operator.integer(0) * operator.integer(1)
            macs = weights
        channels = sources[0][0] if sources and sources[0] else 0
        yield Kernel(
            family=family_of(operator, channels),
            macs=macs,
            moved_bytes=FLOAT_BYTES * (sum(map(prod, sources)) + sum(map(prod, made))),
            weight_bytes=FLOAT_BYTES * (weights + biases),
            outputs=prod(made[0]),
            kernel=operator.integer(1, 1) if operator.kind in CONVOLUTIONS else 1,
            stride=operator.integer(3, 1) if operator.kind in CONVOLUTIONS else 1,
            channels=(channels, made[0][0] if made[0] else 0),
        )


def graph_features(operators: Sequence[Operator], input_shape: Shape | None = None) -> dict[str, float]:
    """Features of an ncnn graph as `cost_model` gives them for our networks, shapes included, all in fp32."""
    totals: dict[str, float] = {}
    for kernel in kernels(operators, input_shape):
        prefix = f"{kernel.family}.fp32"
        accumulate(totals, prefix, kernel.macs, kernel.moved_bytes, kernel.weight_bytes)
        if kernel.macs:
            direct = kernel.family == "conv" and not has_fast_algorithm(kernel.kernel, kernel.stride, kernel.channels)
            accumulate_shape(totals, prefix, kernel.macs, kernel.outputs, direct)
    return totals


def read_graph(folder: Path, name: str) -> list[Operator]:
    """The graph of a network of ncnn's benchmark, by its name there."""
    return read_operators((folder / f"{name}.param").read_text(encoding="utf-8"))
