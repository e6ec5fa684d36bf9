"""What to evaluate next: the candidates that promise the most hypervolume, from what was evaluated so far.

Notation: n evaluated architectures, m objectives, k constraints, d choices, c candidates, p points. Every objective is
a cost: less is better. A constraint is met at 0 or less.

Each objective that must be evaluated, and each constraint, gets a Gaussian process over codes: of its values as they
are, or with those of bad architectures compressed, whichever predicts better what is left out. The expected
gain of a candidate is the volume of what it dominates and nothing evaluated does, integrated over random points u:

    gain = product over constraints of P(value <= 0) * sum over u of w(u) * product over objectives of P(cost <= u)

which needs no decomposition of the region, holds for any number of objectives, and for objectives that are known
exactly. A batch is chosen greedily; each member takes what it is believed to dominate out of w.

Everything here is a function of its arguments: whoever has the same results and generator proposes the same. Linear
algebra runs on one thread: matrices are small, and sums in another order would make workers differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

from predictors.surrogate import Encoding, GaussianProcess

POINTS, FEW_POINTS = 512, 64  # of the region that is not dominated, to choose with and to shortlist with
SHORTLIST = 1_000  # candidates, by their gains over the few points
ENUMERATED = 20_000  # spaces up to this size are looked at as a whole
GENERATIONS, BROOD = 8, 2_500  # of the evolution over larger ones: 20,000 candidates
PARENTS = 256
LEARNED = 300  # results that processes rest on, at most
TRIES = 8  # draws of as many points, to find enough of them in a small region
BEYOND = 0.1  # how far beyond the best value so far points lie, as a share of the range

Codes = np.ndarray


def _unchanged(codes: Codes) -> Codes:
    return codes


def _everything(codes: Codes) -> np.ndarray:
    return np.ones(len(codes), bool)


@dataclass(frozen=True)
class Domain:
    """What can be proposed.

    counts: options of each choice. ordered: whether they lie in an order. alike: a number that choices with the same
        options share, each having its own where nothing is said.
    canonical: (c, d) codes -> codes of the same architectures, one for each; by default codes are canonical.
    allowed: (c, d) canonical codes -> (c,) whether they may be proposed.
    exact: objective -> its costs (c,) for (c, d) canonical codes, where they are known without evaluation.
    """

    counts: tuple[int, ...]
    ordered: tuple[bool, ...]
    alike: tuple[int, ...] = ()
    canonical: Callable[[Codes], Codes] = _unchanged
    allowed: Callable[[Codes], np.ndarray] = _everything
    exact: Mapping[int, Callable[[Codes], np.ndarray]] = field(default_factory=dict)

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.counts, self.ordered, self.alike or tuple(range(len(self.counts))))

    @property
    def is_small(self) -> bool:
        return float(np.prod(np.array(self.counts, float))) <= ENUMERATED

    def every(self) -> Codes:
        """All that may be proposed, once each; of small domains only."""
        return self.new(np.indices(self.counts).reshape(len(self.counts), -1).T, frozenset())

    def random(self, count: int, rng: np.random.Generator) -> Codes:
        return np.stack([rng.integers(options, size=count) for options in self.counts], axis=1)

    def spread(self, count: int, rng: np.random.Generator) -> Codes:
        """Random, with each option of a choice as often as any other."""
        return np.stack([rng.permutation(np.arange(count) % options) for options in self.counts], axis=1)

    def varied(self, parents: Codes, count: int, rng: np.random.Generator) -> Codes:
        """Children of random pairs of parents: choices from either, and each redrawn with a small probability."""
        pairs = parents[rng.integers(len(parents), size=(2, count))]
        crossed = np.where((rng.random((count, 1)) < 0.5) & (rng.random(pairs[0].shape) < 0.5), pairs[1], pairs[0])
        rate = rng.choice((1.0, 2.0, 4.0), size=(count, 1)) / len(self.counts)
        return np.where(rng.random(crossed.shape) < rate, self.random(count, rng), crossed)

    def new(self, codes: Codes, taken: Set[bytes]) -> Codes:
        """The canonical forms of codes (c, d) that are allowed and not taken, once each, in their order."""
        codes = np.ascontiguousarray(self.canonical(codes), dtype=np.int64)
        fresh = [key for key in dict.fromkeys(map(np.ndarray.tobytes, codes)) if key not in taken]
        left = np.frombuffer(b"".join(fresh), np.int64).reshape(len(fresh), len(self.counts))
        return left[self.allowed(left)] if len(left) else left

    def first(self, count: int, taken: Set[bytes], rng: np.random.Generator) -> Codes:
        """At most `count` architectures to begin with, spread and new."""
        drawn = [self.spread(count, rng), *(self.random(count, rng) for _ in range(TRIES))]
        found = self.new(np.concatenate(drawn), taken)
        if len(found) < count:
            seen = taken | keys(found)
            rest = self.new(self.every(), seen) if self.is_small else self._hidden(found, seen, rng)
            found = np.concatenate([found, rng.permutation(rest)])
        return found[:count]

    def _hidden(self, found: Codes, seen: Set[bytes], rng: np.random.Generator) -> Codes:
        """New ones of a region so small that random ones hardly meet it: relatives of those that lie in it."""
        known = np.frombuffer(b"".join(sorted(seen)), np.int64).reshape(len(seen), len(self.counts))
        parents = np.concatenate([found, known[self.allowed(known)]]) if len(seen) else found
        new = found[:0]
        for _ in range(GENERATIONS):
            relatives = [self.varied(parents, BROOD // 2, rng)] if len(parents) else []
            fresh = self.new(np.concatenate([*relatives, self.random(BROOD // 2, rng)]), seen)
            new, parents, seen = np.concatenate([new, fresh]), np.concatenate([parents, fresh]), seen | keys(fresh)
        return new


def keys(codes: Codes) -> set[bytes]:
    """Codes (c, d) as members of a set."""
    return set(map(np.ndarray.tobytes, np.ascontiguousarray(codes, dtype=np.int64)))


@dataclass(frozen=True)
class Results:
    """What was evaluated: canonical codes (n, d), finite costs (n, m), and constraints (n, k), nan where not said."""

    codes: Codes
    costs: np.ndarray
    constraints: np.ndarray

    @property
    def feasible(self) -> np.ndarray:
        return np.logical_not((self.constraints > 0).any(axis=1))

    def informative(self) -> Results:
        """At most `LEARNED` of them: half the nearest to the front, by ranks, and half an even pick of the others."""
        if len(self.codes) <= LEARNED:
            return self
        ranks = self.costs.argsort(axis=0, kind="stable").argsort(axis=0) / len(self.codes)
        front = ranks[self.feasible][non_dominated(self.costs[self.feasible])]
        behind = np.maximum(ranks[:, None] - front[None], 0).sum(axis=2).min(axis=1, initial=float(ranks.shape[1]))
        order = np.argsort(behind + (~self.feasible), kind="stable")
        rest = np.sort(order[LEARNED // 2 :])
        picked = rest[np.linspace(0, len(rest) - 1, LEARNED - LEARNED // 2).astype(int)]
        kept = np.sort(np.concatenate([order[: LEARNED // 2], picked]))
        return Results(self.codes[kept], self.costs[kept], self.constraints[kept])


def propose(
    domain: Domain,
    results: Results,
    count: int,
    rng: np.random.Generator,
    *,
    reference: Sequence[float] = (),
    running: Codes | None = None,
    taken: Set[bytes] = frozenset(),
) -> Codes:
    """The next `count` architectures, canonical and new; fewer where no more are allowed.

    Args:
        results: at least two.
        reference: (m,) the worst costs that count; nan, or nothing at all, where nobody said: then `corner` says.
        running: (r, d) canonical codes that are believed to turn out as predicted.
        taken: what must not be proposed besides the results and what runs, as `keys`.
    """
    running = np.empty((0, len(domain.counts)), np.int64) if running is None else running
    with one_thread():
        beliefs = _Beliefs.fitted(domain, results.informative())
        costs = results.costs[results.feasible]
        low, high = bounds(results, reference)
        for index, costs_of in domain.exact.items():  # what is known to be there counts, however far from the results
            some = domain.new(domain.random(PARENTS, rng), frozenset())
            low[index] = min(low[index], costs_of(some).min(initial=low[index]))
        region = _Region(beliefs, costs[non_dominated(costs)], low, high, rng)
        region.take_out(running)
        taken = taken | keys(results.codes) | keys(running)
        candidates, gains = _candidates(domain, results, region, taken, rng)
        best = candidates[np.argsort(-gains, kind="stable")[:SHORTLIST]]
        return best[region.greedy(best, count)]


def one_thread() -> AbstractContextManager[object]:
    """Within it the linear algebra of NumPy and SciPy uses one thread."""
    return _libraries().limit(limits=1, user_api="blas")


@cache
def _libraries() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  it brings a library of its own, which is found only once it is loaded

    return ThreadpoolController()


def bounds(results: Results, reference: Sequence[float] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The costs (m,) between which volume counts: a little better than the best, and the worst that count.

    Where nobody said what is the worst that counts, it is the worst of the front and a tenth of its range more, or
    what nine tenths of the results keep, if that is worse: the ends of a young front are not those of the true one.
    """
    costs = results.costs[results.feasible] if results.feasible.any() else results.costs
    front = costs[non_dominated(costs)]
    default = np.maximum(front.max(axis=0) + 0.1 * np.ptp(front, axis=0), np.quantile(results.costs, 0.9, axis=0))
    best, usual = costs.min(axis=0), np.ptp(np.quantile(results.costs, (0.1, 0.9), axis=0), axis=0)
    given = np.array(reference if len(reference) else [np.nan] * costs.shape[1], float)
    worst = np.maximum(np.where(np.isnan(given), default, given), best)
    span = np.maximum(worst - best, usual)
    return best - BEYOND * np.where(span > 0, span, 1.0), worst


def _candidates(
    domain: Domain, results: Results, region: _Region, taken: Set[bytes], rng: np.random.Generator
) -> tuple[Codes, np.ndarray]:
    """New architectures and their gains: all there are, or those that an evolution from the front comes by."""
    if domain.is_small:
        pool = domain.new(domain.every(), taken)
        return pool, region.gains(pool)
    good = results.codes[results.feasible] if results.feasible.any() else results.codes
    costs = results.costs[results.feasible] if results.feasible.any() else results.costs
    front = good[non_dominated(costs)]
    pool = domain.new(np.concatenate([domain.varied(front, BROOD // 2, rng), domain.random(BROOD // 2, rng)]), taken)
    gains, seen = region.gains(pool), {*taken, *keys(pool)}
    for _ in range(GENERATIONS - 1):
        parents = np.concatenate([pool[np.argsort(-gains, kind="stable")[:PARENTS]], front])
        fresh = domain.new(domain.varied(parents, BROOD, rng), seen)
        seen |= keys(fresh)
        pool, gains = np.concatenate([pool, fresh]), np.concatenate([gains, region.gains(fresh)])
    return pool, gains


@dataclass(frozen=True)
class _Beliefs:
    """What is believed of each objective and constraint, as the probability that it is at most some value."""

    domain: Domain
    costs: tuple[_Belief | None, ...]  # none where costs are exact
    limits: tuple[_Belief, ...]

    @classmethod
    def fitted(cls, domain: Domain, results: Results) -> _Beliefs:
        encoding, codes = domain.encoding, results.codes
        costs = tuple(
            None if index in domain.exact else _Belief.fitted(encoding, codes, values)
            for index, values in enumerate(results.costs.T)
        )
        told = [(values, np.isfinite(values)) for values in results.constraints.T]
        # of a constraint that was never broken nothing says that it ever binds
        binding = [(values[known], codes[known]) for values, known in told if (values[known] > 0).any()]
        return cls(domain, costs, tuple(_Belief.fitted(encoding, *pair[::-1]) for pair in binding))

    def feasible(self, codes: Codes) -> np.ndarray:
        """(c, d) codes -> (c,) probabilities that all constraints are met."""
        found = np.ones(len(codes), np.float32)
        for belief in self.limits:
            found *= belief.at_most(codes, np.zeros(1))[:, 0]
        return found

    def dominates(self, codes: Codes, points: np.ndarray) -> np.ndarray:
        """(c, d) codes and (p, m) points -> (c, p) probabilities that a candidate counts and is nowhere worse."""
        found = np.repeat(self.feasible(codes)[:, None], len(points), axis=1)
        for index, belief in enumerate(self.costs):
            if belief is None:
                found *= self.domain.exact[index](codes)[:, None] <= points[None, :, index]
            else:
                found *= belief.at_most(codes, points[:, index])
        return found


@dataclass(frozen=True)
class _Belief:
    """A process of a figure as it is or compressed, whichever predicts better what was left out."""

    transform: Callable[[np.ndarray], np.ndarray]
    process: GaussianProcess

    @classmethod
    def fitted(cls, encoding: Encoding, codes: Codes, values: np.ndarray) -> _Belief:
        transforms = (_unchanged, Compressed(values))
        found = [cls(transform, GaussianProcess.fit(encoding, codes, transform(values))) for transform in transforms]
        return max(found, key=lambda belief: rank_correlation(belief.process.left_out(), values))

    def at_most(self, codes: Codes, values: np.ndarray) -> np.ndarray:
        """(c, d) codes and (p,) values -> (c, p) probabilities, float32."""
        mean, deviation = (part.astype(np.float32)[:, None] for part in self.process.predict(codes))
        away = self.transform(values).astype(np.float32)[None] - mean
        away /= deviation
        return normal_cdf(away)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of (n,) and (n,) values; 0 where one does not vary."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(a), rankdata(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    lengths = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return float(ranks[0] @ ranks[1]) / lengths if lengths > 0 else 0.0


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """The normal distribution function to 2e-4, many times faster than an exact one; float32.

    Page (1977), Applied Statistics 26: a logistic function of an odd cubic.
    """
    z = np.clip(z, -6.0, 6.0, dtype=np.float32)
    found = np.square(z)
    found *= np.float32(-0.07135481)
    found -= np.float32(1.5957691)
    found *= z
    np.exp(found, out=found)
    found += 1
    return np.asarray(np.reciprocal(found, out=found))


class Compressed:
    """A rising map of costs that keeps the better half as it is and takes the logarithm of how much worse others are.

    A few broken architectures then do not hide the differences between good ones, and what is better than all results
    lies where it would in the figure itself. It is smooth; 0 is the median, -1 the best tenth.
    """

    def __init__(self, costs: np.ndarray) -> None:
        best_tenth, self.median = np.quantile(costs, (0.1, 0.5))
        self.unit = float(self.median - best_tenth) or float(np.std(costs)) or 1.0

    def __call__(self, costs: np.ndarray) -> np.ndarray:
        units = (costs - self.median) / self.unit
        return np.where(units > 0, np.log1p(np.maximum(units, 0.0)), units)


class _Region:
    """Random points of what no member of the front dominates, between two bounds, each with a weight."""

    def __init__(
        self, beliefs: _Beliefs, front: np.ndarray, low: np.ndarray, high: np.ndarray, rng: np.random.Generator
    ) -> None:
        self.beliefs = beliefs
        found: list[np.ndarray] = []
        while len(found) < TRIES and sum(map(len, found)) < POINTS:
            drawn = low + rng.random((POINTS, len(low))) * (high - low)
            found.append(drawn[~(front[None] <= drawn[:, None]).all(axis=2).any(axis=1)])
        self.points = np.concatenate(found)[:POINTS]
        self.weights = np.ones(len(self.points), np.float32)

    def gains(self, codes: Codes) -> np.ndarray:
        """(c, d) codes -> (c,) gains over the first few points."""
        return self.beliefs.dominates(codes, self.points[:FEW_POINTS]) @ self.weights[:FEW_POINTS]

    def take_out(self, codes: Codes) -> None:
        """Leave of each point's weight what these architectures are not believed to dominate."""
        self.weights = self.weights * (1 - self.beliefs.dominates(codes, self.points)).prod(axis=0)

    def greedy(self, codes: Codes, count: int) -> list[int]:
        """Places of the `count` candidates that gain the most together."""
        dominates, weights = self.beliefs.dominates(codes, self.points), self.weights
        chosen: list[int] = []
        for _ in range(min(count, len(codes))):
            gains = dominates @ weights
            gains[chosen] = -1.0
            chosen.append(int(gains.argmax()))
            weights = weights * (1 - dominates[chosen[-1]])
        return chosen


def non_dominated(costs: np.ndarray) -> np.ndarray:
    """Which rows of (n, m) costs no other row is better than, and the first of those that are equal; (n,) bool."""
    at_most = (costs[:, None] <= costs[None]).all(axis=2)
    first = np.tri(len(costs), k=-1, dtype=bool).T  # i before j
    return np.logical_not((at_most & (~at_most.T | first)).any(axis=0))
