"""What evaluating architectures together could save: the share of MACs in first layers that another one has too.

    python experiments/benchmarks/shared_prefixes.py RUN

Layers are shared where they are equal in everything (shapes, precision, patches) and so are all before them; norms and
ranges that are calibrated for one are right for the other then. `generation` counts what an architecture shares with
one before it in its group of `--group`, `search` with any before it, had the activations of all been kept. Both are
bounds: nothing is said of the memory that it takes. `calibrated_before` is the share of architectures that differ in
precision alone from one before them, whose norms and ranges `nas.Evaluator` uses again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import takewhile

import optuna
from common import about, finish, out_option
from optuna.trial import TrialState

from nas.pipeline import Run
from nas.study import storage_url
from search_spaces import Network


def shared_macs(network: Network, other: Network) -> int:
    """MACs of the first layers that both have."""
    pairs = zip(network.layers, other.layers, strict=False)
    return sum(layer.macs for layer, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def shared_share(networks: Sequence[Network], group: int) -> float:
    """The share of all MACs that networks share with one before them in their group."""
    shared = 0
    for i, network in enumerate(networks):
        before = networks[i - i % group : i]
        shared += max((shared_macs(network, other) for other in before), default=0)
    return shared / sum(network.macs for network in networks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run that was searched, with one study in its folder")
    parser.add_argument("--group", type=int, default=24, help="architectures that a generation has")
    out_option(parser, "shared_prefixes")
    asked = parser.parse_args(arguments)
    run = Run.open(asked.run)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=None, storage=storage_url(run.folder))
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    architectures = [run.space.parse(trial.user_attrs["architecture"]) for trial in trials]
    networks = [run.space.lower(each) for each in architectures]
    calibrated = set(map(run.space.undeployed, architectures))
    result = {
        "space": run.space.name,
        "architectures": len(networks),
        "group": asked.group,
        "generation": round(shared_share(networks, asked.group), 4),
        "search": round(shared_share(networks, len(networks)), 4),
        "calibrated_before": round(1 - len(calibrated) / len(architectures), 4),
    }
    finish({**result, **about((run.experiment.seed,))}, asked.out)
    return 0


if __name__ == "__main__":
    main()
