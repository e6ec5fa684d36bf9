"""Latency and energy of networks left out, on microcontrollers, by runtime and by board, beside simpler models.

    python experiments/benchmarks/mcu_latency.py [--h743 H.csv --structures FOLDER] [--mlperf M.csv --models FOLDER] \\
        [--architecture-columns net_id,task] [--device-columns library,round,submitter,system] \\
        [--latency-columns latency_ms,latency_ms] [--energy-column energy_uJ_per_inf] [--devices NAME,...]
    python experiments/benchmarks/mcu_latency.py --data DIR

The second is the first with the files of experiments/fit_mcu.py in that folder. --h743 is TinyEngine's table, with the
library in its device column, and MCUNet's JSON files in --structures; --mlperf is MLPerf Tiny's, with round, submitter
and system in its three, and the .tflite files in --models. Either table alone will do; columns are those of the tables
that are given, --h743 first. Networks, libraries and boards that experiments/mcu_data.py does not know are left out.
--devices are boards or kernels, as the result calls them; all by default.

A network is left out on every board of the same kernels at once. `ours` is what the device profiles hold;
`instructions` are those counted of CMSIS-NN's kernels at one speed a board; `macs_only` is one price a MAC on each
board. Errors are shares of what was measured. The 90 % intervals of a network come from the residuals of the other
networks on the boards of the same kernels, so that coverage is measured on what they did not see. A runtime with fewer
than nine measurements has no 90 % interval, and its nominal coverage says what it has.

Energy is the power of a board times a latency: the predicted one (`ours`), the measured one, which leaves the error of
the power alone, or that of the MACs. Prints JSON and writes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import about, out_option
from csv_tables import BadInput, as_many, chosen, command, file_options, files_of, listed, present, read_csv

sys.path.append(str(Path(__file__).parents[1]))  # the modules of the fitting scripts, which are in no package

from mcu_data import (
    H743_COLUMNS,
    H743_TABLE,
    MLPERF_COLUMNS,
    MLPERF_TABLE,
    MODELS,
    STRUCTURES,
    H743Columns,
    MlperfColumns,
    Run,
    boards_of,
    read_h743,
    read_mlperf,
)
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

NAME = Path(__file__).stem
FILES = {
    "h743": (H743_TABLE, "TinyEngine's table"),
    "structures": (STRUCTURES, "the folder of its networks"),
    "mlperf": (MLPERF_TABLE, "MLPerf Tiny's table"),
    "models": (MODELS, "the folder of its networks"),
}
COLUMNS = {  # option -> table -> its columns
    "architecture": {"h743": [H743_COLUMNS.network], "mlperf": [MLPERF_COLUMNS.task]},
    "device": {"h743": [H743_COLUMNS.library], "mlperf": MLPERF_COLUMNS.board},
    "latency": {"h743": [H743_COLUMNS.latency], "mlperf": [MLPERF_COLUMNS.latency]},
}
FEWEST = 2  # architectures on a board: one is left out


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
        if not here:
            continue
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


def pooled_coverage(results: Sequence[dict[str, Any]]) -> float | None:
    """Share of all measurements inside their intervals; None without any."""
    if not results:
        return None
    counts = np.array([result["measurements"] for result in results])
    shares = np.array([result["interval"]["measured_coverage"] for result in results])
    return float((counts * shares).sum() / counts.sum())


def benchmark(runs: Sequence[Run]) -> dict[str, Any]:
    by_kernels = {kernels: [run for run in runs if run.kernels == kernels] for kernels in FORMS}
    latency = {kernels: of_latency(here, FORMS[kernels]) for kernels, here in by_kernels.items() if here}
    energy = {kernels: of_energy(here, FORMS[kernels]) for kernels, here in by_kernels.items()}
    totals = {run.name: sum(NOTHING_FITTED.row(run.features)) for run in runs if run.name in COUNTED}
    return {
        **about(),
        "measurements": len(runs),
        "latency_coverage_of_all": pooled_coverage(list(latency.values())),
        "latency": latency,
        "energy_coverage_of_all": pooled_coverage([found for found in energy.values() if found]),
        "energy": {kernels: found for kernels, found in energy.items() if found},
        "instructions_over_counted": {name: totals[name] / COUNTED[name] for name in sorted(totals)},
        "sensitivity": sensitivity(runs),
    }


# reading -------------------------------------------------------------------------------------------------


def read(asked: argparse.Namespace) -> list[Run]:
    """The measurements that the arguments ask for; raises BadInput."""
    files = files_of(asked, FILES)
    for table, folder in (("h743", "structures"), ("mlperf", "models")):
        if (files[table] is None) != (files[folder] is None):
            raise BadInput(f"expected both --{table} and --{folder}")
    h743_columns, mlperf_columns = columns_of(asked, [name for name in ("h743", "mlperf") if files[name]])
    runs = []
    if files["h743"] and files["structures"]:
        runs += read_h743(files["h743"], files["structures"], h743_columns)
    if files["mlperf"] and files["models"]:
        present(read_csv(files["mlperf"]), listed(asked.energy_column), files["mlperf"])
        runs += read_mlperf(files["mlperf"], files["models"], mlperf_columns)
    where = " and ".join(str(files[name]) for name in ("h743", "mlperf") if files[name])
    names = chosen(listed(asked.devices), [*dict.fromkeys(run.kernels for run in runs), *boards_of(runs)], where)
    runs = [run for run in runs if run.kernels in names or run.board in names]
    if not runs:
        raise BadInput(f"{where}: no measurement of a known network on a known board")
    enough(runs)
    return runs


def columns_of(asked: argparse.Namespace, tables: Sequence[str]) -> tuple[H743Columns, MlperfColumns]:
    """The columns of each table, as the arguments name them for the tables that are given."""
    found = {
        option: by_table(f"--{option}-columns", getattr(asked, f"{option}_columns"), usual, tables)
        for option, usual in COLUMNS.items()
    }
    network, library, latency = (found[option]["h743"][0] for option in ("architecture", "device", "latency"))
    task, board, other_latency = (found[option]["mlperf"] for option in ("architecture", "device", "latency"))
    energy = asked.energy_column or MLPERF_COLUMNS.energy
    return (
        H743Columns(network, library, latency),
        MlperfColumns(task[0], (board[0], board[1], board[2]), other_latency[0], energy),
    )


def by_table(
    option: str, text: str | None, usual: Mapping[str, Sequence[str]], tables: Sequence[str]
) -> dict[str, Sequence[str]]:
    """The columns that an option names of each of `tables`, in their order; elsewhere the usual ones."""
    expected = [name for table in tables for name in usual[table]]
    names = iter(as_many(option, text, expected) if text else expected)
    return {table: [next(names) for _ in own] if table in tables else own for table, own in usual.items()}


def enough(runs: Sequence[Run]) -> None:
    """Raises BadInput for a board with too few architectures for one to be left out."""
    for board, own in boards_of(runs).items():
        for what, here in (("latency", own), ("energy", [run for run in own if run.energy_uj])):
            count = len({run.architecture for run in here})
            if here and count < FEWEST:
                raise BadInput(f"{board} has the {what} of {count} architecture; expected at least {FEWEST}")


# the command ---------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    file_options(parser, FILES)
    parser.add_argument("--architecture-columns", help="of the networks' names: net_id,task by default")
    parser.add_argument("--device-columns", help="library,round,submitter,system by default")
    parser.add_argument("--latency-columns", help="milliseconds: latency_ms,latency_ms by default")
    parser.add_argument("--energy-column", help=f"microjoules, of --mlperf: {MLPERF_COLUMNS.energy} by default")
    parser.add_argument("--devices", help="boards or kernels, separated by commas; all by default")
    out_option(parser, NAME)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return command(NAME, lambda asked: benchmark(read(asked)), parsed(arguments))


if __name__ == "__main__":
    sys.exit(main())
