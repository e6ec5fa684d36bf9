"""Multi-objective search over architecture and precision with Optuna, under hard limits.

Accuracy is real: each candidate is cut from the supernet, its norms recalibrated, quantized as its precisions
say, and run on val_search. What is cheap (MACs, bytes, memory, predicted latency) is computed first; a
candidate that breaks a limit already there is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.trial import TrialState
from sqlalchemy import event
from tqdm import tqdm

from hardware_profiles.machine import int8_weight_limit
from nas.costs import (
    Figure,
    Figures,
    Infeasible,
    Limit,
    Objective,
    ProfiledDevice,
    cheap_figures,
    check_devices,
)
from nas.data import Data
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.front import Evaluation, ParetoFront, nearest_message
from nas.quantize import Quantized, quantize
from nas.sampling import sample_spread
from nas.strategies import nested_set
from nas.supernet import Supernet
from search_spaces import PRECISIONS, Architecture, Network, SearchSpace
from search_spaces.space import Value

log = logging.getLogger(__name__)

ALWAYS = ("macs", "params", "model_bytes", "int8_macs_share")  # exact and free, so every evaluation has them
SAMPLERS: Mapping[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "nsga2": lambda seed, population: optuna.samplers.NSGAIISampler(seed=seed, population_size=population),
    "tpe": lambda seed, population: optuna.samplers.TPESampler(seed=seed, n_startup_trials=population),
    "random": lambda seed, population: optuna.samplers.RandomSampler(seed=seed),
}
WEIGHTED = ("conv2d", "linear")
NESTED = 8  # architectures of the nested family that every search starts from, in each precision
STALE = 50  # duplicates in a row after which a small space counts as used up


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs: distinct architectures to evaluate, sampler, and its population (or start-up trials)."""

    trials: int = 100
    sampler: str = "nsga2"
    population: int = 24

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"search.sampler = {self.sampler!r}; expected one of {', '.join(SAMPLERS)}")
        if self.trials < 2 or self.population < 2:
            raise ValueError("search.trials and search.population must be at least 2")


class Evaluator:
    """Accuracy of architectures as they would be deployed: recalibrated and quantized.

    `key` is a digest of all that an accuracy depends on besides the architecture: weights, data, calibration
    and the integer arithmetic.
    """

    def __init__(self, supernet: Supernet, data: Data, *, calibration: int = 256) -> None:
        self.supernet = supernet.eval()
        self.data = data
        self.weight_limit = int8_weight_limit()
        self._calibration = calibration
        self.supernet_sha256 = supernet.digest()
        parts = (supernet.space.name, self.supernet_sha256, data.key, calibration, self.weight_limit)
        self.key = hashlib.sha256(repr(parts).encode()).hexdigest()

    def deploy(self, architecture: Architecture) -> Quantized:
        """The subnet with its own norm statistics and ranges, folded and quantized."""
        subnet = self.supernet.extract(architecture)
        device = next(subnet.parameters()).device
        images = [x.to(device) for x in calibration_images(self.data, subnet)]
        images = list(torch.cat(images)[: self._calibration].split(128))
        return quantize(recalibrate(subnet, images), images, self.weight_limit)

    def accuracy(self, architecture: Architecture, split: str) -> float:
        return accuracy(self.deploy(architecture).simulated, self.data, split)


def study_name(
    evaluator: Evaluator,
    objectives: Sequence[Objective],
    limits: Sequence[Limit],
    devices: Mapping[str, ProfiledDevice],
    settings: SearchSettings,
    seed: int,
) -> str:
    """Names what the values depend on, so that a search of other weights, data or limits is another study."""
    named = {item.device for item in (*objectives, *limits)}
    parts = {
        "evaluator": evaluator.key,
        "objectives": [objective.key for objective in objectives],
        "limits": [str(limit) for limit in limits],
        "devices": {name: device.key for name, device in devices.items() if name in named},
        "sampler": [settings.sampler, settings.population, seed],
    }
    return "search-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def open_study(
    storage: str | None, name: str, objectives: Sequence[Objective], settings: SearchSettings, seed: int
) -> optuna.Study:
    """The study of this name in a storage (any Optuna URL; None is memory), made where it does not exist."""
    backend = None
    if storage is not None:
        backend = optuna.storages.RDBStorage(storage)
        if storage.startswith("sqlite"):
            # one fsync a suggested choice makes SQLite 20 times slower; a write-ahead log survives a killed process
            event.listen(backend.engine, "connect", _write_ahead)
            backend.engine.dispose()
    study = optuna.create_study(
        storage=backend,
        study_name=name,
        directions=[objective.direction for objective in objectives],
        load_if_exists=True,
    )
    # a search that goes on must not draw again what it drew at first
    study.sampler = SAMPLERS[settings.sampler](seed + len(study.get_trials(deepcopy=False)), settings.population)
    return study


def _write_ahead(connection: object, record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def search(
    supernet: Supernet,
    data: Data,
    objectives: Sequence[Objective],
    limits: Sequence[Limit] = (),
    *,
    devices: Mapping[str, ProfiledDevice] | Iterable[ProfiledDevice] = (),
    seed: int = 0,
    storage: str | None = None,
    settings: SearchSettings | None = None,
    evaluator: Evaluator | None = None,
    **options: object,
) -> ParetoFront:
    """Search the space of a supernet; returns the front of what was evaluated, by val_search and predictions.

    Args:
        supernet: trained.
        data: accuracy is that on its val_search split.
        objectives: one to three, such as `nas.maximize("accuracy")`, `nas.minimize("latency_ms", cpu)`.
        limits: hard; an architecture beyond one is not run when that can be seen before.
        devices: the profiled devices that objectives and limits name.
        seed: of the sampler and of the architectures it starts from.
        storage: any Optuna storage URL; a search found there goes on. None keeps the study in memory.
        settings: how; or give fields of `SearchSettings` as keywords.

    Raises Infeasible when no architecture found meets the limits, UnknownFigure for a device not profiled.
    """
    settings = settings or SearchSettings(**options)  # type: ignore[arg-type]
    devices = devices if isinstance(devices, Mapping) else {device.name: device for device in devices}
    if not 1 <= len(objectives) <= 3:
        raise ValueError(f"{len(objectives)} objectives; expected one to three")
    if len({objective.key for objective in objectives}) != len(objectives):
        raise ValueError("an objective is given twice")
    check_devices([item.key for item in (*objectives, *limits)], devices)
    run = _Search(evaluator or Evaluator(supernet, data), objectives, limits, devices, settings, seed)
    run.check_limits()
    return run.run(storage)


class _Search:
    """One search: the study, and what was already evaluated."""

    def __init__(
        self,
        evaluator: Evaluator,
        objectives: Sequence[Objective],
        limits: Sequence[Limit],
        devices: Mapping[str, ProfiledDevice],
        settings: SearchSettings,
        seed: int,
    ) -> None:
        self.evaluator, self.settings, self.seed = evaluator, settings, seed
        self.space: SearchSpace = evaluator.supernet.space
        self.objectives, self.limits = tuple(objectives), tuple(limits)
        self.keys = tuple(dict.fromkeys([*(item.key for item in (*objectives, *limits)), *ALWAYS]))
        named = {key.partition("@")[2] for key in self.keys}
        self.devices = {name: device for name, device in devices.items() if name in named}
        self.options = self._legal_options()
        self.done: dict[Architecture, Evaluation] = {}
        self.feasible: dict[Architecture, bool] = {}

    # costs and limits ----------------------------------------------------------------------------------

    def _legal_options(self) -> dict[str, tuple[Value, ...]]:
        """The options of each choice; of a precision, those that every device has for convolutions and linear layers."""
        legal = {
            name
            for name in PRECISIONS
            if all(name in d.profile.precisions.get(kind, ()) for d in self.devices.values() for kind in WEIGHTED)
        }
        options = {
            choice.name: tuple(o for o in choice.options if choice.role != "precision" or o in legal)
            for choice in self.space.choices
        }
        lacking = [name for name, left in options.items() if not left]
        if lacking:
            offered = self.space.choice(lacking[0]).options
            raise Infeasible(
                f"no architecture is legal on {', '.join(self.devices)}: together they run {', '.join(legal) or 'nothing'}, "
                f"the space offers {', '.join(map(str, offered))}; change space.precisions or the devices"
            )
        return options

    def legalize(self, architecture: Architecture) -> Architecture:
        """The architecture with each precision that is not legal replaced by the first that is."""
        values = {n: v if v in self.options[n] else self.options[n][0] for n, v in architecture.values.items()}
        return self.space.build(values)

    def cheap(self, network: Network) -> dict[str, Figure]:
        return cheap_figures(network, self.keys, self.devices)

    def violations(self, network: Network, figures: Figures) -> dict[str, float]:
        """How far each limit is exceeded; 0 or less when met. A device must also have every layer's precision."""
        illegal = {name: len(d.profile.illegal_layers(network)) for name, d in self.devices.items()}
        found = {f"legal@{name}": float(count) for name, count in illegal.items()}
        for limit in self.limits:
            if limit.key in figures and not illegal.get(limit.device or ""):
                found[str(limit)] = limit.violation(figures[limit.key])
        return found

    def check_limits(self) -> None:
        """Raise Infeasible before anything is evaluated when no architecture tried meets the cheap limits.

        Tries a spread of random architectures and descends from the nearest of them; a limit on accuracy is
        not cheap and is judged at the end.
        """
        spread = sample_spread(self.space, 64, np.random.default_rng([self.seed, 6]))
        starts = [self.legalize(a) for a in (self.space.smallest, self.space.largest, *spread)]
        nearest = min(starts, key=self._total_violation)
        while (least := self._total_violation(nearest)) > 0:
            best = min(map(self.legalize, self.space.neighbours(nearest)), key=self._total_violation)
            if self._total_violation(best) >= least:
                raise Infeasible(self._infeasible_message(nearest))
            nearest = best

    def _total_violation(self, architecture: Architecture) -> float:
        network = self.space.lower(architecture)
        return sum(max(0.0, v) for v in self.violations(network, self.cheap(network)).values())

    def _infeasible_message(self, nearest: Architecture) -> str:
        network = self.space.lower(nearest)
        for name, device in self.devices.items():
            illegal = device.profile.illegal_layers(network)
            if illegal:
                layer = network.by_name[illegal[0]]
                return (
                    f"no architecture is legal on {name}: it has no {layer.precision} {layer.kind} {layer.activation} "
                    f"(layer {layer.name}, and {len(illegal) - 1} more); change the space or the devices"
                )
        figures = self.cheap(network)
        limits = [limit for limit in self.limits if limit.key in figures]
        return nearest_message([self._evaluation(nearest, network, figures)], limits)

    def _evaluation(self, architecture: Architecture, network: Network, figures: Figures) -> Evaluation:
        return Evaluation(architecture.id, str(architecture), dict(figures), network.precisions)

    # the loop ------------------------------------------------------------------------------------------

    def run(self, storage: str | None) -> ParetoFront:
        name = study_name(self.evaluator, self.objectives, self.limits, self.devices, self.settings, self.seed)
        study = open_study(storage, name, self.objectives, self.settings, self.seed)
        self._recall(study)
        stale = 0
        with tqdm(total=self.settings.trials, initial=len(self.done), desc="search", unit="arch") as bar:
            while len(self.done) < self.settings.trials and stale < STALE:
                before = len(self.done)
                self._step(study)
                stale = 0 if len(self.done) > before else stale + 1
                bar.update(len(self.done) - before)
                bar.set_postfix(self._shown(), refresh=False)
        if stale >= STALE:
            log.info("the space seems used up after %d architectures", len(self.done))
        return self.front()

    def _first(self) -> Iterator[Architecture]:
        """What is evaluated before the sampler chooses: the extremes, the nested family and a spread."""
        precisions = dict.fromkeys(o for c in self.space.choices if c.role == "precision" for o in self.options[c.name])
        nested = nested_set(self.space, NESTED, np.random.default_rng(self.seed))
        for precision in precisions or ("",):
            for architecture in dict.fromkeys([self.space.smallest, self.space.largest, *nested]):
                yield self.space.with_precision(architecture, str(precision))
        for architecture in sample_spread(
            self.space, self.settings.population, np.random.default_rng([self.seed, 5])
        ):
            yield self.legalize(architecture)

    def _params(self, architecture: Architecture) -> dict[str, Value]:
        return {name: architecture[name] for name, options in self.options.items() if len(options) > 1}

    def _step(self, study: optuna.Study) -> None:
        """Ask for a trial; evaluate it unless its architecture is known."""
        trial = study.ask()
        values = {
            name: trial.suggest_categorical(name, options) if len(options) > 1 else options[0]
            for name, options in self.options.items()
        }
        architecture = self.space.build(values)
        if architecture in self.done:
            # the sampler only learns from distinct architectures; the next trial is a relative that is not known
            trial.set_user_attr("duplicate_of", architecture.id)
            study.tell(trial, state=TrialState.PRUNED)
            fresh = self._unknown_relative(architecture, trial.number)
            if fresh is not None:
                study.enqueue_trial(self._params(fresh))
            return
        self._evaluate(study, trial, architecture)

    def _unknown_relative(self, architecture: Architecture, number: int) -> Architecture | None:
        rng = np.random.default_rng([self.seed, 7, number])
        for rate in np.linspace(0.02, 0.5, 20):
            relative = self.legalize(self.space.mutate(architecture, rng, rate=float(rate)))
            if relative not in self.done:
                return relative
        return None

    def _evaluate(self, study: optuna.Study, trial: optuna.Trial, architecture: Architecture) -> None:
        network = self.space.lower(architecture)
        figures = self.cheap(network)
        violations = self.violations(network, figures)
        runs = max(violations.values(), default=0.0) <= 0
        if "accuracy" in self.keys:
            # what breaks a limit is not worth running: its accuracy is unknown, and told to Optuna as the worst,
            # which ranks nothing, since constrained samplers compare such trials by their violations alone
            figures["accuracy"] = Figure.exact(self.evaluator.accuracy(architecture, "val_search") if runs else 0.0)
            violations |= self.violations(network, figures)
        for name, violation in violations.items():
            trial.set_constraint(name, violation)
        trial.set_user_attr("architecture", str(architecture))
        trial.set_user_attr("evaluated", runs)
        trial.set_user_attr("figures", {key: figure.to_dict() for key, figure in figures.items()})
        study.tell(trial, [figures[objective.key].value for objective in self.objectives])
        self._remember(architecture, figures, feasible=max(violations.values(), default=0.0) <= 0)

    def _remember(self, architecture: Architecture, figures: Figures, feasible: bool) -> None:
        network = self.space.lower(architecture)
        self.done[architecture] = self._evaluation(architecture, network, figures)
        self.feasible[architecture] = feasible

    def _recall(self, study: optuna.Study) -> None:
        """Take over what an earlier run of the same search evaluated, and queue what must come first and has not."""
        waiting = set()
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.COMPLETE:
                figures = {key: Figure(**value) for key, value in trial.user_attrs["figures"].items()}
                feasible = max(trial.constraints.values(), default=0.0) <= 0
                self._remember(self.space.parse(trial.user_attrs["architecture"]), figures, feasible)
            elif trial.state == TrialState.WAITING:
                waiting.add(self.space.build(trial.system_attrs["fixed_params"]))
            elif trial.state == TrialState.RUNNING:  # of a process that was killed
                study.tell(trial.number, state=TrialState.FAIL)
        if self.done:
            log.info("going on after %d architectures", len(self.done))
        for architecture in dict.fromkeys(self._first()):
            if architecture not in self.done and architecture not in waiting:
                study.enqueue_trial(self._params(architecture))

    def _shown(self) -> dict[str, str]:
        kept = [e for a, e in self.done.items() if self.feasible[a]]
        shown = {"feasible": str(len(kept))}
        if kept and "accuracy" in self.keys:
            shown["best accuracy"] = f"{max(e['accuracy'] for e in kept):.1%}"
        return shown

    def front(self) -> ParetoFront:
        kept = [evaluation for a, evaluation in self.done.items() if self.feasible[a]]
        if not kept:
            raise Infeasible(nearest_message(list(self.done.values()), self.limits))
        return ParetoFront.of(
            kept,
            self.objectives,
            limits=self.limits,
            space=self.space.name,
            supernet_sha256=self.evaluator.supernet_sha256,
        )


def storage_url(folder: Path) -> str:
    """SQLite in a run directory."""
    return f"sqlite:///{folder / 'study.db'}"

