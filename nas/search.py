"""Multi-objective search over architecture and precision with Optuna, under hard limits.

Accuracy is real: each candidate is cut from the supernet, its norms recalibrated, quantized as its precisions
say, and run on val_search. What is cheap (MACs, bytes, memory, predicted latency) is computed first; a
candidate that breaks a limit already there is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from hardware_profiles.machine import int8_weight_limit
from nas.costs import (
    ALWAYS,
    WITH_INTERVAL,
    Figure,
    Figures,
    Infeasible,
    Item,
    Limit,
    Objective,
    ProfiledDevice,
    UnknownFigure,
    cheap_figures,
    check_devices,
    check_objectives,
)
from nas.data import Data
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.figure_table import FigureTable
from nas.front import Evaluation, ParetoFront, nearest_message
from nas.limits import reachable
from nas.progress import progress_bar
from nas.quantize import Quantized, quantize
from nas.sampling import sample_spread
from nas.strategies import nested_set
from nas.supernet import Supernet
from search_spaces import PRECISIONS, Architecture, Network, SearchSpace
from search_spaces.space import Value

log = logging.getLogger(__name__)

WEIGHTED = ("conv2d", "linear")
NESTED = 8  # architectures of the nested family that every search starts from, in each precision
JOURNAL = "journal://"


class _Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II with parents in the order of their trials, whether they were just selected or read back."""

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


SAMPLERS: Mapping[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "nsga2": lambda seed, population: _Nsga2(seed=seed, population_size=population),
    "tpe": lambda seed, population: optuna.samplers.TPESampler(seed=seed, n_startup_trials=population),
    "random": lambda seed, population: optuna.samplers.RandomSampler(seed=seed),
}


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs: distinct architectures to evaluate, sampler, and its population (or start-up trials)."""

    trials: int = 100
    sampler: str = "nsga2"
    population: int = 24

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r}; expected one of {', '.join(SAMPLERS)}")
        if self.trials < 2 or self.population < 2:
            raise ValueError(f"{self.trials} trials and a population of {self.population}; expected at least 2 of each")


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
        some = torch.cat(images)[: self._calibration]
        images = list(some.tensor_split(-(-len(some) // 128)))  # even: a norm takes no batch of one image
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
    items: list[Item] = [*objectives, *limits]
    named = {item.device for item in items}
    parts = {
        "evaluator": evaluator.key,
        "objectives": [(objective.key, objective.direction) for objective in objectives],
        "limits": [str(limit) for limit in limits],
        "devices": {name: device.key for name, device in devices.items() if name in named},
        "sampler": [settings.sampler, settings.population, seed],
    }
    return "search-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def storage_url(folder: Path) -> str:
    """SQLite in a run directory."""
    return f"sqlite:///{folder / 'study.db'}"


Storage = str | optuna.storages.BaseStorage | None


@contextmanager
def open_study(storage: Storage, name: str, objectives: Sequence[Objective]) -> Iterator[optuna.Study]:
    """The study of this name in a storage, made where it does not exist; database connections are closed at the end.

    Args:
        storage: any database URL that Optuna takes, `journal://FILE` for its append-only file, a storage object,
            or None for memory.

    Raises ValueError for a storage that cannot be opened.
    """
    database = None
    try:
        if isinstance(storage, str) and storage.startswith(JOURNAL):
            storage = optuna.storages.JournalStorage(JournalFileBackend(storage.removeprefix(JOURNAL)))
        elif isinstance(storage, str):
            storage = database = optuna.storages.RDBStorage(storage)
            if database.engine.name == "sqlite":
                # one fsync a suggested choice makes SQLite 20 times slower; a write-ahead log survives a killed process
                event.listen(database.engine, "connect", _write_ahead)
                database.engine.dispose()
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[objective.direction for objective in objectives],
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise ValueError(
            f"cannot open the study storage: {str(error).splitlines()[0]}; "
            f"expected a database URL such as sqlite:///study.db, or {JOURNAL}FILE"
        ) from None
    try:
        yield study
    finally:
        if database is not None:
            database.remove_session()
            database.engine.dispose()


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
    storage: Storage = None,
    settings: SearchSettings | None = None,
    evaluator: Evaluator | None = None,
    **options: object,
) -> ParetoFront:
    """Search the space of a supernet; returns the front of what was evaluated, by val_search and predictions.

    A device that an objective or a limit names must be able to run an architecture: it must have every layer's
    precision, and its own SRAM and flash, where its profile states them, are limits like those that are given.

    Args:
        supernet: trained.
        data: accuracy is that on its val_search split.
        objectives: one to four, such as `nas.maximize("accuracy")`, `nas.minimize("latency_ms", cpu)`.
        limits: hard; an architecture beyond one is not run when that can be seen before.
        devices: the profiled devices that objectives and limits name by a text; those given to
            `nas.minimize` and its like as devices need not be repeated.
        seed: of the sampler and of the architectures it starts from. A search that was interrupted and goes on
            in its storage ends like one that was not.
        storage: a database URL of Optuna, `journal://FILE`, or a storage object; a search found there goes on.
            None keeps the study in memory. One process at a time may search in a study.
        settings: how; or give fields of `SearchSettings` as keywords, such as `trials=200`.

    Raises Infeasible when no architecture found meets the limits, UnknownFigure for a figure that a device does
    not have, ValueError for objectives, settings or a storage that cannot be used.
    """
    if settings is not None and options:
        raise ValueError(f"give either settings or {', '.join(options)}, not both")
    settings = settings or SearchSettings(**options)  # type: ignore[arg-type]
    items: list[Item] = [*objectives, *limits]
    named = devices_of(items, devices)
    check_objectives(objectives)
    for item in items:
        if item.name in WITH_INTERVAL and not named[str(item.device)].has_latency:
            raise UnknownFigure(f"{item.key}: the device is not profiled yet; use nas.profile(space, device)")
    evaluator = evaluator or Evaluator(supernet, data)
    costs = Costs(supernet.space, objectives, limits, named)
    return _Search(evaluator, costs, settings, seed).run(storage, limits)


def devices_of(
    items: Sequence[Item], devices: Mapping[str, ProfiledDevice] | Iterable[ProfiledDevice]
) -> dict[str, ProfiledDevice]:
    """The devices that objectives and limits name, by name: those that they carry, and those among `devices`.

    Raises UnknownFigure for a figure that its device does not have, ValueError for two devices of one name.
    """
    known = {device.name: device for device in (devices.values() if isinstance(devices, Mapping) else devices)}
    for item in items:
        if item.profiled is not None:
            held = known.setdefault(item.profiled.name, item.profiled)
            if held.key != item.profiled.key:
                raise ValueError(f"{item.key}: two different devices are called {item.device!r}; rename one profile")
    check_devices(items, known)
    named = {item.device for item in items}
    return {name: device for name, device in known.items() if name in named}


class Costs:
    """What architectures cost without being run, and which of them the limits and the devices allow.

    Args:
        devices: those that objectives and limits name.

    Raises Infeasible when the devices have no precision of the space in common.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        limits: Sequence[Limit],
        devices: Mapping[str, ProfiledDevice],
    ) -> None:
        self.space, self.objectives, self.devices = space, tuple(objectives), dict(devices)
        own = [limit for device in devices.values() for limit in device.memory_limits]
        self.limits = tuple(dict.fromkeys([*limits, *own]))
        items: list[Item] = [*self.objectives, *self.limits]
        self.keys = tuple(dict.fromkeys([*(item.key for item in items), *ALWAYS]))
        self.options = self._legal_options()
        genes = [choice.name for choice in space.choices if choice.role == "precision"]
        self.precisions = tuple(dict.fromkeys(str(o) for name in genes for o in self.options[name])) or ("",)

    def _legal_options(self) -> dict[str, tuple[Value, ...]]:
        """The options of each choice: precisions that every device has for all layers with weights, and more than one
        patch only where every device can run patches."""
        legal = {
            name
            for name in PRECISIONS
            if all(name in d.profile.precisions.get(kind, ()) for d in self.devices.values() for kind in WEIGHTED)
        }
        whole = [name for name, device in self.devices.items() if not device.profile.patches]
        options = {
            choice.name: tuple(
                o
                for o in choice.options
                if (choice.role != "precision" or o in legal) and (choice.role != "patches" or o == 1 or not whole)
            )
            for choice in self.space.choices
        }
        lacking = [name for name, left in options.items() if not left]
        if lacking:
            offered = self.space.choice(lacking[0]).options
            if self.space.choice(lacking[0]).role == "patches":
                raise Infeasible(
                    f"no architecture is legal on {', '.join(whole)}, which runs no layers patch by patch: the space "
                    f"offers {', '.join(map(str, offered))} patches a side; add 1 to space.patches"
                )
            raise Infeasible(
                f"no architecture is legal on {', '.join(self.devices)}: "
                f"together they run {', '.join(sorted(legal)) or 'nothing'}, "
                f"the space offers {', '.join(map(str, offered))}; change space.precisions or the devices"
            )
        return options

    def legalize(self, architecture: Architecture) -> Architecture:
        """The architecture with each precision that is not legal replaced by the first that is."""
        return self.space.build({name: self.legal_value(architecture, name) for name in self.options})

    def legal_value(self, architecture: Architecture, name: str) -> Value:
        value, options = architecture[name], self.options[name]
        return value if value in options else options[0]

    def figures(self, network: Network) -> dict[str, Figure]:
        """All figures but accuracy; infinite on a device that cannot run the network."""
        return cheap_figures(network, self.keys, self.devices)

    def violations(self, network: Network, figures: Figures) -> dict[str, float]:
        """How far each limit is exceeded; 0 or less when met. Figures that are not known yet are not judged.

        The layers that a device cannot run count as `legal@DEVICE`, in place of its limits.
        """
        found = {}
        for name, device in self.devices.items():
            infinite = [k for k, f in figures.items() if k.partition("@")[2] == name and math.isinf(f.value)]
            found[f"legal@{name}"] = float(max(len(device.profile.illegal_layers(network)), len(infinite)))
        for limit in self.limits:
            if limit.key in figures and not found.get(f"legal@{limit.device}"):
                found[str(limit)] = limit.violation(figures[limit.key])
        return found

    @cached_property
    def table(self) -> FigureTable:
        return FigureTable(self.space, self.keys, self.devices)

    def of_codes(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """All figures but accuracy of n architectures (n, number of choices), by key, each (n,).

        For a limit at a confidence, under its text, the end of the interval that it is compared with. Equal to
        `figures` of each network; infinite on a device that cannot run it.
        """
        found = self.table.figures(codes)
        ends = {str(limit): found[limit.key].judged_by(limit) for limit in self.limits if limit.confidence is not None}
        return {key: estimates.value for key, estimates in found.items()} | ends

    def allowed(self, codes: np.ndarray) -> np.ndarray:
        """Which of n architectures (n, number of choices) all devices run and no limit refuses before they are run.

        Architectures are only lowered where bounds leave that open. Limits on what a simulator says are not judged.
        """
        return self.table.violation(codes, self.limits, most=0.0) <= 0

    def extremes(self) -> list[Architecture]:
        """The smallest and the largest architecture in each legal precision."""
        return [
            self.space.with_precision(end, p)
            for end in (self.space.smallest, self.space.largest)
            for p in self.precisions
        ]


def evaluation_of(architecture: Architecture, network: Network, figures: Figures) -> Evaluation:
    return Evaluation(architecture.id, str(architecture), dict(figures), network.precisions)


class _Search:
    """One search: what was already evaluated, and what comes next.

    The architecture of a step depends on the steps before it alone, and on no generator that lives on, so that a
    search which was killed goes on as if nothing had happened.
    """

    def __init__(self, evaluator: Evaluator, costs: Costs, settings: SearchSettings, seed: int) -> None:
        self.evaluator, self.costs, self.settings, self.seed = evaluator, costs, settings, seed
        self.space: SearchSpace = costs.space
        self.done: dict[Architecture, Evaluation] = {}
        self.feasible: dict[Architecture, bool] = {}
        self.steps = 0  # trials that came to an end
        self.duplicate: Architecture | None = None  # what the last step drew, when it was known already

    def run(self, storage: Storage, limits: Sequence[Limit]) -> ParetoFront:
        costs = self.costs
        reached = reachable(costs, self.seed)
        for each in reached.ranges:
            log.info("%s", each)
        first = list(dict.fromkeys(self._first(reached.architecture)))
        name = study_name(self.evaluator, costs.objectives, limits, costs.devices, self.settings, self.seed)
        trials = self.settings.trials
        with open_study(storage, name, costs.objectives) as study:
            waiting = self._recall(study)
            with progress_bar(total=trials, initial=min(len(self.done), trials), desc="search", unit="arch") as bar:
                while len(self.done) < trials:
                    planned = next((a for a in first if a not in self.done), None)
                    if planned is None and self.duplicate is not None:
                        planned = self._unknown_relative(self.duplicate)
                        if planned is None:
                            log.info("the space is used up after %d architectures", len(self.done))
                            break
                    if planned is not None and not waiting:
                        study.enqueue_trial(self._params(planned))
                    waiting = False
                    before = len(self.done)
                    self._step(study)
                    bar.update(len(self.done) - before)
                    bar.set_postfix(self._shown(), refresh=False)
        return self.front()

    def _first(self, feasible: Architecture) -> Iterator[Architecture]:
        """What is evaluated before the sampler chooses: the extremes, one within limits, nested ones and a spread."""
        yield from self.costs.extremes()
        yield feasible
        nested = nested_set(self.space, NESTED, np.random.default_rng(self.seed))
        for precision in self.costs.precisions:
            yield from (self.space.with_precision(architecture, precision) for architecture in nested)
        for architecture in sample_spread(self.space, self.settings.population, np.random.default_rng([self.seed, 5])):
            yield self.costs.legalize(architecture)

    def _params(self, architecture: Architecture) -> dict[str, Value]:
        options = self.costs.options.items()
        return {name: self.costs.legal_value(architecture, name) for name, legal in options if len(legal) > 1}

    def _step(self, study: optuna.Study) -> None:
        """Ask for a trial; evaluate it unless its architecture is known."""
        fresh_seed = int(np.random.default_rng([self.seed, 10, self.steps]).integers(2**32))
        study.sampler = SAMPLERS[self.settings.sampler](fresh_seed, self.settings.population)
        trial = study.ask()
        values = {
            name: trial.suggest_categorical(name, legal) if len(legal) > 1 else legal[0]
            for name, legal in self.costs.options.items()
        }
        architecture = self.space.build(values)  # type: ignore[arg-type]
        trial.set_user_attr("architecture", str(architecture))
        if architecture in self.done:
            # the sampler only learns from distinct architectures; the next trial is a relative that is not known
            trial.set_user_attr("duplicate_of", architecture.id)
            study.tell(trial, state=TrialState.PRUNED)
            self.duplicate = architecture
        else:
            self._evaluate(study, trial, architecture)
            self.duplicate = None
        self.steps += 1

    def _unknown_relative(self, architecture: Architecture) -> Architecture | None:
        """The nearest architecture not evaluated yet, by changes of one choice; None when there is none left."""
        rng = np.random.default_rng([self.seed, 7, self.steps])
        seen, queue = {architecture}, deque([architecture])
        while queue:
            relatives = [self.costs.legalize(a) for a in self.space.neighbours(queue.popleft())]
            for i in rng.permutation(len(relatives)):
                relative = relatives[int(i)]
                if relative not in self.done:
                    return relative
                if relative not in seen:
                    seen.add(relative)
                    queue.append(relative)
        return None

    def _evaluate(self, study: optuna.Study, trial: optuna.Trial, architecture: Architecture) -> None:
        network = self.space.lower(architecture)
        figures = self.costs.figures(network)
        violations = self.costs.violations(network, figures)
        runs = max(violations.values(), default=0.0) <= 0
        if "accuracy" in self.costs.keys and runs:
            share = self.evaluator.accuracy(architecture, "val_search")
            figures["accuracy"] = Figure.share(share, len(self.evaluator.data["val_search"]))
            violations = self.costs.violations(network, figures)
        for name, violation in violations.items():
            trial.set_constraint(name, violation)
        trial.set_user_attr("figures", {key: figure.to_dict() for key, figure in figures.items()})
        # What breaks a limit is not worth running. Optuna wants a value all the same: an accuracy of 0, which ranks
        # nothing, since constrained samplers compare such trials by their violations alone, and which is not kept.
        known = {"accuracy": 0.0} | {key: figure.value for key, figure in figures.items()}
        study.tell(trial, [known[objective.key] for objective in self.costs.objectives])
        self._remember(architecture, figures, max(violations.values(), default=0.0) <= 0)

    def _remember(self, architecture: Architecture, figures: Figures, feasible: bool) -> None:
        self.done[architecture] = evaluation_of(architecture, self.space.lower(architecture), figures)
        self.feasible[architecture] = feasible

    def _recall(self, study: optuna.Study) -> bool:
        """Take over what an earlier run of the same search did; returns whether its next trial waits in the study."""
        waiting = False
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.WAITING:
                waiting = True
            elif trial.state == TrialState.RUNNING:  # of a process that was killed
                study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                architecture = self.space.parse(trial.user_attrs["architecture"])
                self.steps += 1
                self.duplicate = architecture if trial.state == TrialState.PRUNED else None
                if trial.state == TrialState.COMPLETE:
                    figures = {key: Figure(**value) for key, value in trial.user_attrs["figures"].items()}
                    self._remember(architecture, figures, max(trial.constraints.values(), default=0.0) <= 0)
        if self.done:
            log.info("going on after %d architectures", len(self.done))
        return waiting

    def _shown(self) -> dict[str, str]:
        kept = [e for a, e in self.done.items() if self.feasible[a]]
        shown = {"feasible": str(len(kept))}
        if kept and "accuracy" in self.costs.keys:
            shown["best accuracy"] = f"{max(e['accuracy'] for e in kept):.1%}"
        return shown

    def front(self) -> ParetoFront:
        kept = [evaluation for a, evaluation in self.done.items() if self.feasible[a]]
        if not kept:
            raise Infeasible(nearest_message(list(self.done.values()), self.costs.limits))
        return ParetoFront.of(
            kept,
            self.costs.objectives,
            limits=self.costs.limits,
            space=self.space.name,
            supernet_sha256=self.evaluator.supernet_sha256,
        )
