"""LINAS (arXiv 2205.10358, 2312.13301), as its authors' code does it, for `tabular_search.py` to compare with.

    measure 50 random architectures
    repeat: for each objective keep the better of a ridge regression and a support vector machine (5-fold grid search)
            on one-hot codes; run NSGA-II on them, from random architectures; measure its last population

What was measured already is measured again where the population has it, as in the original; `unique=True` keeps it out
of the population instead, which is a change.

The NSGA-II is written here, since Optuna's takes milliseconds a candidate and LINAS asks for 20,000 a round: binary
tournaments by rank and crowding, simulated binary crossover and polynomial mutation on reals that are rounded, no
duplicates (Deb et al. 2002, IEEE TEC 6; the operators as in pymoo).
"""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np

from predictors.proposals import keys, non_dominated

POPULATION = 50
PREDICTED = 20_000  # candidates a round
CROSSOVER, CROSSOVER_ETA = 0.9, 15.0
MUTATION, MUTATION_ETA = 0.02, 20.0
ALPHAS = np.arange(0.1, 10.05, 0.1)  # of the ridge regression
COSTS = np.arange(1.0, 101.0)  # C of the support vector machine
FOLDS = 5
MATINGS = 20  # attempts to fill a generation with what is new

Function = Callable[[np.ndarray], np.ndarray]


def linas(
    measure: Function, counts: np.ndarray, budget: int, rng: np.random.Generator, *, unique: bool = False
) -> None:
    """Measure `budget` architectures, (n, d) codes -> (n, m) costs at a time."""
    codes = rng.integers(counts, size=(min(POPULATION, budget), len(counts)))
    costs = measure(codes)
    population = codes
    while len(codes) < budget:
        predictors = [fitted(codes, column, counts) for column in costs.T]
        banned = keys(codes) if unique else frozenset()
        population = nsga2(lambda c, p=predictors: np.stack([f(c) for f in p], axis=1), counts, rng, banned)
        population = population[: budget - len(codes)]
        codes, costs = np.concatenate([codes, population]), np.concatenate([costs, measure(population)])


def fitted(codes: np.ndarray, values: np.ndarray, counts: np.ndarray) -> Function:
    """The better of two regressions on one-hot codes, by the mean absolute percentage error of a 5-fold grid search."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVR

    scale = 10.0 ** (np.floor(np.log10(np.abs(values).max())) - 1)
    searches = [
        GridSearchCV(model, grid, cv=FOLDS, scoring="neg_mean_absolute_percentage_error").fit(
            one_hot(codes, counts), values / scale
        )
        for model, grid in ((Ridge(), {"alpha": ALPHAS}), (SVR(kernel="rbf"), {"C": COSTS}))
    ]
    best = max(searches, key=lambda search: search.best_score_).best_estimator_
    return lambda asked: np.asarray(best.predict(one_hot(asked, counts))) * scale


def one_hot(codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.concatenate([codes[:, [i]] == np.arange(count) for i, count in enumerate(counts)], axis=1).astype(float)


def nsga2(costs_of: Function, counts: np.ndarray, rng: np.random.Generator, banned: Set[bytes]) -> np.ndarray:
    """The last population (at most 50, d) after 20,000 candidates, none of them among `banned`."""
    codes = np.empty((0, len(counts)), np.int64)
    while not len(codes):  # few random ones are new in a space that is nearly used up
        codes = new(rng.integers(counts, size=(4 * POPULATION, len(counts))), banned)[:POPULATION]
    costs = costs_of(codes)
    for _ in range(PREDICTED // POPULATION - 1):
        rank, crowding = ranks(costs), np.zeros(len(costs))
        for level in np.unique(rank):
            crowding[rank == level] = crowding_of(costs[rank == level])
        children = np.empty((0, len(counts)), np.int64)
        for _ in range(MATINGS):
            children = np.concatenate([children, mated(codes, rank, crowding, counts, rng)])
            children = new(children, banned | keys(codes))[:POPULATION]
            if len(children) == POPULATION:
                break
        if not len(children):
            break
        codes, costs = np.concatenate([codes, children]), np.concatenate([costs, costs_of(children)])
        kept = survivors(costs, POPULATION)
        codes, costs = codes[kept], costs[kept]
    return codes


def new(codes: np.ndarray, taken: Set[bytes]) -> np.ndarray:
    """Those rows that are not taken, once each."""
    first = {row.tobytes(): place for place, row in reversed(list(enumerate(codes)))}
    return codes[sorted(place for row, place in first.items() if row not in taken)]


def mated(
    codes: np.ndarray, rank: np.ndarray, crowding: np.ndarray, counts: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Children (50, d) of parents that won binary tournaments."""
    pairs = rng.integers(len(codes), size=(2, POPULATION, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    wins = (rank[a] < rank[b]) | ((rank[a] == rank[b]) & (crowding[a] >= crowding[b]))
    first, second = codes[np.where(wins, a, b)].astype(float)
    low, high = np.full(len(counts), -0.5), counts - 0.5
    child = crossed(first, second, low, high, rng)
    return np.clip(np.rint(mutated(child, low, high, rng)), 0, counts - 1).astype(np.int64)


def crossed(a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One child a pair by simulated binary crossover: half of the variables of nine tenths of the pairs."""
    left, right = np.minimum(a, b), np.maximum(a, b)
    gap = np.maximum(right - left, 1e-14)
    u = rng.random(a.shape)

    def spread(beta: np.ndarray) -> np.ndarray:
        alpha = 2 - beta ** -(CROSSOVER_ETA + 1)
        inner = np.where(u <= 1 / alpha, u * alpha, 1 / (2 - u * alpha))
        return inner ** (1 / (CROSSOVER_ETA + 1))

    near_low = 0.5 * (left + right - spread(1 + 2 * (left - low) / gap) * gap)
    near_high = 0.5 * (left + right + spread(1 + 2 * (high - right) / gap) * gap)
    child = np.where(rng.random(a.shape) < 0.5, near_low, near_high)
    used = (rng.random((len(a), 1)) < CROSSOVER) & (rng.random(a.shape) < 0.5) & (a != b)
    return np.where(used, np.clip(child, low, high), a)


def mutated(x: np.ndarray, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Polynomial mutation of each variable with a probability of 2 %."""
    span, u, power = high - low, rng.random(x.shape), 1 / (MUTATION_ETA + 1)
    down = (2 * u + (1 - 2 * u) * (1 - (x - low) / span) ** (MUTATION_ETA + 1)) ** power - 1
    up = 1 - (2 * (1 - u) + (2 * u - 1) * (1 - (high - x) / span) ** (MUTATION_ETA + 1)) ** power
    return np.where(rng.random(x.shape) < MUTATION, x + np.where(u <= 0.5, down, up) * span, x)


def ranks(costs: np.ndarray) -> np.ndarray:
    """The front (n,) that each row belongs to: 0 for those that nothing dominates, and so on; equal rows share it."""
    left, found, level = np.arange(len(costs)), np.zeros(len(costs), int), 0
    while len(left):
        front = costs[left][non_dominated(costs[left])]
        equal = (costs[left][:, None] == front[None]).all(axis=2).any(axis=1)
        found[left[equal]] = level
        left, level = left[~equal], level + 1
    return found


def crowding_of(costs: np.ndarray) -> np.ndarray:
    """How far (n,) the neighbours of each member of a front are, infinite at its ends."""
    found = np.zeros(len(costs))
    for column in costs.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] or 1.0
        found[order[[0, -1]]] = np.inf
        found[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return found


def survivors(costs: np.ndarray, count: int) -> np.ndarray:
    """Places of the best `count` rows: by front, and in the last one that fits by crowding."""
    rank = ranks(costs)
    kept: list[int] = []
    for level in range(int(rank.max()) + 1):
        members = np.flatnonzero(rank == level)
        members = members[np.argsort(-crowding_of(costs[members]), kind="stable")]
        kept += members[: count - len(kept)].tolist()
    return np.array(kept)
