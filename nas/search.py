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
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from nas.candidates import Costs, devices_of
from nas.costs import (
    WITH_INTERVAL,
    Figure,
    Figures,
    Infeasible,
    Item,
    Limit,
    Objective,
    ProfiledDevice,
    UnknownFigure,
    check_objectives,
)
from nas.data import Data
from nas.evaluator import Evaluator, Score
from nas.front import Evaluation, ParetoFront, meets, nearest_message
from nas.guided_sampler import UNMEASURED, PredictorGuidedSampler, SpaceUsedUp
from nas.limits import reachable
from nas.progress import progress_bar
from nas.samplers import GUIDED, LIBRARY, SAMPLERS, guided_sampler
from nas.sampling import sample_spread
from nas.strategies import nested_set
from nas.study import Opened, Storage, fail_stale, is_of_one_machine, open_study, retry_failed, retry_running
from nas.supernet import Supernet
from search_spaces import Architecture, Network, SearchSpace
from search_spaces.space import Value

log = logging.getLogger(__name__)

UNPRUNED = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
BEGUN = "begun"  # attribute of a study that several processes share, once its queue is filled
SEEN = "images_seen"  # attribute of a trial that was not evaluated on the whole split
PATIENCE_S, POLL_S = 600.0, 0.1  # for trials of other processes
BEGIN_PATIENCE_S = 60.0  # for the process that made a study to fill its queue
NESTED = 8  # architectures of the nested family that every search starts from, in each precision


@dataclass(frozen=True)
class SearchSettings:
    """How a search runs.

    Args:
        trials: distinct architectures to evaluate.
        sampler: `guided` (PredictorGuidedSampler) or one of Optuna's: `nsga2`, `nsga3`, `tpe`, `gp`, `random`.
        population: of NSGA-II and NSGA-III; for the others, architectures spread over the space before any prediction.
        workers: processes of this machine that share the search.
        asynchronous: with `guided` and several workers, nobody waits for a generation to end; results then depend on
            who is faster. Without it they are those of one worker.
    """

    trials: int = 100
    sampler: str = GUIDED
    population: int = 24
    workers: int = 1
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r}; expected one of {', '.join(SAMPLERS)}")
        if self.trials < 2 or self.population < 2:
            raise ValueError(f"{self.trials} trials and a population of {self.population}; expected at least 2 of each")
        if self.workers < 1:
            raise ValueError(f"workers = {self.workers}; expected 1 or more")
        if self.asynchronous and self.sampler != GUIDED:
            raise ValueError(f"sampler {self.sampler} is always asynchronous; leave asynchronous out")


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
    if settings.workers > 1 and not isinstance(storage, str):
        raise ValueError(
            f"{settings.workers} workers share a study by its URL, such as sqlite:///study.db; got {storage!r}"
        )
    plan = _Plan(supernet.space, tuple(objectives), tuple(limits), named, settings, seed, storage)
    found = _Search(plan, evaluator)
    with plan.open(evaluator) as opened:
        study = opened.study
        if is_of_one_machine(storage):
            retry_running(study)
        found.sync(study)
        if plan.is_shared:
            found.begin(study, opened.is_new or is_of_one_machine(storage))
        if found.done:
            log.info("going on after %d architectures", len(found.done))
        done = min(len(found.done), settings.trials)
        bar = progress_bar(total=settings.trials, initial=done, desc="search", unit="arch")
        with bar, _workers(plan, evaluator):
            found.work(study, bar)
    return found.front()


def evaluation_of(architecture: Architecture, network: Network, figures: Figures) -> Evaluation:
    return Evaluation(architecture.id, str(architecture), dict(figures), network.precisions)


def nested_front(
    supernet: Supernet,
    data: Data,
    objectives: Sequence[Objective],
    limits: Sequence[Limit] = (),
    *,
    devices: Mapping[str, ProfiledDevice] | Iterable[ProfiledDevice] = (),
    seed: int = 0,
    evaluator: Evaluator | None = None,
) -> ParetoFront:
    """The front of the nested family alone, from the smallest to the largest: no search (SortedNet, arXiv 2309.00255).

    Arguments and errors as those of `search`, which evaluates the same architectures first.
    """
    check_objectives(objectives)
    costs = Costs(supernet.space, objectives, limits, devices_of([*objectives, *limits], devices))
    evaluator = evaluator or Evaluator(supernet, data)
    evaluations = []
    for architecture in _allowed(costs, [*costs.extremes(), *_nested(costs, seed)]):
        network = costs.space.lower(architecture)
        figures = costs.figures(network)
        if "accuracy" in costs.keys:
            score = evaluator.score(architecture, "val_search")
            figures["accuracy"] = Figure.share(score.accuracy, score.seen)
        evaluations.append(evaluation_of(architecture, network, figures))
    kept = [one for one in evaluations if meets(one, costs.limits)]
    if not evaluations:
        raise Infeasible(f"nested family: none of it meets {', '.join(map(str, costs.limits))}; search for others")
    if not kept:
        raise Infeasible("nested family: " + nearest_message(evaluations, costs.limits))
    return _front_of(kept, costs, evaluator)


def _nested(costs: Costs, seed: int) -> list[Architecture]:
    """The nested family in each precision."""
    nested = nested_set(costs.space, NESTED, np.random.default_rng(seed))
    return [costs.space.with_precision(one, precision) for precision in costs.precisions for one in nested]


def _allowed(costs: Costs, architectures: Sequence[Architecture]) -> list[Architecture]:
    """Those that no device and no limit refuses before they are run, made legal."""
    legal = list(dict.fromkeys(map(costs.legalize, architectures)))
    return [one for one, kept in zip(legal, costs.allowed(costs.space.encode(legal)), strict=True) if kept]


def _front_of(kept: Sequence[Evaluation], costs: Costs, evaluator: Evaluator) -> ParetoFront:
    return ParetoFront.of(
        kept, costs.objectives, limits=costs.limits, space=costs.space.name, supernet_sha256=evaluator.supernet_sha256
    )


@dataclass(frozen=True)
class _Plan:
    """All that a process needs to take part in a search, besides the evaluator."""

    space: SearchSpace
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    devices: Mapping[str, ProfiledDevice]
    settings: SearchSettings
    seed: int
    storage: Storage

    @property
    def costs(self) -> Costs:
        return Costs(self.space, self.objectives, self.limits, self.devices)

    @property
    def is_shared(self) -> bool:
        """Whether other processes may take part."""
        return self.settings.workers > 1 or not is_of_one_machine(self.storage)

    def open(self, evaluator: Evaluator) -> AbstractContextManager[Opened]:
        name = study_name(evaluator, self.objectives, self.limits, self.devices, self.settings, self.seed)
        return open_study(self.storage, name, self.objectives, shared=self.is_shared)


@contextmanager
def _workers(plan: _Plan, evaluator: Evaluator) -> Iterator[None]:
    """The other processes of this machine, at work as long as the search goes on."""
    count = plan.settings.workers
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_work, args=(plan, evaluator, i), daemon=True) for i in range(1, count)]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    for process in started:
        process.start()
    try:
        yield
        for process in started:
            process.join()
            if process.exitcode:
                log.warning("a worker ended with code %d; others did its share", process.exitcode)
    finally:
        torch.set_num_threads(threads)
        for process in started:
            process.kill()


def _work(plan: _Plan, evaluator: Evaluator, worker: int) -> None:
    """What one of the other processes does."""
    torch.set_num_threads(max(1, torch.get_num_threads() // plan.settings.workers))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with plan.open(evaluator) as opened:
        _Search(plan, evaluator, worker).work(opened.study)


class _Search:
    """One process of a search: what is known already, and what comes next.

    All that it knows is in the study, and no generator lives on, so that a search which was killed goes on as if
    nothing had happened, and several processes can share one.
    """

    def __init__(self, plan: _Plan, evaluator: Evaluator, worker: int = 0) -> None:
        self.costs, self.settings, self.seed = plan.costs, plan.settings, plan.seed
        self.evaluator, self.space, self.worker = evaluator, plan.space, worker
        self.done: dict[Architecture, Evaluation] = {}
        self.feasible: dict[Architecture, bool] = {}
        self.whole: dict[Architecture, int] = {}  # feasible and evaluated on the whole split: numbers of their trials
        self.read: set[int] = set()  # numbers of the trials that ended and are in the above
        self.steps = 0  # how many that are
        self.duplicate: Architecture | None = None  # what the last of them drew, when it was known already
        self.used_up = False
        reached = reachable(self.costs, self.seed)
        for each in reached.ranges if worker == 0 else ():
            log.info("%s", each)
        self.first = tuple(dict.fromkeys(self._first(reached.architecture)))

    def begin(self, study: optuna.Study, is_ours: bool) -> None:
        """Put all that is evaluated before the sampler chooses in the queue, or wait for the process that does so.

        Those that several processes put there one by one would come between the sampler's own, at random.
        """
        until = time.monotonic() + (0.0 if is_ours else BEGIN_PATIENCE_S)
        while BEGUN not in study.user_attrs:
            if time.monotonic() >= until:
                states = (TrialState.WAITING, TrialState.RUNNING)
                while (one := self._first_left(study.get_trials(deepcopy=False, states=states))) is not None:
                    study.enqueue_trial(self._params(one))
                study.set_user_attr(BEGUN, True)
            time.sleep(POLL_S)

    def work(self, study: optuna.Study, bar: Any = None) -> None:
        """Evaluate architectures until the study has as many as asked, by this process and others."""
        trials = self.settings.trials
        study.sampler = self._sampler()
        while True:
            self.sync(study)
            if bar is not None:
                bar.update(min(len(self.done), trials) - bar.n)
                bar.set_postfix(self._shown(), refresh=False)
            if len(self.done) >= trials or self.used_up:
                return
            held = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
            waiting = sum(trial.state == TrialState.WAITING for trial in held)
            if len(self.done) + len(held) - waiting >= trials:
                if not self._waited(study, {trial.number for trial in held if trial.state == TrialState.RUNNING}):
                    return
                continue
            if not waiting:
                planned = self._first_left(held)
                if planned is None and self.duplicate is not None:
                    planned = self._unknown_relative(self.duplicate)
                    if planned is None:
                        break
                if planned is not None:
                    study.enqueue_trial(self._params(planned))
            if self.settings.sampler != GUIDED:
                study.sampler = self._sampler()
            try:
                study.optimize(self._run, n_trials=1)
            except BaseException:  # what was interrupted is not lost to whoever goes on
                retry_failed(study)
                raise
        log.info("the space is used up after %d architectures", len(self.done))

    def _sampler(self) -> optuna.samplers.BaseSampler:
        settings = self.settings
        if settings.sampler == GUIDED:
            return guided_sampler(
                self.costs, seed=self.seed, startup=settings.population, asynchronous=settings.asynchronous
            )
        key = [self.seed, 10, self.steps, *([self.worker] if self.worker else [])]
        return LIBRARY[settings.sampler](int(np.random.default_rng(key).integers(2**32)), settings.population)

    def _waited(self, study: optuna.Study, running: set[int]) -> bool:
        """Wait for a trial of other processes to end, of those that were seen `running`; False when none did for long.

        They may have ended since they were seen: looked for anew, none would be there to be waited for.
        """
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            time.sleep(POLL_S)
            fail_stale(study)
            now = {t.number for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
            if running - now:
                return True
        log.warning("trials %s of other processes did not end in %d s; going on without them", running, PATIENCE_S)
        return False

    def _first_left(self, held: Sequence[FrozenTrial]) -> Architecture | None:
        """The next that is evaluated before the sampler chooses, and that nobody has begun."""
        begun = [trial.system_attrs.get("fixed_params", trial.params) for trial in held]
        left = (one for one in self.first if one not in self.done)
        return next((one for one in left if self._params(one) not in begun), None)

    def _first(self, feasible: Architecture) -> Iterator[Architecture]:
        """What is evaluated before the sampler chooses: the extremes, one within limits, nested ones and a spread.

        For the guided sampler, which spreads its own and knows the limits, only those that are within them.
        """
        ends = [*self.costs.extremes(), feasible, *_nested(self.costs, self.seed)]
        if self.settings.sampler == GUIDED:
            yield from _allowed(self.costs, ends)
            return
        yield from ends
        for architecture in sample_spread(self.space, self.settings.population, np.random.default_rng([self.seed, 5])):
            yield self.costs.legalize(architecture)

    def _params(self, architecture: Architecture) -> dict[str, Value]:
        options = self.costs.options.items()
        return {name: self.costs.legal_value(architecture, name) for name, legal in options if len(legal) > 1}

    def _run(self, trial: optuna.Trial) -> list[float]:
        """Evaluate the architecture of a trial; prunes it where that is known, or where enough are evaluated."""
        try:
            values = {
                name: trial.suggest_categorical(name, legal) if len(legal) > 1 else legal[0]
                for name, legal in self.costs.options.items()
            }
        except SpaceUsedUp:
            self.used_up = True
            raise
        architecture = self.space.build(values)  # type: ignore[arg-type]
        trial.set_user_attr("architecture", str(architecture))
        others = [t for t in trial.study.get_trials(deepcopy=False) if t.number != trial.number]
        if any(_holds(other, architecture) for other in others):
            # the sampler only learns from distinct architectures; the next trial is a relative that is not known
            trial.set_user_attr("duplicate_of", architecture.id)
            raise optuna.TrialPruned
        # one is enough of those that several processes began with the last place free
        if sum(t.number < trial.number and t.state in UNPRUNED for t in others) >= self.settings.trials:
            raise optuna.TrialPruned
        return self._evaluated(trial, architecture)

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

    def _evaluated(self, trial: optuna.Trial, architecture: Architecture) -> list[float]:
        network = self.space.lower(architecture)
        figures = self.costs.figures(network)
        violations = self.costs.violations(network, figures)
        if "accuracy" in self.costs.keys and max(violations.values(), default=0.0) <= 0:
            score = self.evaluator.score(architecture, "val_search", self._is_hopeless(trial, figures))
            figures["accuracy"] = Figure.share(score.accuracy, score.seen)
            violations = self.costs.violations(network, figures)
            if not score.is_whole:
                trial.set_user_attr(SEEN, score.seen)
        elif "accuracy" in self.costs.keys:
            trial.set_user_attr(UNMEASURED, True)
        for name, violation in violations.items():
            trial.set_constraint(name, violation)
        trial.set_user_attr("figures", {key: figure.to_dict() for key, figure in figures.items()})
        # What breaks a limit is not worth running. Optuna wants a value all the same: an accuracy of 0, which ranks
        # nothing, since constrained samplers compare such trials by their violations alone, and which is not kept.
        known = {"accuracy": 0.0} | {key: figure.value for key, figure in figures.items()}
        return [known[objective.key] for objective in self.costs.objectives]

    def _is_hopeless(self, trial: optuna.Trial, figures: Figures) -> Callable[[Score], bool]:
        """Whether a score so far leaves no way to meet the limits, or not to be dominated by what was evaluated.

        With generations, only what came before the trial's own counts, so that any number of processes agree.
        """
        before = trial.number
        if isinstance(trial.study.sampler, PredictorGuidedSampler) and not self.settings.asynchronous:
            before = trial.study.sampler.generation_start(trial.study, trial.number)
        objectives = self.costs.objectives
        others = [o for o in objectives if o.key != "accuracy"]
        bars = [limit.value for limit in self.costs.limits if limit.key == "accuracy" and limit.operator == ">="]
        if len(others) < len(objectives):
            known = {o.key: figures[o.key].value for o in others}
            bars += [
                self.done[one]["accuracy"]
                for one, number in self.whole.items()
                if number < before and all(o.cost(self.done[one][o.key]) <= o.cost(known[o.key]) for o in others)
            ]
        bar = max(bars, default=-math.inf)
        return lambda score: score.at_most < bar

    def sync(self, study: optuna.Study) -> None:
        """Take over the trials that ended since, of this process and of others."""
        for trial in study.get_trials(deepcopy=False):
            ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            if trial.number in self.read or not ended or "architecture" not in trial.user_attrs:
                continue
            self.read.add(trial.number)
            self.steps += 1
            architecture = self.space.parse(trial.user_attrs["architecture"])
            is_duplicate = "duplicate_of" in trial.user_attrs and architecture not in self.first
            self.duplicate = architecture if is_duplicate else None
            if trial.state == TrialState.COMPLETE:
                figures = {key: Figure(**value) for key, value in trial.user_attrs["figures"].items()}
                self.done[architecture] = evaluation_of(architecture, self.space.lower(architecture), figures)
                self.feasible[architecture] = max(trial.constraints.values(), default=0.0) <= 0
                if self.feasible[architecture] and SEEN not in trial.user_attrs:
                    self.whole[architecture] = trial.number

    def _shown(self) -> dict[str, str]:
        kept = [e for a, e in self.done.items() if self.feasible[a]]
        shown = {"feasible": str(len(kept))}
        if kept and "accuracy" in self.costs.keys:
            shown["best accuracy"] = f"{max(e['accuracy'] for e in kept):.1%}"
        return shown

    def front(self) -> ParetoFront:
        kept = [self.done[architecture] for architecture in self.whole]
        if not kept:
            raise Infeasible(nearest_message(list(self.done.values()), self.costs.limits))
        return _front_of(kept, self.costs, self.evaluator)


def _holds(trial: FrozenTrial, architecture: Architecture) -> bool:
    """Whether a trial, perhaps of another process, evaluates an architecture or has."""
    return trial.state in (TrialState.RUNNING, TrialState.COMPLETE) and trial.user_attrs.get("architecture") == str(
        architecture
    )
