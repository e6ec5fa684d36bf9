"""Latency and energy of networks left out, on microcontrollers, by runtime and by board, beside simpler models.

    python experiments/benchmarks/mcu_latency.py DATA_DIR

DATA_DIR as for experiments/fit_mcu.py. A network is left out on every board of the same kernels at once. `ours` is what
the device profiles hold; `instructions` are those counted of CMSIS-NN's kernels at one speed a board; `macs_only` is
one price a MAC on each board. Errors are shares of what was measured. The 90 % intervals of a network come from the
residuals of the other networks on the boards of the same kernels, so that coverage is measured on what they did not
see. A runtime with fewer than nine measurements has no 90 % interval, and its nominal coverage says what it has.

Energy is the power of a board times a latency: the predicted one (`ours`), the measured one, which leaves the error of
the power alone, or that of the MACs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import about, finish, out_option

sys.path.append(str(Path(__file__).parents[1]))  # the modules of the fitting scripts, which are in no package

from mcu_data import Run, boards_of, has_data, read_runs
from mcu_models import (
    COUNTED,
    FORMS,
    INSTRUCTIONS,
    NOTHING_FITTED,
    OTHER_KERNELS,
    RIDGE,
    Form,
    covered,
    energy_left_out_uj,
    errors,
    instructions_left_out_ms,
    macs_left_out_ms,
    predict_left_out_ms,
)

from predictors.regression import relative_interval


def of_latency(runs: Sequence[Run], form: Form) -> dict[str, Any]:
    """Errors of one runtime's kernels, whole and by board."""
    measured = np.array([run.latency_ms for run in runs])
    left_out = {
        "ours": predict_left_out_ms(runs, form),
        "instructions": instructions_left_out_ms(runs),
        "macs_only": macs_left_out_ms(runs),
    }
    width, nominal = relative_interval(left_out["ours"], measured)
    inside = covered(runs, left_out["ours"], measured)
    boards = {}
    for board in boards_of(runs):
        at = [index for index, run in enumerate(runs) if run.board == board]
        boards[board] = {name: errors(predicted[at], measured[at]) for name, predicted in left_out.items()}
        boards[board] |= {
            "networks": {
                runs[index].name: {
                    "macs": int(runs[index].macs),
                    "measured_ms": runs[index].latency_ms,
                    "left_out_ms": float(left_out["ours"][index]),
                    "inside_its_interval": inside[index],
                }
                for index in at
            }
        }
    return {
        "measurements": len(runs),
        "architectures": len({run.architecture for run in runs}),
        **{name: errors(predicted, measured) for name, predicted in left_out.items()},
        "interval": {
            "half_width": width,
            "nominal_coverage": nominal,
            "measured_coverage": float(np.mean(inside)),
        },
        "boards": boards,
    }


def of_energy(runs: Sequence[Run], form: Form) -> dict[str, Any]:
    """Errors of the energies of one runtime's kernels, where there are any."""
    at = [index for index, run in enumerate(runs) if run.energy_uj]
    if not at:
        return {}
    here = [runs[index] for index in at]
    measured = np.array([float(run.energy_uj or 0.0) for run in here])
    latencies = {
        "ours": predict_left_out_ms(runs, form)[at],
        "measured_latency": np.array([run.latency_ms for run in here]),
        "macs_only": macs_left_out_ms(runs)[at],
    }
    left_out = {name: energy_left_out_uj(here, latency) for name, latency in latencies.items()}
    width, nominal = relative_interval(left_out["ours"], measured)
    inside = covered(here, left_out["ours"], measured)
    boards = {
        board: {
            name: errors(predicted[rows], measured[rows])
            for rows in [[index for index, run in enumerate(here) if run.board == board]]
            for name, predicted in left_out.items()
        }
        for board in boards_of(here)
    }
    return {
        "measurements": len(here),
        **{name: errors(predicted, measured) for name, predicted in left_out.items()},
        "interval": {
            "half_width": width,
            "nominal_coverage": nominal,
            "measured_coverage": float(np.mean(inside)),
        },
        "boards": boards,
    }


def sensitivity(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean error with the two numbers that were chosen with these tables at hand set otherwise, by kernels."""
    found: dict[str, Any] = {}
    for kernels in ("cmsis-nn", "x-cube-ai-7"):
        here = [run for run in runs if run.kernels == kernels]
        measured = np.array([run.latency_ms for run in here])
        form = FORMS[kernels]
        tried = {f"ridge {ridge:g}": replace(form, ridge=ridge) for ridge in (RIDGE / 3, RIDGE * 3)}
        if form is OTHER_KERNELS:
            flash = form.columns[-1]
            for price in (0.0, 0.5, 2.0):
                scaled = (dict.fromkeys(flash, price),) if price else ()
                tried[f"{price:g} instructions expected for a byte from flash"] = Form((*INSTRUCTIONS, *scaled), RIDGE)
        found[kernels] = {
            name: errors(predict_left_out_ms(here, other), measured)["mape"] for name, other in tried.items()
        }
    return found


def pooled_coverage(results: Sequence[dict[str, Any]]) -> float:
    """Share of all measurements inside their intervals."""
    counts = np.array([result["measurements"] for result in results])
    shares = np.array([result["interval"]["measured_coverage"] for result in results])
    return float((counts * shares).sum() / counts.sum())


def run(data: Path) -> dict[str, Any]:
    runs = read_runs(data)
    by_kernels = {kernels: [run for run in runs if run.kernels == kernels] for kernels in FORMS}
    latency = {kernels: of_latency(here, FORMS[kernels]) for kernels, here in by_kernels.items()}
    energy = {kernels: of_energy(here, FORMS[kernels]) for kernels, here in by_kernels.items()}
    totals = {run.name: sum(NOTHING_FITTED.row(run.features)) for run in runs if run.name in COUNTED}
    return {
        **about(),
        "measurements": len(runs),
        "latency_coverage_of_all": pooled_coverage(list(latency.values())),
        "latency": latency,
        "energy_coverage_of_all": pooled_coverage([found for found in energy.values() if found]),
        "energy": {kernels: found for kernels, found in energy.items() if found},
        "instructions_over_counted": {name: totals[name] / COUNTED[name] for name in sorted(COUNTED)},
        "sensitivity": sensitivity(runs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with the measurements")
    out_option(parser, "mcu_latency")
    options = parser.parse_args(arguments)
    if not has_data(options.data):
        print(f"{options.data}: expected a folder with mcu_stm32h743.csv and mcu_mlperf_tiny.csv", file=sys.stderr)
        return 2
    finish(run(options.data), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
