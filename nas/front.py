"""Pareto fronts: sets of evaluations of which none is better than another in every objective."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hardware_profiles.files import read_json, write_json
from nas.costs import FIGURES, Figure, Infeasible, Limit, Objective, UnknownFigure, parse_limit, parse_objective
from nas.dominance import dominated, hypervolume

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from nas.comparison import Comparison

SCHEMA = 1


@dataclass(frozen=True)
class Evaluation:
    """What is known of one architecture.

    `architecture` is its text, read back by `SearchSpace.parse`. `predicted` holds what a search believed of
    the figures that have since been measured.
    """

    id: str
    architecture: str
    figures: Mapping[str, Figure]
    precisions: Mapping[str, str]
    predicted: Mapping[str, Figure] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        return self.figures[key].value


def costs_of(evaluations: Sequence[Evaluation], objectives: Sequence[Objective]) -> np.ndarray:
    """Objective values turned so that less is better, shape (evaluations, objectives)."""
    rows = [[objective.cost(evaluation[objective.key]) for objective in objectives] for evaluation in evaluations]
    return np.asarray(rows, dtype=float).reshape(len(evaluations), len(objectives))


@dataclass(frozen=True, repr=False)
class ParetoFront:
    """Non-dominated evaluations, with what they were searched for.

    `others` were evaluated too, but are dominated or beyond a limit; they are kept for pictures, and for
    `nas.remeasure`, where they may turn out to be on the front. `noise` is the relative difference of repeated
    measurements by objective. `left` are the ids of those that were on the front until they were measured.
    """

    objectives: tuple[Objective, ...]
    points: tuple[Evaluation, ...]
    others: tuple[Evaluation, ...] = ()
    space: str = ""
    supernet_sha256: str = ""
    limits: tuple[Limit, ...] = ()
    noise: Mapping[str, float] | None = None
    left: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Counts and ranges; `to_frame` has the points."""
        ranges = [
            f"{objective.key} {min(values):.4g} to {max(values):.4g}"
            for objective in self.objectives
            if (values := [point[objective.key] for point in self.points])
        ]
        counts = f"{len(self.points)} points", *ranges, f"{len(self.others)} others"
        return f"<ParetoFront: {', '.join(counts)}>"

    @property
    def departed(self) -> tuple[Evaluation, ...]:
        """What a search had on its front, and what is not on it any longer since it was measured."""
        return tuple(evaluation for evaluation in self.others if evaluation.id in self.left)

    @classmethod
    def of(
        cls,
        evaluations: Iterable[Evaluation],
        objectives: Sequence[Objective],
        *,
        limits: Sequence[Limit] = (),
        noise: Mapping[str, float] | None = None,
        space: str = "",
        supernet_sha256: str = "",
    ) -> ParetoFront:
        """The non-dominated ones among the evaluations that meet the limits.

        They are sorted by the second objective (usually a latency), or by the only one.
        """
        evaluations = list(evaluations)
        feasible = [e for e in evaluations if meets(e, limits)]
        relative = np.array([(noise or {}).get(objective.key, 0.0) for objective in objectives])
        beaten = dominated(costs_of(feasible, objectives), relative)
        kept = [e for e, lost in zip(feasible, beaten, strict=True) if not lost]
        on_front = {id(e) for e in kept}
        axis = objectives[min(1, len(objectives) - 1)]
        kept.sort(key=lambda e: (e[axis.key], e.id))
        rest = tuple(e for e in evaluations if id(e) not in on_front)
        return cls(tuple(objectives), tuple(kept), rest, space, supernet_sha256, tuple(limits), noise or None)

    @classmethod
    def from_run(cls, folder: str | Path) -> ParetoFront:
        """The front of a run directory; raises ValueError where nothing was searched yet."""
        path = Path(folder) / "front.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no front yet; run 'nas search {folder}'")
        return cls.load(path)

    @classmethod
    def from_study(
        cls,
        study: optuna.Study,
        objectives: Sequence[Objective | str] | None = None,
        *,
        noise: Mapping[str, float] | None = None,
    ) -> ParetoFront:
        """The front of the finished trials of any Optuna study; see `nas.front_sources.front_of_study`."""
        from nas.front_sources import front_of_study

        return front_of_study(study, objectives, noise=noise)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        objectives: Sequence[Objective | str],
        *,
        id_column: str | None = None,
        architecture_columns: Sequence[str] = (),
        limits: Sequence[Limit | str] = (),
    ) -> ParetoFront:
        """The front of a table with a row an architecture; see `nas.front_sources.front_of_csv`."""
        from nas.front_sources import front_of_csv

        return front_of_csv(
            Path(path), objectives, id_column=id_column, architecture_columns=architecture_columns, limits=limits
        )

    def __len__(self) -> int:
        return len(self.points)

    def filter(self, limits: Iterable[Limit]) -> ParetoFront:
        """The points that meet all limits; may be empty. Raises UnknownFigure for a figure the front does not have."""
        limits = tuple(limits)
        for limit in limits:
            self._known(limit.key)
        kept = tuple(point for point in self.points if meets(point, limits))
        others = (*self.others, *(point for point in self.points if not meets(point, limits)))
        left = tuple(evaluation.id for evaluation in self.departed if meets(evaluation, limits))
        limits = tuple(dict.fromkeys((*self.limits, *limits)))
        return replace(self, points=kept, others=others, limits=limits, left=left)

    def per_device(self) -> dict[str, ParetoFront]:
        """The front of each device that an objective names: by the objectives without a device, and its own.

        What no other beats for one device is beaten by none for all of them, so these are points of this front, of
        one search under the limits of all devices; the rest are among the `others`.
        """
        names = dict.fromkeys(o.device for o in self.objectives if o.device is not None)
        return {name: self._of_device(name) for name in names}

    def of_device(self, name: str) -> ParetoFront:
        """The front of one device; raises UnknownFigure for a device that no objective names."""
        fronts = self.per_device()
        if name not in fronts:
            known = ", ".join(fronts) or "none"
            raise UnknownFigure(f"no objective of the front is of the device {name!r}; those of devices are of {known}")
        return fronts[name]

    def _of_device(self, name: str) -> ParetoFront:
        own = tuple(o for o in self.objectives if o.device in (None, name))
        cut = ParetoFront.of(self.points, own, noise=self.noise)
        return replace(self, objectives=own, points=cut.points, others=(*self.others, *cut.others))

    def best(self, objective: str, limits: Mapping[str, float] | Iterable[Limit] = ()) -> Evaluation:
        """The point that is best in one objective among those that meet the limits.

        Limits may be a mapping from a figure to its bound, in the direction in which the figure is better.
        Raises Infeasible, with the nearest point, when no point meets them, and UnknownFigure for a figure that
        the front does not have.
        """
        wanted = self.objective(objective)
        self._known(wanted.key)
        limits = tuple(self._bounds(limits))
        kept = self.filter(limits).points
        if not kept:
            raise Infeasible(nearest_message(self.points, limits))
        return min(kept, key=lambda point: (wanted.cost(point[wanted.key]), self._rivals(point, wanted)))

    def _rivals(self, point: Evaluation, wanted: Objective) -> tuple[float, ...]:
        return tuple(o.cost(point[o.key]) for o in self.objectives if o.key != wanted.key)

    def knee(self) -> Evaluation:
        """The point with the least sum of costs, each scaled to 0..1 over the front.

        With two objectives that is the point farthest from the line through the extremes (I. Das, 1999).
        Raises Infeasible for an empty front.
        """
        if not self.points:
            raise Infeasible(nearest_message((), ()))
        costs = costs_of(self.points, self.objectives)
        span = costs.max(axis=0) - costs.min(axis=0)
        scaled = (costs - costs.min(axis=0)) / np.where(span > 0, span, 1.0)
        return self.points[int(scaled.sum(axis=1).argmin())]

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Volume dominated by the front up to a reference value for each objective, by its key.

        Raises UnknownFigure when the reference lacks an objective.
        """
        missing = [objective.key for objective in self.objectives if objective.key not in reference]
        if missing:
            raise UnknownFigure(f"the reference lacks {', '.join(missing)}; give a value for every objective")
        corner = np.array([objective.cost(reference[objective.key]) for objective in self.objectives])
        return hypervolume(costs_of(self.points, self.objectives), corner)

    def against(self, other: ParetoFront, reference: Mapping[str, float] | None = None) -> Comparison:
        """This front and another with the same objectives, compared; see `nas.comparison.compare`."""
        from nas.comparison import compare

        return compare(self, other, reference)

    def find(self, id_: str) -> Evaluation:
        """The point with this id, or the only one whose id starts so."""
        exact = [point for point in self.points if point.id == id_]
        found = exact or [point for point in self.points if point.id.startswith(id_)]
        if len(found) != 1:
            raise UnknownFigure(f"{len(found)} points of the front have an id that starts with {id_!r}; expected one")
        return found[0]

    def to_frame(self) -> pd.DataFrame:
        """One row a point: id, figures by key, their origins, what the search believed before, the architecture."""
        import pandas as pd

        rows = []
        for point in self.points:
            row: dict[str, object] = {"id": point.id}
            row |= {key: figure.value for key, figure in point.figures.items()}
            row |= {f"{key} origin": figure.origin for key, figure in point.figures.items()}
            row |= {f"{key} before": figure.value for key, figure in point.predicted.items()}
            rows.append(row | {"architecture": point.architecture})
        return pd.DataFrame(rows)

    def plot(self, path: str | Path, kind: str = "front") -> None:
        """Draw the front to a PNG (or any suffix matplotlib knows); kinds are those of `nas.front_pictures.KINDS`.

        Raises ValueError for another kind, or a front that it cannot show.
        """
        from nas.front_pictures import draw

        draw(self, Path(path), kind)

    def objective(self, text: str) -> Objective:
        """An objective of the front by its key, or any figure that has a direction of its own."""
        return next((o for o in self.objectives if o.key == text.strip()), None) or parse_objective(text)

    def limit(self, text: str) -> Limit:
        """A limit on a figure, also on one that only this front has; raises UnknownFigure or ValueError."""
        return limit_on(text, self.objectives, self._keys())

    def _bounds(self, limits: Mapping[str, float] | Iterable[Limit]) -> Iterable[Limit]:
        if not isinstance(limits, Mapping):
            return limits
        return [
            Limit(o.name, ">=" if o.direction == "maximize" else "<=", float(bound), o.device, foreign=o.foreign)
            for key, bound in limits.items()
            for o in [self.objective(key)]
        ]

    def _keys(self) -> set[str]:
        return {key for point in (*self.points, *self.others) for key in point.figures}

    def _known(self, key: str) -> None:
        known = {key for point in self.points for key in point.figures}
        if self.points and key not in known:
            raise UnknownFigure(f"the front has no {key}; it has {', '.join(sorted(known))}")

    # files -----------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        write_json(path, to_dict(self))

    @classmethod
    def load(cls, path: Path) -> ParetoFront:
        """Read what `save` wrote; raises ValueError for a file that is something else."""
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise ValueError(f"{path} is no front of schema {SCHEMA}; got schema {content.get('schema')!r}")
        try:
            objectives = [
                Objective(o["name"], o["direction"], o["device"], foreign=o.get("unit", "") is None)
                for o in content["objectives"]  # type: ignore[attr-defined]
            ]
            points = tuple(_from_dict(point) for point in content["points"])  # type: ignore[attr-defined]
            others = tuple(_from_dict(point) for point in content["others"])  # type: ignore[attr-defined]
            keys = {key for point in (*points, *others) for key in point.figures}
            limits = tuple(_limit_from(text, objectives, keys) for text in content["limits"])  # type: ignore[attr-defined]
            noise = {str(key): float(value) for key, value in content["noise"].items()}  # type: ignore[attr-defined]
            space, sha256 = str(content["space"]), str(content["supernet_sha256"])
            left = tuple(map(str, content.get("left", ())))  # type: ignore[call-overload]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a complete front ({error!r}); run the search again") from None
        return cls(
            tuple(objectives),
            points,
            others,
            space,
            sha256,
            limits,
            noise or None,
            left,
        )


def meets(evaluation: Evaluation, limits: Iterable[Limit]) -> bool:
    """Whether an evaluation is within all limits."""
    return all(limit.violation(evaluation.figures[limit.key]) <= 0 for limit in limits)


def nearest_message(evaluations: Sequence[Evaluation], limits: Sequence[Limit]) -> str:
    """Which limits bind, and what the architecture that violates them least reaches.

    Evaluations may lack a figure that was not worth finding out; those that have all of them are preferred.
    """
    if not evaluations:
        return "the front has no point; search again with other limits"

    def known(evaluation: Evaluation) -> list[Limit]:
        return [limit for limit in limits if limit.key in evaluation.figures]

    def rank(evaluation: Evaluation) -> tuple[int, float]:
        judged = known(evaluation)
        return -len(judged), sum(max(0.0, limit.violation(evaluation.figures[limit.key])) for limit in judged)

    nearest = min(evaluations, key=rank)
    judged = known(nearest)
    broken = [limit for limit in judged if limit.violation(nearest.figures[limit.key]) > 0]
    reached = ", ".join(dict.fromkeys(f"{limit.key}={_shown(limit, nearest)}" for limit in judged))
    return (
        f"no architecture found meets {', '.join(map(str, limits))}; what binds is {', '.join(map(str, broken))}.\n"
        f"The nearest reachable point is {nearest.id}: {reached}"
    )


def _shown(limit: Limit, evaluation: Evaluation) -> str:
    """The value in full where a limit holds for the end of its interval."""
    figure = evaluation.figures[limit.key]
    end = figure.high if limit.operator == "<=" else figure.low
    return f"{figure.value:.6g}" + (f" (up to {end:.6g})" if limit.confidence and end is not None else "")


def limit_on(text: str, objectives: Sequence[Objective], keys: Collection[str]) -> Limit:
    """A limit written as text, where figures of a foreign table or study may be named too.

    Args:
        objectives: if one of them is foreign, so is every other figure that is not an objective of ours.
        keys: all figures that can be named, the objectives' included.

    Raises UnknownFigure or ValueError with the right form.
    """
    name, *rest = re.split(r"\s*([<>]=)\s*", text.strip(), maxsplit=1)
    ours = {objective.key for objective in objectives if not objective.foreign}
    foreign_table = any(objective.foreign for objective in objectives)
    if name not in keys or name in ours or (name.partition("@")[0] in FIGURES and not foreign_table):
        return parse_limit(text)
    try:
        operator, number = rest
        return Limit(name, operator, float(number), foreign=True)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"cannot read the limit {text!r}; write {name}<=NUMBER or {name}>=NUMBER") from None


def to_dict(front: ParetoFront) -> dict[str, object]:
    """The documented form of front.json."""
    return {
        "schema": SCHEMA,
        "space": front.space,
        "supernet_sha256": front.supernet_sha256,
        "objectives": [
            {"name": o.name, "direction": o.direction, "unit": o.unit or None, "device": o.device}
            for o in front.objectives
        ],
        "limits": [str(limit) for limit in front.limits],
        "noise": dict(front.noise or {}),
        "per_device": {name: [point.id for point in part.points] for name, part in front.per_device().items()},
        "points": [_to_dict(point) for point in front.points],
        "left": list(front.left),
        "others": [_to_dict(point) for point in front.others],
    }


def _to_dict(point: Evaluation) -> dict[str, object]:
    return {
        "id": point.id,
        "architecture": point.architecture,
        "values": {key: figure.to_dict() for key, figure in point.figures.items()},
        "predicted": {key: figure.to_dict() for key, figure in point.predicted.items()},
        "precisions": dict(point.precisions),
    }


def _from_dict(point: Mapping[str, object]) -> Evaluation:
    values, predicted = (
        {key: Figure(**figure) for key, figure in point[name].items()}  # type: ignore[attr-defined]
        for name in ("values", "predicted")
    )
    precisions = dict(point["precisions"])  # type: ignore[call-overload]
    return Evaluation(str(point["id"]), str(point["architecture"]), values, precisions, predicted)


def _limit_from(text: str, objectives: Sequence[Objective], keys: Collection[str]) -> Limit:
    bare, confidence = re.fullmatch(r"(.*?)(?: at ([0-9.]+)%)?", text).groups()  # type: ignore[union-attr]
    return replace(limit_on(bare, objectives, keys), confidence=float(confidence) / 100 if confidence else None)
