"""What benchmarks of training arms share: pieces of work as lines of a file, and differences paired by seed.

A piece of work is a JSON object: arm, seed, steps and the like. Each is done in a process of its own, which is this
script called with `--item`, and becomes a line {"item": ..., ...found} of NAME_runs.jsonl beside --out. A piece whose
line is there is not done again, so a stopped benchmark goes on. What a script holds itself (its recipe, what an arm
means) is not in the item: whoever changes that deletes the lines. The commit of each line is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import about, finish, in_processes, out_option

from nas import Data
from nas.versions import versions

Item = dict[str, Any]
LEVEL = 0.95  # of the intervals, unless told otherwise; what is outside counts as a difference

# pieces of work ------------------------------------------------------------------------------------------


def piece_options(parser: argparse.ArgumentParser, name: str, seeds: Sequence[int]) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--workers", type=int, default=2, help="pieces of work at once, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="where checkpoints go")
    parser.add_argument("--report", action="store_true", help="do nothing more: report on what there is")
    parser.add_argument("--item", type=json.loads, help=argparse.SUPPRESS)
    out_option(parser, name)


def run(
    asked: argparse.Namespace,
    items: Sequence[Item],
    work: Callable[[Item, Path], Mapping[str, Any]],
    report: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    alone: int = 0,
) -> None:
    """Do what is missing of `items` and report on their lines; or, in a process for one item, print its line.

    The first `alone` items run one by one, with nothing beside them: they measure time.
    """
    if is_piece(asked, work):
        return
    if not asked.report:
        do(items[:alone], log_of(asked), this_command(), 1)
        do(items[alone:], log_of(asked), this_command(), asked.workers)
    tell(asked, items, report)


def is_piece(asked: argparse.Namespace, work: Callable[[Item, Path], Mapping[str, Any]]) -> bool:
    """Whether this process is for one item only; if so, it is done now and its line printed."""
    if asked.item is None:
        return False
    folder = asked.runs / hashlib.sha256(key(asked.item).encode()).hexdigest()[:12]
    print(json.dumps({"item": asked.item, **work(asked.item, folder), "commit": versions().get("commit")}))
    return True


def tell(
    asked: argparse.Namespace,
    items: Sequence[Item],
    report: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
) -> None:
    """Report on those items that are done."""
    done = finished(items, log_of(asked))
    told = {"pieces": {"done": len(done), "planned": len(items)}, "commits": sorted({str(x["commit"]) for x in done})}
    finish({**about(asked.seeds), **told, **report(done)}, asked.out)


def log_of(asked: argparse.Namespace) -> Path:
    return Path(asked.out).with_name(f"{asked.out.stem}_runs.jsonl")


def this_command() -> list[str]:
    return [sys.executable, *sys.argv]


def key(item: Mapping[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)


def do(items: Sequence[Item], log: Path, command: Sequence[str], workers: int) -> None:
    """Run the command, with `--item`, for each piece that has no line yet, and append the last line it prints."""
    done = {key(line["item"]) for line in _lines(log)}
    missing = [item for item in items if key(item) not in done]
    log.parent.mkdir(parents=True, exist_ok=True)
    for index, text in in_processes([[*command, "--item", key(item)] for item in missing], workers):
        with log.open("a", encoding="utf-8") as stream:
            stream.write(text.strip().splitlines()[-1] + "\n")
        print(f"{log.stem}: {index + 1} of {len(missing)} {key(missing[index])}", file=sys.stderr, flush=True)


def finished(items: Sequence[Item], log: Path) -> list[dict[str, Any]]:
    """The lines of those items that are done, in the order of `items`."""
    lines = {key(line["item"]): line for line in _lines(log)}
    return [lines[key(item)] for item in items if key(item) in lines]


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def first_images(data: Data, split: str, count: int) -> Data:
    """The data with only the first images of a split."""
    whole = data[split]
    part = replace(whole, indices=whole.indices[:count], labels=whole.labels[:count])
    return replace(data, splits={**data.splits, split: part})


# differences ---------------------------------------------------------------------------------------------


def by_arm(
    lines: Sequence[Mapping[str, Any]], arms: Sequence[str], figure: Callable[[Mapping[str, Any]], float]
) -> dict[str, dict[int, float]]:
    """One figure of each line, by arm and seed, of the arms that have lines."""
    found: dict[str, dict[int, float]] = {}
    for arm in arms:
        values = {line["item"]["seed"]: figure(line) for line in lines if line["item"]["arm"] == arm}
        if values:
            found[arm] = values
    return found


def compared(values: Mapping[str, Mapping[int, float]], base: str, level: float = LEVEL) -> dict[str, Any]:
    """Arms against `base`, paired by seed.

    Every value is taken as a mean, plus something of its arm, plus something of its seed, plus noise (a randomized
    block design). The noise that arm and seed leave over is pooled over the arms, since two or three seeds say little
    about one arm alone; with two arms this is the paired t-test. A difference is `better` or `worse` where its
    interval (Student's t, at `level`) leaves out 0: at 95 %, of twenty arms without any effect about one would be
    called so by chance.

    Args:
        values: arm -> seed -> figure, larger being better. Arms that lack a seed of the base are left out.

    Returns, for each arm, its mean, values by seed and standard deviation between seeds; and, but for the base, the
    mean difference to it, the differences by seed, half the width of the interval, and the verdict. `noise` is the
    pooled standard deviation of one value; with a single seed there is none, and no verdict.
    """
    seeds = sorted(values.get(base, {}))
    whole = {arm: np.array([of[s] for s in seeds]) for arm, of in values.items() if seeds and set(seeds) <= set(of)}
    noise, half = _noise(np.array(list(whole.values())), level)
    rows: dict[str, Any] = {}
    for arm, found in whole.items():
        each = {str(seed): _round(value) for seed, value in zip(seeds, found, strict=True)}
        rows[arm] = {"mean": _round(found.mean()), "by_seed": each}
        if len(seeds) > 1:
            rows[arm]["std_between_seeds"] = _round(found.std(ddof=1))
        if arm != base:
            gaps = found - whole[base]
            rows[arm] |= {"difference": _round(gaps.mean()), "differences": [_round(gap) for gap in gaps]}
            rows[arm] |= {"interval": half if half is None else _round(half), "verdict": _verdict(gaps.mean(), half)}
    unfinished = sorted(set(values) - set(whole))
    return {"base": base, "noise": noise if noise is None else _round(noise), "arms": rows, "unfinished": unfinished}


def _noise(values: np.ndarray, level: float) -> tuple[float | None, float | None]:
    """(standard deviation of a value, half an interval of a difference of means) of values (arms, seeds)."""
    from scipy.stats import t

    if values.ndim < 2 or min(values.shape) < 2:
        return None, None
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    noise = float(np.sqrt(np.square(left).sum() / freedom))
    return noise, float(t.ppf(0.5 + level / 2, freedom)) * noise * (2 / values.shape[1]) ** 0.5


def _verdict(gap: float, half: float | None) -> str:
    if half is None:
        return "one seed: unknown"
    if abs(gap) <= half:
        return "no difference beyond noise"
    return "better" if gap > 0 else "worse"


def _round(value: float) -> float:
    return round(float(value), 5)
