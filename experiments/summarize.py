"""Write what a finished run got to experiments/results/, for the README and for comparisons.

    python experiments/summarize.py RUN COMMAND [--note TEXT]

RUN is a run directory; COMMAND is the command that made it, kept as text. The largest subnet is exported too (to
RUN/exports), since its test accuracy says what the supernet is worth. Prints the JSON and writes
experiments/results/NAME.json, NAME being that of the experiment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fitted import write_result

from hardware_profiles.files import read_json
from hardware_profiles.machine import this_machine
from nas import Evaluation, ParetoFront
from nas.pipeline import Run
from nas.versions import versions


def summary(run: Run, command: str, note: str) -> dict[str, Any]:
    """What a run got, with what is needed to get it again."""
    front, experiment = run.front, run.experiment
    largest = run.space.largest
    network = run.space.lower(largest)
    _, whole = run.export(Evaluation(largest.id, str(largest), {}, network.precisions))
    _, chosen = run.export(run.chosen(front))
    machine = this_machine()
    return {
        "command": command,
        "note": note,
        "seed": experiment.seed,
        "machine": f"{machine.cpu}, {machine.logical_cores} cores",
        "versions": yaml.safe_load((run.folder / "experiment.yaml").read_text(encoding="utf-8"))["versions"],
        "summarized_by": versions(),
        "stages": read_json(run.folder / "stages.json"),
        "space": {
            "name": run.space.name,
            "architectures": float(run.space.size),
            "largest_mmacs": network.macs / 1e6,
            "smallest_mmacs": run.space.lower(run.space.smallest).macs / 1e6,
        },
        "largest_subnet": {"test_accuracy": whole["accuracy"]["test"], "macs": whole["macs"]},
        "front": _front(front),
        "predictors": {
            name: device.predictor.report() for name, device in run.devices.items() if device.predictor is not None
        },
        "checks": run.check_predictors(),
        "export": {
            key: chosen[key]
            for key in ("id", "architecture", "accuracy", "parity", "int8_macs_share", "model_bytes", "file_bytes")
        }
        | {"devices": chosen["devices"]},
    }


def _front(front: ParetoFront) -> dict[str, Any]:
    keys = [objective.key for objective in front.objectives]
    spans = {}
    for key in keys:
        values = [point[key] for point in front.points]
        spans[key] = max(values) / min(values)
    return {
        "points": len(front),
        "span": spans,
        "noise": dict(front.noise or {}),
        "rows": [
            {
                "id": point.id,
                **{key: point[key] for key in keys},
                **{f"{key} before": figure.value for key, figure in point.predicted.items()},
                "macs": point["macs"],
                "int8_macs_share": point["int8_macs_share"],
            }
            for point in front.points
        ],
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("command")
    parser.add_argument("--note", default="", help="what a reader must know of how the run went")
    parsed = parser.parse_args(arguments)
    run = Run.open(parsed.run)
    result = summary(run, parsed.command, parsed.note)
    print(json.dumps(result, indent=1))
    write_result(run.experiment.name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
