"""What training in bf16 with channels last, and compiling, is worth against fp32: images a second, and accuracy.

    python experiments/benchmarks/arithmetic.py CIFAR10.npz [--rounds 10] [--steps 200] [--seeds 0 1 2]

Speed: the largest and the smallest network of experiments/cifar10.yaml, forward, backward and SGD update as in
training, in each arithmetic and compiled by torch.compile, turn by turn, one thread; `compile_s` is how much longer
the first compiled step takes than a later one. A ratio is the median over the rounds of the ratio of one turn;
its quartiles are beside it. `images_per_s` is that of the median step.

Accuracy: the supernet and recipe of equal_flops.py, trained for a few steps in each arithmetic with the same seeds,
and evaluated in fp32 on the first 2000 test images with recalibrated norms. fp32 and fp32_channels_last do the same
sums in another order, so what lies between them is noise.

Where the processor has no bf16 instructions, torch computes bf16 by converting: then the speed says nothing about bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from arms import Item, by_arm, compared, piece_options, run
from common import recipe_space
from equal_flops import RECIPE, SPACE, accuracies, chosen

from hardware_profiles.machine import Machine, this_machine
from nas import Data, Supernet, TrainSettings, load_data, load_experiment, train
from nas.distributed import Workers, workers
from nas.strategies import Pass, Step
from nas.train_settings import ARITHMETICS
from nas.train_step import Batch, StepRunner
from search_spaces import Architecture, SearchSpace

TIMED = "cifar10"  # the recipe of what is timed
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")  # as Linux names them, on x86 and ARM
BASE, TESTED = "fp32_channels_last", "bf16_channels_last"
COMPILED = "fp32_channels_last, compiled"
TIMED_ARMS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"arithmetic": name} for name in ARITHMETICS},
    COMPILED: {"arithmetic": BASE, "compile": True},
}
WARM_UP = 2  # rounds that do not count: they allocate gradients and momentum
NETWORKS = 8  # whose mean accuracy is compared
TEST_IMAGES = 2000
SEEDS = (0, 1, 2)
FIGURES = ("mean_accuracy", "smallest_accuracy", "largest_accuracy")


def planned(seeds: Sequence[int], rounds: int, steps: int) -> list[Item]:
    """Speeds first, then trainings seed by seed."""
    speeds = [{"kind": "speed", "network": name, "rounds": rounds} for name in ("largest", "smallest")]
    return speeds + [
        {"kind": "train", "arm": arm, "seed": seed, "steps": steps} for seed in seeds for arm in ARITHMETICS
    ]


def work(
    item: Item,
    data: Data,
    folder: Path,
    *,
    timed: tuple[SearchSpace, TrainSettings],
    trained: tuple[SearchSpace, TrainSettings],
    networks: Sequence[Architecture],
) -> Item:
    """Time steps, or train and evaluate the networks of the trained space."""
    if item["kind"] == "speed":
        return speed(item, data, *timed)
    space, settings = trained
    supernet = Supernet(space, item["seed"])
    settings = replace(settings, steps=item["steps"], arithmetic=item["arm"])
    results = train(supernet, data, seed=item["seed"], settings=settings, folder=folder)
    supernet.cpu()
    ends = accuracies(supernet, data, [space.smallest, space.largest], "test", TEST_IMAGES)
    return {
        "mean_accuracy": float(np.mean(accuracies(supernet, data, networks, "test", TEST_IMAGES))),
        "smallest_accuracy": ends[0],
        "largest_accuracy": ends[1],
        **{name: results[name] for name in ("loss", "rollbacks", "seconds")},
    }


# speed ---------------------------------------------------------------------------------------------------


def speed(item: Item, data: Data, space: SearchSpace, settings: TrainSettings) -> Item:
    """Seconds of each round's step, by arm; the first of a round changes."""
    architecture: Architecture = getattr(space, item["network"])
    with workers() as joined:
        trained = [
            (name, _Trained(space, architecture, data, replace(settings, **changes), joined))
            for name, changes in TIMED_ARMS.items()
        ]
        seconds: dict[str, list[float]] = {name: [] for name in TIMED_ARMS}
        for number in range(WARM_UP + item["rounds"]):
            first = number % len(trained)
            for name, one in trained[first:] + trained[:first]:
                seconds[name].append(one.step(number))
    return {
        "device": str(joined.device),
        "architecture": str(architecture),
        "macs": space.lower(architecture).macs,
        "batch": settings.batch_size,
        "compile_s": seconds[COMPILED][0] - median(seconds[COMPILED][WARM_UP:]),
        "seconds": {name: found[WARM_UP:] for name, found in seconds.items()},
    }


class _Trained:
    """A network in training, always on the same images."""

    def __init__(
        self,
        space: SearchSpace,
        architecture: Architecture,
        data: Data,
        settings: TrainSettings,
        joined: Workers,
    ) -> None:
        supernet = Supernet(space, 0).to(joined.device)
        self._runner = StepRunner(supernet, data, settings, 0, joined)
        self._optimizer = torch.optim.SGD(
            supernet.parameters(), lr=1e-5, momentum=settings.momentum, nesterov=settings.momentum > 0
        )
        self._plan = Step((Pass((architecture,)),), 1.0)
        pixels, labels = next(data["train"].batches(settings.batch_size))
        self._batch = Batch(pixels, labels, len(labels))

    def step(self, number: int) -> float:
        """Seconds."""
        start = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        self._runner.gradients(self._plan, number, 10**6, 0, [self._batch])
        self._optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


# report --------------------------------------------------------------------------------------------------


def report(lines: Sequence[Mapping[str, Any]], machine: Machine) -> dict[str, Any]:
    speeds = {x["item"]["network"]: speed_row(x) for x in lines if x["item"]["kind"] == "speed"}
    trained = [x for x in lines if x["item"]["kind"] == "train"]
    told = {name: compared(by_arm(trained, ARITHMETICS, lambda x, name=name: x[name]), BASE) for name in FIGURES}  # type: ignore[misc]
    has = [flag for flag in BF16_FLAGS if flag in machine.flags]
    return {
        "what": f"training in {TESTED} against {BASE} and fp32: speed of a step, and accuracy after few steps",
        "timed": TIMED,
        "trained": SPACE.name,
        "bf16_instructions": has,
        "speed": speeds,
        "accuracy": told,
        "rollbacks": int(sum(x["rollbacks"] for x in trained)),
        "in_words": in_words(has, speeds, told["mean_accuracy"]["arms"].get(TESTED, {})),
    }


def speed_row(line: Mapping[str, Any]) -> dict[str, Any]:
    seconds, batch = line["seconds"], line["batch"]
    pairs = [(TESTED, "fp32"), (TESTED, BASE), (BASE, "fp32"), (COMPILED, BASE)]
    return {
        **{name: line[name] for name in ("device", "architecture", "macs", "batch")},
        "compile_s": round(line["compile_s"], 1),
        "images_per_s": {name: round(batch / median(found), 1) for name, found in seconds.items()},
        "times_as_fast": {f"{a} / {b}": _ratio(seconds[a], seconds[b]) for a, b in pairs},
    }


def _ratio(seconds: Sequence[float], of_other: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the first is, turn by turn."""
    ratios = np.array(of_other) / np.array(seconds)
    low, middle, high = (round(float(q), 3) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"median": middle, "quartiles": [low, high]}


def in_words(has: Sequence[str], speeds: Mapping[str, Any], tested: Mapping[str, Any]) -> list[str]:
    on_cpu = all(row["device"] == "cpu" for row in speeds.values())
    said = []
    if on_cpu:
        said.append(
            f"The processor has bf16 instructions ({', '.join(has)})."
            if has
            else "The processor has no bf16 instructions: torch converts, and the speeds say nothing about bf16 itself."
        )
    for name, row in speeds.items():
        for other in ("fp32", BASE):
            ratio = row["times_as_fast"][f"{TESTED} / {other}"]["median"]
            said.append(f"The {name} network trains {ratio:.2f} times as fast in {TESTED} as in {other}.")
        ratio = row["times_as_fast"][f"{COMPILED} / {BASE}"]["median"]
        said.append(f"Compiled in {row['compile_s']:.0f} s, it trains {ratio:.2f} times as fast as not compiled.")
    if "difference" in tested:
        interval = "" if tested["interval"] is None else f" (give or take {100 * tested['interval']:.2f})"
        gap = f"{100 * tested['difference']:+.2f} points{interval}"
        said.append(f"What is trained in {TESTED} is, in mean accuracy, {gap} from {BASE}: {tested['verdict']}.")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each network that count")
    parser.add_argument("--steps", type=int, default=200, help="of each training; bf16 without hardware is slow")
    piece_options(parser, "arithmetic", SEEDS)
    asked = parser.parse_args()
    timed = recipe_space(TIMED), load_experiment(TIMED).train

    def do(item: Item, folder: Path) -> Item:
        data = load_data(asked.data, val_search=2500, val_front=2500, seed=0)
        return work(item, data, folder, timed=timed, trained=(SPACE, RECIPE), networks=chosen(NETWORKS))

    items = planned(asked.seeds, asked.rounds, asked.steps)
    run(asked, items, do, lambda lines: report(lines, this_machine()), alone=2)


if __name__ == "__main__":
    main()
