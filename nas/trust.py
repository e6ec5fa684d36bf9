"""Whether inherited accuracy can be trusted: some networks of a supernet, each trained alone for the same budget.

A search picks by the accuracy that a network inherits from the supernet. What counts is how the network compares
with others when each is trained alone. `trust` trains a handful alone and says how well the two orders agree and
whether they agree better than the order of MACs, which needs no supernet; what picking by inherited accuracy costs,
and what it costs to search nothing and take the largest network that fits (as SortedNet does, arXiv 2309.00255).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.files import read_json, write_json
from nas.data import Data
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.ranking import (
    ROUNDING,
    Correlation,
    Pick,
    bootstrap,
    chance_tau,
    kendall_tau,
    noise_bound,
    picks,
    regrets,
    standard_error,
    tau_gain,
)
from nas.sampling import sample_spread
from nas.supernet import Subnet, Supernet, digest_of
from nas.train import steps_of, train
from nas.train_settings import TrainSettings
from nas.versions import versions
from predictors.regression import spearman_rho
from search_spaces import Architecture, SearchSpace
from search_spaces.space import DEPLOYMENT_ROLES

log = logging.getLogger(__name__)

FEWEST, CANDIDATES = 3, 64
LISTED = 1000  # networks, up to which a space is listed where random ones are too few
SPLIT = "val_front"


# the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedNetwork:
    """One network with the accuracy it inherits and the one it reaches alone, both in 0..1.

    training_macs: spent on training it alone. rollbacks: how often that collapsed and went on with a lower learning
    rate.
    """

    id: str
    architecture: str
    macs: int
    inherited: float
    alone: float
    training_macs: int
    rollbacks: int

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
        """Tau-b of inherited and stand-alone accuracy."""
        return self._bootstrap(kendall_tau, "inherited", "alone")

    @cached_property
    def spearman(self) -> Correlation:
        return self._bootstrap(spearman_rho, "inherited", "alone")

    @cached_property
    def kendall_macs(self) -> Correlation:
        """Tau-b of MACs and stand-alone accuracy: what an order that needs no supernet reaches."""
        return self._bootstrap(kendall_tau, "macs", "alone")

    @cached_property
    def kendall_gain(self) -> Correlation:
        """`kendall` minus `kendall_macs`, both of the same draws."""
        return self._bootstrap(tau_gain, "inherited", "macs", "alone")

    def _bootstrap(self, statistic: Callable[..., float | None], *columns: str) -> Correlation:
        rng = np.random.default_rng([self.seed, 8])
        return bootstrap(statistic, [self.column(name) for name in columns], rng)

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

    def is_real(self, a: int, b: int, comparisons: int = 1) -> bool:
        """Whether the networks a and b, trained alone, differ by more than 90 % of equals do on so many images.

        comparisons: among how many pairs this one was found to be the most different; see `nas.ranking.noise_bound`.
        """
        alone, error = self.column("alone"), self.error("alone")
        return bool(abs(alone[a] - alone[b]) > noise_bound(comparisons) * math.hypot(error[a], error[b]))

    def is_real_regret(self, pick: Pick) -> bool:
        """Whether the best within the budget is better than the picked one by more than the best of equals is.

        The best is the largest of several noisy accuracies, so the bound grows with the networks within the budget.
        """
        return self.is_real(pick.best, pick.picked, pick.comparisons)

    @property
    def noise_floor(self) -> float:
        """Standard error of a difference of two accuracies, averaged (root mean square) over the networks."""
        return float(np.sqrt(2 * np.mean(self.error("alone") ** 2)))

    @property
    def training_macs(self) -> int:
        """Spent on training alone, with what was spent again after a collapse."""
        return sum(network.training_macs for network in self.networks)

    @cached_property
    def findings(self) -> list[str]:
        """What may be claimed, and what may not."""
        found = [self._order_said(), self._pairs_said(), self._rules_said(), self._collapses_said(), ONE_TRAINING]
        return [said for said in found if said]

    def _order_said(self) -> str:
        count, tau, bound = len(self.networks), self.kendall.value, chance_tau(len(self.networks))
        if tau is None:
            return "No claim about the order: all inherited or all stand-alone accuracies are equal."
        if bound is None:
            return f"No claim about the order: {count} networks are too few; ask for more with --networks."
        chance = f"one random order of {count} networks in ten has a tau of {bound:.2f} or more, up or down"
        if tau >= bound - ROUNDING:
            said = f"Inherited accuracy orders the networks better than chance ({chance})."
        elif tau <= ROUNDING - bound:
            said = f"Inherited accuracy orders the networks worse than chance ({chance})."
        else:
            said = f"No claim about the order: {chance}; ask for more with --networks."
        return f"{said} {self._baseline_said()}"

    def _baseline_said(self) -> str:
        """Whether the order is better than that of MACs, which every space has and networks are spread over."""
        gain, alone = self.kendall_gain, self.kendall_macs.value
        if gain.value is None or gain.low is None or gain.high is None or alone is None:
            return "MACs do not order the networks: all have the same."
        told = f"tau of MACs {alone:.2f}, difference {gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        if gain.low > ROUNDING:
            return f"Inherited accuracy orders them better than their MACs do ({told})."
        if gain.high < -ROUNDING:
            return f"Inherited accuracy orders them worse than their MACs do, which need no supernet ({told})."
        return (
            f"No claim that inherited accuracy orders them better than their MACs do, which need no supernet ({told})."
        )

    def _pairs_said(self) -> str:
        inherited, alone = self.column("inherited"), self.column("alone")
        count = len(self.networks)
        pairs = [(a, b) for a in range(count) for b in range(a)]
        real = [(a, b) for a, b in pairs if self.is_real(a, b)]
        alike = sum((inherited[a] - inherited[b]) * (alone[a] - alone[b]) > 0 for a, b in real)
        return (
            f"{len(real)} of {len(pairs)} pairs of networks differ by more than noise when trained alone (of equals, "
            f"one in ten would); inherited accuracy orders {alike} of them the same way."
        )

    def _rules_said(self) -> str:
        alone = self.column("alone")
        real = {rule: sum(map(self.is_real_regret, found)) for rule, found in self.picks.items()}
        other = [
            alone[a.picked] - alone[b.picked]
            for a, b in zip(self.picks["inherited"], self.picks["largest"], strict=True)
            if self.is_real(a.picked, b.picked)
        ]
        better = sum(difference > 0 for difference in other)
        return (
            f"Of {len(self.picks['largest'])} budgets, the regret is more than noise at {real['inherited']} when "
            f"picking by inherited accuracy and at {real['largest']} when taking the largest (of equals, at one in "
            f"twenty at most); picking by inherited accuracy is better by more than noise at {better}, worse at "
            f"{len(other) - better}."
        )

    def _collapses_said(self) -> str:
        collapsed = [str(number) for number, network in enumerate(self.networks, start=1) if network.rollbacks]
        if not collapsed:
            return ""
        return (
            f"Trained alone, {', '.join(collapsed)} collapsed and went on with a lower learning rate: not the same "
            f"training as that of the others."
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
            "kendall_tau_b_macs": asdict(self.kendall_macs),
            "kendall_tau_b_gain": asdict(self.kendall_gain),
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
                "within": pick.within,
                "picked": self.networks[pick.picked].id,
                "best": self.networks[pick.best].id,
                "regret": float(value),
                "is_real": self.is_real_regret(pick),
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
            rollbacks = f"  rollbacks: {network.rollbacks}" if network.rollbacks else ""
            lines.append(f"{number:>2}  {network.id:10}  {network.macs / 1e6:8.4g}  {shown}{rollbacks}")
        gaps = 100 * self.column("gap")
        lines += [
            f"± is one standard error on {self.validation_images} images. Each network alone: {self.steps} steps of "
            f"{self.images_a_step} images; {self.training_macs:.3g} MACs of training in all.",
            "",
            f"rank correlation of inherited and stand-alone accuracy: {_told('Kendall tau-b', self.kendall)}, "
            f"{_told('Spearman rho', self.spearman)} (90 % bootstrap over networks)",
            f"rank correlation of MACs and stand-alone accuracy, which needs no supernet: "
            f"{_told('Kendall tau-b', self.kendall_macs)}",
            f"gap: mean {gaps.mean():+.2f} pp, from {gaps.min():+.2f} to {gaps.max():+.2f} pp",
        ]
        for rule, said in (("inherited", "picking by inherited accuracy"), ("largest", "taking the largest that fits")):
            values = 100 * self.regrets(rule)
            lines.append(f"regret of {said}: mean {values.mean():.2f} pp, max {values.max():.2f} pp")
        floor, count = 100 * self.noise_floor, len(self.networks)
        lines.append(
            f"noise floor: the s.e. of a difference is {floor:.2f} pp on average; {noise_bound() * floor:.2f} pp "
            f"between two, and {noise_bound(count - 1) * floor:.2f} pp from the best of {count} to another may be noise"
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
    compared = []
    for number, architecture in enumerate(chosen, start=1):
        macs = supernet.space.lower(architecture).macs
        log.info("network %d of %d: %s, %.4g MMACs", number, len(chosen), architecture.id, macs / 1e6)
        alone = _alone(supernet.space, architecture, data, folder / architecture.id, settings, seed)
        inherited = _accuracy(supernet.extract(architecture), data)
        compared.append(ComparedNetwork(architecture.id, str(architecture), macs, inherited, **alone))
    images = len(data["train"])
    return TrustReport(
        tuple(sorted(compared, key=lambda network: (network.macs, network.id))),
        len(data[SPLIT]),
        steps_of(settings, images)[1],
        min(settings.images_a_step, images),
        asdict(settings),
        seed,
        supernet.space.name,
        data.key,
        supernet.digest(),
    )


def alone_settings(settings: TrainSettings) -> TrainSettings:
    """The same training for a space of one architecture: steps, images a step and augmentation stay.

    So do the micro-batches, each of which is one more batch of the same network: its norms see as many images. The
    learning rate follows one cosine, as in all strategies but `progressive`, whose phases each have a lower one of
    their own. There is no other kernel size to transform.
    """
    return replace(settings, strategy="uniform", kernel_transforms=False)


def spread_over_macs(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """The smallest, the largest, and then one after the other whichever is farthest in log MACs from those before.

    All have the first precision, since training is in floating point; there are fewer than `count` only where the
    space has no more of these. With the same generator a longer list begins with a shorter one. Raises ValueError
    for a count out of range, or a space of fewer than three networks.
    """
    if not FEWEST <= count <= CANDIDATES:
        raise ValueError(f"networks = {count}; expected {FEWEST} to {CANDIDATES}")
    plain = space.restricted({c.name: c.options[:1] for c in space.choices if c.role in DEPLOYMENT_ROLES})
    drawn = sample_spread(plain, CANDIDATES, rng)
    if len(drawn) < CANDIDATES and plain.size <= LISTED:  # of a few networks, random ones miss some
        listed = list(plain.all())
        drawn += [listed[i] for i in rng.permutation(len(listed))]
    pool = list(dict.fromkeys([space.smallest, space.largest, *(space.build(one.values) for one in drawn)]))
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
) -> dict[str, Any]:
    """`alone`, `training_macs` and `rollbacks` of a network trained from scratch.

    They come from its result.json where that is of the same training.
    """
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
    if not {"accuracy", "macs", "rollbacks"} <= held.keys():
        network = Supernet(space.only(architecture), seed=seed)
        spent = train(network, data, seed=seed, folder=folder, settings=settings)
        subnet = network.extract(network.space.smallest)
        weights = digest_of(subnet)
        held |= {"accuracy": _accuracy(subnet, data), "weights_sha256": weights}
        held |= {name: int(spent[name]) for name in ("macs", "rollbacks")}
        write_json(path, held)
    shutil.rmtree(folder / "supernet", ignore_errors=True)
    return {"alone": held["accuracy"], "training_macs": held["macs"], "rollbacks": held["rollbacks"]}


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
