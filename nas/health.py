"""Whether a training is healthy: accuracy and gradient norm of its smallest, middle and largest network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import Data
from nas.evaluate import accuracy, calibration_images, calibration_order, recalibrate
from nas.strategies import middle
from nas.supernet import Subnet, Supernet
from search_spaces import Architecture, SearchSpace

LEARNED = 3.0  # standard errors above chance that count as having learned something
AT_CHANCE = 1.0  # and up to how many still count as chance: far apart, or few images would raise false alarms
PROBE_IMAGES = 64  # that a gradient norm is measured on


def sizes_of(space: SearchSpace) -> dict[str, Architecture]:
    """The three architectures that stand for a space."""
    return {"smallest": space.smallest, "middle": middle(space), "largest": space.largest}


def examine(supernet: Supernet, data: Data) -> dict[str, float]:
    """Accuracy on val_search and gradient norm on a few training images, for each of `sizes_of`.

    Keys are `smallest`, ... and `smallest_gradient_norm`, ...; the supernet does not change.
    """
    device = next(supernet.parameters()).device
    found, norms = {}, {}
    for name, architecture in sizes_of(supernet.space).items():
        subnet = supernet.extract(architecture)
        images = [x.to(device) for x in calibration_images(data, subnet)]
        norms[f"{name}_gradient_norm"] = _gradient_norm(subnet, images[0], data)
        found[name] = accuracy(recalibrate(subnet, images), data, "val_search")
    return found | norms


def _gradient_norm(subnet: Subnet, images: Tensor, data: Data) -> float:
    """Euclidean norm of the gradient of the cross-entropy; the images are the first of `calibration_images`."""
    split = data["calibration"]
    labels = split.labels[torch.from_numpy(calibration_order(split))][: len(images)].to(images.device)
    subnet.train()
    loss = F.cross_entropy(subnet(images[:PROBE_IMAGES]), labels[:PROBE_IMAGES])
    gradients = torch.autograd.grad(loss, list(subnet.parameters()), allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt())


class Guard:
    """Notices a collapse: a network that was clearly better than guessing is back at it, several times in a row.

    Args:
        chance: accuracy of always saying the most frequent class.
        images: number of images that accuracies are measured on.
        patience: evaluations in a row at chance that count as a collapse.
    """

    def __init__(self, chance: float, images: int, patience: int) -> None:
        error = math.sqrt(chance * (1 - chance) / max(1, images))
        self.learned_above, self.chance_below = chance + LEARNED * error, chance + AT_CHANCE * error
        self.patience = patience
        self.learned: set[str] = set()
        self.at_chance: dict[str, int] = {}
        self.watched: dict[str, int] = {}  # evaluations of each

    @classmethod
    def of(cls, data: Data, patience: int) -> Guard:
        labels = data["val_search"].labels
        return cls(float(labels.bincount().max()) / len(labels), len(labels), patience)

    @property
    def healthy(self) -> bool:
        """Whether no network is at chance that was better."""
        return not any(self.at_chance.values())

    def collapse(self, accuracies: Mapping[str, float], watched: Iterable[str]) -> str:
        """What collapsed, in words; empty when nothing did. Call it once an evaluation."""
        collapsed = []
        for name in watched:
            self.watched[name] = self.watched.get(name, 0) + 1
            if accuracies[name] > self.learned_above:
                self.learned.add(name)
            fallen = name in self.learned and accuracies[name] <= self.chance_below
            self.at_chance[name] = self.at_chance.get(name, 0) + 1 if fallen else 0
            if self.at_chance[name] >= self.patience:
                collapsed.append(f"the {name} subnet has been at chance for {self.at_chance[name]} evaluations")
        return " and ".join(collapsed)

    @property
    def stuck(self) -> list[str]:
        """Which networks were watched `patience` times and have never been better than guessing."""
        return [name for name, times in self.watched.items() if times >= self.patience and name not in self.learned]

    def state(self) -> dict[str, object]:
        counted = {"at_chance": self.at_chance, "watched": self.watched}
        return {"learned": sorted(self.learned)} | {name: dict(sorted(of.items())) for name, of in counted.items()}

    def restore(self, state: Mapping[str, object]) -> None:
        self.learned = set(state["learned"])  # type: ignore[call-overload]
        self.at_chance = dict(state["at_chance"])  # type: ignore[call-overload]
        self.watched = dict(state["watched"])  # type: ignore[call-overload]
