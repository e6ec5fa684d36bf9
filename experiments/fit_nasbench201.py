"""Fit the profiles of an Adreno 640 GPU and a Cortex-A76 CPU to NAS-Bench-201 networks (nn-Meter's table).

    python experiments/fit_nasbench201.py DATA_DIR [--write]

DATA_DIR holds mobile_nasbench201_latency.csv.gz (nn-Meter, MIT) and nasbench201_cifar10.csv.gz. Prints what it found as
JSON and writes it to experiments/results/fit_nasbench201.json; --write also writes the fitted part of the device files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fitted import fit_command, fold_coverage, held_out_section, provenance, rounded
from experiments.nasbench201_table import CELLS, DEVICES, FREE, PRICES, TABLE, CellTable, read_cell_tables
from experiments.prices import coefficients, families_in, priced
from hardware_profiles.cost_model import FAMILIES
from predictors.regression import (
    fit_coefficients,
    folds_of,
    predict_left_out,
    relative_interval,
    scores,
    with_constant,
)

COMMAND = "python experiments/fit_nasbench201.py DATA_DIR"
FOLDS = 10
SEED = 0


def fit(data: Path) -> dict[str, Any]:
    tables = read_cell_tables(data / TABLE, data / CELLS, list(DEVICES.values()))
    devices = {name: _fit_device(tables[device]) for name, device in DEVICES.items()}
    return {**provenance(COMMAND), "seed": SEED, "devices": devices}


def _fit_device(table: CellTable) -> dict[str, Any]:
    amounts = priced(table.rows, PRICES)
    fold = folds_of(amounts, FOLDS, np.random.default_rng(SEED))  # cells that do the same share one
    left_out_ms = predict_left_out(amounts, table.latency_ms, fold)
    line = predict_left_out(with_constant(table.counted_macs[:, None]), table.latency_ms, fold, ridge=0.0)
    relative_error, coverage = relative_interval(left_out_ms, table.latency_ms)
    found = {
        "held_out": scores(left_out_ms, table.latency_ms),
        "macs_only": scores(line, table.latency_ms),
        "coverage": coverage,
    }
    prices = fit_coefficients(amounts, table.latency_ms)
    return {
        "networks": len(table.latency_ms),
        "distinct": len(np.unique(amounts, axis=0)),
        "macs": {"smallest": int(table.macs.min()), "largest": int(table.macs.max())},
        "covered": families_in(table.rows),
        "prices_ms": {price.name: rounded(value) for price, value in zip(PRICES, prices.tolist(), strict=True)},
        "relative_error": rounded(relative_error),
        "held_out": held_out_section(found, len(table.latency_ms), FOLDS),
        "coverage_of_networks_left_out": rounded(fold_coverage(left_out_ms, table.latency_ms, fold)),
    }


def device_sections(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The written part of a device file."""
    own = result["devices"][name]
    covered = [*own["covered"], *FREE]
    refused = ", ".join(sorted(set(FAMILIES) - set(covered)))
    return {
        "latency": {
            "origin": "fitted",
            "source": f"fitted to nn-Meter's latencies of {own['networks']} NAS-Bench-201 networks, "
            f"{own['macs']['smallest'] / 1e6:.0f} to {own['macs']['largest'] / 1e6:.0f} million MACs. All have the "
            "same operations at the same three sizes (16, 32 and 64 channels on 32, 16 and 8 pixels), so the errors "
            "hold for networks like them, and elsewhere prices are extrapolated. Families that they lack "
            f"({refused}) are refused",
            "constant_ms": 0.0,
            "coefficients_ms": coefficients(PRICES, own["prices_ms"].values(), own["covered"])
            | {f"{family}.fp32.count": 0.0 for family in FREE},
            "relative_error": own["relative_error"],
            "held_out": dict(own["held_out"]),
        }
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return fit_command(
        arguments,
        about=__doc__,
        name="fit_nasbench201",
        needed=(TABLE, CELLS),
        fit=fit,
        devices=lambda result: {name: device_sections(result, name) for name in DEVICES},
    )


if __name__ == "__main__":
    sys.exit(main())
