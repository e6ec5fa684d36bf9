"""Fit the profiles of two phone CPUs to the latencies of single blocks (nn-Meter's tables), both together.

    python experiments/fit_mobile_cpu.py DATA_DIR [--write]

DATA_DIR holds mobile_block_latency.csv.gz (nn-Meter, MIT). Blocks are left out by whole groups of one side and one
number of input channels, and, to see how far the prices carry, by sides. Prints what it found as JSON and writes it to
experiments/results/fit_mobile_cpu.json; --write also writes the fitted part of the device files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fitted import fit_command, fold_coverage, held_out_section, provenance, rounded
from experiments.mobile_blocks import PRICES, TABLE, BlockTable, read_block_table
from experiments.prices import coefficients, families_in, priced
from hardware_profiles.cost_model import FAMILIES
from predictors.pooled import PENALTY, TOLERANCE, fit_pooled, predict_networks_left_out
from predictors.regression import predict_left_out, relative_interval, scores, with_constant

COMMAND = "python experiments/fit_mobile_cpu.py DATA_DIR"
COLUMNS = {"pixel4": "pixel4_v3", "xiaomi11": "xiaomi11_v3"}
FOLDS = 10
SEED = 0


def fit(data: Path) -> dict[str, Any]:
    table = read_block_table(data, tuple(COLUMNS.values()))
    amounts = priced(table.rows, PRICES)
    latency_ms = np.array([table.latency_ms[column] for column in COLUMNS.values()])
    groups = int(table.group.max()) + 1
    fold = (np.random.default_rng(SEED).permutation(groups) % FOLDS)[table.group]
    prices = fit_pooled(amounts, latency_ms)
    left_out_ms = predict_networks_left_out(amounts, latency_ms, fold)
    sides_left_out_ms = predict_networks_left_out(amounts, latency_ms, table.side)
    return {
        **provenance(COMMAND),
        "seed": SEED,
        "penalty": PENALTY,
        "tolerance": TOLERANCE,
        "blocks": len(table.keys),
        "groups": groups,
        "macs": {"smallest": int(table.macs.min()), "largest": int(table.macs.max())},
        "covered": families_in(table.rows),
        "devices": {
            name: _report(table, prices[i], left_out_ms[i], latency_ms[i], fold)
            | {"sides_left_out": scores(sides_left_out_ms[i], latency_ms[i])}
            for i, name in enumerate(COLUMNS)
        },
    }


def _report(
    table: BlockTable, prices: np.ndarray, left_out_ms: np.ndarray, latency_ms: np.ndarray, fold: np.ndarray
) -> dict[str, Any]:
    relative_error, coverage = relative_interval(left_out_ms, latency_ms)
    line = predict_left_out(with_constant(table.macs[:, None]), latency_ms, fold, ridge=0.0)
    found = {"held_out": scores(left_out_ms, latency_ms), "macs_only": scores(line, latency_ms), "coverage": coverage}
    kinds = np.array(table.kinds)
    return {
        "prices_ms": {price.name: rounded(value) for price, value in zip(PRICES, prices.tolist(), strict=True)},
        "relative_error": rounded(relative_error),
        "held_out": held_out_section(found, len(latency_ms), FOLDS),
        "coverage_of_blocks_left_out": rounded(fold_coverage(left_out_ms, latency_ms, fold)),
        "largest_gmacs_per_second": rounded((table.macs / latency_ms).max() / 1e6),
        "kinds": {
            str(kind): {
                "blocks": int((kinds == kind).sum()),
                "held_out": scores(left_out_ms[kinds == kind], latency_ms[kinds == kind]),
                "macs_only": scores(line[kinds == kind], latency_ms[kinds == kind]),
            }
            for kind in np.unique(kinds)
        },
    }


def device_sections(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The written part of a device file."""
    own, covered, macs = result["devices"][name], result["covered"], result["macs"]
    refused = ", ".join(sorted(set(FAMILIES) - set(covered)))
    return {
        "latency": {
            "origin": "fitted",
            "source": f"fitted to nn-Meter's latencies of {result['blocks']} single blocks (inverted residual, "
            f"attention, feed-forward, first and last layers), {macs['smallest'] / 1e6:.2f} to "
            f"{macs['largest'] / 1e6:.0f} million MACs; held-out errors are on blocks of sides and input channels left "
            "out. No whole network was measured: a network is the sum of its layers. The table does not say how many "
            f"threads ran; no block does more than {own['largest_gmacs_per_second']:.1f} billion MACs a second. "
            f"Families that no block has ({refused}) are refused",
            "constant_ms": 0.0,
            "coefficients_ms": coefficients(PRICES, own["prices_ms"].values(), covered),
            "relative_error": own["relative_error"],
            "held_out": dict(own["held_out"]),
        }
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return fit_command(
        arguments,
        about=__doc__,
        name="fit_mobile_cpu",
        needed=(TABLE,),
        fit=fit,
        devices=lambda result: {name: device_sections(result, name) for name in COLUMNS},
    )


if __name__ == "__main__":
    sys.exit(main())
