"""Fit the profiles of phone and board GPUs to ncnn's published benchmark (Vulkan), all of them together.

    python experiments/fit_phones.py DATA_DIR [--write]

DATA_DIR holds ncnn_phone_latency.csv.gz and ncnn_param/*.param: the table of ncnn's benchmark (BSD-3) and the graphs of
the networks in it. Prints what it found as JSON and writes it to experiments/results/fit_phones.json; --write also
writes the fitted part of the device files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fitted import fit_command, held_out_section, provenance, rounded
from experiments.phone_gpus import (
    GRAPHS,
    LARGEST_SPREAD,
    LEFT_OUT,
    LOWEST_SPEARMAN,
    PRICES,
    TABLE,
    PhoneTable,
    read_phone_table,
)
from experiments.prices import coefficients, families_in
from hardware_profiles.cost_model import FAMILIES
from predictors.pooled import PENALTY, TOLERANCE, fit_pooled, predict_networks_left_out
from predictors.regression import predict_left_out, relative_interval, scores, with_constant

COMMAND = "python experiments/fit_phones.py DATA_DIR"
LARGEST_ERROR = 0.3  # mean, held out: a GPU that is predicted worse gets no profile


def fit(data: Path) -> dict[str, Any]:
    """Prices of each GPU from all networks, and errors on each network left out on all GPUs."""
    table = read_phone_table(data / TABLE, data / GRAPHS)
    prices = fit_pooled(table.priced, table.latency_ms)
    left_out_ms = predict_networks_left_out(table.priced, table.latency_ms, np.arange(len(table.names)))
    return {
        **provenance(COMMAND),
        "seed": None,
        "penalty": PENALTY,
        "tolerance": TOLERANCE,
        "rule": f"a GPU is used where the latency follows the MACs (Spearman of {LOWEST_SPEARMAN} or more) and the "
        f"median of average over minimum is at most {LARGEST_SPREAD}",
        "networks_left_out": LEFT_OUT,
        "gpus_of_the_table": table.judged,
        "networks": [
            {"name": name, "macs": round(macs)} for name, macs in zip(table.names, table.macs.tolist(), strict=True)
        ],
        "covered": families_in(table.rows),
        "gpus": {gpu.name: _report(table, i, prices[i], left_out_ms[i]) for i, gpu in enumerate(table.gpus)},
    }


def _report(table: PhoneTable, gpu: int, prices: np.ndarray, left_out_ms: np.ndarray) -> dict[str, Any]:
    ran = np.flatnonzero(~np.isnan(table.latency_ms[gpu]))
    measured, predicted, macs = table.latency_ms[gpu, ran], left_out_ms[ran], table.macs[ran]
    relative_error, coverage = relative_interval(predicted, measured)
    line = predict_left_out(with_constant(macs[:, None]), measured, np.arange(len(ran)), ridge=0.0)
    found = {"held_out": scores(predicted, measured), "macs_only": scores(line, measured), "coverage": coverage}
    return {
        "title": table.gpus[gpu].title,
        "prices_ms": {price.name: rounded(value) for price, value in zip(PRICES, prices.tolist(), strict=True)},
        "relative_error": rounded(relative_error),
        "held_out": held_out_section(found, len(ran), len(ran)),
        "left_out": {
            table.names[j]: {"measured_ms": float(m), "predicted_ms": rounded(p)}
            for j, m, p in zip(ran.tolist(), measured.tolist(), predicted.tolist(), strict=True)
        },
    }


def device_sections(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The written part of a device file: every price written out for the features that pay it."""
    own, covered = result["gpus"][name], result["covered"]
    refused = ", ".join(sorted(set(FAMILIES) - set(covered)))
    macs = [network["macs"] for network in result["networks"] if network["name"] in own["left_out"]]
    return {
        "latency": {
            "origin": "fitted",
            "source": f"fitted to the fastest run of {len(macs)} networks in ncnn's published benchmark, "
            f"{min(macs) / 1e6:.0f} to {max(macs) / 1e6:.0f} million MACs, together with {len(result['gpus']) - 1} "
            "other GPUs, whose prices this one's are drawn towards; held-out errors are on networks left out on all of "
            f"them; families that none of the networks has ({refused}) are refused",
            "constant_ms": 0.0,
            "coefficients_ms": coefficients(PRICES, own["prices_ms"].values(), covered),
            "relative_error": own["relative_error"],
            "held_out": dict(own["held_out"]),
        }
    }


def shipped(result: Mapping[str, Any]) -> list[str]:
    """The GPUs that are predicted well enough for a profile."""
    return [name for name, own in result["gpus"].items() if own["held_out"]["mape"] <= LARGEST_ERROR]


def main(arguments: Sequence[str] | None = None) -> int:
    return fit_command(
        arguments,
        about=__doc__,
        name="fit_phones",
        needed=(TABLE, GRAPHS),
        fit=fit,
        devices=lambda result: {name: device_sections(result, name) for name in shipped(result)},
    )


if __name__ == "__main__":
    sys.exit(main())
