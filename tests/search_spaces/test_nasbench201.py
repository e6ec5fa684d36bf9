"""NAS-Bench-201 networks: counted by hand, against the published counts, and liveness by listing paths."""

from __future__ import annotations

import csv
import gzip
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest

from search_spaces.nasbench201 import OPERATIONS, live_operations, nasbench201_network

NONE, SKIP, CONV1, CONV3, POOL = OPERATIONS
PATHS = ((3,), (0, 4), (1, 5), (0, 2, 5))  # edges 01 02 12 03 13 23, by number: all ways from node 0 to node 3
SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, side


def test_live_operations_are_those_on_a_path(rng: np.random.Generator) -> None:
    for operations in product(OPERATIONS, repeat=6):
        walked = {edge for path in PATHS if all(operations[edge] != NONE for edge in path) for edge in path}
        expected = tuple(operation if edge in walked else NONE for edge, operation in enumerate(operations))
        assert live_operations(operations) == expected


def test_a_cell_of_3x3_convolutions_counted_by_hand() -> None:
    network = nasbench201_network([CONV3] * 6)
    stem = 27 * 16 * 32**2
    cells = sum(5 * 6 * 9 * width**2 * side**2 for width, side in SHAPES)
    residual = sum((9 * width**2 // 2 + 9 * width**2 + width**2 // 2) * side**2 for width, side in SHAPES[1:])
    assert network.macs == stem + cells + residual + 64 * 10
    kinds = [layer.kind for layer in network.layers]
    assert kinds.count("conv2d") == 1 + 15 * 6 + 2 * 3
    assert kinds.count("add") == 15 * 3 + 2  # two edges meet in node 2, three in node 3
    assert network.output.out_shape == (10,)


def test_what_an_edge_becomes() -> None:
    skips = nasbench201_network([NONE, NONE, NONE, SKIP, NONE, NONE])
    assert not [layer.name for layer in skips.layers if "cell" in layer.name]
    dead = [CONV3, CONV3, NONE, SKIP, NONE, NONE]
    assert nasbench201_network(dead) == skips
    pools = nasbench201_network([NONE, NONE, NONE, POOL, NONE, NONE])
    names = [layer for layer in pools.layers if "cell" in layer.name]
    assert len(names) == 15 and all(layer["mode"] == "average" and layer.kernel == 3 for layer in names)
    assert [layer.in_shapes[0] for layer in names] == [layer.out_shape for layer in names]
    doubled = nasbench201_network([SKIP, NONE, NONE, SKIP, SKIP, NONE])  # a tensor added to itself
    assert sum(layer.kind == "add" and layer.inputs[0] == layer.inputs[1] for layer in doubled.layers) == 15


def test_what_is_no_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="no path through the cell"):
        nasbench201_network([CONV3, CONV3, CONV3, NONE, NONE, NONE])
    with pytest.raises(ValueError, match="expected 6 operations out of none, skip_connect"):
        nasbench201_network([CONV3] * 5)
    with pytest.raises(ValueError, match=r"got .*'conv'"):
        nasbench201_network(["conv"] * 6)


def test_counts_are_the_published_ones(data_folder: Path, rng: np.random.Generator) -> None:
    with gzip.open(data_folder / "nasbench201_cifar10.csv.gz", "rt", newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = ("op_0to1", "op_0to2", "op_1to2", "op_0to3", "op_1to3", "op_2to3")
    checked = 0
    for row in (rows[i] for i in rng.choice(len(rows), 120, replace=False)):
        operations = tuple(OPERATIONS[int(row[column])] for column in columns)
        if live_operations(operations) != operations or set(operations) == {NONE}:
            continue  # published counts include what the output does not see
        network = nasbench201_network(operations)
        assert network.macs == float(row["macs_cifar10"])
        weights = sum(prod(layer.parameter_shapes["weight"]) for layer in network.layers if layer.has_weights)
        norms = sum(2 * layer.out_shape[0] for layer in network.layers if layer.norm) + 2 * 64  # and the last one
        assert weights + norms + 10 == float(row["params_cifar10"])
        checked += 1
    assert checked > 30
