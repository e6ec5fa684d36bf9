"""What each option of training craft does to a supernet on CIFAR-10: one option at a time against a base recipe.

    python experiments/benchmarks/craft.py CIFAR10.npz [--learning-rate 0.4] [--steps 1500] [--seeds 0 1]

Space and recipe are those of equal_flops.py. Arms of the strategy `sorted` take the same number of steps as `base`;
those of `sandwich` compare distillation losses at the same, smaller, number of steps. Soft cross-entropy and kl have
the same gradient: what lies between them is noise.

Figures, on the first 5000 test images with recalibrated norms: the mean accuracy of 16 networks spread over MACs, the
accuracy of the smallest and of the largest, and over the 16 the mean recall and precision of the class that
`class_weights` makes four times as important (1 - recall is its share of false negatives). An arm helped or hurt where
its difference to the base of the same seed is beyond noise (see `arms.compared`).

A cheap proxy trains a fifth of the steps: on all images, on a fifth drawn at random, or on a fifth chosen by dataset
quantization. Rank correlation is Spearman's, of the 16 accuracies of an arm with those of a base run: of the same seed
(which has the same initial weights and draws the same architectures), and of other seeds. The base's own with other
seeds is the most that a proxy can be expected to reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import Item, by_arm, compared, first_images, piece_options, run
from equal_flops import RECIPE, SPACE, chosen
from torch import Tensor

from nas import Data, Supernet, TrainSettings, load_data, train
from nas.evaluate import calibration_images, recalibrate, resolution_of
from search_spaces import Architecture, SearchSpace

NETWORKS = 16
TEST_IMAGES = 5000
WEIGHTED_CLASS = 3  # cats, which are most often taken for something else
SEEDS = (0, 1)
MORE_SEEDS = 2  # of the arms of distillation for each seed asked for: three arms alone say little about the noise
WORDS = {"better": "helped", "worse": "hurt"}


@dataclass(frozen=True)
class Arm:
    """What an arm changes: of the recipe, and of the data; and which arm it is compared to."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    weighted: float = 0.0  # weight of WEIGHTED_CLASS
    rate: float = 1.0  # times the learning rate
    base: str = "base"
    share: float = 1.0  # of the steps


DISTILLED = "sandwich_soft_cross_entropy"
ARMS: Mapping[str, Arm] = {
    "base": Arm(),
    "average_0.999": Arm({"average": 0.999}),
    "average_0.99": Arm({"average": 0.99}),
    "mixup_0.2": Arm({"mixup": 0.2}),
    "cutmix_1.0": Arm({"cutmix": 1.0}),
    "erasing_0.25": Arm({"erasing": 0.25}),
    "gradient_noise_0.01": Arm({"gradient_noise": 0.01}),
    "drop_path_0.1": Arm({"drop_path": 0.1}),
    "bias_loss": Arm({"bias_loss": True}),
    "bias_loss_twice_the_rate": Arm({"bias_loss": True}, rate=2.0),  # its weights begin at 0.3
    "adamw_0.001": Arm({"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.05}),
    "adamw_0.003": Arm({"optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.05}),
    "adamw_0.01": Arm({"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.05}),
    "no_label_smoothing": Arm({"label_smoothing": 0.0}),
    "class_weights": Arm(weighted=4.0),
    "fifth_of_steps": Arm(share=0.2),
    "fifth_of_steps_random": Arm(data={"train_share": 0.2, "coreset": "random"}, share=0.2),
    "fifth_of_steps_coreset": Arm(data={"train_share": 0.2, "coreset": "dataset_quantization"}, share=0.2),
    "fifth_random": Arm(data={"train_share": 0.2, "coreset": "random"}),
    "fifth_coreset": Arm(data={"train_share": 0.2, "coreset": "dataset_quantization"}),
    **{
        f"sandwich_{loss}": Arm({"strategy": "sandwich", "distillation": loss}, base=DISTILLED)
        for loss in ("soft_cross_entropy", "kl", "alpha_divergence")
    },
}
FIGURES = ("mean_accuracy", "smallest_accuracy", "largest_accuracy", "recall", "precision")


def planned(
    arms: Sequence[str], seeds: Sequence[int], steps: int, sandwich_steps: int, learning_rate: float
) -> list[Item]:
    """The pieces of work, seed by seed, so that a stopped benchmark has whole seeds."""
    more = range(max(seeds) + 1, max(seeds) + 1 + len(seeds) * (MORE_SEEDS - 1))
    distilled = [arm for arm in arms if ARMS[arm].base == DISTILLED]
    pairs = [(arm, seed) for seed in seeds for arm in arms] + [(arm, seed) for seed in more for arm in distilled]
    return [
        {"arm": arm, "seed": seed, "learning_rate": learning_rate}
        | {"steps": sandwich_steps if arm in distilled else round(ARMS[arm].share * steps)}
        for arm, seed in pairs
    ]


def settings_of(item: Item, classes: Sequence[str]) -> TrainSettings:
    arm = ARMS[item["arm"]]
    weights = {"class_weights": {classes[WEIGHTED_CLASS]: arm.weighted}} if arm.weighted else {}
    changed = {"learning_rate": arm.rate * item["learning_rate"], **arm.settings, **weights}
    return replace(RECIPE, steps=item["steps"], **changed)


def work(item: Item, data: Data, folder: Path, *, space: SearchSpace, networks: Sequence[Architecture]) -> Item:
    """Train the arm and evaluate it: for each of the networks, the smallest and the largest, its three figures."""
    supernet = Supernet(space, seed=item["seed"])
    settings = settings_of(item, data.classes)
    results = train(supernet, data, seed=item["seed"], settings=settings, folder=folder)
    supernet.cpu()
    limited = first_images(data, "test", TEST_IMAGES)
    found = [figures(supernet, limited, one) for one in (*networks, space.smallest, space.largest)]
    told = {name: results[name] for name in ("macs", "seconds", "rollbacks")}
    return {**told, "networks": found[:-2], "smallest": found[-2], "largest": found[-1]}


def figures(supernet: Supernet, data: Data, architecture: Architecture) -> dict[str, float]:
    """Accuracy of a network on the test split, and recall and precision of WEIGHTED_CLASS."""
    subnet = supernet.extract(architecture)
    recalibrate(subnet, calibration_images(data, subnet))
    guesses = list[Tensor]()
    with torch.inference_mode():
        for x, _ in data.batches("test", resolution_of(subnet), 250):
            guesses.append(subnet(x).argmax(dim=1))
    return figures_of(torch.cat(guesses).numpy(), data["test"].labels.numpy())


def figures_of(guessed: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    of_class, said = labels == WEIGHTED_CLASS, guessed == WEIGHTED_CLASS
    hits = int((of_class & said).sum())
    return {
        "accuracy": float((guessed == labels).mean()),
        "recall": hits / max(1, int(of_class.sum())),
        "precision": hits / max(1, int(said.sum())),
    }


# report --------------------------------------------------------------------------------------------------


def report(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each arm against its base: figures, differences, verdicts."""
    groups = {base: [arm for arm in ARMS if ARMS[arm].base == base] for base in ("base", DISTILLED)}
    found: dict[str, Any] = {}
    for base, arms in groups.items():
        told = {name: compared(by_arm(lines, arms, lambda line, name=name: _figure(line, name)), base)  # type: ignore[misc]
                for name in FIGURES}  # fmt: skip
        rows = {arm: _row(arm, base, lines, told) for arm in told["mean_accuracy"]["arms"]}
        unfinished = [arm for arm in arms if arm not in rows]
        noise = {name: told[name]["noise"] for name in FIGURES}
        found["sorted" if base == "base" else "sandwich"] = {"noise": noise, "unfinished": unfinished, "arms": rows}
    return {
        "what": f"accuracy of {NETWORKS} networks on {TEST_IMAGES} test images, one option of training at a time",
        "space": SPACE.name,
        **found,
    }


def _figure(line: Mapping[str, Any], name: str) -> float:
    if name == "mean_accuracy":
        return float(np.mean([one["accuracy"] for one in line["networks"]]))
    if name in ("smallest_accuracy", "largest_accuracy"):
        return float(line[name.removesuffix("_accuracy")]["accuracy"])
    return float(np.mean([one[name] for one in line["networks"]]))


def _row(arm: str, base: str, lines: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> dict[str, Any]:
    own = [line for line in lines if line["item"]["arm"] == arm]
    verdict = told["mean_accuracy"]["arms"][arm].get("verdict", "the base")
    return {
        "verdict": WORDS.get(verdict, verdict),
        "steps": own[0]["item"]["steps"],
        "tmacs": own[0]["macs"] / 1e12,
        "rollbacks": int(sum(line["rollbacks"] for line in own)),
        "figures": {name: told[name]["arms"][arm] for name in FIGURES},
        "rank_correlation": _ranks(own, [line for line in lines if line["item"]["arm"] == base]),
    }


def _ranks(own: Sequence[Mapping[str, Any]], bases: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean rank correlation with base runs of the same seed, and of other seeds."""
    found: dict[str, list[float | None]] = {"same_seed": [], "other_seeds": []}
    for line in own:
        for other in bases:
            if other is line:
                continue
            same = line["item"]["seed"] == other["item"]["seed"]
            found["same_seed" if same else "other_seeds"].append(_spearman(line, other))
    return {name: _mean(values) for name, values in found.items()}


def _spearman(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    from scipy.stats import spearmanr

    values = [[one["accuracy"] for one in line["networks"]] for line in (a, b)]
    if any(len(set(accuracies)) == 1 for accuracies in values):
        return None  # no ranks
    return float(spearmanr(*values).statistic)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument(
        "--learning-rate", type=float, default=0.4, help="of all arms but adamw; tuned by equal_flops.py"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--sandwich-steps", type=int, default=500)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    piece_options(parser, "craft", SEEDS)
    asked = parser.parse_args()

    def do(item: Item, folder: Path) -> Item:
        data = load_data(asked.data, val_search=2500, val_front=2500, seed=0, **ARMS[item["arm"]].data)
        return work(item, data, folder, space=SPACE, networks=chosen(NETWORKS))

    items = planned(asked.arms, asked.seeds, asked.steps, asked.sandwich_steps, asked.learning_rate)
    run(asked, items, do, report)


if __name__ == "__main__":
    main()
