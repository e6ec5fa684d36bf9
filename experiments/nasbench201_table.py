"""Latencies of NAS-Bench-201 networks on a phone's GPU and CPU (nn-Meter's table), and what they are priced by."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from experiments.prices import Price
from hardware_profiles.cost_model import features
from search_spaces.nasbench201 import OPERATIONS, live_operations, nasbench201_network

TABLE = "mobile_nasbench201_latency.csv.gz"
CELLS = "nasbench201_cifar10.csv.gz"
DEVICES = {"adreno640": "adreno640gpu_tflite21", "cortex-a76": "cortexA76cpu_tflite21"}  # profile -> name in the table
EDGE_COLUMNS = ("op_0to1", "op_0to2", "op_1to2", "op_0to3", "op_1to3", "op_2to3")

COMPUTING = ("conv", "pointwise", "linear")
POOLS = ("average_pool",)
ELEMENTWISE = ("add", "relu")
# Each operation of a cell always comes at the same three sizes, so the table tells one number of each: these four
# prices are as many as it can tell apart. A reshape is a view, in every network, and taken to be free.
PRICES = (
    Price("kernel", (*COMPUTING, *POOLS), "count"),
    Price("mac", COMPUTING, "macs"),
    Price("byte of a pool", POOLS, "bytes"),
    Price("byte of an add or relu", ELEMENTWISE, "bytes"),
)
FREE = ("reshape",)


@dataclass(frozen=True)
class CellTable:
    """n networks of one device: their features, MACs (n,), and latencies (n,) in ms.

    `counted_macs` are NAS-Bench-201's own, of all operations, whether or not the output sees them.
    """

    rows: tuple[dict[str, float], ...]
    macs: np.ndarray
    counted_macs: np.ndarray
    latency_ms: np.ndarray


def read_cell_table(data: Path, device: str) -> CellTable:
    """The networks of a device of `DEVICES`."""
    cells = _cells(data)
    with gzip.open(data / TABLE, "rt", encoding="utf-8", newline="") as stream:
        measured = [row for row in csv.DictReader(stream) if row["device"] == DEVICES[device]]
    chosen = [cells[row["arch_idx"]] for row in measured]
    rows = [_features(live_operations(operations)) for operations, _ in chosen]
    return CellTable(
        rows=tuple(rows),
        macs=np.array([sum(row.get(f"{family}.fp32.macs", 0.0) for family in COMPUTING) for row in rows]),
        counted_macs=np.array([macs for _, macs in chosen]),
        latency_ms=np.array([float(row["latency_ms"]) for row in measured]),
    )


def _cells(data: Path) -> dict[str, tuple[list[str], float]]:
    """Index of an architecture -> its operations, and its MACs as NAS-Bench-201 counts them."""

    def read() -> Iterator[tuple[str, tuple[list[str], float]]]:
        with gzip.open(data / CELLS, "rt", encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                operations = [OPERATIONS[int(row[column])] for column in EDGE_COLUMNS]
                yield row["arch_idx"], (operations, float(row["macs_cifar10"]))

    return dict(read())


@cache  # many cells do the same once dead operations are gone
def _features(operations: tuple[str, ...]) -> dict[str, float]:
    amounts = features(nasbench201_network(operations))
    return {name: amount for name, amount in amounts.items() if name.partition(".")[0] not in FREE}
