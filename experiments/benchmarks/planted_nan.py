"""Whether a training that meets a NaN ends where it would have ended without: clean runs against planted ones.

    python experiments/benchmarks/planted_nan.py [digits | CIFAR10.npz] [--steps 600] [--seeds 0 1 2 3 4]

A planted run has the seed and recipe of a clean one, but once, at a step drawn from the middle 80 %, its loss and all
gradients are NaN. The trainer then goes back to the last good evaluation, halves the learning rate and goes on.
Figures: accuracy on the test split, norms recalibrated, of the smallest, the middle and the largest network; planted
minus clean of the same seed against the spread between clean seeds; rollbacks, and how many steps were repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import equal_flops
import numpy as np
from arms import Item, by_arm, compared, piece_options, run

from nas import Data, Supernet, TrainSettings, load_data, train
from nas.health import sizes_of
from nas.strategies import SIZES, STRATEGIES, Step, Strategy
from search_spaces import MobileNet, SearchSpace

ARMS = ("clean", "planted")
SEEDS = (0, 1, 2, 3, 4)
MIDDLE = (0.1, 0.9)  # the steps that a NaN is planted in, as shares of all
DIGITS_TEST = 0.4  # share of the 1,797 digits: 719 images
DIGITS = MobileNet(
    resolutions=(8,), channels=1, widths=(8, 16), width_multipliers=(1.0,), divisor=4, strides=(1, 2),
    depths=(1, 2, 3), expansions=(2, 3, 4), coupled=True, kernels=(3,), stem_width=8, stem_stride=1,
    head_width=64, precisions=("fp32",),
)  # fmt: skip
DIGITS_RECIPE = TrainSettings(batch_size=32, learning_rate=0.1, arithmetic="fp32", evaluate_every=2)


class Planted:
    """A strategy whose passes, the first time it is asked for one step, have a gradient that is not a number.

    The trainer asks for a step when it trains it; again after that, for what is watched; and again when a rollback
    led back to it, which then must go well: a fault that came back would not be one NaN.
    """

    def __init__(self, strategy: Strategy, at: int) -> None:
        self._strategy, self._at = strategy, at
        self._planted = False

    def step(self, number: int) -> Step:
        plan = self._strategy.step(number)
        if self._planted or number != self._at:
            return plan
        self._planted = True
        return replace(plan, passes=tuple(replace(one, weight=float("nan")) for one in plan.passes))


def planted_at(seed: int, steps: int) -> int:
    low, high = (round(share * steps) for share in MIDDLE)
    return int(np.random.default_rng([seed, 0]).integers(low, max(low + 1, high)))


def setting(data: str) -> tuple[SearchSpace, TrainSettings]:
    """The space and recipe for digits, or for an .npz of images like CIFAR-10's."""
    if data == "digits":
        return DIGITS, DIGITS_RECIPE
    return equal_flops.SPACE, replace(equal_flops.RECIPE, evaluate_every=1)


def planned(data: str, seeds: Sequence[int], steps: int) -> list[Item]:
    return [{"arm": arm, "seed": seed, "steps": steps, "data": data} for seed in seeds for arm in ARMS]


def work(item: Item, data: Data, folder: Path, *, space: SearchSpace, settings: TrainSettings) -> Item:
    """Train one arm, from the beginning: a run that went on would meet its NaN a second time."""
    shutil.rmtree(folder, ignore_errors=True)
    seed, steps = item["seed"], item["steps"]
    settings = replace(settings, steps=steps)
    strategy: Strategy = STRATEGIES[settings.strategy](space, seed, steps, settings)
    at = planted_at(seed, steps) if item["arm"] == "planted" else None
    if at is not None:
        strategy = Planted(strategy, at)
    supernet = Supernet(space, seed)
    results = train(supernet, data, seed=seed, settings=settings, folder=folder, strategy=strategy)
    supernet.cpu()
    back = [entry for entry in _metrics(folder) if entry.get("event") == "rollback"]
    found = equal_flops.accuracies(supernet, data, list(sizes_of(space).values()), "test", 10**6)
    return {
        "accuracies": dict(zip(sizes_of(space), found, strict=True)),
        "rollbacks": int(results["rollbacks"]),
        "planted_at": at,
        "steps_repeated": sum(int(entry["reason"].rpartition(" ")[2]) - entry["step"] for entry in back),
        "reasons": [entry["reason"] for entry in back],
        "seconds": results["seconds"],
        "test_images": len(data["test"]),
    }


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# report --------------------------------------------------------------------------------------------------


def report(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = {size: compared(by_arm(lines, ARMS, lambda x, size=size: x["accuracies"][size]), "clean") for size in SIZES}  # type: ignore[misc]
    planted = [line for line in lines if line["item"]["arm"] == "planted"]
    clean = [line for line in lines if line["item"]["arm"] == "clean"]
    return {
        "what": "test accuracy of trainings in which one step's loss was NaN, against the same ones without",
        "data": lines[0]["item"]["data"] if lines else "",
        "test_images": lines[0]["test_images"] if lines else 0,
        "steps": lines[0]["item"]["steps"] if lines else 0,
        "accuracy": told,
        "planted": [
            {"seed": x["item"]["seed"], **{name: x[name] for name in ("planted_at", "steps_repeated", "rollbacks")}}
            for x in planted
        ],
        "rollbacks": {"clean": [x["rollbacks"] for x in clean], "planted": [x["rollbacks"] for x in planted]},
        "in_words": in_words(told, planted),
    }


def in_words(told: Mapping[str, Any], planted: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    for size in SIZES:
        arms = told[size]["arms"]
        row, spread = arms.get("planted", {}), arms.get("clean", {}).get("std_between_seeds")
        if "difference" in row and spread is not None:
            gap = 100 * row["difference"]
            side = "within" if abs(gap) <= 100 * spread else "beyond"
            said.append(
                f"The {size} network ends {gap:+.2f} points from clean runs on average, {side} the standard deviation "
                f"of {100 * spread:.2f} between clean seeds; paired by seed: {row['verdict']}."
            )
    if planted:
        repeated = [x["steps_repeated"] for x in planted]
        recovered = sum(x["rollbacks"] == 1 for x in planted)
        said.append(
            f"{recovered} of {len(planted)} planted runs recovered with one rollback, repeating {min(repeated)} to "
            f"{max(repeated)} steps."
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits", help="an .npz of CIFAR-10; scikit-learn's digits without")
    parser.add_argument("--steps", type=int, default=600)
    piece_options(parser, "planted_nan", SEEDS)
    asked = parser.parse_args()
    space, settings = setting(asked.data)

    def do(item: Item, folder: Path) -> Item:
        test = DIGITS_TEST if asked.data == "digits" else 0.2
        return work(item, load_data(asked.data, test=test, seed=0), folder, space=space, settings=settings)

    run(asked, planned(Path(asked.data).name, asked.seeds, asked.steps), do, report)


if __name__ == "__main__":
    main()
