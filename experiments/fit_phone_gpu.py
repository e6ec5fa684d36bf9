"""Fit the phone GPU profile to ncnn's published benchmark of a Snapdragon 835 (Adreno 540, Vulkan).

    python experiments/fit_phone_gpu.py DATA_DIR [--write]

DATA_DIR holds ncnn_phone_latency.csv.gz and ncnn_param/*.param: the table of ncnn's benchmark (BSD-3) and the graphs of
the networks in it. Prints what it found as JSON and writes it to experiments/results/fit_phone_gpu.json; --write also
writes the fitted part of the device file.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from fitted import held_out_section, judged_fit, provenance, rounded, spread, write_device, write_result

from hardware_profiles.cost_model import FAMILIES, QUANTITIES, accumulate

COMMAND = "python experiments/fit_phone_gpu.py DATA_DIR"
DEVICE = "Adreno 540"
FLOAT_BYTES = 4
UNSET = -233  # ncnn's mark for an axis that is not there
NOTHING_RUNS = {"Input", "Split", "MemoryData", "Noop"}
SAME_SHAPE = {"ReLU", "Clip", "HardSwish", "HardSigmoid", "Swish", "Sigmoid", "Softmax", "BinaryOp", "Eltwise", "Split"}
WEIGHTED = ("conv", "pointwise", "depthwise", "grouped", "linear")
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
    """From the hints, or derived for the few types of operator in the one measured graph that has no hints."""
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


def graph_features(operators: Sequence[Operator]) -> dict[str, float]:
    """Features of an ncnn graph as `cost_model.features` gives them for our networks, all in fp32."""
    shapes: dict[str, Shape] = {}
    totals: dict[str, float] = {}
    for operator in operators:
        sources = [shapes[name] for name in operator.inputs]
        made = output_shapes(operator, sources)
        shapes.update(zip(operator.outputs, made, strict=True))
        if operator.kind in NOTHING_RUNS:
            continue
        weights, biases, macs = 0, 0, 0
        if operator.kind in ("Convolution", "ConvolutionDepthWise"):
            weights, biases = operator.integer(6), operator.integer(0) * operator.integer(5)
            macs = weights * prod(made[0][1:])
        elif operator.kind == "InnerProduct":
            weights, biases = operator.integer(2), operator.integer(0) * operator.integer(1)
            macs = weights
        family = family_of(operator, sources[0][0] if sources else 0)
        moved = FLOAT_BYTES * (sum(map(prod, sources)) + sum(map(prod, made)))
        accumulate(totals, f"{family}.fp32", macs, moved, FLOAT_BYTES * (weights + biases))
    return totals


def read_table(data: Path) -> list[dict[str, str]]:
    """The rows of the device's GPU; the fastest of a benchmark's runs is the one least disturbed."""
    with gzip.open(data / "ncnn_phone_latency.csv.gz", "rt", newline="") as stream:
        return [row for row in csv.DictReader(stream) if DEVICE in row["device"] and row["backend"] == "gpu_vulkan"]


def quantity_totals(row: Mapping[str, float]) -> list[float]:
    """Sums over all families: operators, MACs, bytes of activations, bytes of parameters."""
    return [sum(value for name, value in row.items() if name.endswith(f".{quantity}")) for quantity in QUANTITIES]


def fit(data: Path) -> dict[str, Any]:
    table = read_table(data)
    names = [row["model"] for row in table]
    graphs = [(data / "ncnn_param" / f"{name}.param").read_text() for name in names]
    rows = [graph_features(read_operators(graph)) for graph in graphs]
    latency_ms = np.array([float(row["min_ms"]) for row in table])
    matrix = np.array([quantity_totals(row) for row in rows])
    macs = matrix[:, QUANTITIES.index("macs")]
    found = judged_fit(matrix, macs, latency_ms, np.arange(len(names)))
    average_ms = np.array([float(row["avg_ms"]) for row in table])
    on_average = judged_fit(matrix, macs, average_ms, np.arange(len(names)))
    families = {name.partition(".")[0] for row in rows for name in row}
    return {
        **provenance(COMMAND),
        "seed": None,
        "device": table[0]["device"],
        "networks": [
            {
                "name": row["model"],
                "macs": int(count),
                "min_ms": float(row["min_ms"]),
                "avg_ms": float(row["avg_ms"]),
                "left_out_ms": rounded(left_out),
            }
            for row, count, left_out in zip(table, macs, found["left_out_ms"], strict=True)
        ],
        "coefficients_ms": {
            quantity: rounded(value) for quantity, value in zip(QUANTITIES, found["coefficients"], strict=True)
        },
        "relative_error": rounded(found["relative_error"]),
        "held_out": held_out_section(found, len(names), len(names)),
        "held_out_of_avg_ms": held_out_section(on_average, len(names), len(names)),
        "families": {
            family: sum(any(name.startswith(f"{family}.") for name in row) for row in rows)
            for family in sorted(families)
        },
        "not_covered": sorted(set(FAMILIES) - families),
    }


def device_sections(result: Mapping[str, Any]) -> dict[str, Any]:
    covered = [f"{family}.fp32" for family in result["families"] if family in FAMILIES]
    weighted = [f"{family}.fp32" for family in WEIGHTED if family in result["families"]]
    price = result["coefficients_ms"]
    coefficients = spread(covered, {name: price[name] for name in ("count", "bytes")})
    coefficients |= spread(weighted, {name: price[name] for name in ("macs", "weight_bytes")})
    smallest, largest = (pick(row["macs"] for row in result["networks"]) for pick in (min, max))
    return {
        "latency": {
            "origin": "fitted",
            "source": f"fitted to the fastest run of {len(result['networks'])} networks in ncnn's published benchmark, "
            f"{smallest / 1e6:.0f} to {largest / 1e6:.0f} million MACs; every family has the same coefficients, and "
            f"those that none of the networks has ({', '.join(result['not_covered'])}) are refused",
            "constant_ms": 0.0,
            "coefficients_ms": coefficients,
            "relative_error": result["relative_error"],
            "held_out": dict(result["held_out"]),
        }
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with the measurements")
    parser.add_argument("--write", action="store_true", help="also write the device file")
    options = parser.parse_args(arguments)
    if not (options.data / "ncnn_phone_latency.csv.gz").is_file():
        print(f"{options.data}: expected a folder with ncnn_phone_latency.csv.gz and ncnn_param/", file=sys.stderr)
        return 2
    result = fit(options.data)
    print(json.dumps(result, indent=1))
    write_result("fit_phone_gpu", result)
    if options.write:
        write_device("adreno540", COMMAND, device_sections(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
