"""Which choices matter: how much of the spread of each objective they explain, and what chance explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.costs import Objective
from nas.front import Evaluation, ParetoFront, costs_of

ABSENT = ""  # an architecture's text leaves out a choice that is at its first option
FEWEST, MOST = 30, 1000  # evaluations that can tell anything, and as many as are looked at
FOLDS, TREES, REPEATS = 5, 50, 5
LEAST_EXPLAINED = 0.2  # share of the variance on held-out evaluations below which the model has not understood much


@dataclass(frozen=True)
class Importance:
    """Of one objective: the share of its variance that each choice accounts for, among what was evaluated.

    `shares` are by choice, most first; they may add up to more than 1 where choices act together. `noise` is what
    choices that were shuffled, and so cannot matter, reach (95 % of them are below). `explained` is the share of the
    variance that the model predicts of evaluations it has not seen. `doubt` says why the shares tell nothing; empty
    where they do.
    """

    objective: Objective
    shares: tuple[tuple[str, float], ...]
    noise: float
    explained: float
    evaluations: int
    doubt: str

    @property
    def matter(self) -> tuple[str, ...]:
        """The choices above the noise; none where the shares tell nothing."""
        return () if self.doubt else tuple(name for name, share in self.shares if share > self.noise)


def codes_of_choices(evaluations: Sequence[Evaluation]) -> tuple[tuple[str, ...], list[list[str]], np.ndarray]:
    """(choices, options of each, codes of shape (evaluations, choices)) as the texts of the architectures tell.

    Options are in the order of their numbers, or of their names; a choice that a text leaves out has the option
    `ABSENT`, the first. Choices that never differ are left out.
    """
    read = [dict(_pairs(evaluation.architecture)) for evaluation in evaluations]
    names = dict.fromkeys(name for values in read for name in values)
    found = {name: [values.get(name, ABSENT) for values in read] for name in names}
    options = {name: sorted(set(column), key=_rank) for name, column in found.items()}
    kept = tuple(name for name in names if len(options[name]) > 1)
    columns = [[options[name].index(value) for value in found[name]] for name in kept]
    return kept, [options[name] for name in kept], np.array(columns, dtype=int).reshape(len(kept), len(read)).T


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(name, value) for name, is_, value in (part.partition("=") for part in text.split(",")) if is_]


def _rank(option: str) -> tuple[bool, float, str]:
    try:
        return option != ABSENT, float(option), option
    except ValueError:
        return option != ABSENT, 0.0, option


def importance(front: ParetoFront, *, seed: int = 0) -> tuple[Importance, ...]:
    """How much each choice matters for each objective of a front, over all that was evaluated for it.

    Models (a ridge regression on options, a random forest on what it leaves) are fitted on four fifths of the
    evaluations and asked about the rest, in turn. The squared error that shuffling one choice adds there, halved, is
    the variance that this choice accounts for, alone and together with others (B. Gregorutti and others, arXiv
    1310.5726). Beside the choices the models are given a shuffled copy of each, which cannot matter: what those reach
    is the noise (M. B. Kursa and W. R. Rudnicki, 2010). Choices that rise and fall together share their credit.

    A search evaluates what it likes, so this is about the evaluated architectures, not the whole space. At most
    1,000 of them are looked at. Raises ValueError where no choice differs.
    """
    evaluations = [*front.points, *front.others]
    rng = np.random.default_rng(seed)
    if len(evaluations) > MOST:
        evaluations = [evaluations[int(i)] for i in np.sort(rng.choice(len(evaluations), MOST, replace=False))]
    names, _, codes = codes_of_choices(evaluations)
    if not names:
        raise ValueError(
            "no choice differs between the architectures of the front; expected texts such as 'depth=2,width=16' "
            "(of a CSV, name the columns of the choices)"
        )
    shuffled = codes[rng.permutation(len(codes))]
    costs = costs_of(evaluations, front.objectives)
    return tuple(
        _of_objective(objective, names, np.hstack([codes, shuffled]), cost, rng)
        for objective, cost in zip(front.objectives, costs.T, strict=True)
    )


def _of_objective(
    objective: Objective, names: tuple[str, ...], codes: np.ndarray, cost: np.ndarray, rng: np.random.Generator
) -> Importance:
    count, variance = len(cost), float(cost.var())
    if count < FEWEST or variance == 0:
        doubt = f"{count} evaluations, {FEWEST} needed" if variance else "all evaluations are equal in it"
        return Importance(objective, tuple((name, 0.0) for name in names), 0.0, 0.0, count, doubt)
    added, explained = _added_error(codes, cost / np.sqrt(variance), rng)
    shares = np.maximum(added / 2, 0.0)
    noise = float(np.quantile(shares[len(names) :], 0.95))
    ranked = sorted(zip(names, shares[: len(names)].tolist(), strict=True), key=lambda pair: -pair[1])
    doubt = ""
    if explained < LEAST_EXPLAINED:
        doubt = f"{count} evaluations are too few: a model of them explains {max(0.0, explained):.0%} of the variance"
    return Importance(objective, tuple(ranked), noise, explained, count, doubt)


def _added_error(codes: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """(mean squared error that shuffling each column adds, variance explained), on held-out rows; unit variance."""
    count, columns = codes.shape
    added, squared = np.zeros(columns), 0.0
    for held in np.array_split(rng.permutation(count), FOLDS):
        rest = np.setdiff1d(np.arange(count), held)
        model = _Model(codes, rest, target, int(rng.integers(2**31)))
        error = float(((model.predict(codes[held]) - target[held]) ** 2).sum())
        squared += error
        asked = np.tile(codes[held], (columns, REPEATS, 1, 1))  # (columns, repeats, held, columns)
        for column in range(columns):
            asked[column, :, :, column] = rng.permuted(asked[column, :, :, column], axis=1)
        errors = (model.predict(asked.reshape(-1, columns)).reshape(columns, -1, len(held)) - target[held]) ** 2
        added += errors.sum(axis=(1, 2)) / REPEATS - error
    return added / count, 1 - squared / count


class _Model:
    """What single options add, by a ridge regression, and a random forest for what that leaves."""

    def __init__(self, codes: np.ndarray, rows: np.ndarray, target: np.ndarray, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.linear_model import RidgeCV

        self._options = codes.max(axis=0) + 1
        known = codes[rows]
        self._ridge = RidgeCV(np.logspace(-2, 4, 13)).fit(self._one_hot(known), target[rows])
        left = target[rows] - self._ridge.predict(self._one_hot(known))
        self._forest = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=seed).fit(known, left)

    def _one_hot(self, codes: np.ndarray) -> np.ndarray:
        return np.hstack([np.eye(options)[column] for options, column in zip(self._options, codes.T, strict=True)])

    def predict(self, codes: np.ndarray) -> np.ndarray:
        return np.asarray(self._ridge.predict(self._one_hot(codes)) + self._forest.predict(codes))
