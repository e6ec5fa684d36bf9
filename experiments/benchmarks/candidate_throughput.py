"""How many candidates a second one core judges by look-ups, and in how much memory.

    python experiments/benchmarks/candidate_throughput.py

For several spaces and devices: all figures of random codes, and which of them limits allow, after the tables were
compiled. Then a million candidates at once, and the peak memory of the process. Seconds are of the processor, the best
of three.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.benchmarks.common import about, finish, out_option, recipe_space
from hardware_profiles import load_device
from nas.candidates import Costs
from nas.costs import ProfiledDevice, at_most, maximize, minimize

CASES = (("quickstart", "adreno540"), ("quickstart", "stm32h743"), ("cifar10", "stm32f746"))


def costs_of(recipe: str, name: str) -> Costs:
    """Accuracy and latency, under a limit of latency and, where it has a planner, the device's memory."""
    device = ProfiledDevice(load_device(name))
    objectives = [maximize("accuracy"), minimize("latency_ms", device)]
    limits = [at_most("latency_ms", 5.0, device), at_most("macs", 2e6)]
    return Costs(recipe_space(recipe), objectives, limits, {name: device})


def random_codes(costs: Costs, count: int, seed: int) -> np.ndarray:
    """Codes (count, d) as bytes, each choice uniform over its legal options."""
    rng = np.random.default_rng(seed)
    legal = [[choice.code_of(option) for option in costs.options[choice.name]] for choice in costs.space.choices]
    return np.stack([rng.choice(np.array(each, np.uint8), count) for each in legal], axis=1)


def per_second(call: Callable[[np.ndarray], object], codes: np.ndarray) -> float:
    """Candidates a second of processor time; the best of three."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        call(codes)
        seconds.append(time.process_time() - started)
    return len(codes) / min(seconds)


def measured(recipe: str, device: str, count: int, seed: int) -> dict[str, Any]:
    costs = costs_of(recipe, device)
    codes = random_codes(costs, count, seed)
    started = time.process_time()
    costs.of_codes(codes)  # compiles what occurs
    compiled = time.process_time() - started
    return {
        "space": recipe,
        "device": device,
        "figures": list(costs.of_codes(codes[:1])),
        "first_seconds": compiled,
        "figures_per_second": per_second(costs.of_codes, codes),
        "allowed_per_second": per_second(costs.allowed, codes),
        "allowed_share": float(costs.allowed(codes).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=200_000)
    parser.add_argument("--at-once", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser, "candidate_throughput")
    parsed = parser.parse_args()
    cases = [measured(recipe, device, parsed.candidates, parsed.seed) for recipe, device in CASES]
    costs = costs_of(*CASES[1])
    codes = random_codes(costs, parsed.at_once, parsed.seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = costs.of_codes(codes)
    costs.allowed(codes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"candidates": len(codes), "figures": len(found), "before_mib": before / 1024, "peak_mib": peak / 1024}
    finish({"about": about([parsed.seed]), "cases": cases, "at_once": memory}, parsed.out)


if __name__ == "__main__":
    main()
