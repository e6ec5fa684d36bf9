"""What the benchmarks share: where a result comes from, where it goes, and work spread over processes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from hardware_profiles.files import write_json
from hardware_profiles.machine import this_machine
from nas import load_experiment
from nas.versions import versions
from search_spaces import SearchSpace, build_space

RESULTS = Path(__file__).parents[1] / "results"


def about(seeds: Sequence[int] = ()) -> dict[str, Any]:
    """The command, seeds, machine and versions (with the commit) that make a result repeatable."""
    machine = this_machine()
    script, *arguments = sys.argv
    return {
        "command": shlex.join(["python", f"experiments/benchmarks/{Path(script).name}", *map(_portable, arguments)]),
        "seeds": list(seeds),
        "machine": f"{machine.cpu}, {machine.logical_cores} cores",
        "versions": versions(),
    }


def _portable(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def recipe_space(name: str, **changed: Any) -> SearchSpace:
    """The space of a shipped recipe, with some of its settings changed."""
    settings: dict[str, Any] = {**load_experiment(name).space, **changed}
    return build_space(settings.pop("family"), settings)


def out_option(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the JSON goes")


def finish(result: Mapping[str, Any], out: Path) -> None:
    """Print a result and write it."""
    write_json(out, result)
    print(json.dumps(result, indent=1))


def in_processes(commands: Sequence[Sequence[str]], workers: int) -> Iterator[tuple[int, str]]:
    """(index, stdout) of each command as it ends, `workers` of them at once with one thread each.

    Raises RuntimeError with the end of stderr when one fails; those that wait are not begun then.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def done(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(done, command): index for index, command in enumerate(commands)}
        try:
            for finished in as_completed(waiting):
                process = finished.result()
                if process.returncode:
                    raise RuntimeError(f"{shlex.join(process.args)} failed:\n{process.stderr[-2000:]}")
                yield waiting[finished], process.stdout
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
