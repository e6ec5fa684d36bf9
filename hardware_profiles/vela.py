"""What Vela, the compiler of Arm's Ethos-U accelerators, estimates of a network: never a measurement.

Vela's own words on its numbers are that they are there for the decisions of the compiler, do not stand for real
performance, and are not to be compared between settings; a model of the hardware or an FPGA would tell. So they rank
networks for one accelerator in one configuration, and no error of them is known.

Stored weights are compressed. The normally distributed ones written here compress as little as the trained ones of
MLPerf Tiny's residual and keyword networks (7.4 bits of entropy, 7.3 and 7.7); its person detector has 83 % zeros, and
is estimated at 0.72 ms with normal weights and at 0.44 ms with its own. So a network that waits for its weights and
will be sparse is estimated too slow.

Vela (the package ethos-u-vela) is optional and runs as a program of its own.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hardware_profiles.cost_model import UnsupportedLayer
from hardware_profiles.tflite_writer import write_tflite
from search_spaces import Network

ACCELERATORS = ("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256")
INSTALL = "Vela is not installed; pip install 'fitnest[npu]' brings it"
TIMEOUT_S = 300.0  # a large network compiles in seconds
_ON_CPU = re.compile(r"^CPU operators = (\d+)", re.MULTILINE)


class VelaFailed(RuntimeError):
    """Vela ended with an error or without a result."""


@lru_cache(maxsize=1 << 14)
def estimate(network: Network, accelerator: str) -> float:
    """Milliseconds of one forward pass of one sample, as Vela estimates them with its default configuration.

    Raises ImportError saying what to install, UnsupportedLayer for a layer that is not int8 or would run on the host
    processor, whose time Vela does not know, and VelaFailed.
    """
    if find_spec("ethosu") is None:
        raise ImportError(INSTALL)
    content = write_tflite(network, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "network.tflite").write_bytes(content)
        printed = _run_vela(folder, accelerator)
        on_cpu = _ON_CPU.search(printed)
        if on_cpu is None or int(on_cpu[1]):
            count = on_cpu[1] if on_cpu else "an unknown number of"
            raise UnsupportedLayer(
                f"{count} operators would not run on the {accelerator}, and Vela knows no time of them"
            )
        return _inference_ms(folder)


def _run_vela(folder: Path, accelerator: str) -> str:
    command = [sys.executable, "-m", "ethosu.vela", str(folder / "network.tflite")]
    command += ["--accelerator-config", accelerator, "--output-dir", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise VelaFailed(f"Vela took more than {TIMEOUT_S:g} s; expected seconds") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise VelaFailed(f"Vela ended with code {done.returncode}: {' '.join(last)}")
    return done.stdout


def _inference_ms(folder: Path) -> float:
    """From the one row of the summary that Vela writes, in seconds there."""
    for path in folder.glob("*_summary_*.csv"):
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                return float(row["inference_time"]) * 1000
    raise VelaFailed("Vela wrote no summary; expected one beside its output")
