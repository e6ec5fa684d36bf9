"""How many NAS-Bench-201 networks a latency model needs to see, on any devices that ran some.

    python experiments/benchmarks/mobile_nasbench201.py --table T.csv[.gz] --cells C.csv[.gz] --on arch_idx \\
        --architecture-columns 'op_*' --device-column device --latency-column latency_ms [--devices a,b] \\
        [--macs-column macs_cifar10] --samples 100 --draws 20 --seed 0
    python experiments/benchmarks/mobile_nasbench201.py --data DIR

The second is the first with mobile_nasbench201_latency.csv.gz (an Adreno 640 GPU and a Cortex-A76 CPU, of nn-Meter) and
nasbench201_cifar10.csv.gz of that folder. --table has one row a measurement, or one row a cell and one column a
device: then --devices are columns, by default all that can be latencies. --cells tells the six operations of a cell,
by names or codes, in the order of the edges 0to1, 0to2, 1to2, 0to3, 1to3, 2to3, and its MACs; without it --table does.
A device of a shipped profile is called by the name of the profile. Cells whose output does not see their input are
left out and counted (`without_path`).

In each of several draws a model is fitted on some networks and judged on all others of its device. Methods:

    macs_only         a line through the MACs that NAS-Bench-201 counts
    live_macs_only    a line through the MACs of the operations that the output sees
    ours              the four prices of the shipped profiles

`unseen` judges the networks whose amounts of all priced quantities are those of no network of the draw, since many
cells have the same operations in another order. Intervals are of 90 %, from cross-validation within the draw. Prints
JSON and writes it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import about, out_option
from csv_tables import (
    BadInput,
    chosen,
    command,
    file_options,
    files_of,
    latency_names,
    listed,
    macs_column,
    matching,
    present,
    read_csv,
)

from experiments.nasbench201_table import (
    CELLS,
    COLUMNS,
    DEVICES,
    EDGE_COLUMNS,
    PRICES,
    TABLE,
    CellColumns,
    CellTable,
    read_cell_tables,
)
from experiments.prices import priced
from predictors.regression import (
    fit_coefficients,
    folds_of,
    predict_left_out,
    relative_interval,
    scores,
    with_constant,
)

NAME = Path(__file__).stem
FILES = {"table": (TABLE, "latencies"), "cells": (CELLS, "operations and MACs")}
PROFILES = {device: profile for profile, device in DEVICES.items()}
EDGES = [name.removeprefix("op_") for name in EDGE_COLUMNS]
EDGE = re.compile(r"\dto\d$")
FOLDS = 10


def draw_scores(
    matrix: np.ndarray, latency_ms: np.ndarray, sample: np.ndarray, twin: np.ndarray, rng: np.random.Generator
) -> dict[str, float]:
    """A model on `matrix` (n, d) fitted on the networks of `sample` (bool (n,)) and judged on all others.

    `twin` (n,) is the same number for networks of equal amounts.
    """
    coefficients = fit_coefficients(matrix[sample], latency_ms[sample])
    predicted = matrix[~sample] @ coefficients
    fold = folds_of(matrix[sample], FOLDS, rng)
    relative_error, _ = relative_interval(
        predict_left_out(matrix[sample], latency_ms[sample], fold), latency_ms[sample]
    )
    error = np.abs(predicted / latency_ms[~sample] - 1)
    inside = np.abs(latency_ms[~sample] / predicted - 1) <= relative_error
    unseen = ~np.isin(twin[~sample], twin[sample])
    return {
        **scores(predicted, latency_ms[~sample]),
        "coverage": float(inside.mean()),
        "half_interval": relative_error,
        "unseen": int(unseen.sum()),
        "unseen_within_10_percent": float((error[unseen] <= 0.1).mean()) if unseen.any() else float("nan"),
    }


def summary(draws: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst case over draws of each score."""
    found = {}
    for name in draws[0]:
        values = np.array([draw[name] for draw in draws], dtype=np.float64)
        values = values[~np.isnan(values)]
        if len(values):
            found[name] = {"mean": float(values.mean()), "std": float(values.std()), "min": float(values.min())}
    return found


def device_report(table: CellTable, samples: int, draws: int, seed: int) -> dict[str, Any]:
    amounts = priced(table.rows, PRICES)
    twin = np.unique(amounts, axis=0, return_inverse=True)[1].ravel()
    methods = {
        "macs_only": with_constant(table.counted_macs[:, None]),
        "live_macs_only": with_constant(table.macs[:, None]),
        "ours": amounts,
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        sample = np.isin(np.arange(len(amounts)), rng.choice(len(amounts), samples, replace=False))
        for name, matrix in methods.items():
            results[name].append(draw_scores(matrix, table.latency_ms, sample, twin, rng))
    return {
        "networks": len(amounts),
        **({"without_path": table.without_path} if table.without_path else {}),
        "judged": len(amounts) - samples,
        "distinct_amounts": int(twin.max()) + 1,
        "methods": {name: summary(found) for name, found in results.items()},
    }


# reading -------------------------------------------------------------------------------------------------


def read_tables(asked: argparse.Namespace) -> dict[str, CellTable]:
    """The networks of each device that the arguments ask for; raises BadInput."""
    files = files_of(asked, FILES)
    table = files["table"]
    if table is None:
        raise BadInput("expected --table")
    cells = files["cells"] or table
    frame = read_csv(table)
    columns = columns_of(asked, frame, read_csv(cells))
    others = (columns.on, columns.macs, *columns.operations)
    known = latency_names(frame, others) if columns.device is None else frame[columns.device].dropna().unique()
    names = [DEVICES.get(name, name) for name in listed(asked.devices)]
    devices = chosen(names, list(map(str, known)), table)
    if not devices:
        raise BadInput(f"{table}: no column can be a latency")
    tables = read_cell_tables(table, cells, devices, columns)
    for device, found in tables.items():
        if len(found.latency_ms) <= asked.samples:
            raise BadInput(f"{device} ran {len(found.latency_ms)} networks; expected more than {asked.samples} samples")
    return {PROFILES.get(device, device): found for device, found in tables.items()}


def columns_of(asked: argparse.Namespace, frame: pd.DataFrame, cells: pd.DataFrame) -> CellColumns:
    """The columns of a table of latencies and of one of cells that the arguments name."""
    device = asked.device_column or (COLUMNS.device if COLUMNS.device in frame else None)
    present(frame, [asked.on, *([device, asked.latency_column] if device else [])], "--table")
    present(cells, [asked.on], "--cells")
    macs = macs_column(cells, asked.macs_column)
    if macs is None:
        raise BadInput("no column of MACs, which the baseline needs; name it with --macs-column")
    operations = matching(cells, asked.architecture_columns)
    if not in_order(operations):
        raise BadInput(
            f"expected six architecture columns, the operations of the edges {', '.join(EDGES)} in this order, "
            f"got {', '.join(operations)}"
        )
    return CellColumns(asked.on, device, asked.latency_column, tuple(operations), macs)


def in_order(operations: Sequence[str]) -> bool:
    """Whether there is a column for each edge, and none whose name ends with another edge."""
    named = [EDGE.search(name) for name in operations]
    return len(operations) == len(EDGES) and all(
        found is None or found.group() == edge for found, edge in zip(named, EDGES, strict=True)
    )


# the command ---------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    file_options(parser, FILES)
    parser.add_argument("--on", default=COLUMNS.on, help="the column that names a cell in both files")
    parser.add_argument("--architecture-columns", default="op_*", help="names or patterns, separated by commas")
    parser.add_argument("--macs-column", help="by default the first column with macs or flops in its name")
    parser.add_argument(
        "--device-column",
        help=f"of a table with one row a measurement: the device's name; by default {COLUMNS.device} if it is there",
    )
    parser.add_argument(
        "--latency-column", default=COLUMNS.latency, help="of a table with one row a measurement: the latency"
    )
    parser.add_argument("--devices", help="names or columns, separated by commas; all by default")
    parser.add_argument("--samples", type=int, default=100, help="networks fitted a draw")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser, NAME)
    return parser.parse_args(arguments)


def benchmark(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.samples < 2 * FOLDS or asked.draws < 1:
        raise BadInput(f"expected at least {2 * FOLDS} samples and 1 draw, got {asked.samples} and {asked.draws}")
    devices = {
        name: device_report(table, asked.samples, asked.draws, asked.seed) for name, table in read_tables(asked).items()
    }
    return {**about([asked.seed]), "samples": asked.samples, "draws": asked.draws, "devices": devices}


def main(arguments: Sequence[str] | None = None) -> int:
    return command(NAME, benchmark, parsed(arguments))


if __name__ == "__main__":
    sys.exit(main())
