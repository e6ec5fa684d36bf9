"""How many NAS-Bench-201 networks a latency model needs to see: an Adreno 640 GPU and a Cortex-A76 CPU (nn-Meter).

    python experiments/benchmarks/mobile_nasbench201.py --data DATA_DIR

DATA_DIR holds mobile_nasbench201_latency.csv.gz and nasbench201_cifar10.csv.gz. In each of several draws a model is
fitted on some networks and judged on all others of its device. Methods:

    macs_only         a line through the MACs that NAS-Bench-201 counts
    live_macs_only    a line through the MACs of the operations that the output sees
    ours              the four prices of the shipped profiles

`unseen` judges the networks whose amounts of all priced quantities are those of no network of the draw, since many
cells have the same operations in another order. Intervals are of 90 %, from cross-validation within the draw.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import about, finish, out_option

from experiments.nasbench201_table import DEVICES, PRICES, CellTable, read_cell_table
from experiments.prices import priced
from predictors.regression import (
    fit_coefficients,
    folds_of,
    predict_left_out,
    relative_interval,
    scores,
    with_constant,
)

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
        "judged": len(amounts) - samples,
        "distinct_amounts": int(twin.max()) + 1,
        "methods": {name: summary(found) for name, found in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FITNEST_DATA"), help="default: $FITNEST_DATA")
    parser.add_argument("--samples", type=int, default=100, help="networks fitted a draw")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser, "mobile_nasbench201")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of the measurements: --data DATA_DIR, or the environment variable FITNEST_DATA")
    devices = {
        name: device_report(read_cell_table(options.data, name), options.samples, options.draws, options.seed)
        for name in DEVICES
    }
    result = {**about([options.seed]), "samples": options.samples, "draws": options.draws, "devices": devices}
    finish(result, options.out)


if __name__ == "__main__":
    main()
