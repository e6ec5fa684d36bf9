"""An Optuna sampler that proposes what promises the most hypervolume, and nothing twice; for any study and storage.

Notation: n trials, d parameters; codes (n, d) are places among the options of each parameter.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.study import fail_stale
from predictors.proposals import Domain, Results, keys, propose
from predictors.surrogate import ordered_choices

log = logging.getLogger(__name__)

MOST_OPTIONS = 32  # of a number; one with more values is searched on so many of them
SHARE = 10  # a generation is at least one of so many parts of the trials before it
NOTICE_S = 30.0  # of waiting, after which a trial says what it waits for
QUEUE_PATIENCE_S = 2.0  # for a trial that waits in the queue while none that runs is waited for
CLAIM = "guided:claim"
UNMEASURED = "unmeasured"  # user attribute: the values of a trial stand for nothing
ENQUEUED, RETRIED = "fixed_params", "failed_trial"  # system attributes of Optuna

CodesFunction = Callable[[np.ndarray], np.ndarray]


class SpaceUsedUp(optuna.TrialPruned):
    """Everything that may be proposed was; the trial in hand is pruned, and `optimize` ends."""


@dataclass(frozen=True)
class Grid:
    """The parameters of a study as codes."""

    names: tuple[str, ...]
    options: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution]) -> Grid:
        return cls(tuple(space), tuple(map(options_of, space.values())))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.options))

    @property
    def ordered(self) -> tuple[bool, ...]:
        return ordered_choices(self.options)

    @property
    def alike(self) -> tuple[int, ...]:
        """A number for each parameter that those with the same options share."""
        return tuple(map([repr(options) for options in self.options].index, map(repr, self.options)))

    def code(self, params: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The codes of a trial, a number between two options being the nearer one; None where a parameter lacks."""
        if any(name not in params for name in self.names):
            return None
        return tuple(_nearest(options, params[name]) for name, options in zip(self.names, self.options, strict=True))

    def codes(self, trials: Iterable[FrozenTrial]) -> np.ndarray:
        """Of those trials that have all parameters, (n, d)."""
        found = [code for trial in trials if (code := self.code(_params(trial))) is not None]
        return np.array(found, np.int64).reshape(len(found), len(self.names))

    def params(self, codes: np.ndarray) -> dict[str, Any]:
        """Of one architecture, (d,)."""
        return {
            name: options[code] for name, options, code in zip(self.names, self.options, codes.tolist(), strict=True)
        }


def options_of(distribution: BaseDistribution) -> tuple[Any, ...]:
    """All values of a distribution, or `MOST_OPTIONS` of them, evenly spaced as it says; raises TypeError."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    if not isinstance(distribution, IntDistribution | FloatDistribution):
        raise TypeError(f"a parameter with {distribution!r}; expected a categorical, int or float distribution")
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and round((high - low) / step) < MOST_OPTIONS:
        values = low + step * np.arange(round((high - low) / step) + 1)
    else:
        space = np.geomspace if distribution.log else np.linspace
        values = space(low, high, MOST_OPTIONS)
        values = values if step is None else low + step * np.round((values - low) / step)
    kind = int if isinstance(distribution, IntDistribution) else float
    return tuple(dict.fromkeys(kind(min(max(value, low), high)) for value in values))


def _nearest(options: tuple[Any, ...], value: Any) -> int:
    for place, option in enumerate(options):
        if option == value and isinstance(option, bool) == isinstance(value, bool):
            return place
    return int(np.argmin([abs(option - value) for option in options]))


def _params(trial: FrozenTrial) -> Mapping[str, Any]:
    """What a trial has, or will have once it runs."""
    return {**trial.system_attrs.get(ENQUEUED, {}), **trial.params}


@dataclass(frozen=True)
class _History:
    """Trials that a generation rests on; `unfinished` ones were not waited for any longer."""

    finished: tuple[FrozenTrial, ...]
    unfinished: tuple[FrozenTrial, ...]


class PredictorGuidedSampler(optuna.samplers.BaseSampler):
    """Fits a Gaussian process to each objective and proposes what promises the most hypervolume.

    Made for 1 to 4 objectives of either direction; for categorical, int and float parameters (a number with more than
    32 values is searched on 32 of them); constraints set by `Trial.set_constraint`; enqueued, pruned and failed
    trials; any storage. Parameters that only some trials have are drawn at random, on their own; once all values of the
    others were proposed, these are drawn at random too. A trial with the user attribute `unmeasured` teaches nothing,
    but is not proposed again.

    **Nothing is proposed twice**: what any trial has had is not proposed again, be it pruned or failed (enqueue it
    again, or use Optuna's retry callbacks, to repeat it). When everything was proposed, the study stops and the trial
    in hand is pruned. A trial that is enqueued with some of the parameters gets the others at random.

    **Generations.** The first `startup` trials are spread over the space. Generations of `batch` trials follow, or of a
    tenth of the trials before, if that is more. Which generation a trial belongs to and which place it has there is
    decided by its rank among the trials that were not enqueued. What a generation proposes is a function of the seed
    and of the trials before the generation alone, so any number of workers with the same seed propose the same, and a
    study that was stopped goes on as if it had not been. For that the sampler waits for trials of earlier generations
    that still run, up to `patience_s`; after that it goes on without them, with a warning. A failed trial whose retry
    completes counts as that one; a retry that nobody takes is waited for two seconds. So tell the trials of a process
    that was killed that they failed, or use a storage with heartbeats.

    `asynchronous=True` never waits: it uses the results there are and believes running trials to turn out as
    predicted. Results then depend on timing, but still nothing is proposed twice: workers write what they take into
    the storage and look whether somebody else did.

    Args:
        seed: the same for all workers of a study.
        startup: trials before the first prediction.
        batch: the least size of a generation.
        search_space: the parameters. By default they are those of the trials so far, sorted by name, and the first
            trial of a study, which nothing is known before, is random.
        reference: the worst values that count, one an objective, nan where nobody knows.
        canonical: codes (n, d) -> codes of the same architectures, one for each architecture. Codes are places among
            the options of each parameter, in the order of `search_space`.
        allowed: canonical codes (n, d) -> (n,) bool: limits that are known without evaluating.
        exact: number of an objective -> its values (n,) for canonical codes (n, d): those known without evaluating.
        asynchronous: see above.
        patience_s: how long to wait for trials of earlier generations.
        poll_s: how often to look meanwhile.

    Raises ValueError for a number that is out of range, and for a reference of another length than the objectives.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        startup: int = 20,
        batch: int = 5,
        search_space: Mapping[str, BaseDistribution] | None = None,
        reference: Sequence[float] | None = None,
        canonical: CodesFunction | None = None,
        allowed: CodesFunction | None = None,
        exact: Mapping[int, CodesFunction] | None = None,
        asynchronous: bool = False,
        patience_s: float = 600.0,
        poll_s: float = 0.05,
    ) -> None:
        if startup < 2 or batch < 1 or seed < 0:
            raise ValueError(f"startup {startup}, batch {batch}, seed {seed}; expected at least 2, 1 and 0")
        self._seed, self._startup, self._batch = seed, startup, batch
        self._search_space = None if search_space is None else dict(search_space)
        self._reference = None if reference is None else tuple(reference)
        self._functions = {"canonical": canonical, "allowed": allowed}
        self._exact = dict(exact or {})
        self._asynchronous, self._patience_s, self._poll_s = asynchronous, patience_s, poll_s
        # what can be computed again at any time: parameters and proposals of one generation, or a queue of proposals
        self._space: tuple[object, dict[str, BaseDistribution]] = (None, {})
        self._proposed: tuple[object, np.ndarray] = (None, np.empty((0, 0)))

    def generation_start(self, study: Study, number: int) -> int:
        """The number of the first trial in the generation of a trial: its proposal rests on the trials before that.

        The first number for a trial that was enqueued before there was any other.
        """
        trials = study.get_trials(deepcopy=False)
        own = next(trial for trial in trials if trial.number == number)
        ranked = any(t.number <= _root(own) and not _is_enqueued(t) for t in trials)
        return self._place(trials, own)[0] if ranked else 0

    # Optuna's interface ------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._search_space is not None:
            return dict(self._search_space)
        trials = study.get_trials(deepcopy=False)
        if ENQUEUED in trial.system_attrs:
            return common_space(trials)
        start = len(trials) // self._batch if self._asynchronous else self._place(trials, trial)[1]
        key = (study._storage, study._study_id, start)
        if self._space[0] != key:
            known = trials if self._asynchronous else self._history(study, trial).finished
            self._space = key, common_space(known)
        return dict(self._space[1])

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        grid = Grid.of(search_space)
        domain = self._domain(grid, study.directions)
        if ENQUEUED in trial.system_attrs:
            codes = self._completion(study, trial, grid, domain)
        elif self._asynchronous:
            codes = self._claimed(study, trial, grid, domain)
        else:
            codes = self._in_place(study, trial, grid, domain)
        return grid.params(codes)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        seed = int(self._rng(trial.number, zlib.crc32(param_name.encode())).integers(2**32))
        return optuna.samplers.RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)

    # generations ---------------------------------------------------------------------------------------------

    def _generation(self, rank: int) -> tuple[int, int]:
        """Where the generation of a rank begins, and its size."""
        start, size = 0, 1 if self._search_space is None else self._startup
        while rank >= start + size:
            start += size
            size = self._startup - start if start < self._startup else self._size(start)
        return start, size

    def _size(self, before: int) -> int:
        return max(self._batch, before // SHARE)

    def _place(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> tuple[int, int, int]:
        """(number of the first trial of the generation, its rank, place in the generation)."""
        own = _root(trial)
        ranked = [t.number for t in trials if t.number <= own and not _is_enqueued(t)]
        rank = len(ranked) - 1
        start, _ = self._generation(rank)
        return ranked[start], start, rank - start

    def _history(self, study: Study, trial: FrozenTrial) -> _History:
        """What the generation of a trial rests on, once that is finished."""
        began = stirred = time.monotonic()
        said = False
        while True:
            trials = study.get_trials(deepcopy=False)
            first, _, _ = self._place(trials, trial)
            before = [t for t in trials if _root(t) < first]
            retried = {t.system_attrs["retry_history"][-1] for t in before if RETRIED in t.system_attrs}
            current = [t for t in before if t.number not in retried]
            unfinished = [t for t in current if not t.state.is_finished()]
            now = time.monotonic()
            if any(t.state == TrialState.RUNNING for t in unfinished):
                stirred = now
            waited_enough = now - began > self._patience_s or now - stirred > QUEUE_PATIENCE_S
            if not unfinished or waited_enough:
                if unfinished:
                    numbers = ", ".join(str(t.number) for t in unfinished)
                    log.warning("trial %d goes on without the results of trials %s", trial.number, numbers)
                return _History(
                    tuple(sorted((t for t in current if t.state.is_finished()), key=_root)), tuple(unfinished)
                )
            if not said and now - began > NOTICE_S:
                said = True
                self._tell_of_waiting(trial, unfinished)
            time.sleep(self._poll_s)
            fail_stale(study)

    def _tell_of_waiting(self, trial: FrozenTrial, unfinished: Sequence[FrozenTrial]) -> None:
        log.warning(
            "trial %d waits up to %.0f s for what trials %s find. If a process was killed in one of them, tell the "
            "study that it failed: study.tell(%d, state=optuna.trial.TrialState.FAIL); storages with heartbeats do so",
            trial.number,
            self._patience_s,
            ", ".join(str(each.number) for each in unfinished),
            unfinished[0].number,
        )

    def _in_place(self, study: Study, trial: FrozenTrial, grid: Grid, domain: Domain) -> np.ndarray:
        """The proposal at the trial's place in its generation; another one where a trial enqueued since has it."""
        trials = study.get_trials(deepcopy=False)
        first, start, place = self._place(trials, trial)
        key = (study._storage, study._study_id, start)
        if self._proposed[0] != key:
            history = self._history(study, trial)
            _, size = self._generation(start)
            proposed = self._propose(
                study, grid, domain, size, self._rng(start), history.finished, history.unfinished, frozenset()
            )
            self._proposed = key, proposed
        proposed = self._proposed[1]
        if place >= len(proposed):
            return self._repeated(study, trial, grid, domain)
        others = [t for t in trials if _root(t) > first and _is_enqueued(t) and _root(t) != _root(trial)]
        if proposed[place].tobytes() in self._keys(grid, domain, others):
            return self._claimed(study, trial, grid, domain, keys(proposed))
        return np.asarray(proposed[place])

    def _claimed(
        self, study: Study, trial: FrozenTrial, grid: Grid, domain: Domain, taken: Iterable[bytes] = ()
    ) -> np.ndarray:
        """A proposal from what is known now, that no other trial has, runs or claims."""
        taken = set(taken)
        while True:
            others = [t for t in study.get_trials(deepcopy=False) if _root(t) != _root(trial)]
            taken |= self._keys(grid, domain, others)
            codes = self._next(study, trial, grid, domain, others, taken)
            if codes is None:
                return self._repeated(study, trial, grid, domain)
            study._storage.set_trial_system_attr(trial._trial_id, CLAIM, codes.tolist())
            others = [t for t in study.get_trials(deepcopy=False) if _root(t) != _root(trial)]
            if codes.tobytes() not in self._keys(grid, domain, others):
                return codes

    def _next(
        self, study: Study, trial: FrozenTrial, grid: Grid, domain: Domain, others: Sequence[FrozenTrial],
        taken: set[bytes],
    ) -> np.ndarray | None:  # fmt: skip
        """The first in the queue that nobody has; a new queue where there is none; None where nothing is left."""
        owner = (study._storage, study._study_id, "queue")
        queue = self._proposed[1] if self._proposed[0] == owner else np.empty((0, len(grid.names)), np.int64)
        queue = queue[[row.tobytes() not in taken for row in queue]]
        if not len(queue):
            finished = [t for t in others if t.state.is_finished()]
            running = [t for t in others if t.state == TrialState.RUNNING]
            size = self._startup if len(others) < self._startup else self._size(len(others))
            queue = self._propose(study, grid, domain, size, self._rng(trial.number, 0), finished, running, taken)
        if not len(queue):
            return None
        self._proposed = owner, queue[1:]
        return np.ascontiguousarray(queue[0])

    def _completion(self, study: Study, trial: FrozenTrial, grid: Grid, domain: Domain) -> np.ndarray:
        """Random values beside those that were enqueued, new if possible."""
        drawn = domain.random(256, self._rng(trial.number))
        for column, (name, options) in enumerate(zip(grid.names, grid.options, strict=True)):
            if name in trial.system_attrs[ENQUEUED]:
                drawn[:, column] = _nearest(options, trial.system_attrs[ENQUEUED][name])
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        found = domain.new(drawn, self._keys(grid, domain, others))
        return np.asarray(found[0] if len(found) else domain.canonical(drawn[:1])[0])

    def _repeated(self, study: Study, trial: FrozenTrial, grid: Grid, domain: Domain) -> np.ndarray:
        """Values that trials had before, where some have other parameters besides; else the study stops."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        drawn = domain.new(domain.random(256, self._rng(trial.number)), frozenset())
        if not len(drawn) or not any(set(t.params) - set(grid.names) for t in others):
            self._stop(study, len(others))
        return np.asarray(drawn[0])

    def _stop(self, study: Study, count: int) -> None:
        log.info("nothing is left to propose after %d trials, that is new and allowed: the study stops", count)
        try:
            study.stop()
        except RuntimeError:
            log.debug("not in optimize: whoever asks learns it from the exception")
        raise SpaceUsedUp(f"nothing new that is allowed is left after {count} trials; nothing is proposed twice")

    # proposals -----------------------------------------------------------------------------------------------

    def _domain(self, grid: Grid, directions: Sequence[StudyDirection]) -> Domain:
        if self._reference is not None and len(self._reference) != len(directions):
            raise ValueError(f"a reference of {len(self._reference)} values for {len(directions)} objectives")
        exact = {
            index: _as_costs(_checked(f"exact[{index}]", values), directions[index])
            for index, values in self._exact.items()
        }
        given = {name: _checked(name, each) for name, each in self._functions.items() if each is not None}
        return Domain(grid.counts, grid.ordered, grid.alike, exact=exact, **given)

    def _propose(
        self, study: Study, grid: Grid, domain: Domain, count: int, rng: np.random.Generator,
        finished: Sequence[FrozenTrial], running: Sequence[FrozenTrial], taken: Iterable[bytes],
    ) -> np.ndarray:  # fmt: skip
        taken = frozenset(taken) | self._keys(grid, domain, [*finished, *running])
        results = results_of(finished, grid, domain, study.directions)
        if len(results.codes) < 2 or len(taken) < self._startup:
            return domain.first(count, taken, rng)
        signs = [_sign(direction) for direction in study.directions]
        reference = () if self._reference is None else np.multiply(signs, self._reference).tolist()
        believed = domain.canonical(grid.codes(running)) if running else None
        return propose(domain, results, count, rng, reference=reference, running=believed, taken=taken)

    def _keys(self, grid: Grid, domain: Domain, trials: Sequence[FrozenTrial]) -> frozenset[bytes]:
        """What trials have, will have or claim."""
        claims = [t.system_attrs[CLAIM] for t in trials if len(t.system_attrs.get(CLAIM, ())) == len(grid.names)]
        codes = np.concatenate([grid.codes(trials), np.array(claims, np.int64).reshape(-1, len(grid.names))])
        return frozenset(keys(domain.canonical(codes))) if len(codes) else frozenset()

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])


def _checked(name: str, function: CodesFunction) -> CodesFunction:
    """The same, which refuses results that are not one row, or one value, for each row of codes."""

    def checked(codes: np.ndarray) -> np.ndarray:
        found = np.asarray(function(codes))
        expected = codes.shape if name == "canonical" else codes.shape[:1]
        if found.shape != expected or (name == "allowed" and found.dtype != bool):
            kind = "booleans" if name == "allowed" else "numbers"
            raise ValueError(
                f"{name} gave {found.dtype} of shape {found.shape} for codes of shape {codes.shape}; "
                f"expected {kind} of shape {expected}"
            )
        return found

    return checked


def results_of(
    trials: Sequence[FrozenTrial], grid: Grid, domain: Domain, directions: Sequence[StudyDirection]
) -> Results:
    """Of those trials that are complete; an infinite value counts as the worst (or best) finite one."""
    known = [t for t in trials if t.state == TrialState.COMPLETE and not t.user_attrs.get(UNMEASURED)]
    whole = [(t, code) for t in known if (code := grid.code(t.params)) is not None]
    signs = np.array([_sign(direction) for direction in directions])
    costs = np.array([t.values for t, _ in whole], float).reshape(len(whole), len(signs)) * signs
    for column in costs.T:
        finite = column[np.isfinite(column)]
        np.clip(column, finite.min(initial=np.inf), finite.max(initial=-np.inf), out=column) if len(finite) else None
    names = sorted({name for t, _ in whole for name in t.constraints})
    constraints = [[t.constraints.get(name, np.nan) for name in names] for t, _ in whole]
    codes = np.array([code for _, code in whole], np.int64).reshape(len(whole), len(grid.names))
    return Results(
        domain.canonical(codes) if len(codes) else codes,
        costs,
        np.array(constraints, float).reshape(len(whole), len(names)),
    )


def common_space(trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Parameters that all finished trials with parameters have, alike, sorted by name."""
    told = [t.distributions for t in trials if t.state.is_finished() and t.distributions]
    common = {name: d for name, d in (told[0] if told else {}).items() if all(x.get(name) == d for x in told)}
    return dict(sorted(common.items()))


def _is_enqueued(trial: FrozenTrial) -> bool:
    return ENQUEUED in trial.system_attrs or RETRIED in trial.system_attrs


def _root(trial: FrozenTrial) -> int:
    """The number of the trial that this one repeats; its own where it repeats none."""
    return int(trial.system_attrs.get(RETRIED, trial.number))


def _sign(direction: StudyDirection) -> float:
    return -1.0 if direction == StudyDirection.MAXIMIZE else 1.0


def _as_costs(values: CodesFunction, direction: StudyDirection) -> CodesFunction:
    return lambda codes: _sign(direction) * np.asarray(values(codes), float)
