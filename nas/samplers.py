"""The samplers that a search may use, by name, over the legal options of a space."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from nas.guided_sampler import CodesFunction, PredictorGuidedSampler

if TYPE_CHECKING:
    from nas.candidates import Costs

GUIDED = "guided"


def _first_number(trial: FrozenTrial) -> int:
    """That of the trial which it repeats, if it repeats one."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


class _Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II with parents in the order of their trials, whether they were just selected or read back."""

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=_first_number)


class _Nsga3(optuna.samplers.NSGAIIISampler):
    """NSGA-III likewise."""

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=_first_number)


def _nsga3(seed: int, population: int) -> optuna.samplers.BaseSampler:
    return _experimental(lambda: _Nsga3(seed=seed, population_size=population))


def _gp(seed: int, population: int) -> optuna.samplers.BaseSampler:
    return _experimental(
        lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=population, deterministic_objective=True)
    )


def _experimental(make: Callable[[], optuna.samplers.BaseSampler]) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make()


# Optuna's, by (seed, population); they may draw what is known already
LIBRARY: Mapping[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "nsga2": lambda seed, population: _Nsga2(seed=seed, population_size=population),
    "nsga3": _nsga3,
    "tpe": lambda seed, population: optuna.samplers.TPESampler(seed=seed, n_startup_trials=population),
    "gp": _gp,
    "random": lambda seed, population: optuna.samplers.RandomSampler(seed=seed),
}
SAMPLERS = (GUIDED, *LIBRARY)


def guided_sampler(costs: Costs, *, seed: int, startup: int, asynchronous: bool) -> PredictorGuidedSampler:
    """The guided sampler of a search: it knows what is known without running an architecture, and the limits on it."""
    legal = LegalCodes(costs)
    exact = {i: legal.figure(o.key) for i, o in enumerate(costs.objectives) if costs.is_looked_up(o.key)}
    return PredictorGuidedSampler(
        seed,
        startup=startup,
        search_space=legal.distributions,
        canonical=legal.canonical,
        allowed=lambda codes: costs.allowed(legal.of_space(codes)),
        exact=exact,
        asynchronous=asynchronous,
    )


class LegalCodes:
    """Codes among the legal options of those choices that have several; the other choices have one."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self._space = costs, costs.space
        self.distributions = {name: CategoricalDistribution(o) for name, o in costs.options.items() if len(o) > 1}
        self._codes = {c.name: np.array([c.code_of(o) for o in costs.options[c.name]]) for c in self._space.choices}
        self._columns = [i for i, choice in enumerate(self._space.choices) if choice.name in self.distributions]

    def of_space(self, codes: np.ndarray) -> np.ndarray:
        """The space's canonical codes (n, number of choices) of codes (n, number of distributions)."""
        columns = iter(np.asarray(codes).T)
        legal = [self._codes[choice.name] for choice in self._space.choices]
        taken = [one[next(columns)] if len(one) > 1 else np.full(len(codes), one[0]) for one in legal]
        return self._space.canonical_codes(np.stack(taken, axis=1))

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        """One row of codes for each architecture: choices that are not active hold their first legal option."""
        whole, out = self.of_space(codes), np.zeros_like(np.asarray(codes))
        for column, place in enumerate(self._columns):
            legal = self._codes[self._space.choices[place].name]
            out[:, column] = (whole[:, place, None] == legal).argmax(axis=1)
        return out

    def figure(self, key: str) -> CodesFunction:
        """The values (n,) of a figure that is known without running an architecture."""
        return lambda codes: self._costs.table.figures(self.of_space(codes), [key])[key].value
