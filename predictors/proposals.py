"""What to evaluate next: the candidates that promise the most hypervolume, from what was evaluated so far.

Notation: n evaluated architectures, m objectives, d choices, c candidates. Every objective is a cost: less is better.

Each objective that must be evaluated gets a Gaussian process over codes, fitted on the normal scores of its values, so
that a few broken architectures do not hide the differences between good ones. The expected gain of a candidate is the
volume of what it dominates and nothing evaluated does, integrated over random points u of that region:

    gain = sum over u of w(u) * product over objectives of P(cost <= u)

which needs no decomposition of the region, holds for any number of objectives, and for objectives that are known
exactly. A batch is chosen greedily; each member takes what it is believed to dominate out of w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from predictors.surrogate import Encoding, GaussianProcess

POINTS = 768  # of the region that is not dominated
ENUMERATED = 20_000  # spaces up to this size are looked at as a whole
GENERATIONS, BROOD = 8, 2_500  # of the evolution over larger ones: 20,000 candidates
PARENTS = 256
RANKED_SHARE = 0.5  # of the points that are spread by ranks rather than by values
TRIES = 8  # draws of as many points, to find enough of them in a small region
BEYOND = 0.05  # how far beyond the best value so far points lie, as a share of the range

Codes = np.ndarray


@dataclass(frozen=True)
class Domain:
    """What can be proposed.

    counts: options of each choice. ordered: whether they lie in an order.
    canonical: (c, d) codes -> codes of the same architectures, one for each; by default codes are canonical.
    allowed: (c, d) canonical codes -> (c,) whether they may be proposed.
    exact: objective -> its costs (c,) for (c, d) canonical codes, where they are known without evaluation.
    """

    counts: tuple[int, ...]
    ordered: tuple[bool, ...]
    canonical: Callable[[Codes], Codes] = lambda codes: codes
    allowed: Callable[[Codes], np.ndarray] = lambda codes: np.ones(len(codes), bool)
    exact: Mapping[int, Callable[[Codes], np.ndarray]] = field(default_factory=dict)

    def random(self, count: int, rng: np.random.Generator) -> Codes:
        codes = np.stack([rng.integers(options, size=count) for options in self.counts], axis=1)
        return self.canonical(codes)

    @property
    def is_small(self) -> bool:
        return bool(np.prod(np.array(self.counts, float)) <= ENUMERATED)

    def every(self) -> Codes:
        """All architectures once; of small domains only."""
        grid = np.indices(self.counts).reshape(len(self.counts), -1).T
        return np.unique(self.canonical(np.ascontiguousarray(grid)), axis=0)

    def varied(self, parents: Codes, count: int, rng: np.random.Generator) -> Codes:
        """Children of random pairs of parents: choices from either, and each redrawn with a small probability."""
        pairs = parents[rng.integers(len(parents), size=(2, count))]
        crossed = np.where((rng.random((count, 1)) < 0.5) & (rng.random(pairs[0].shape) < 0.5), pairs[1], pairs[0])
        rate = rng.choice((1.0, 2.0, 4.0), size=(count, 1)) / len(self.counts)
        drawn = np.stack([rng.integers(options, size=count) for options in self.counts], axis=1)
        return self.canonical(np.where(rng.random(crossed.shape) < rate, drawn, crossed))


class Proposer:
    """Proposes architectures of a domain; keeps nothing but where the fits of the last round ended.

    Args:
        domain: what can be proposed.
        reference: (m,) the worst costs that count; nan, or nothing at all, where nobody said: then the worst of the
            front counts, short of the worst tenth of what was evaluated.
    """

    def __init__(self, domain: Domain, reference: Sequence[float] = ()) -> None:
        self.domain = domain
        self.reference = tuple(reference)
        self._processes: dict[int, GaussianProcess] = {}

    def propose(self, codes: Codes, costs: np.ndarray, count: int, rng: np.random.Generator) -> Codes:
        """The next `count` architectures, canonical and not among `codes`; fewer where no more are allowed.

        Args:
            codes: (n, d) canonical codes of what was evaluated, or is being evaluated.
            costs: (n, m); nan in rows without a result yet, which are believed to turn out as predicted.
        """
        known = ~np.isnan(costs).any(axis=1)
        beliefs = _Beliefs.fitted(self.domain, self._processes, codes[known], costs[known])
        region = _Region(beliefs, costs[known], self._corner(costs[known]), rng)
        region.take_out(codes[~known])
        taken = set(map(bytes, np.ascontiguousarray(codes, dtype=np.int64)))
        candidates, gains = self._candidates(codes[known], costs[known], region, taken, rng)
        best = candidates[np.argsort(-gains, kind="stable")[: max(PARENTS, 4 * count)]]
        return best[region.greedy(best, count)]

    def _corner(self, costs: np.ndarray) -> np.ndarray:
        front = costs[non_dominated(costs)]
        worst = front.max(axis=0) + 0.1 * np.maximum(np.ptp(front, axis=0), 1e-9)
        default = np.minimum(worst, np.quantile(costs, 0.9, axis=0))
        given = np.array(self.reference or [np.nan] * costs.shape[1], float)
        return np.where(np.isnan(given), np.maximum(default, costs.min(axis=0) + 1e-9), given)

    def _candidates(
        self, codes: Codes, costs: np.ndarray, region: _Region, taken: set[bytes], rng: np.random.Generator
    ) -> tuple[Codes, np.ndarray]:
        """New architectures and their gains: all there are, or those that an evolution from the front comes by."""
        if self.domain.is_small:
            pool = self._new(self.domain.every(), taken)
            return pool, region.gains(pool)
        front = codes[non_dominated(costs)]
        first = [self.domain.varied(front, BROOD // 2, rng), self.domain.random(BROOD // 2, rng)]
        pool = self._new(np.concatenate(first), taken)
        gains = region.gains(pool)
        for _ in range(GENERATIONS - 1):
            parents = np.concatenate([pool[np.argsort(-gains, kind="stable")[:PARENTS]], front])
            new = self._new(self.domain.varied(parents, BROOD, rng), taken | set(map(bytes, pool)))
            pool, gains = np.concatenate([pool, new]), np.concatenate([gains, region.gains(new)])
        return pool, gains

    def _new(self, codes: Codes, taken: set[bytes]) -> Codes:
        """Those that are allowed and not taken, once each."""
        codes = np.ascontiguousarray(codes, dtype=np.int64)
        fresh = dict.fromkeys(map(bytes, codes))
        rows = [np.frombuffer(row, np.int64) for row in fresh if row not in taken]
        left = np.array(rows, np.int64).reshape(len(rows), len(self.domain.counts))
        return left[self.domain.allowed(left)] if len(left) else left


class _Beliefs:
    """What is believed of each objective, as the probability that a cost is at most some value."""

    def __init__(
        self, domain: Domain, scores: Sequence[_NormalScores], processes: Mapping[int, GaussianProcess]
    ) -> None:
        self.domain, self.scores, self.processes = domain, scores, processes

    @classmethod
    def fitted(cls, domain: Domain, processes: dict[int, GaussianProcess], codes: Codes, costs: np.ndarray) -> _Beliefs:
        scores = [_NormalScores(column) for column in costs.T]
        for objective, score in enumerate(scores):
            if objective not in domain.exact:
                process = processes.setdefault(objective, GaussianProcess(Encoding(domain.counts, domain.ordered)))
                process.fit(codes, score(costs[:, objective]))
        return cls(domain, scores, processes)

    def dominates(self, codes: Codes, points: np.ndarray) -> np.ndarray:
        """(c, d) codes and (p, m) points -> (c, p) probabilities that a candidate is nowhere worse than a point."""
        from scipy.special import ndtr

        found = np.ones((len(codes), len(points)), np.float32)
        for objective, score in enumerate(self.scores):
            if objective in self.domain.exact:
                found *= self.domain.exact[objective](codes)[:, None] <= points[None, :, objective]
            else:
                mean, deviation = self.processes[objective].predict(codes)
                at = score(points[:, objective]).astype(np.float32)
                found *= ndtr((at[None] - mean[:, None].astype(np.float32)) / deviation[:, None].astype(np.float32))
        return found


class _NormalScores:
    """A rising map from values to normal scores: ranks through the inverse normal distribution, linear in between."""

    def __init__(self, values: np.ndarray) -> None:
        from scipy.stats import norm

        self.values, place, count = np.unique(values, return_inverse=True, return_counts=True)
        self.scores = norm.ppf((np.cumsum(count) - count / 2) / len(values))
        near = max(2, len(self.values) // 10)
        self.slopes = [
            _slope(part(self.values), part(self.scores)) for part in (lambda x: x[:near], lambda x: x[-near:])
        ]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        found = np.interp(values, self.values, self.scores)
        found += self.slopes[0] * np.minimum(values - self.values[0], 0)
        return found + self.slopes[1] * np.maximum(values - self.values[-1], 0)


def _slope(values: np.ndarray, scores: np.ndarray) -> float:
    rise = float(values[-1] - values[0])
    return float(scores[-1] - scores[0]) / rise if rise > 0 else 1.0


class _Region:
    """Random points of what nothing evaluated dominates, within the corner, each with a weight."""

    def __init__(self, beliefs: _Beliefs, costs: np.ndarray, corner: np.ndarray, rng: np.random.Generator) -> None:
        self.beliefs = beliefs
        front = costs[non_dominated(costs)]
        found: list[np.ndarray] = []
        for _ in range(TRIES):
            drawn = self._drawn(costs, corner, rng)
            free = ~(front[None] <= drawn[:, None]).all(axis=2).any(axis=1)
            found.append(drawn[free])
            if sum(map(len, found)) >= POINTS:
                break
        self.points = np.concatenate(found)[:POINTS]
        self.weights = np.ones(len(self.points), np.float32)

    def _drawn(self, costs: np.ndarray, corner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Points under the corner: even over values, and for a share of them even over the ranks of what there is."""
        shape = (POINTS, costs.shape[1])
        low = costs.min(axis=0)
        low = low - BEYOND * np.maximum(corner - low, 1e-9)
        even = low + rng.random(shape) * (corner - low)
        inside = np.concatenate([np.minimum(costs, corner), low[None]])
        ranked = np.stack([np.quantile(column, rng.random(POINTS)) for column in inside.T], axis=1)
        return np.where(rng.random((POINTS, 1)) < RANKED_SHARE, ranked, even)

    def gains(self, codes: Codes) -> np.ndarray:
        return self.beliefs.dominates(codes, self.points) @ self.weights

    def take_out(self, codes: Codes) -> None:
        """Leave of each point's weight what these architectures are not believed to dominate."""
        for row in self.beliefs.dominates(codes, self.points):
            self.weights = self.weights * (1 - row)

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
    return ~(at_most & (~at_most.T | first)).any(axis=0)
