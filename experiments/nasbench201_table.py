"""Latencies of NAS-Bench-201 networks on a phone's GPU and CPU (nn-Meter's table), and what they are priced by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from experiments.measurements import BadInput, positive, read_rows
from experiments.prices import Price
from hardware_profiles.cost_model import features
from search_spaces.nasbench201 import OPERATIONS, live_operations, nasbench201_network

TABLE = "mobile_nasbench201_latency.csv.gz"
CELLS = "nasbench201_cifar10.csv.gz"
DEVICES = {"adreno640": "adreno640gpu_tflite21", "cortex-a76": "cortexA76cpu_tflite21"}  # profile -> name in the table
EDGE_COLUMNS = ("op_0to1", "op_0to2", "op_1to2", "op_0to3", "op_1to3", "op_2to3")
OPERATION_OF = {str(code): name for code, name in enumerate(OPERATIONS)} | {name: name for name in OPERATIONS}

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


@dataclass(frozen=True, slots=True)
class CellColumns:
    """The columns of a table of latencies and of a table of cells.

    `on` names the cell in both. A table with a column `device` has one row a measurement, with its time in `latency`;
    in one without (None) each device has a column of its own. `operations` are those of the edges in `EDGE_COLUMNS`.
    """

    on: str = "arch_idx"
    device: str | None = "device"
    latency: str = "latency_ms"
    operations: tuple[str, ...] = EDGE_COLUMNS
    macs: str = "macs_cifar10"


COLUMNS = CellColumns()
Cell = tuple[tuple[str, ...], float]  # its operations, and its MACs as NAS-Bench-201 counts them


@dataclass(frozen=True)
class CellTable:
    """n networks of one device: their features, MACs (n,), and latencies (n,) in ms.

    `counted_macs` are NAS-Bench-201's own, of all operations, whether or not the output sees them. `without_path` are
    the measured cells whose output does not see their input: they are no networks of ours and not among the n.
    """

    rows: tuple[dict[str, float], ...]
    macs: np.ndarray
    counted_macs: np.ndarray
    latency_ms: np.ndarray
    without_path: int = 0


def read_cell_tables(
    table: Path, cells: Path, devices: Sequence[str], columns: CellColumns = COLUMNS
) -> dict[str, CellTable]:
    """The networks of each device, in the order of the table; raises BadInput.

    What a device did not run has no row, or nothing in the device's column.
    """
    asked = [columns.device, columns.latency] if columns.device else devices
    measured = read_rows(table, [columns.on, *asked])
    known = _cells(cells, columns)
    found = {}
    for device in devices:
        latency = columns.latency if columns.device else device
        rows = [row for row in measured if row[latency] and (not columns.device or row[columns.device] == device)]
        if lacking := [row[columns.on] for row in rows if row[columns.on] not in known]:
            raise BadInput(f"{cells}: no row with {columns.on} {lacking[0]!r}, of which {table} has a latency")
        found[device] = _cell_table(
            [known[row[columns.on]] for row in rows], [positive(row, latency, table) for row in rows]
        )
    return found


def _cell_table(cells: Sequence[Cell], latency_ms: Sequence[float]) -> CellTable:
    live = [live_operations(operations) for operations, _ in cells]
    kept = [i for i, operations in enumerate(live) if set(operations) != {"none"}]
    rows = [_features(live[i]) for i in kept]
    return CellTable(
        rows=tuple(rows),
        macs=np.array([sum(row.get(f"{family}.fp32.macs", 0.0) for family in COMPUTING) for row in rows]),
        counted_macs=np.array([cells[i][1] for i in kept]),
        latency_ms=np.array([latency_ms[i] for i in kept]),
        without_path=len(cells) - len(kept),
    )


def _cells(path: Path, columns: CellColumns) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for row in read_rows(path, [columns.on, columns.macs, *columns.operations]):
        operations = tuple(_operation(row, column, path) for column in columns.operations)
        cell = operations, positive(row, columns.macs, path)
        if found.setdefault(row[columns.on], cell) != cell:
            raise BadInput(f"{path}: several cells have {columns.on} {row[columns.on]!r}")
    return found


def _operation(row: Mapping[str, str], column: str, path: Path) -> str:
    """An operation by its name or its code."""
    if row[column] not in OPERATION_OF:
        raise BadInput(f"{path}: {column} is {row[column]!r}; expected one of {', '.join(OPERATION_OF)}")
    return OPERATION_OF[row[column]]


@cache  # many cells do the same once dead operations are gone
def _features(operations: tuple[str, ...]) -> dict[str, float]:
    amounts = features(nasbench201_network(operations))
    return {name: amount for name, amount in amounts.items() if name.partition(".")[0] not in FREE}
