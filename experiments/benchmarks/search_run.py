"""Samplers on the supernet of a run: time of a whole search, and hypervolume after so many evaluations.

    python experiments/benchmarks/search_run.py RUN [--trials 300] [--seeds 2] [--samplers guided,nsga2] [--workers 1]

Objectives and limits are those of the run's experiment. Each search begins anew: accuracies of another are not reused.
`hypervolume_share` is that of the non-dominated set of all searches together, with the worst values of that set and a
tenth of its range beyond them as the reference. `evaluations_for` says how many evaluations `guided` needs for what
another sampler has after n, in steps of ten. Figures are those that a search sees: val_search and predictions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import about, finish, out_option

import nas
from nas.dominance import dominated, hypervolume
from nas.pipeline import Run
from nas.samplers import GUIDED, SAMPLERS
from nas.search import SEEN
from nas.study import storage_url

BUDGETS = (50, 100, 150, 300)
STEP = 10


def costs_in_order(run: Run, sampler: str, seed: int, trials: int, workers: int) -> tuple[float, np.ndarray]:
    """(seconds, costs (trials, objectives) in the order of the evaluations; infinite where not on a front)."""
    plan = run.experiment.search
    objectives = plan.parsed_objectives
    settings = nas.SearchSettings(trials, sampler, plan.population, workers)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        nas.search(
            run.supernet,
            run.data,
            objectives,
            plan.parsed_limits,
            devices=run.devices,
            seed=seed,
            storage=storage_url(Path(folder)),
            settings=settings,
        )
        seconds = time.perf_counter() - began
        study = optuna.load_study(study_name=None, storage=storage_url(Path(folder)))
        done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    signs = np.array([objective.cost(1.0) for objective in objectives])
    costs = np.array([trial.values for trial in done]) * signs
    whole = [max(trial.constraints.values(), default=0.0) <= 0 and SEEN not in trial.user_attrs for trial in done]
    return seconds, np.where(np.array(whole)[:, None], costs, np.inf)


def volumes(costs: np.ndarray, corner: np.ndarray, counts: Sequence[int]) -> list[float]:
    """Hypervolume of the first so many evaluations."""
    return [hypervolume(costs[:count][(costs[:count] < corner).all(axis=1)], corner) for count in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samplers", default="guided,nsga2", help="guided first")
    parser.add_argument("--workers", type=int, default=1)
    out_option(parser, "search_run")
    asked = parser.parse_args()
    names = asked.samplers.split(",")
    if unknown := [name for name in names if name not in SAMPLERS]:
        parser.error(f"no sampler {unknown[0]!r}; there are {', '.join(SAMPLERS)}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run, seeds = Run.open(asked.run), range(asked.seeds)
    found = {
        (name, seed): costs_in_order(run, name, seed, asked.trials, asked.workers) for seed in seeds for name in names
    }
    everything = np.concatenate([costs for _, costs in found.values()])
    everything = everything[np.isfinite(everything).all(axis=1)]
    front = everything[~dominated(everything)]
    corner = front.max(axis=0) + 0.1 * np.ptp(front, axis=0)
    most = hypervolume(front, corner)
    counts = [*range(STEP, asked.trials + 1, STEP)]
    shares = {key: np.array(volumes(costs, corner, counts)) / most for key, (_, costs) in found.items()}
    budgets = [count for count in BUDGETS if count in counts]
    finish(
        {
            "experiment": run.experiment.name,
            "objectives": [objective.key for objective in run.experiment.search.parsed_objectives],
            "trials": asked.trials,
            "workers": asked.workers,
            "samplers": {name: _told(name, names[0], seeds, found, shares, counts, budgets) for name in names},
            **about(list(seeds)),
        },
        asked.out,
    )


def _told(
    name: str, first: str, seeds: Sequence[int], found: Any, shares: Any, counts: Sequence[int], budgets: Sequence[int]
) -> dict[str, Any]:
    mean = {one: np.mean([shares[one, seed] for seed in seeds], axis=0) for one in {name, first}}
    told: dict[str, Any] = {
        "seconds": [round(found[name, seed][0], 1) for seed in seeds],
        "hypervolume_share": {
            str(b): [round(float(shares[name, seed][counts.index(b)]), 4) for seed in seeds] for b in budgets
        },
        "whole_evaluations": [int(np.isfinite(found[name, seed][1][:, 0]).sum()) for seed in seeds],
    }
    if name != first == GUIDED:
        reached = {b: np.flatnonzero(mean[first] >= mean[name][counts.index(b)]) for b in budgets}
        told["evaluations_for"] = {str(b): counts[int(r[0])] if len(r) else None for b, r in reached.items()}
    return told


if __name__ == "__main__":
    main()
