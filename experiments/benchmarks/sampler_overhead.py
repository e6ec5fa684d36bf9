"""Milliseconds that Optuna and a sampler need for a trial, in memory and in SQLite.

    python experiments/benchmarks/sampler_overhead.py [--trials 1000] [--samplers ours,nsga2,tpe,random]

The objective costs nothing: two sums over 20 choices of 4 options each, one with interactions. SQLite is opened as
`nas.search` opens it, with a write-ahead log. `ms_a_trial` is the mean over all trials and `last_ms_a_trial` that over
the last tenth; `slowest_ms` is of one trial, which for ours holds a whole proposal round: predictors are fitted and a
generation is chosen. `sqlite_over_memory` is the ratio of the means. `process_ms_a_trial` is the processor time, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import about, finish, out_option
from optuna.distributions import CategoricalDistribution

from nas import PredictorGuidedSampler, minimize
from nas.study import open_study

CHOICES, OPTIONS = 20, 4
SEED = 0
SPACE = {f"choice{i:02}": CategoricalDistribution(tuple(range(OPTIONS))) for i in range(CHOICES)}
SAMPLERS: Mapping[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "ours": lambda: PredictorGuidedSampler(SEED, search_space=SPACE),
    "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=SEED),
    "tpe": lambda: optuna.samplers.TPESampler(seed=SEED),
    "random": lambda: optuna.samplers.RandomSampler(seed=SEED),
}


def costs_of(codes: np.ndarray) -> tuple[float, float]:
    """Of codes (20,): something additive, and something that falls with it."""
    effects = np.random.default_rng(SEED).random((2, CHOICES))
    return float(effects[0] @ codes), float(-effects[1] @ np.sqrt(codes) - (codes[:-1] * codes[1:]).sum() / CHOICES)


def timed(sampler: optuna.samplers.BaseSampler, storage: str | None, trials: int) -> dict[str, float]:
    """Times of a study of so many trials."""
    walls = []
    with open_study(storage, "overhead", [minimize("macs"), minimize("params")]) as opened:
        study = opened.study
        study.sampler = sampler
        began = time.process_time()
        for _ in range(trials):
            started = time.perf_counter()
            trial = study.ask()
            codes = [trial.suggest_categorical(name, space.choices) for name, space in SPACE.items()]
            study.tell(trial, costs_of(np.array(codes)))
            walls.append(1000 * (time.perf_counter() - started))
        process = 1000 * (time.process_time() - began)
    return {
        "ms_a_trial": round(float(np.mean(walls)), 2),
        "last_ms_a_trial": round(float(np.mean(walls[-max(1, trials // 10) :])), 2),
        "slowest_ms": round(float(np.max(walls)), 2),
        "process_ms_a_trial": round(process / trials, 2),
    }


def measured(name: str, trials: int) -> dict[str, Any]:
    """Of a sampler, in both storages."""
    memory = timed(SAMPLERS[name](), None, trials)
    with tempfile.TemporaryDirectory() as folder:
        sqlite = timed(SAMPLERS[name](), f"sqlite:///{Path(folder) / 'study.db'}", trials)
    return {
        "memory": memory,
        "sqlite": sqlite,
        "sqlite_over_memory": round(sqlite["ms_a_trial"] / memory["ms_a_trial"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    out_option(parser, "sampler_overhead")
    asked = parser.parse_args()
    names = asked.samplers.split(",")
    if unknown := [name for name in names if name not in SAMPLERS]:
        parser.error(f"no sampler {unknown[0]!r}; there are {', '.join(SAMPLERS)}")
    if asked.trials < 1:
        parser.error(f"--trials {asked.trials}; expected at least 1")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    result = {"trials": asked.trials, "choices": CHOICES, "options": OPTIONS}
    finish({**result, "samplers": {name: measured(name, asked.trials) for name in names}, **about((SEED,))}, asked.out)


if __name__ == "__main__":
    main()
