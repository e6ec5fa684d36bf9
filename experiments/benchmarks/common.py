"""What the benchmarks share: where a result comes from, where it goes, and work spread over processes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware_profiles.files import write_json
from hardware_profiles.machine import this_machine
from nas.versions import versions

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


def out_option(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the JSON goes")


def finish(result: Mapping[str, Any], out: Path) -> None:
    """Print a result and write it."""
    write_json(out, result)
    print(json.dumps(result, indent=1))


def in_processes(commands: Sequence[Sequence[str]], workers: int) -> Iterator[tuple[int, str]]:
    """(index, stdout) of each command as it ends, `workers` of them at once with one thread each.

    Raises RuntimeError with the end of stderr when one fails; those that run are ended then.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    waiting, running = list(enumerate(commands)), dict[int, subprocess.Popen[str]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, command = waiting.pop(0)
                running[index] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
                )
            done = next((index for index, process in running.items() if process.poll() is not None), None)
            if done is None:
                time.sleep(0.2)
                continue
            process = running.pop(done)
            stdout, stderr = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{shlex.join(commands[done])} failed:\n{stderr[-2000:]}")
            yield done, stdout
    finally:
        for process in running.values():
            process.kill()
