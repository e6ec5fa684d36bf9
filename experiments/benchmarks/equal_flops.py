"""Which training strategy is worth its compute: all of them on CIFAR-10 with the same training MACs.

    python experiments/benchmarks/equal_flops.py CIFAR10.npz [--stage tune|train|alone|report|all] [--workers 2]

The space ties width to depth (CompOFA, arXiv 2104.12642): 243 networks, so that every one of them is evaluated.
Each strategy gets the same budget of multiply-accumulates, the same recipe, the same number of learning rates to
be tuned over (on val_search, at a quarter of the budget), and the same seeds. Twelve networks trained alone, for as
many steps as the cheapest strategy takes, say how well a supernet ranks. Test images are only reported on.

Every finished piece of work is a line of equal_flops_runs.jsonl beside --out: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import about, finish, in_processes, out_option

from nas import Data, Supernet, TrainSettings, accuracy, load_data, sample_spread, train
from nas.evaluate import calibration_images, recalibrate
from nas.front import hypervolume
from nas.strategies import STRATEGIES, Strategy
from nas.versions import versions
from search_spaces import Architecture, MobileNet, SearchSpace

SPACE = MobileNet(
    resolutions=(32,), widths=(16, 24, 32, 40, 48), strides=(2, 1, 2, 1, 1), width_multipliers=(1.0,),
    depths=(1, 2, 3), expansions=(2, 3, 4), coupled=True, kernels=(3,), stem_width=16, stem_stride=2,
    head_width=128, precisions=("fp32",),
)  # fmt: skip
RECIPE = TrainSettings(
    batch_size=64, weight_decay=5e-5, flip=True, crop_padding=4, arithmetic="fp32_channels_last", evaluate_every=10**6
)
RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
TUNED_ON = 16  # networks whose mean accuracy on val_search chooses the learning rate
TUNING_SHARE = 0.25  # of the budget
SEEDS = (0, 1, 2)
ALONE = 12  # networks trained alone
TEST_IMAGES = 2000  # for all 243 networks; the twelve, the smallest and the largest see all of them
REFERENCE = (0.9, 4.0)  # error and MMACs, for the hypervolume


# pieces of work ------------------------------------------------------------------------------------------


def steps_within(name: str, settings: TrainSettings, budget: float) -> int:
    """How many steps of a strategy cost about `budget` MACs, forward and backward."""
    steps = 1000
    for _ in range(4):  # the plan depends on the number of steps, its mean cost hardly
        strategy = STRATEGIES[name](SPACE, 0, steps, replace(settings, strategy=name))
        sampled = np.linspace(0, steps - 1, 300).astype(int)
        mean = float(np.mean([_planned_macs(strategy, int(step)) for step in sampled]))
        steps = max(1, round(budget / (mean * settings.batch_size)))
    return steps


@cache
def _macs(architecture: Architecture) -> int:
    return SPACE.lower(architecture).macs


def _planned_macs(strategy: Strategy, step: int) -> float:
    """Of one step, for each image; what only a teacher or a candidate sees costs a third of what is trained."""
    total, taught = 0.0, False
    for one in strategy.step(step).passes:
        macs = [_macs(architecture) for architecture in one.candidates]
        total += 3 * float(np.mean(macs)) + (sum(macs) if len(macs) > 1 else 0)
        taught |= one.teacher == "frozen"
    return total + (_macs(SPACE.largest) if taught else 0)


def chosen(count: int) -> list[Architecture]:
    """Networks spread over MACs, the same always."""
    return sample_spread(SPACE, count, np.random.default_rng(0))


def accuracies(
    supernet: Supernet, data: Data, networks: Sequence[Architecture], split: str, images: int, *, shared: bool = False
) -> list[float]:
    """Top-1 accuracy of subnets on the first images of a split; `shared` keeps the supernet's own norm statistics."""
    limited = replace(data, splits={**data.splits, split: _first(data, split, images)})
    found = []
    for architecture in networks:
        subnet = supernet.extract(architecture).eval()
        if not shared:
            recalibrate(subnet, calibration_images(data, subnet))
        found.append(round(accuracy(subnet, limited, split, batch_size=250), 5))
    return found


def _first(data: Data, split: str, images: int) -> Any:
    whole = data[split]
    return replace(whole, indices=whole.indices[:images], labels=whole.labels[:images])


def work(item: Mapping[str, Any], data: Data, folder: Path) -> dict[str, Any]:
    """Train what `item` says and evaluate it; the result is the item and what was found."""
    settings = replace(RECIPE, strategy=item["strategy"], learning_rate=item["learning_rate"], steps=item["steps"])
    space: SearchSpace = SPACE
    if item["kind"].endswith("alone"):
        space = SPACE.only(SPACE.parse(item["architecture"]))
    supernet = Supernet(space, seed=item["seed"])
    results = train(supernet, data, seed=item["seed"], settings=settings, folder=folder)
    supernet.cpu()
    found: dict[str, Any] = {"macs": results["macs"], "train_seconds": results["seconds"]}
    found |= {"rollbacks": results["rollbacks"], "commit": versions().get("commit")}
    if item["kind"] == "tune":
        found["val_search"] = accuracies(supernet, data, chosen(TUNED_ON), "val_search", 10**6)
    elif item["kind"] == "tune_alone":
        found["val_search"] = accuracies(supernet, data, [space.largest], "val_search", 10**6)
    elif item["kind"] == "alone":
        found["test"] = accuracies(supernet, data, [space.largest], "test", 10**6)
    else:
        few, every = chosen(ALONE), list(SPACE.all())
        found["test_alone"] = accuracies(supernet, data, few, "test", 10**6)
        found["test_ends"] = accuracies(supernet, data, [SPACE.smallest, SPACE.largest], "test", 10**6)
        found["test_shared_norms"] = accuracies(supernet, data, few, "test", 10**6, shared=True)
        found["test"] = accuracies(supernet, data, every, "test", TEST_IMAGES)
    return {**item, **found}


def planned(stage: str, budget: float, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pieces of work of a stage, seed by seed, so that a stopped benchmark has whole seeds."""
    if stage == "tune":
        items = [
            {"kind": "tune", "strategy": name, "learning_rate": rate, "seed": 0,
             "steps": steps_within(name, RECIPE, TUNING_SHARE * budget)}
            for rate in RATES for name in STRATEGIES
        ]  # fmt: skip
        steps = steps_within("sorted", RECIPE, TUNING_SHARE * budget)
        middle = str(chosen(ALONE)[ALONE // 2])
        alone = {"kind": "tune_alone", "strategy": "uniform", "seed": 0, "steps": steps, "architecture": middle}
        return items + [{**alone, "learning_rate": rate} for rate in RATES]
    if stage == "train":
        return [
            {"kind": "train", "strategy": name, "learning_rate": best_rate(name, done), "seed": seed,
             "steps": steps_within(name, RECIPE, budget)}
            for seed in SEEDS for name in STRATEGIES
        ]  # fmt: skip
    steps, rate = steps_within("sorted", RECIPE, budget), best_rate("alone", done)
    return [
        {"kind": "alone", "strategy": "uniform", "learning_rate": rate, "seed": 0, "steps": steps,
         "architecture": str(architecture)}
        for architecture in chosen(ALONE)
    ]  # fmt: skip


def best_rate(name: str, done: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate with the best mean accuracy in tuning; raises ValueError before tuning is finished."""
    kind = "tune_alone" if name == "alone" else "tune"
    tried = [line for line in done if line["kind"] == kind and (name == "alone" or line["strategy"] == name)]
    if len(tried) < len(RATES):
        raise ValueError(f"{name} has {len(tried)} of {len(RATES)} learning rates tried; run --stage tune first")
    return float(max(tried, key=lambda line: np.mean(line["val_search"]))["learning_rate"])


# report --------------------------------------------------------------------------------------------------


def report(done: Sequence[Mapping[str, Any]], budget: float) -> dict[str, Any]:
    """Figures of each strategy over its seeds, and which differences are larger than those between seeds."""
    mmacs = np.array([SPACE.lower(architecture).macs for architecture in SPACE.all()]) / 1e6
    alone = {line["architecture"]: line["test"][0] for line in done if line["kind"] == "alone"}
    alone_accuracies = [alone.get(str(architecture)) for architecture in chosen(ALONE)]
    rows = {}
    for name in STRATEGIES:
        lines = sorted((x for x in done if x["kind"] == "train" and x["strategy"] == name), key=lambda x: x["seed"])
        if lines:
            rows[name] = _row(lines, mmacs, alone_accuracies)
    return {
        "space": {"name": SPACE.name, "networks": SPACE.size, "mmacs": [float(mmacs.min()), float(mmacs.max())]},
        "budget_tmacs": budget / 1e12,
        "tuned": {name: _tuning(name, done) for name in (*STRATEGIES, "alone")},
        "alone": {"test": alone_accuracies, "mmacs": [SPACE.lower(a).macs / 1e6 for a in chosen(ALONE)]},
        "strategies": rows,
        "noise": _noise(rows),
        "differences": _differences(rows),
    }


def _row(lines: Sequence[Mapping[str, Any]], mmacs: np.ndarray, alone: Sequence[float | None]) -> dict[str, Any]:
    each = [_figures(line, mmacs, alone) for line in lines]
    keys = [key for key in each[0] if all(one[key] is not None for one in each)]
    first = lines[0]
    return {
        "seeds": [line["seed"] for line in lines],
        "learning_rate": first["learning_rate"],
        "steps": first["steps"],
        "mean": {key: round(float(np.mean([one[key] for one in each])), 5) for key in keys},
        "std": {key: round(float(np.std([one[key] for one in each], ddof=1)), 5) for key in keys if len(each) > 1},
        "each": each,
    }


def _figures(line: Mapping[str, Any], mmacs: np.ndarray, alone: Sequence[float | None]) -> dict[str, Any]:
    from scipy.stats import kendalltau

    test = np.array(line["test"])
    below = np.stack([1 - test, mmacs], axis=1)
    corner = np.array(REFERENCE)
    whole = (corner[0]) * (corner[1] - mmacs.min())
    tau = None
    if all(value is not None for value in alone):
        tau = round(float(kendalltau(line["test_alone"], alone).statistic), 4)
    return {
        "mean_accuracy": round(float(test.mean()), 5),
        "smallest_accuracy": line["test_ends"][0],
        "largest_accuracy": line["test_ends"][1],
        "hypervolume_share": round(hypervolume(below, corner) / whole, 5),
        "kendall_tau_alone": tau,
        "kendall_tau_macs": round(float(kendalltau(test, mmacs).statistic), 4),
        "shared_norms_loss": round(float(np.mean(line["test_alone"]) - np.mean(line["test_shared_norms"])), 5),
        "tmacs": line["macs"] / 1e12,
        "train_seconds": line["train_seconds"],
    }


def _tuning(name: str, done: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    kind = "tune_alone" if name == "alone" else "tune"
    return {
        str(line["learning_rate"]): round(float(np.mean(line["val_search"])), 4)
        for line in done
        if line["kind"] == kind and (name == "alone" or line["strategy"] == name)
    }


def _noise(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Standard deviations between seeds pooled over strategies, and binomial ones of the test images."""
    keys = ("mean_accuracy", "smallest_accuracy", "largest_accuracy", "hypervolume_share")
    pooled = {}
    for key in keys:
        variances = [row["std"][key] ** 2 for row in rows.values() if key in row["std"]]
        if variances:
            pooled[key] = round(float(np.sqrt(np.mean(variances))), 5)
    middle = float(np.mean([row["mean"]["largest_accuracy"] for row in rows.values()])) if rows else 0.5
    return {"between_seeds": pooled, "binomial_10000_images": round(float(np.sqrt(middle * (1 - middle) / 1e4)), 5)}


def _differences(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The best by mean accuracy against each other: real where it is over twice the standard error of a difference."""
    if not rows or any(len(row["seeds"]) < 2 for row in rows.values()):
        return {}
    noise = _noise(rows)["between_seeds"]
    best = max(rows, key=lambda name: rows[name]["mean"]["mean_accuracy"])
    found: dict[str, Any] = {"best": best, "over": {}}
    for name, row in rows.items():
        if name == best:
            continue
        told = {}
        for key in ("mean_accuracy", "smallest_accuracy", "largest_accuracy", "hypervolume_share"):
            gap = rows[best]["mean"][key] - row["mean"][key]
            error = noise[key] * np.sqrt(1 / len(rows[best]["seeds"]) + 1 / len(row["seeds"]))
            told[key] = {"gap": round(float(gap), 5), "real": bool(abs(gap) > 2 * error)}
        found["over"][name] = told
    return found


# command -------------------------------------------------------------------------------------------------


def _key(item: Mapping[str, Any]) -> str:
    fields = ("kind", "strategy", "learning_rate", "seed", "steps", "architecture")
    return "-".join(str(item.get(field, "")) for field in fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--stage", choices=("tune", "train", "alone", "report", "all"), default="all")
    parser.add_argument("--budget", type=float, default=3e12, help="MACs of one training")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/equal_flops"), help="where checkpoints go")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    out_option(parser, "equal_flops")
    asked = parser.parse_args()
    if asked.item:
        item = json.loads(asked.item)
        data = load_data(asked.data, val_search=2500, val_front=2500, seed=0)
        print(json.dumps(work(item, data, asked.runs / hashlib.sha256(_key(item).encode()).hexdigest()[:12])))
        return
    log = asked.out.with_name("equal_flops_runs.jsonl")
    for stage in ("tune", "train", "alone") if asked.stage == "all" else (asked.stage,):
        if stage != "report":
            _run_stage(stage, asked, log)
    finish({**about(SEEDS), **report(_lines(log), asked.budget)}, asked.out)


def _run_stage(stage: str, asked: argparse.Namespace, log: Path) -> None:
    done = {_key(line) for line in _lines(log)}
    items = [item for item in planned(stage, asked.budget, _lines(log)) if _key(item) not in done]
    script = [sys.executable, __file__, str(asked.data), "--runs", str(asked.runs)]
    for index, text in in_processes([[*script, "--item", json.dumps(item)] for item in items], asked.workers):
        with log.open("a", encoding="utf-8") as stream:
            stream.write(text.strip().splitlines()[-1] + "\n")
        print(f"{stage}: {index + 1} of {len(items)} {_key(items[index])}", file=sys.stderr, flush=True)


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


if __name__ == "__main__":
    main()
