"""How well latencies on this CPU are predicted: fresh subnets, measured later, beside how well a measurement repeats.

    python experiments/benchmarks/host_cpu.py [--recipe cifar10] [--samples 120] [--held-out 100]

A predictor is fitted on `samples` measured subnets of the recipe's space. Then, in later processes and from another
seed, three sets of subnets spread over MACs are measured twice: all fp32, all int8, and of mixed precision. Of each:
how many predictions are within 10 % of the mean of the two measurements, their rank correlation, the share of single
measurements that the 90 % interval contains, and how far the two measurements lie apart (the noise floor, which no
prediction can beat).
`macs` is a line through the MACs of the same training subnets.

`plan`: what choosing what to measure brings. From all that was measured, predictors are fitted again on 40 drawn
subnets and 24 more, drawn or half of them picked for being uncertain, and judged on subnets left out.

`million`: seconds to predict a million architectures given as codes, on one core, with the table empty and filled.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import about, finish, out_option, recipe_space

from hardware_profiles import features, load_device
from hardware_profiles.files import read_json
from hardware_profiles.measurement import Measurement
from nas.costs import ProfiledDevice
from nas.profile import measure_untrained, profile
from nas.sampling import sample_spread
from predictors import LatencyPredictor, most_uncertain
from predictors.regression import fit_coefficients, matrix_of, with_constant
from search_spaces import Architecture, SearchSpace

FIRST, MORE, JUDGED_ON, DRAWS = 40, 24, 100, 20  # of the comparison of plans
MILLION = 1_000_000


def held_out(space: SearchSpace, count: int, seed: int, seen: set[str]) -> dict[str, list[Architecture]]:
    """Subnets never seen: all fp32, all int8, and of mixed precision."""
    rng = np.random.default_rng([seed, 10])
    spread = sample_spread(space, 6 * count, rng)
    found = {
        "fp32": [space.with_precision(one, "fp32") for one in spread],
        "int8": [space.with_precision(one, "int8") for one in spread],
        "mixed": [one for one in spread if 0 < space.lower(one).int8_macs_share < 1],
    }
    fresh = {name: [one for one in dict.fromkeys(each) if one.id not in seen] for name, each in found.items()}
    return {name: _some(each, count) for name, each in fresh.items()}


def _some(architectures: Sequence[Architecture], count: int) -> list[Architecture]:
    places = np.unique(np.linspace(0, len(architectures) - 1, count).round().astype(int))
    return [architectures[int(place)] for place in places]


def judged(
    space: SearchSpace,
    architectures: Sequence[Architecture],
    device: ProfiledDevice,
    first: Mapping[str, Measurement],
    second: Mapping[str, Measurement],
    line: np.ndarray,
) -> dict[str, Any]:
    """What is told of one set; `line` is (ms a MAC, ms)."""
    assert device.predictor is not None
    once = np.array([first[one.id].latency_ms for one in architectures])
    twice = np.array([second[one.id].latency_ms for one in architectures])
    measured_ms = (once + twice) / 2
    found = device.predictor.table(space).predict(space.encode(architectures))
    assert found.low_ms is not None
    assert found.high_ms is not None
    macs = np.array([space.lower(one).macs for one in architectures], float)
    inside = [(found.low_ms <= each) & (each <= found.high_ms) for each in (once, twice)]
    apart = np.abs(once - twice) / measured_ms
    return {
        "networks": len(architectures),
        "latency_ms": [float(measured_ms.min()), float(measured_ms.max())],
        "ours": {**_errors(found.mean_ms, measured_ms), "coverage_of_90_percent_interval": float(np.mean(inside))},
        "macs": _errors(with_constant(macs[:, None]) @ line, measured_ms),
        "repeat": {"median": float(np.median(apart)), "p90": float(np.quantile(apart, 0.9)), "max": float(apart.max())},
    }


def _errors(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> dict[str, float]:
    from scipy.stats import spearmanr

    error = np.abs(predicted_ms / measured_ms - 1)
    return {
        "within_10_percent": float((error <= 0.1).mean()),
        "median_error": float(np.median(error)),
        "max_error": float(error.max()),
        "spearman": float(spearmanr(predicted_ms, measured_ms).statistic),
    }


def profiled(space: SearchSpace, asked: argparse.Namespace) -> tuple[ProfiledDevice, np.ndarray]:
    """The device with its predictor, and a line through the MACs of the subnets it was fitted on: (ms a MAC, ms)."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "measured.json"
        device = profile(
            space,
            load_device(asked.device),
            samples=asked.samples,
            error=0.0,
            seed=asked.seed,
            patience_s=asked.patience,
            record=record,
        )
        measured: Any = read_json(record)["measurements"]
    latency_ms = {space.parse(text): one["latency_ms"] for text, one in measured.items()}
    macs = np.array([[float(space.lower(one).macs)] for one in latency_ms])
    return device, fit_coefficients(with_constant(macs), np.array(list(latency_ms.values())))


def plans(space: SearchSpace, measured: Mapping[Architecture, float], channel_block: int, seed: int) -> dict[str, Any]:
    """Errors on the same left-out subnets after the same number of measurements, chosen in two ways."""
    rows = [features(space.lower(one), channel_block) for one in measured]
    names = sorted({name for row in rows for name in row})
    matrix, latency = with_constant(matrix_of(rows, names)), np.array(list(measured.values()))
    found: dict[str, list[dict[str, float]]] = {"drawn": [], "half_picked": []}
    for draw in range(DRAWS):
        order = np.random.default_rng([seed, 11, draw]).permutation(len(latency))
        out, first, pool = np.split(order, [JUDGED_ON, JUDGED_ON + FIRST])
        coefficients = fit_coefficients(matrix[first], latency[first])
        half = pool[: MORE // 2]
        known = np.concatenate([first, half])
        left = pool[MORE // 2 :]
        relative = matrix[left] / (matrix[left] @ coefficients)[:, None]
        picked = left[most_uncertain(matrix[known] / latency[known, None], relative, MORE - MORE // 2)]
        for name, chosen in {"drawn": pool[:MORE], "half_picked": np.concatenate([half, picked])}.items():
            used = np.concatenate([first, chosen])
            fitted = fit_coefficients(matrix[used], latency[used])
            found[name].append(_errors(matrix[out] @ fitted, latency[out]))
    return {
        "measured": FIRST + MORE,
        "judged_on": JUDGED_ON,
        "draws": DRAWS,
        **{name: _mean_and_spread(each) for name, each in found.items()},
    }


def _mean_and_spread(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: [float(np.mean(values)), float(np.std(values))] for name, values in columns.items()}


def million(space: SearchSpace, predictor: LatencyPredictor, seed: int) -> dict[str, float]:
    """Seconds for a million random codes; the first time includes lowering every combination of a slot once."""
    rng = np.random.default_rng([seed, 12])
    codes = np.stack([rng.integers(len(one.options), size=MILLION, dtype=np.uint8) for one in space.choices], axis=1)
    table = predictor.table(space)
    seconds = {}
    for name in ("empty_table", "filled_table"):
        started = time.perf_counter()
        table.predict(codes)
        seconds[name] = round(time.perf_counter() - started, 3)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="cifar10", help="whose space")
    parser.add_argument("--device", default="host-cpu")
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for the machine to be quiet")
    out_option(parser, "host_cpu")
    asked = parser.parse_args(arguments)
    space = recipe_space(asked.recipe)
    device, line = profiled(space, asked)
    assert device.predictor is not None
    sets = held_out(space, asked.held_out, asked.seed + 1, set(device.predictor.provenance["architectures"]))
    everything = list(dict.fromkeys(one for each in sets.values() for one in each))
    first, second = (
        measure_untrained(space, everything, device.profile, seed=asked.seed + 1, patience_s=asked.patience)
        for _ in range(2)
    )
    measured = {one: (first[one.id].latency_ms + second[one.id].latency_ms) / 2 for one in everything}
    judgements = {name: judged(space, each, device, first, second, line) for name, each in sets.items()}
    covered = [each["ours"]["coverage_of_90_percent_interval"] for each in judgements.values()]
    finish(
        {
            **about([asked.seed]),
            "device": asked.device,
            "recipe": asked.recipe,
            "space": space.name,
            "predictor": {**device.predictor.report(), "history": device.predictor.provenance["history"]},
            "held_out": judgements,
            "coverage_of_90_percent_interval": float(np.mean(covered)),
            "plan": plans(space, measured, device.predictor.model.channel_block, asked.seed),
            "million_predictions_s": million(space, device.predictor, asked.seed),
        },
        asked.out,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
