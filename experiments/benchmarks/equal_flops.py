"""Which training strategy is worth its compute: all of them on CIFAR-10 with the same training MACs.

    python experiments/benchmarks/equal_flops.py CIFAR10.npz [--stage tune|train|alone|time|all] [--budget 3e12]

The space ties width to depth (CompOFA, arXiv 2104.12642): 243 networks, so that every one of them is evaluated.
Each strategy gets the same budget of multiply-accumulates, the same recipe, the same learning rates to be tuned over
(on val_search, at a quarter of the budget), and the same seeds. Twelve networks trained alone, for as many steps as
`sorted` takes, say how well a supernet ranks; a second seed of them says how well anything could.

The best strategy is chosen on val_front; the test images are only reported on. Every finished piece of work is a line
of equal_flops_runs.jsonl beside --out: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from arms import (
    Item,
    by_arm,
    compared,
    do,
    finished,
    first_images,
    is_piece,
    log_of,
    piece_options,
    tell,
    this_command,
)  # fmt: skip

from nas import (
    Data,
    Step,
    Strategy,
    Supernet,
    TrainingDiverged,
    TrainSettings,
    accuracy,
    load_data,
    sample_spread,
    train,
)
from nas.evaluate import calibration_images, recalibrate
from nas.front import hypervolume
from nas.strategies import STRATEGIES
from search_spaces import Architecture, MobileNet, SearchSpace

SPACE = MobileNet(
    resolutions=(32,), widths=(16, 24, 32, 40, 48), strides=(2, 1, 2, 1, 1), width_multipliers=(1.0,),
    depths=(1, 2, 3), expansions=(2, 3, 4), coupled=True, kernels=(3,), stem_width=16, stem_stride=2,
    head_width=128, precisions=("fp32",),
)  # fmt: skip
RECIPE = TrainSettings(
    batch_size=64, weight_decay=5e-5, flip=True, crop_padding=4, arithmetic="fp32_channels_last", evaluate_every=2
)
RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
TUNED_ON = 16  # networks whose mean accuracy on val_search chooses the learning rate
TUNING_SHARE = 0.25  # of the budget
SEEDS, ALONE_SEEDS = (0, 1, 2), (0, 1)
ALONE = 12  # networks trained alone
TIMED_STEPS, TIMED_ROUNDS = 24, 3
EVERY_IMAGE = 10**6
REFERENCE = (0.9, 4.0)  # error and MMACs, for the hypervolume
LEVEL = 1 - 0.05 / (len(STRATEGIES) - 1)  # five comparisons with the best: together wrong one time in twenty


# budgets -------------------------------------------------------------------------------------------------


def steps_within(name: str, budget: float) -> int:
    """How many steps of a strategy cost about `budget` MACs, forward and backward."""
    steps = 1000
    for _ in range(4):  # the plan depends on the number of steps, its mean cost hardly
        strategy = STRATEGIES[name](SPACE, 0, steps, replace(RECIPE, strategy=name))
        sampled = np.linspace(0, steps - 1, 300).astype(int)
        mean = float(np.mean([_planned_macs(strategy, int(step)) for step in sampled]))
        steps = max(1, round(budget / (mean * RECIPE.batch_size)))
    return steps


def _planned_macs(strategy: Strategy, step: int) -> float:
    """Of one step, for each image; what only a teacher or a candidate sees costs a third of what is trained."""
    total, taught = 0.0, False
    for one in strategy.step(step).passes:
        macs = [_macs(architecture) for architecture in one.candidates]
        total += 3 * float(np.mean(macs)) + (sum(macs) if len(macs) > 1 else 0)
        taught |= one.teacher == "frozen"
    return total + (_macs(SPACE.largest) if taught else 0)


@cache
def _macs(architecture: Architecture) -> int:
    return SPACE.lower(architecture).macs


def chosen(count: int) -> list[Architecture]:
    """Networks spread over MACs, the same always."""
    return sample_spread(SPACE, count, np.random.default_rng(0))


# pieces of work ------------------------------------------------------------------------------------------


def tuning(budget: float) -> list[Item]:
    """Every rate for every strategy, and for a middle network alone."""
    alone = {"kind": "tune_alone", "arm": "alone", "architecture": str(chosen(ALONE)[ALONE // 2])}
    each = [{"kind": "tune", "arm": name} for name in STRATEGIES] + [alone]
    steps = {one["arm"]: _steps(one["arm"], TUNING_SHARE * budget) for one in each}
    return [{**one, "learning_rate": rate, "seed": 0, "steps": steps[one["arm"]]} for rate in RATES for one in each]


def training(budget: float, rates: Mapping[str, float], seeds: Sequence[int]) -> list[Item]:
    """Seed by seed, so that a stopped benchmark has whole seeds."""
    steps = {name: _steps(name, budget) for name in STRATEGIES}
    return [
        {"kind": "train", "arm": name, "learning_rate": rates[name], "seed": seed, "steps": steps[name]}
        for seed in seeds
        for name in STRATEGIES
    ]


def training_alone(budget: float, rates: Mapping[str, float]) -> list[Item]:
    common = {"kind": "alone", "arm": "alone", "learning_rate": rates["alone"], "steps": _steps("alone", budget)}
    return [{**common, "seed": seed, "architecture": str(one)} for seed in ALONE_SEEDS for one in chosen(ALONE)]


def timing(budget: float) -> list[Item]:
    return [
        {"kind": "time", "arm": name, "seed": turn, "steps": _steps(name, budget)}
        for turn in range(TIMED_ROUNDS)
        for name in STRATEGIES
    ]


def _steps(name: str, budget: float) -> int:
    return steps_within("sorted" if name == "alone" else name, budget)


def work(item: Item, data: Data, folder: Path) -> dict[str, Any]:
    """Train what `item` says and evaluate it."""
    if item["kind"] == "time":
        return {"seconds_a_step": seconds_a_step(item, data)}
    name = "uniform" if item["arm"] == "alone" else item["arm"]
    settings = replace(RECIPE, strategy=name, learning_rate=item["learning_rate"], steps=item["steps"])
    space: SearchSpace = SPACE.only(SPACE.parse(item["architecture"])) if item["arm"] == "alone" else SPACE
    supernet = Supernet(space, seed=item["seed"])
    try:
        results = train(supernet, data, seed=item["seed"], settings=settings, folder=folder)
    except TrainingDiverged:
        return {"diverged": True}
    supernet.cpu()
    told = {name: results[name] for name in ("macs", "seconds", "rollbacks")}
    return told | evaluated(item["kind"], supernet, data)


def evaluated(kind: str, supernet: Supernet, data: Data) -> dict[str, Any]:
    """Accuracies of what a piece of work asks for."""
    if kind == "tune":
        return {"val_search": accuracies(supernet, data, chosen(TUNED_ON), "val_search")}
    if kind == "tune_alone":
        return {"val_search": accuracies(supernet, data, [supernet.space.largest], "val_search")}
    if kind == "alone":
        return {"test": accuracies(supernet, data, [supernet.space.largest], "test")}
    few = chosen(ALONE)
    return {
        "val_front": accuracies(supernet, data, list(SPACE.all()), "val_front"),
        "test": accuracies(supernet, data, few, "test"),
        "test_ends": accuracies(supernet, data, [SPACE.smallest, SPACE.largest], "test"),
        "test_shared_norms": accuracies(supernet, data, few, "test", shared=True),
    }


def accuracies(
    supernet: Supernet,
    data: Data,
    networks: Sequence[Architecture],
    split: str,
    images: int = EVERY_IMAGE,
    *,
    shared: bool = False,
) -> list[float]:
    """Top-1 accuracy of subnets on the first images of a split; `shared` keeps the supernet's own norm statistics."""
    limited = first_images(data, split, images)
    found = []
    for architecture in networks:
        subnet = supernet.extract(architecture).eval()
        if not shared:
            recalibrate(subnet, calibration_images(data, subnet))
        found.append(round(accuracy(subnet, limited, split, batch_size=250), 5))
    return found


class _Strided:
    """Every so-maniest step of a strategy, so that few steps cost what the whole training costs on average."""

    def __init__(self, inner: Strategy, stride: float) -> None:
        self.inner, self.stride = inner, stride

    def step(self, number: int) -> Step:
        planned = self.inner.step(int(number * self.stride))
        return replace(planned, events=("freeze_teacher",) if number == 0 else ())


def seconds_a_step(item: Item, data: Data) -> float:
    """Mean over steps spread over the whole training; the first few, which warm up, are not counted."""
    settings = replace(RECIPE, strategy=item["arm"], learning_rate=1e-3, steps=TIMED_STEPS, evaluate_every=EVERY_IMAGE)
    inner = STRATEGIES[item["arm"]](SPACE, item["seed"], item["steps"], settings)
    seconds = []
    for steps in (4, TIMED_STEPS):
        strategy = _Strided(inner, item["steps"] / steps)
        short = replace(settings, steps=steps)
        seconds.append(train(Supernet(SPACE), data, settings=short, strategy=strategy)["seconds"] / steps)
    return round(seconds[-1], 5)


def best_rates(done: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each arm with the best mean accuracy in tuning.

    Raises ValueError before tuning is finished, and where the best is the first or the last that was tried.
    """
    found = {}
    for name, tried in tuned(done).items():
        rates = sorted(tried)
        if rates != sorted(RATES):
            raise ValueError(f"{name} has {len(rates)} of {len(RATES)} learning rates tried; run --stage tune first")
        found[name] = max(rates, key=lambda rate: tried[rate])
        if found[name] in (rates[0], rates[-1]):
            raise ValueError(f"{name} was best at {found[name]}, an end of the rates tried; widen RATES")
    return found


def tuned(done: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Mean accuracy on val_search by arm and learning rate; 0 where training collapsed on the way."""
    found: dict[str, dict[float, float]] = {name: {} for name in (*STRATEGIES, "alone")}
    for line in done:
        if line["item"]["kind"].startswith("tune"):
            spoilt = line.get("diverged") or line["rollbacks"]
            mean = 0.0 if spoilt else round(float(np.mean(line["val_search"])), 4)
            found[line["item"]["arm"]][line["item"]["learning_rate"]] = mean
    return found


# report --------------------------------------------------------------------------------------------------


def report(done: Sequence[Mapping[str, Any]], budget: float) -> dict[str, Any]:
    """Figures of each strategy over its seeds, and which differences are larger than the noise between seeds."""
    trained = [line for line in done if line["item"]["kind"] == "train" and not line.get("diverged")]
    macs = np.array([_macs(architecture) for architecture in SPACE.all()]) / 1e6
    alone = _alone(done)
    rows = [{**line, "figures": figures(line, macs, alone)} for line in trained]
    names = sorted({name for row in rows for name, value in row["figures"].items() if value is not None})
    values = {name: by_arm(rows, list(STRATEGIES), partial(_figure, name)) for name in names}
    means = {arm: float(np.mean(list(of.values()))) for arm, of in values.get("mean_accuracy", {}).items()}
    best = max(means, key=means.__getitem__) if means else ""
    return {
        "space": {"name": SPACE.name, "networks": SPACE.size, "mmacs": [float(macs.min()), float(macs.max())]},
        "budget_tmacs": budget / 1e12,
        "images": "mean_accuracy and hypervolume_share: 243 networks on val_front; test_*: 10,000 test images",
        "tuned": {arm: {str(rate): value for rate, value in sorted(of.items())} for arm, of in tuned(done).items()},
        "best_on_val_front": best,
        "level": LEVEL,
        "differences_to_best": {name: compared(values[name], best, LEVEL) for name in names if best},
        "trainings": [{**row["item"], **row["figures"], "rollbacks": row["rollbacks"]} for row in rows],
        "diverged": [line["item"] for line in done if line.get("diverged")],
        "alone": alone | {"mmacs": [_macs(architecture) / 1e6 for architecture in chosen(ALONE)]},
        "seconds_a_training": _seconds(done),
    }


def _figure(name: str, row: Mapping[str, Any]) -> float:
    return float(row["figures"][name])


def figures(line: Mapping[str, Any], mmacs: np.ndarray, alone: Mapping[str, Any]) -> dict[str, float | None]:
    """What is told of one training; larger is better, but for the MACs spent."""
    front = np.array(line["val_front"])
    corner = np.array(REFERENCE)
    whole = corner[0] * (corner[1] - mmacs.min())
    first = alone["test"].get("0")
    return {
        "mean_accuracy": round(float(front.mean()), 5),
        "hypervolume_share": round(hypervolume(np.stack([1 - front, mmacs], axis=1), corner) / whole, 5),
        "test_mean_of_12": round(float(np.mean(line["test"])), 5),
        "test_smallest": line["test_ends"][0],
        "test_largest": line["test_ends"][1],
        "kendall_tau_alone": kendall_tau(line["test"], first) if first else None,
        "kendall_tau_macs": kendall_tau(line["test"], [_macs(one) for one in chosen(ALONE)]),
        "recalibration_gain": round(float(np.mean(line["test"]) - np.mean(line["test_shared_norms"])), 5),
        "tmacs": round(line["macs"] / 1e12, 4),
    }


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    from nas.ranking import kendall_tau as tau

    found = tau(np.array(a), np.array(b))
    return None if found is None else round(found, 4)


def _alone(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test accuracies of the networks trained alone by seed, and the rank correlation between two seeds of them."""
    found: dict[str, list[float]] = {}
    for seed in ALONE_SEEDS:
        lines = [x for x in done if x["item"]["kind"] == "alone" and x["item"]["seed"] == seed and "test" in x]
        by_name = {line["item"]["architecture"]: line["test"][0] for line in lines}
        if len(by_name) == ALONE:
            found[str(seed)] = [by_name[str(architecture)] for architecture in chosen(ALONE)]
    ceiling = kendall_tau(*found.values()) if len(found) == 2 else None
    macs = [_macs(architecture) for architecture in chosen(ALONE)]
    by_macs = {seed: kendall_tau(of, macs) for seed, of in found.items()}
    return {"test": found, "kendall_tau_between_seeds": ceiling, "kendall_tau_macs": by_macs}


def _seconds(done: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median over the rounds of a step's seconds, times the steps; timed one strategy after the other, one thread."""
    found = {}
    for name in STRATEGIES:
        lines = [x for x in done if x["item"]["kind"] == "time" and x["item"]["arm"] == name]
        if lines:
            steps = lines[0]["item"]["steps"]
            found[name] = round(float(np.median([line["seconds_a_step"] for line in lines])) * steps, 1)
    return found


# command -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--stage", choices=("tune", "train", "alone", "time", "all"), default="all")
    parser.add_argument("--budget", type=float, default=3e12, help="MACs of one training")
    piece_options(parser, "equal_flops", SEEDS)
    asked = parser.parse_args()

    def worked(item: Item, folder: Path) -> dict[str, Any]:
        return work(item, load_data(asked.data, val_search=2500, val_front=2500, seed=0), folder)

    if is_piece(asked, worked):
        return
    tune, log = tuning(asked.budget), log_of(asked)
    if not asked.report:
        do(tune, log, this_command(), asked.workers)
    items = tune
    if asked.report or asked.stage != "tune":
        rates = best_rates(finished(tune, log))
        stages = {
            "train": training(asked.budget, rates, asked.seeds),
            "alone": training_alone(asked.budget, rates),
            "time": timing(asked.budget),
        }
        for stage, pieces in stages.items():
            if not asked.report and asked.stage in (stage, "all"):
                do(pieces, log, this_command(), 1 if stage == "time" else asked.workers)
            items = [*items, *pieces]
    tell(asked, items, lambda done: report(done, asked.budget))


if __name__ == "__main__":
    main()
