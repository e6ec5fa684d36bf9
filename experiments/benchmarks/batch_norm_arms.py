"""How a supernet's batch norms are best handled when it holds only a few networks: three arms on CIFAR-10.

    python experiments/benchmarks/batch_norm_arms.py CIFAR10.npz [--steps 3000] [--seeds 0 1]

SortedNet (arXiv 2309.00255) does not say. With its uniform draws from a fixed set of 8 architectures, all arms for the
same number of steps:

- `shared`: one norm for all, with the running statistics that training leaves;
- `recalibrated`: the same weights, with statistics measured anew for each network (arXiv 1903.05134);
- `own`: each architecture has norms of its own, scale, shift and statistics (switchable norms, arXiv 1812.08928).
  `own_recalibrated` is the same with statistics measured anew, which tells what scale and shift alone do.

Figures are of the 8 on the first 5000 test images. Space and recipe are those of equal_flops.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arms import Item, by_arm, compared, piece_options, run
from equal_flops import RECIPE, SPACE, accuracies
from torch import Tensor, nn

from nas import Data, Subnet, Supernet, load_data, train
from nas.health import sizes_of
from nas.interpreter import Normalization, Parameters, Tap, execute
from nas.strategies import Sorted, StrategySettings, nested_set
from nas.supernet import LayerParameters
from search_spaces import Architecture, Layer, SearchSpace

SET = 8
TEST_IMAGES = 5000
SEEDS = (0, 1, 2, 3)
ARMS = ("shared", "recalibrated", "own", "own_recalibrated")
KINDS = ("shared", "own")  # of trainings, each of which is two arms
FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda found: float(np.mean(found)),
    "worst": min,
    "largest": lambda found: found[0],
}


def fixed_set(space: SearchSpace) -> tuple[Architecture, ...]:
    """The architectures, the largest first; those that training watches are among them."""
    watched = sizes_of(space)
    nested = nested_set(space, SET, np.random.default_rng(0))
    return tuple(dict.fromkeys([watched["largest"], *watched.values(), *nested]))[:SET]


class FromSet(Sorted):
    """SortedNet with the same set of architectures for every seed."""

    def __init__(self, space: SearchSpace, seed: int, steps: int, settings: StrategySettings) -> None:
        super().__init__(space, seed, steps, settings)
        self.set = fixed_set(space)


class OwnNorms(Supernet):
    """A supernet of a few architectures, each with batch norms of its own; it refuses all others.

    The norms of `shared` are there but unused. Raises ValueError for an architecture that it was not made for.
    """

    def __init__(self, space: SearchSpace, architectures: Sequence[Architecture], seed: int = 0) -> None:
        super().__init__(space, seed)
        self.norms = nn.ModuleDict()
        for architecture in architectures:
            layers = super().extract(architecture).layers
            self.norms[architecture.id] = nn.ModuleDict(
                {name: LayerParameters(norm) for name, held in layers.items() if (norm := norm_of(held))}
            )

    def forward(self, x: Tensor, architecture: Architecture, *, tap: Tap | None = None, segments: int = 1) -> Tensor:
        parameters_of, normalization = self._own(architecture), Normalization(self.training)
        return execute(self.network(architecture), x, parameters_of, normalization, tap, segments)

    def extract(self, architecture: Architecture) -> Subnet:
        network, parameters_of = self.network(architecture), self._own(architecture)
        return Subnet(network, {layer.name: parameters_of(layer) for layer in network.layers}).train(self.training)

    def _own(self, architecture: Architecture) -> Callable[[Layer], Parameters]:
        """Parameters by layer: the shared ones, with the norms of the architecture in place of the shared norms."""
        if architecture.id not in self.norms:
            raise ValueError(f"{architecture} has no norms here; expected one of {len(self.norms)} architectures")
        lowered, norms = self._lower(architecture), self.norms[architecture.id]
        assert isinstance(norms, nn.ModuleDict)

        def parameters_of(layer: Layer) -> Parameters:
            shared, name = self._parameters_of(lowered, layer), layer.name.replace(".", "/")
            return {**shared, **norm_of(norms[name])} if name in norms else shared

        return parameters_of


def norm_of(held: nn.Module) -> dict[str, Tensor]:
    """Scale, shift and statistics of a layer's norm; nothing where it has none."""
    assert isinstance(held, LayerParameters)
    return {name: tensor for name, tensor in held.tensors().items() if name.startswith("norm_")}


def trained_numbers(supernet: Supernet) -> dict[str, int]:
    """How many numbers training sets, and how many of them are norms, without those that nothing uses."""
    norms = supernet.norms if isinstance(supernet, OwnNorms) else supernet.shared
    named = [(name, parameter.numel()) for name, parameter in supernet.shared.named_parameters()]
    rest = sum(count for name, count in named if ".norm_" not in name)
    of_norms = sum(parameter.numel() for name, parameter in norms.named_parameters() if ".norm_" in name)
    return {"all": rest + of_norms, "norms": of_norms}


def planned(seeds: Sequence[int], steps: int, learning_rate: float) -> list[Item]:
    return [
        {"kind": kind, "seed": seed, "steps": steps, "learning_rate": learning_rate} for seed in seeds for kind in KINDS
    ]


def work(item: Item, data: Data, folder: Path, *, space: SearchSpace) -> Item:
    """Train one supernet; its networks with the statistics of training, and recalibrated, are two arms."""
    seed, steps, networks = item["seed"], item["steps"], fixed_set(space)
    supernet = OwnNorms(space, networks, seed) if item["kind"] == "own" else Supernet(space, seed)
    settings = replace(RECIPE, steps=steps, learning_rate=item["learning_rate"])
    strategy = FromSet(space, seed, steps, settings)
    results = train(supernet, data, seed=seed, settings=settings, folder=folder, strategy=strategy)
    supernet.cpu()
    return {
        "rollbacks": results["rollbacks"],
        "seconds": results["seconds"],
        "trained_numbers": trained_numbers(supernet),
        "as_trained": accuracies(supernet, data, networks, "test", TEST_IMAGES, shared=True),
        "recalibrated": accuracies(supernet, data, networks, "test", TEST_IMAGES),
    }


# report --------------------------------------------------------------------------------------------------


def report(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_arms = [arm_line for line in lines for arm_line in _by_arm(line)]
    told = {}
    for name, figure in FIGURES.items():
        values = by_arm(of_arms, ARMS, lambda line, figure=figure: figure(line["accuracies"]))  # type: ignore[misc]
        # what training leaves in shared norms varies more than all else: its noise is not that of the others
        shared = {arm: of for arm, of in values.items() if arm in ("shared", "recalibrated")}
        others = {arm: of for arm, of in values.items() if arm != "shared"}
        told[name] = {"shared": compared(shared, "recalibrated"), "own": compared(others, "recalibrated")}
    sizes = {line["item"]["kind"]: line["trained_numbers"] for line in lines}
    return {
        "what": f"accuracy of {SET} networks on {TEST_IMAGES} test images, by how batch norms are handled",
        "space": SPACE.name,
        "networks": [str(architecture) for architecture in fixed_set(SPACE)],
        "figures": told,
        "by_network": {arm: _mean_of(of_arms, arm) for arm in ARMS},
        "trained_numbers": sizes,
        "rollbacks": int(sum(line["rollbacks"] for line in lines)),
        "in_words": in_words(told["mean"], sizes),
    }


def _by_arm(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two arms that one training is."""
    names = ("shared", "recalibrated") if line["item"]["kind"] == "shared" else ("own", "own_recalibrated")
    found = zip(names, (line["as_trained"], line["recalibrated"]), strict=True)
    return [{"item": {"arm": arm, "seed": line["item"]["seed"]}, "accuracies": of} for arm, of in found]


def _mean_of(of_arms: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    """The accuracy of each network, mean over seeds."""
    found = [line["accuracies"] for line in of_arms if line["item"]["arm"] == arm]
    return np.mean(found, axis=0).round(5).tolist() if found else []


def in_words(means: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What the mean accuracies say; nothing about an arm that is not finished."""
    said = []
    for group, arm, what in (
        ("shared", "shared", "Shared norms with the statistics of training"),
        ("own", "own", "Norms of its own for each architecture"),
        ("own", "own_recalibrated", "Norms of its own for each architecture, recalibrated,"),
    ):
        row = means[group]["arms"].get(arm)
        if row and "difference" in row:
            interval = "" if row["interval"] is None else f" (give or take {100 * row['interval']:.2f})"
            said.append(
                f"{what} are {100 * row['difference']:+.2f} points{interval} from shared ones, recalibrated: "
                f"{row['verdict']}."
            )
    if sizes.keys() == set(KINDS):
        added = sizes["own"]["all"] - sizes["shared"]["all"]
        share = added / sizes["shared"]["all"]
        said.append(f"Norms of their own add {added:,} trained numbers, {share:.1%}, for {SET} architectures.")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--learning-rate", type=float, default=0.4, help="tuned by equal_flops.py")
    parser.add_argument("--steps", type=int, default=1500)
    piece_options(parser, "batch_norm_arms", SEEDS)
    asked = parser.parse_args()

    def do(item: Item, folder: Path) -> Item:
        return work(item, load_data(asked.data, val_search=2500, val_front=2500, seed=0), folder, space=SPACE)

    run(asked, planned(asked.seeds, asked.steps, asked.learning_rate), do, report)


if __name__ == "__main__":
    main()
