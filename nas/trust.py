"""Whether inherited accuracy can be trusted: some networks of a supernet, each trained alone for the same budget.

A search picks by the accuracy that a network inherits from the supernet. What counts is how the network compares
with others when each is trained alone. `trust` trains a handful alone and says how well the two orders agree, what
picking by inherited accuracy costs, and what it costs to search nothing and take the largest network that fits
(as SortedNet does, arXiv 2309.00255).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.files import read_json, write_json
from nas.checkpoints import load_checkpoint
from nas.costs import Z_90
from nas.data import Data
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.sampling import sample_spread
from nas.strategies import unquantized
from nas.supernet import Subnet, Supernet, digest_of
from nas.train import train
from nas.train_settings import TrainSettings
from nas.versions import versions
from search_spaces import Architecture, SearchSpace

log = logging.getLogger(__name__)

FEWEST, CANDIDATES = 3, 64
RESAMPLES = 1000
SPLIT = "val_front"


# statistics ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """A rank correlation and its 90 % interval; None where all values of one side are equal."""

    value: float | None
    low: float | None
    high: float | None


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float | None:
    """Kendall's tau-b, which allows for ties; None where it is not defined since x or y is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def spearman_rho(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rho; None where it is not defined since x or y is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float | None],
    x: np.ndarray,
    y: np.ndarray,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Correlation:
    """The statistic of x and y (n,), and the middle 90 % of it when the n pairs are drawn anew with replacement.

    Draws in which it is not defined are left out.
    """
    draws = rng.integers(len(x), size=(resamples, len(x)))
    found = [value for draw in draws if (value := statistic(x[draw], y[draw])) is not None]
    value = statistic(x, y)
    if value is None or not found:
        return Correlation(value, None, None)
    low, high = np.quantile(found, (0.05, 0.95))
    return Correlation(value, float(low), float(high))


def chance_tau(count: int) -> float | None:
    """The smallest tau that at most 10 % of the random orders of `count` reach, up or down; None where none is.

    Exact, from the number of orders with each number of inversions (Kendall 1938).
    """
    orders = np.ones(1)
    for length in range(2, count + 1):
        orders = np.convolve(orders, np.ones(length)) / length
    pairs = count * (count - 1) // 2
    tau = 1 - 2 * np.arange(pairs + 1) / max(pairs, 1)
    both_tails = 2 * np.cumsum(orders)
    rare = tau[(both_tails <= 0.1 + 1e-12) & (tau > 0)]
    return float(rare[-1]) if len(rare) else None


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent images: binomial, with one success and one failure added.

    Without those (Laplace's rule) a share of 0 or 1 would have no error at all.
    """
    expected = (share * count + 1) / (count + 2)
    return math.sqrt(expected * (1 - expected) / count)


@dataclass(frozen=True)
class Pick:
    """What a rule picks within a budget, and what would have been best: indices of networks."""

    budget_macs: int
    picked: int
    best: int


def picks(macs: np.ndarray, alone: np.ndarray, score: np.ndarray) -> list[Pick]:
    """For each distinct number of MACs as a budget: the network within it that has the highest score.

    Args:
        macs, alone, score: (n,) costs, accuracies when trained alone, and what the rule maximizes.

    Of equals (in score, or for the best in `alone`) it is the one with the fewest MACs, then the first.
    """
    order = np.argsort(macs, kind="stable")
    found = []
    for budget in np.unique(macs):
        within = order[macs[order] <= budget]
        picked, best = (int(within[np.argmax(values[within])]) for values in (score, alone))
        found.append(Pick(int(budget), picked, best))
    return found


def regrets(picked: Sequence[Pick], alone: np.ndarray) -> np.ndarray:
    """How much better than each pick the best network within its budget is when trained alone, 0 or more."""
    return np.array([alone[pick.best] - alone[pick.picked] for pick in picked])


# the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedNetwork:
    """One network with the accuracy it inherits and the one it reaches alone, both in 0..1."""

    id: str
    architecture: str
    macs: int
    inherited: float
    alone: float

    @property
    def gap(self) -> float:
        return self.inherited - self.alone


@dataclass(frozen=True)
class TrustReport:
    """Networks in the order of their MACs, how they were trained, and what follows from their accuracies.

    validation_images: how many images each accuracy is a share of.
    steps, images_a_step: the training of each network alone.
    settings: those of that training.
    """

    networks: tuple[ComparedNetwork, ...]
    validation_images: int
    steps: int
    images_a_step: int
    settings: Mapping[str, Any]
    seed: int
    space: str
    data_key: str
    supernet_sha256: str

    def column(self, name: str) -> np.ndarray:
        return np.array([getattr(network, name) for network in self.networks])

    @cached_property
    def kendall(self) -> Correlation:
        rng = np.random.default_rng([self.seed, 8])
        return bootstrap(kendall_tau, self.column("inherited"), self.column("alone"), rng)

    @cached_property
    def spearman(self) -> Correlation:
        rng = np.random.default_rng([self.seed, 8])
        return bootstrap(spearman_rho, self.column("inherited"), self.column("alone"), rng)

    @cached_property
    def picks(self) -> dict[str, list[Pick]]:
        """By rule: the best inherited accuracy within a budget, and simply the largest network (ties: the first)."""
        macs, alone = self.column("macs"), self.column("alone")
        rules = {"inherited": self.column("inherited"), "largest": macs}
        return {rule: picks(macs, alone, score) for rule, score in rules.items()}

    def regrets(self, rule: str) -> np.ndarray:
        """Of `inherited` or `largest`, one a budget, in 0..1."""
        return regrets(self.picks[rule], self.column("alone"))

    def error(self, name: str) -> np.ndarray:
        """Standard errors of the accuracies `inherited` or `alone`."""
        return np.array([standard_error(share, self.validation_images) for share in self.column(name)])

    def is_real(self, a: int, b: int) -> bool:
        """Whether the networks a and b, trained alone, differ by more than 90 % of equals do on so many images."""
        alone, error = self.column("alone"), self.error("alone")
        return bool(abs(alone[a] - alone[b]) > Z_90 * math.hypot(error[a], error[b]))

    @property
    def noise_floor(self) -> float:
        """Standard error of a difference of two accuracies, averaged (root mean square) over the networks."""
        return float(np.sqrt(2 * np.mean(self.error("alone") ** 2)))

    @property
    def training_macs(self) -> int:
        """Spent on training alone: three times the forward pass for each image (forward, and backward twice that)."""
        return sum(3 * int(macs) for macs in self.column("macs")) * self.steps * self.images_a_step

    @cached_property
    def findings(self) -> list[str]:
        """What may be claimed, and what may not."""
        return [self._order_said(), self._pairs_said(), self._rules_said(), ONE_TRAINING]

    def _order_said(self) -> str:
        count, tau, bound = len(self.networks), self.kendall.value, chance_tau(len(self.networks))
        if tau is None:
            return "No claim about the order: all inherited or all stand-alone accuracies are equal."
        if bound is None:
            return f"No claim about the order: {count} networks are too few; ask for more with --networks."
        chance = f"one random order of {count} networks in ten has a tau of {bound:.2f} or more, up or down"
        if tau >= bound:
            return f"Inherited accuracy orders the networks better than chance ({chance})."
        if tau <= -bound:
            return f"Inherited accuracy orders the networks worse than chance ({chance})."
        return f"No claim about the order: {chance}; ask for more with --networks."

    def _pairs_said(self) -> str:
        inherited, alone = self.column("inherited"), self.column("alone")
        count = len(self.networks)
        pairs = [(a, b) for a in range(count) for b in range(a)]
        real = [(a, b) for a, b in pairs if self.is_real(a, b)]
        alike = sum((inherited[a] - inherited[b]) * (alone[a] - alone[b]) > 0 for a, b in real)
        return (
            f"{len(real)} of {len(pairs)} pairs of networks differ by more than noise when trained alone; "
            f"inherited accuracy orders {alike} of them the same way."
        )

    def _rules_said(self) -> str:
        alone = self.column("alone")
        real = {rule: sum(self.is_real(p.best, p.picked) for p in found) for rule, found in self.picks.items()}
        other = [
            alone[a.picked] - alone[b.picked]
            for a, b in zip(self.picks["inherited"], self.picks["largest"], strict=True)
            if self.is_real(a.picked, b.picked)
        ]
        better = sum(difference > 0 for difference in other)
        return (
            f"Of {len(self.picks['largest'])} budgets, the regret is more than noise at {real['inherited']} when "
            f"picking by inherited accuracy and at {real['largest']} when taking the largest; picking by inherited "
            f"accuracy is better by more than noise at {better}, worse at {len(other) - better}."
        )

    def to_dict(self) -> dict[str, object]:
        """What trust.json holds."""
        rows = [
            asdict(network) | {"gap": network.gap, "inherited_se": float(inherited), "alone_se": float(alone)}
            for network, inherited, alone in zip(
                self.networks, self.error("inherited"), self.error("alone"), strict=True
            )
        ]
        return {
            "schema": 1,
            "seed": self.seed,
            "settings": dict(self.settings),
            "versions": versions(),
            "space": self.space,
            "data": self.data_key,
            "supernet_sha256": self.supernet_sha256,
            "n": len(self.networks),
            "split": SPLIT,
            "validation_images": self.validation_images,
            "steps": self.steps,
            "images_a_step": self.images_a_step,
            "training_macs": self.training_macs,
            "networks": rows,
            "kendall_tau_b": asdict(self.kendall),
            "spearman_rho": asdict(self.spearman),
            "noise_floor": self.noise_floor,
            "regret": {rule: self._regret_to_dict(rule) for rule in self.picks},
            "findings": self.findings,
        }

    def _regret_to_dict(self, rule: str) -> dict[str, object]:
        values = self.regrets(rule)
        budgets = [
            {
                "budget_macs": pick.budget_macs,
                "picked": self.networks[pick.picked].id,
                "best": self.networks[pick.best].id,
                "regret": float(value),
                "is_real": self.is_real(pick.best, pick.picked),
            }
            for pick, value in zip(self.picks[rule], values, strict=True)
        ]
        return {"mean": float(values.mean()), "max": float(values.max()), "budgets": budgets}

    def save(self, path: Path) -> None:
        write_json(path, self.to_dict())

    def plot(self, path: Path) -> None:
        """The picture of the report; the format is that of the suffix."""
        from nas.plot import plot_trust

        plot_trust(self, path)

    def __str__(self) -> str:
        """The table and the findings, as the command prints them."""
        titles = ("", "id", "MMACs", "inherited (%)", "alone (%)", "gap (pp)")
        lines = ["{:>2}  {:10}  {:>8}  {:>14}  {:>14}  {:>14}".format(*titles)]
        errors = zip(self.error("inherited"), self.error("alone"), strict=True)
        for number, (network, (inherited, alone)) in enumerate(zip(self.networks, errors, strict=True), start=1):
            pairs = (
                (network.inherited, inherited),
                (network.alone, alone),
                (network.gap, math.hypot(inherited, alone)),
            )
            shown = "  ".join(f"{100 * value:8.2f} ±{100 * error:4.2f}" for value, error in pairs)
            lines.append(f"{number:>2}  {network.id:10}  {network.macs / 1e6:8.4g}  {shown}")
        gaps = 100 * self.column("gap")
        lines += [
            f"± is one standard error on {self.validation_images} images. Each network alone: {self.steps} steps of "
            f"{self.images_a_step} images; {self.training_macs:.3g} MACs of training in all.",
            "",
            f"rank correlation of inherited and stand-alone accuracy: {_told('Kendall tau-b', self.kendall)}, "
            f"{_told('Spearman rho', self.spearman)} (90 % bootstrap over networks)",
            f"gap: mean {gaps.mean():+.2f} pp, from {gaps.min():+.2f} to {gaps.max():+.2f} pp",
        ]
        for rule, said in (("inherited", "picking by inherited accuracy"), ("largest", "taking the largest that fits")):
            values = 100 * self.regrets(rule)
            lines.append(f"regret of {said}: mean {values.mean():.2f} pp, max {values.max():.2f} pp")
        floor = 100 * self.noise_floor
        lines.append(
            f"noise floor: the s.e. of a difference is {floor:.2f} pp on average; {Z_90 * floor:.2f} pp may be noise"
        )
        return "\n".join([*lines, "", *self.findings])


ONE_TRAINING = (
    "Each network was trained alone once, so what another seed would change is not in these errors; "
    "accuracies share their images, so the errors of differences are upper bounds for the images' part."
)


def _told(name: str, found: Correlation) -> str:
    if found.value is None:
        return f"{name} not defined"
    interval = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{name} {found.value:.2f}{interval}"


# training alone ------------------------------------------------------------------------------------------


def trust(
    supernet: Supernet,
    data: Data,
    *,
    folder: Path,
    settings: TrainSettings | None = None,
    seed: int = 0,
    networks: int = 8,
) -> TrustReport:
    """Train `networks` architectures of a trained supernet alone, and compare.

    Args:
        supernet: trained; its weights do not change.
        data: what it was trained on; both accuracies are those on val_front.
        folder: each network keeps its result, and checkpoints while it trains, in a folder by its id; what is
            found there is not trained again, so that a report that was stopped goes on, and one of more networks
            adds to those of fewer.
        settings, seed: those of the supernet's training: each network alone gets as many steps of as many images.
        networks: 3 to 64, spread over MACs; fewer where the space has no more.

    Raises ValueError for a number of networks out of range and nas.TrainingDiverged when a training does.
    """
    settings = alone_settings(settings or TrainSettings())
    chosen = spread_over_macs(supernet.space, networks, np.random.default_rng([seed, 7]))
    compared, steps = [], set()
    for number, architecture in enumerate(chosen, start=1):
        macs = supernet.space.lower(architecture).macs
        log.info("network %d of %d: %s, %.4g MMACs", number, len(chosen), architecture.id, macs / 1e6)
        alone, trained_steps = _alone(supernet.space, architecture, data, folder / architecture.id, settings, seed)
        steps.add(trained_steps)
        inherited = _accuracy(supernet.extract(architecture), data)
        compared.append(ComparedNetwork(architecture.id, str(architecture), macs, inherited, alone))
    assert len(steps) == 1, "the same settings and data give the same number of steps"
    return TrustReport(
        tuple(sorted(compared, key=lambda network: (network.macs, network.id))),
        len(data[SPLIT]),
        steps.pop(),
        min(settings.images_a_step, len(data["train"])),
        asdict(settings),
        seed,
        supernet.space.name,
        data.key,
        supernet.digest(),
    )


def alone_settings(settings: TrainSettings) -> TrainSettings:
    """The same training for a space of one architecture: steps, images a step, augmentation and schedule stay.

    So do the micro-batches, each of which is one more batch of the same network: its norms see as many images.
    There is no other kernel size to transform.
    """
    return replace(settings, strategy="uniform", kernel_transforms=False)


def spread_over_macs(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """The smallest, the largest, and then one after the other whichever is farthest in log MACs from those before.

    All have the first precision, since training is in floating point. With the same generator a longer list
    begins with a shorter one. Raises ValueError for a count out of range, or a space of fewer than three networks.
    """
    if not FEWEST <= count <= CANDIDATES:
        raise ValueError(f"networks = {count}; expected {FEWEST} to {CANDIDATES}")
    drawn = [unquantized(space, architecture) for architecture in sample_spread(space, CANDIDATES, rng)]
    pool = list(dict.fromkeys([space.smallest, space.largest, *drawn]))
    if len(pool) < FEWEST:
        raise ValueError(f"the space has {len(pool)} networks; expected {FEWEST} or more to compare")
    log_macs = np.log([space.lower(architecture).macs for architecture in pool])
    chosen = [0, 1]
    while len(chosen) < min(count, len(pool)):
        distances = np.abs(log_macs[:, None] - log_macs[chosen]).min(axis=1)
        distances[chosen] = -1.0
        chosen.append(int(np.argmax(distances)))
    return [pool[i] for i in chosen]


def _alone(
    space: SearchSpace, architecture: Architecture, data: Data, folder: Path, settings: TrainSettings, seed: int
) -> tuple[float, int]:
    """(accuracy, steps) of a network trained from scratch; from its result.json where that is of the same training."""
    path = folder / "result.json"
    key = {
        "space": space.name,
        "architecture": str(architecture),
        "data": data.key,
        "settings": asdict(settings),
        "seed": seed,
    }
    key = json.loads(json.dumps(key))  # as it reads back: lists for tuples
    held = _held(path)
    if held.get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        held = {"schema": 1, "key": key}
        write_json(path, held)
    if "accuracy" not in held:
        network = Supernet(space.only(architecture), seed=seed)
        train(network, data, seed=seed, folder=folder, settings=settings)
        found = load_checkpoint(folder / "supernet")
        assert found is not None, "training leaves a checkpoint"
        subnet = network.extract(network.space.smallest)
        weights = digest_of(subnet)
        held |= {"accuracy": _accuracy(subnet, data), "steps": found[1]["step"], "weights_sha256": weights}
        write_json(path, held)
    shutil.rmtree(folder / "supernet", ignore_errors=True)
    return float(held["accuracy"]), int(held["steps"])


def _held(path: Path) -> dict[str, Any]:
    """What was kept of a network; nothing where the file is missing or damaged, since it can be made again."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _accuracy(subnet: Subnet, data: Data) -> float:
    """On val_front, with norm statistics of the subnet's own."""
    device = next(subnet.parameters()).device
    recalibrate(subnet, [x.to(device) for x in calibration_images(data, subnet)])
    return accuracy(subnet, data, SPLIT)
