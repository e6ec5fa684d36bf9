"""What the fitting scripts share: where a fit comes from, how it is judged, and the files it is written to."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hardware_profiles.device import SHIPPED, load_device
from hardware_profiles.files import write_text
from hardware_profiles.machine import this_machine
from nas.versions import commit_of
from predictors.regression import fit_coefficients, predict_left_out, relative_interval, scores, with_constant

RESULTS = Path(__file__).parent / "results"
DIGITS = 6  # of a number in a device file: far below the error of any fit, and stable between machines


def provenance(command: str) -> dict[str, Any]:
    """The command, commit, machine and versions that make a result repeatable."""
    return {
        "command": command,
        "commit": commit_of(Path(__file__).parent) or None,
        "machine": this_machine().cpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "pyyaml")},
    }


def judged_fit(matrix: np.ndarray, macs: np.ndarray, latency_ms: np.ndarray, fold: np.ndarray) -> dict[str, Any]:
    """Coefficients on all networks, and errors on those of the fold left out, beside a line through the MACs.

    matrix (n, d), macs (n,), latency_ms (n,), fold (n,). A fit on so few networks needs no ridge.
    """
    left_out = predict_left_out(matrix, latency_ms, fold, ridge=0.0)
    macs_only = predict_left_out(with_constant(macs[:, None]), latency_ms, fold, ridge=0.0)
    relative_error, coverage = relative_interval(left_out, latency_ms)
    return {
        "coefficients": fit_coefficients(matrix, latency_ms, ridge=0.0),
        "left_out_ms": left_out,
        "relative_error": relative_error,
        "coverage": coverage,
        "held_out": scores(left_out, latency_ms),
        "macs_only": scores(macs_only, latency_ms),
    }


def fold_coverage(predicted_ms: np.ndarray, latency_ms: np.ndarray, fold: np.ndarray) -> float:
    """Share of the n measurements inside intervals made of the left-out residuals of the other folds; all (n,)."""
    inside = []
    for number in np.unique(fold):
        out = fold == number
        relative_error, _ = relative_interval(predicted_ms[~out], latency_ms[~out])
        inside.append(np.abs(latency_ms[out] / predicted_ms[out] - 1) <= relative_error)
    return float(np.concatenate(inside).mean())


def held_out_section(fit: Mapping[str, Any], networks: int, folds: int) -> dict[str, float]:
    """The errors as a device file holds them."""
    return {
        "networks": networks,
        "folds": folds,
        **{name: rounded(value) for name, value in fit["held_out"].items()},
        "coverage": rounded(fit["coverage"]),
        "macs_only_mape": rounded(fit["macs_only"]["mape"]),
        "macs_only_spearman": rounded(fit["macs_only"]["spearman"]),
    }


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def spread(families: Sequence[str], quantities: Mapping[str, float]) -> dict[str, float]:
    """Coefficients that families share, written out for each: `family.precision.quantity` -> ms per unit."""
    return {
        f"{family}.{quantity}": rounded(value) for family in sorted(families) for quantity, value in quantities.items()
    }


def write_device(name: str, command: str, sections: Mapping[str, Any]) -> None:
    """Replace the written part of a shipped device file, all from its marker on, if the outcome can be read."""
    path = SHIPPED / f"{name}.yaml"
    marker = f"# All below is written by: {command} --write\n"
    head, found, _ = path.read_text(encoding="utf-8").partition(marker)
    if not found:
        raise ValueError(f"{path} has no line {marker.strip()!r}; add it where the written part shall begin")
    body = yaml.safe_dump(dict(sections), sort_keys=False, width=110, allow_unicode=True)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_text(head + marker + body, encoding="utf-8")
        load_device(trial)
    write_text(path, head + marker + body)


def write_result(name: str, result: Mapping[str, Any]) -> None:
    write_text(RESULTS / f"{name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def fit_command(
    arguments: Sequence[str] | None,
    *,
    about: str | None,
    name: str,
    needed: Sequence[str],
    fit: Callable[[Path], dict[str, Any]],
    devices: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]],
) -> int:
    """What each fitting script does when it is run; returns the exit status.

    Args:
        arguments: of the command line; None for those of the process.
        about: the script's docstring.
        name: of the script, and of its result.
        needed: files that the data folder must hold.
        fit: data folder -> result.
        devices: result -> the written sections of each device file.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with the measurements")
    parser.add_argument("--write", action="store_true", help="also write the device files")
    options = parser.parse_args(arguments)
    missing = [file for file in needed if not (options.data / file).exists()]
    if missing:
        print(f"{options.data}: expected a folder with {', '.join(needed)}; missing {missing[0]}", file=sys.stderr)
        return 2
    result = fit(options.data)
    print(json.dumps(result, indent=1))
    write_result(name, result)
    if options.write:
        for device, sections in devices(result).items():
            write_device(device, result["command"], sections)
    return 0
