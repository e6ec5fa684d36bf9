"""Two fronts with the same objectives, compared: how much each dominates, and at which budgets it is ahead.

Notation: costs are objective values turned so that less is better; `scaled` ones are 0 at the best value of both
fronts, in the span given. `first` and `second` are the two fronts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from nas.costs import Objective, UnknownFigure
from nas.dominance import beaten_by, hypervolume
from nas.front import ParetoFront, costs_of

REFERENCE_MARGIN = 0.1  # of the span of both fronts, beyond the worst of them
Leader = Literal["first", "second", "neither"]


@dataclass(frozen=True)
class Stretch:
    """Budgets of the second objective over which the same front is ahead in the first.

    `start` and `end` are values of the second objective from the tightest budget to the loosest; `end` is None
    where the stretch goes on for ever. Leads are differences of the first objective, at 0 or above and in its unit:
    the mean over the budgets of the stretch (up to the last point of both fronts), and the largest. They are None
    where only the leader has a point within the budget.
    """

    start: float
    end: float | None
    leader: Leader
    mean_lead: float | None
    largest_lead: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; every pair is (of the first front, of the second).

    `reference` is the worst corner of the box, by objective. `hypervolume` is the share of the box, from the best
    values of both fronts to the reference, that a front dominates; `adds` what it dominates and the other does not;
    `beaten` how many of its points the other dominates beyond the noise. `epsilon` is by how much a front must
    improve in every objective, in spans of both fronts, to be as good as the other everywhere (0 or less: it already
    is). `stretches` are empty with one objective; with three they are of the first two alone.
    """

    first: ParetoFront
    second: ParetoFront
    noise: Mapping[str, float]
    reference: Mapping[str, float]
    hypervolume: tuple[float, float]
    adds: tuple[float, float]
    beaten: tuple[int, int]
    epsilon: tuple[float, float]
    stretches: tuple[Stretch, ...]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.first.objectives

    def to_dict(self) -> dict[str, object]:
        """The documented form of `nas pareto A --against B --format json`."""
        both = ("a", "b")
        counts = dict(zip(both, (len(self.first), len(self.second)), strict=True))
        return {
            "objectives": [{"name": o.key, "direction": o.direction} for o in self.objectives],
            "noise": dict(self.noise),
            "reference": dict(self.reference),
            "points": counts,
            "hypervolume": dict(zip(both, self.hypervolume, strict=True)),
            "adds": dict(zip(both, self.adds, strict=True)),
            "beaten": dict(zip(both, self.beaten, strict=True)),
            "epsilon": dict(zip(both, self.epsilon, strict=True)),
            "budgets": [
                {
                    "from": s.start,
                    "to": s.end,
                    "ahead": {"first": "a", "second": "b", "neither": None}[s.leader],
                    "mean_lead": s.mean_lead,
                    "largest_lead": s.largest_lead,
                }
                for s in self.stretches
            ],
        }


def compare(first: ParetoFront, second: ParetoFront, reference: Mapping[str, float] | None = None) -> Comparison:
    """Compare two fronts over the objectives of the first.

    Quality indicators after Zitzler and others, "Performance assessment of multiobjective optimizers: an analysis
    and review" (IEEE Transactions on Evolutionary Computation 7(2), 2003): hypervolume, and the additive
    epsilon-indicator with each objective divided by its span over both fronts. Noise is the larger of the two fronts'.

    Args:
        reference: values by objective, worse than the best of both fronts. Of an objective that it lacks: the worst
            of both fronts and 10 % of their span (of that value where they do not differ).

    Raises ValueError for an empty front, other objectives, or a reference that leaves nothing to dominate;
    UnknownFigure for a reference of another figure.
    """
    objectives = first.objectives
    _check_same(first, second)
    costs = costs_of(first.points, objectives), costs_of(second.points, objectives)
    noise = {o.key: max((front.noise or {}).get(o.key, 0.0) for front in (first, second)) for o in objectives}
    relative = np.array(list(noise.values()))
    both = np.concatenate(costs)
    best, worst = both.min(axis=0), both.max(axis=0)
    corner = _corner(objectives, best, worst, reference or {})
    depth = corner - best
    ones = np.ones(len(objectives))
    shares = [hypervolume((c - best) / depth, ones) for c in (*costs, both)]
    span = np.where(worst > best, worst - best, 1.0)
    return Comparison(
        first,
        second,
        {key: value for key, value in noise.items() if value},
        {o.key: o.cost(float(value)) for o, value in zip(objectives, corner, strict=True)},
        (shares[0], shares[1]),
        (shares[2] - shares[1], shares[2] - shares[0]),
        (int(beaten_by(costs[0], costs[1], relative).sum()), int(beaten_by(costs[1], costs[0], relative).sum())),
        (epsilon(costs[0] / span, costs[1] / span), epsilon(costs[1] / span, costs[0] / span)),
        _stretches(costs[0][:, :2], costs[1][:, :2], objectives, relative[:2]) if len(objectives) > 1 else (),
    )


def _check_same(first: ParetoFront, second: ParetoFront) -> None:
    wanted, got = (
        {(objective.key, objective.direction) for objective in front.objectives} for front in (first, second)
    )
    if wanted != got:
        told = [", ".join(f"{direction} {key}" for key, direction in sorted(which)) for which in (wanted, got)]
        raise ValueError(
            f"fronts of different objectives cannot be compared: one would {told[0]}, the other {told[1]}; "
            "search both for the same"
        )
    if not first.points or not second.points:
        raise ValueError("a front without a point cannot be compared; search again with other limits")


def _corner(
    objectives: tuple[Objective, ...], best: np.ndarray, worst: np.ndarray, given: Mapping[str, float]
) -> np.ndarray:
    unknown = set(given) - {objective.key for objective in objectives}
    if unknown:
        known = ", ".join(objective.key for objective in objectives)
        raise UnknownFigure(f"the reference names {', '.join(sorted(unknown))}; the objectives are {known}")
    spans = np.where(worst > best, worst - best, np.where(worst == 0, 1.0, np.abs(worst)))
    corner = worst + REFERENCE_MARGIN * spans
    for i, objective in enumerate(objectives):
        if objective.key in given:
            corner[i] = objective.cost(given[objective.key])
            if not corner[i] > best[i]:
                raise ValueError(
                    f"the reference {objective.key}={given[objective.key]:g} leaves nothing to dominate; "
                    f"expected a value worse than the best of both fronts, {objective.cost(float(best[i])):g}"
                )
    return corner


def epsilon(costs: np.ndarray, others: np.ndarray) -> float:
    """The additive epsilon-indicator: the least by which all rows of `costs` (n, objectives) must fall, in every
    objective, for each row of `others` (m, objectives) to be no better than one of them."""
    return float((costs[:, None] - others).max(axis=2).min(axis=0).max())


# attainment ------------------------------------------------------------------------------------------------


def attained(costs: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Least first cost among rows (n, 2) whose second cost is within each budget, shape (budgets,); inf if none is."""
    order = np.argsort(costs[:, 1], kind="stable")
    best_so_far = np.append(np.inf, np.minimum.accumulate(costs[order, 0]))
    return np.asarray(best_so_far[np.searchsorted(costs[order, 1], budgets, side="right")])


def _stretches(
    first: np.ndarray, second: np.ndarray, objectives: tuple[Objective, ...], noise: np.ndarray
) -> tuple[Stretch, ...]:
    """Between two neighbouring budgets at which a front gains a point, neither changes; neighbours alike join.

    A front is ahead where the other is behind beyond the noise, even with a budget that is larger by its noise.
    """
    budgets = np.unique(np.concatenate([first[:, 1], second[:, 1]]))
    a, b = attained(first, budgets), attained(second, budgets)
    slack = budgets + noise[1] * np.abs(budgets)
    leads = _is_ahead(a, attained(second, slack), noise[0]), _is_ahead(b, attained(first, slack), noise[0])
    leaders: list[Leader] = ["first" if x else "second" if y else "neither" for x, y in zip(*leads, strict=True)]
    known = np.isfinite(a) & np.isfinite(b)
    starts = [0]
    starts += [i for i in range(1, len(budgets)) if (leaders[i], known[i]) != (leaders[i - 1], known[i - 1])]
    found = []
    for start, end in pairwise([*starts, len(budgets)]):
        mean = largest = None
        if known[start]:
            apart = np.abs(a[start:end] - b[start:end])
            widths = np.diff(budgets[start : end + 1])  # of the last stretch, one fewer
            widths = widths if len(widths) == len(apart) else np.append(widths, 0.0)
            mean = float(np.average(apart, weights=widths)) if widths.any() else float(apart[-1])
            largest = float(apart.max())
        until = objectives[1].cost(float(budgets[end])) if end < len(budgets) else None
        found.append(Stretch(objectives[1].cost(float(budgets[start])), until, leaders[start], mean, largest))
    return tuple(found)


def _is_ahead(costs: np.ndarray, others: np.ndarray, noise: float) -> np.ndarray:
    """Where attained costs are less beyond the noise; an infinite one has no point yet."""
    margin = noise * np.where(np.isfinite(costs) & np.isfinite(others), np.maximum(np.abs(costs), np.abs(others)), 0.0)
    return np.asarray(np.isfinite(costs) & (costs < others - margin))
