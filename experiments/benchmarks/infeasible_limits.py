"""Limits just beyond and just within what can be reached, on every shipped device: is the answer right, and how soon.

    python experiments/benchmarks/infeasible_limits.py

For each space of a recipe and each device: the range of latency, SRAM, flash and MACs, then a limit a millionth below
the least, which must be refused naming it, and one a millionth above, which must be met. Then each kind of limit on a
space small enough to lower every architecture. Times are of one thread, of the processor and of the wall, with the
compilation of the tables; a device that is measured has no latency before it is profiled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.benchmarks.common import about, finish, out_option, recipe_space
from hardware_profiles import device_names, load_device
from nas.candidates import Costs
from nas.costs import Infeasible, Limit, ProfiledDevice, at_most, maximize
from nas.limits import reachable
from search_spaces import SearchSpace

RECIPES = ("quickstart", "cifar10", "digits_transformer")
BEYOND = 1e-6
HUGE = 1e15


def limits_of(device: ProfiledDevice) -> list[Limit]:
    """One that everything meets, on each figure of a device."""
    names = ["flash_bytes", *(["sram_bytes"] if device.profile.planner else [])]
    if device.has_latency and device.profile.latency_model.accelerator is None:
        names.append("latency_ms")
    return [at_most("macs", HUGE), *(at_most(name, HUGE, device) for name in names)]


def timed(space: SearchSpace, limits: Sequence[Limit], device: ProfiledDevice) -> tuple[Any, float, float]:
    """(Reachable or Infeasible, seconds of the processor, seconds of the wall), tables compiled anew."""
    wall, processor = time.perf_counter(), time.process_time()
    try:
        found: Any = reachable(Costs(space, [maximize("accuracy")], limits, {device.name: device}))
    except Infeasible as error:
        found = error
    return found, time.process_time() - processor, time.perf_counter() - wall


def tried(space: SearchSpace, device: ProfiledDevice) -> dict[str, Any]:
    """What came of limits just beyond and just within the least of each figure."""
    whole, seconds, wall = timed(space, limits_of(device), device)
    times, walls = [seconds], [wall]
    if isinstance(whole, Infeasible):
        return {"runs": False, "why": str(whole)[:160], "most_seconds": seconds, "most_wall_seconds": wall}
    figures: dict[str, Any] = {}
    for each in whole.ranges:
        if each.limit.value != HUGE:
            continue  # the device's own memory
        told = []
        for factor in (1 - BEYOND, 1 + BEYOND):
            bound = Limit(each.limit.name, "<=", each.least * factor, each.limit.device)
            answer, seconds, wall = timed(space, [bound], device)
            refused = isinstance(answer, Infeasible)
            told.append(f"what binds is {bound} (" in str(answer) if refused else "met")
            times.append(seconds)
            walls.append(wall)
        figures[each.limit.key] = {
            "least": each.least,
            "most": each.most,
            "least_is_exact": each.least_is_exact,
            "most_is_exact": each.most_is_exact,
            "below_is_refused_by_name": told[0] is True,
            "above_is_met": told[1] == "met",
        }
    return {"runs": True, "figures": figures, "most_seconds": max(times), "most_wall_seconds": max(walls)}


def small_space(device: ProfiledDevice) -> SearchSpace:
    """The quickstart's, with few enough choices to lower every architecture; three layers are fp32 or int8.

    The other layers are int8, or fp32 for a device that has no int8.
    """
    fixed = slice(-1, None) if "int8" in device.profile.precisions["conv2d"] else slice(0, 1)
    space = recipe_space("quickstart", depths=[1, 2], width_multipliers=[0.5, 1.0], channels=1)
    precisions = ("stem.precision", "stage1.block0.project.precision", "classifier.precision")
    widths = ("stage1.width", "stage3.width", "head.width")
    free = (*precisions, *widths, "stage2.depth", "stage1.block0.kernel", "stage2.block1.expansion")
    return space.restricted(
        {
            c.name: c.options[fixed if c.role == "precision" else slice(-1, None)]
            for c in space.choices
            if c.name not in free
        }
    )


def enumerated(device: ProfiledDevice, seed: int) -> dict[str, Any]:
    """Random single limits and pairs on the small space, against all of its architectures."""
    import numpy as np

    space = small_space(device)
    limits = limits_of(device)
    costs = Costs(space, [maximize("accuracy")], limits, {device.name: device})
    able = list(dict.fromkeys(map(costs.legalize, space.all())))
    figures = [costs.figures(space.lower(architecture)) for architecture in able]
    values = {limit.key: np.array([each[limit.key].value for each in figures]) for limit in limits}
    if not all(np.isfinite(each).all() for each in values.values()):
        return {"architectures": len(able), "runs": False}
    rng = np.random.default_rng(seed)
    right = wrong = refused = 0
    for count in (1, 2) * 8:
        chosen = [limits[int(i)] for i in rng.permutation(len(limits))[:count]]
        met = np.ones(len(able), bool)
        asked = []
        for limit in chosen:
            sorted_values = np.unique(values[limit.key])
            upper = rng.random() < 0.5 or count == 1
            place = int(len(sorted_values) * rng.choice([0.0, 0.1, 0.5]))
            bound = float(sorted_values[place if upper else -1 - place]) * (1 - 1e-9 if upper else 1 + 1e-9)
            asked.append(Limit(limit.name, "<=" if upper else ">=", bound, limit.device))
            met &= values[limit.key] <= bound if upper else values[limit.key] >= bound
        answer, _, _ = timed(space, asked, device)
        refused += isinstance(answer, Infeasible)
        right += isinstance(answer, Infeasible) != bool(met.any())
        wrong += isinstance(answer, Infeasible) == bool(met.any())
    return {"architectures": len(able), "runs": True, "right": right, "wrong": wrong, "refused": refused}


def summary(spaces: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The slowest answer, and how many were right."""
    all_of = [each for space in spaces.values() for each in space.values()]
    figures = [figure for each in all_of if each["runs"] for figure in each["figures"].values()]
    return {
        "most_seconds": max(each["most_seconds"] for each in all_of),
        "most_wall_seconds": max(each["most_wall_seconds"] for each in all_of),
        "limits": len(figures),
        "refused_below": sum(each["below_is_refused_by_name"] for each in figures),
        "met_above": sum(each["above_is_met"] for each in figures),
        "exact_least": sum(each["least_is_exact"] for each in figures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=list(device_names()))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser, "infeasible_limits")
    parsed = parser.parse_args()
    devices = [ProfiledDevice(load_device(name)) for name in parsed.devices]
    spaces = {
        recipe: {device.name: tried(recipe_space(recipe), device) for device in devices} for recipe in parsed.recipes
    }
    checked = {device.name: enumerated(device, parsed.seed) for device in devices}
    finish(
        {"about": about([parsed.seed]), "summary": summary(spaces), "enumerated": checked, "spaces": spaces}, parsed.out
    )


if __name__ == "__main__":
    main()
