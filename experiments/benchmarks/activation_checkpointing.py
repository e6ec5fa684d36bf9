"""What activation checkpointing saves in memory and costs in time (arXiv 1604.06174).

    python experiments/benchmarks/activation_checkpointing.py [--out FILE.json]

One pass (forward, cross-entropy, backward) of the largest network of a supernet, in fp32, in 1 segment (everything
is kept) and in several.
- `kept_bytes`: what autograd holds when the forward pass ends, parameters not counted.
- `allocated_bytes`: how far what torch has allocated rises above what it had before the pass, gradients included.
- `resident_bytes`: how far the memory of a process of its own (`--measure`) rises above what it had before; on Linux
  without CUDA only. The C library's allocator keeps freed blocks, so this falls less than what is allocated.
  `resident_mapped_bytes` is the same with MALLOC_MMAP_THRESHOLD_=65536, with which glibc returns them at once.
- `time_ratio`: the median over rounds of the time of the pass / that of one segment, turn by turn.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import about, finish, out_option, recipe_space
from torch.profiler import ProfilerActivity, profile

from nas.supernet import Supernet
from search_spaces import MobileNet, SearchSpace


def _large() -> SearchSpace:
    """Four stages of up to three blocks, images of 96 pixels."""
    return MobileNet(
        resolutions=(96,),
        widths=(16, 24, 40, 80),
        strides=(1, 2, 2, 2),
        depths=(1, 2, 3),
        kernels=(3, 5),
        expansions=(2, 4),
        head_width=320,
        precisions=("fp32",),
    )


STATUS = Path("/proc/self/status")
SPACES: Mapping[str, Callable[[], SearchSpace]] = {
    "cifar_32px": partial(recipe_space, "cifar10", precisions=["fp32"]),
    "mobilenet_96px": _large,
}


class Pass:
    """Forward, loss and backward of the largest network of a space, in any number of segments."""

    def __init__(self, name: str, batch: int, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        space = SPACES[name]()
        self.architecture = space.largest
        self.supernet = Supernet(space, seed).to(self.device).train()
        generator = torch.Generator().manual_seed(seed)
        shape = self.supernet.network(self.architecture).input_shape
        x = torch.randn(batch, *shape, generator=generator)
        self.x = x.to(self.device, memory_format=torch.channels_last)
        self.labels = torch.randint(space.classes, (batch,), generator=generator).to(self.device)

    def run(self, segments: int) -> float:
        """Seconds."""
        self.supernet.zero_grad(set_to_none=True)
        self._synchronize()
        start = time.perf_counter()
        self._loss(segments).backward()
        self._synchronize()
        return time.perf_counter() - start

    def _loss(self, segments: int) -> torch.Tensor:
        return F.cross_entropy(self.supernet(self.x, self.architecture, segments=segments), self.labels)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def kept_bytes(self, segments: int) -> int:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.supernet.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.detach()  # alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._loss(segments)
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del loss
        return total

    def allocated_bytes(self, segments: int) -> int:
        self.supernet.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run(segments)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.run(segments)
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    def resident_bytes(self, segments: int) -> int:
        """Of a process that has run no pass before."""
        before = _resident_bytes("VmRSS")
        self.run(segments)
        return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """What Linux says of this process: VmRSS now, or VmHWM at most.

    The peak of getrusage would not do: a process starts with that of the one that made it.
    """
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(fields[field].split()[0])


def resident_in_own_process(name: str, segments: int, batch: int, seed: int, variables: Mapping[str, str]) -> int:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--segments", str(segments)]
    command += ["--batch", str(batch), "--seed", str(seed)]
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} exited with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout)


def measure_memory(trial: Pass, name: str, segments: int, batch: int, seed: int) -> dict[str, int]:
    found = {"kept_bytes": trial.kept_bytes(segments), "allocated_bytes": trial.allocated_bytes(segments)}
    if trial.device.type == "cpu" and STATUS.exists():
        found["resident_bytes"] = resident_in_own_process(name, segments, batch, seed, {})
        mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        found["resident_mapped_bytes"] = resident_in_own_process(name, segments, batch, seed, mapped)
    return found


def measure(name: str, segments: Sequence[int], batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """Memory and time of the largest network of a space for each number of segments, and their ratios to one."""
    trial = Pass(name, batch, seed)
    network = trial.supernet.network(trial.architecture)
    numbers = sorted({1, *segments})
    trial.run(1)  # libraries allocate workspaces once
    memory = {number: measure_memory(trial, name, number, batch, seed) for number in numbers}
    seconds = [{number: trial.run(number) for number in numbers} for _ in range(rounds)]
    rows = [
        {
            "segments": number,
            **memory[number],
            **{f"{kind}_ratio".replace("_bytes", ""): n / memory[1][kind] for kind, n in memory[number].items()},
            "pass_ms": 1e3 * median(times[number] for times in seconds),
            "time_ratio": median(times[number] / times[1] for times in seconds),
        }
        for number in numbers
    ]
    shape = {"macs": network.macs, "layers": len(network.layers), "input_shape": network.input_shape}
    return {"network": shape, "device": str(trial.device), "rows": rows}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(SPACES), default=sorted(SPACES))
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 4, 8], help="beside 1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser, "activation_checkpointing")
    parser.add_argument("--measure", choices=sorted(SPACES), help="only print the resident_bytes of this network")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    if parsed.measure:
        print(Pass(parsed.measure, parsed.batch, parsed.seed).resident_bytes(parsed.segments[0]))
        return 0
    result = {
        **about([parsed.seed]),
        "what": "memory and time of one pass of the largest network, in segments; bytes, milliseconds, ratios to one",
        "batch": parsed.batch,
        "threads": parsed.threads,
        "networks": {
            name: measure(name, parsed.segments, parsed.batch, parsed.rounds, parsed.seed) for name in parsed.networks
        },
    }
    finish(result, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
