"""Fronts of what others evaluated: any Optuna study, any table with a row an architecture."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from nas.costs import FIGURES, Figure, Limit, Objective, UnknownFigure, parse_objective
from nas.front import Evaluation, ParetoFront, limit_on

if TYPE_CHECKING:
    import optuna

DIRECTIONS: Mapping[str, str] = {"max": "maximize", "maximize": "maximize", "min": "minimize", "minimize": "minimize"}


def read_objective(text: str) -> Objective:
    """`NAME:max` or `NAME:min` for a column of any name and unit; without a direction, one of our own figures.

    Raises UnknownFigure for a figure that is not ours and has no direction.
    """
    name, _, direction = text.strip().rpartition(":")
    if name and direction in DIRECTIONS:
        return Objective(name.strip(), DIRECTIONS[direction], foreign=True)  # type: ignore[arg-type]
    try:
        return parse_objective(text)
    except UnknownFigure as error:
        if name:
            raise UnknownFigure(f"{text}: expected {name}:max or {name}:min, got the direction {direction!r}") from None
        raise UnknownFigure(
            f"{error}; a column that is none of these needs its direction: {text}:max or :min"
        ) from None


def _objectives(given: Sequence[Objective | str]) -> list[Objective]:
    read = [read_objective(item) if isinstance(item, str) else item for item in given]
    keys = [objective.key for objective in read]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"objectives {', '.join(keys) or '(none)'}: expected one or more, each of them once")
    return read


# Optuna ----------------------------------------------------------------------------------------------------


def front_of_study(
    study: optuna.Study,
    objectives: Sequence[Objective | str] | None = None,
    *,
    noise: Mapping[str, float] | None = None,
) -> ParetoFront:
    """The front of the finished trials of a study, whoever made it.

    Trials that break a constraint are among the `others`; unfinished, pruned and failed ones, and those with an
    infinite value, are left out. The architecture is what the trial drew, as `name=value,...`. Trials of
    `nas.search` bring their figures and architectures along; those that it refused unseen have no accuracy and are
    left out.

    Args:
        objectives: one for each objective of the study, in its order and direction. Without them they are foreign
            ones called by the metric names of the study, or value_0, value_1, ...
        noise: relative difference of repeated evaluations, by objective.

    Raises ValueError for objectives that do not fit the study, and for a study of `nas.search` without any.
    """
    directions = [direction.name.lower() for direction in study.directions]
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if objectives is None:
        if any("figures" in trial.user_attrs for trial in trials):
            raise ValueError(
                f"the study {study.study_name} is of nas.search, which does not write its objectives there; "
                'give them in order, such as objectives=["accuracy", "latency_ms@host-cpu"]'
            )
        names = study.metric_names or [f"value_{i}" for i in range(len(directions))]
        chosen = [Objective(n, d, foreign=True) for n, d in zip(names, directions, strict=True)]  # type: ignore[arg-type]
    else:
        chosen = _objectives(objectives)
        if [objective.direction for objective in chosen] != directions:
            given = ", ".join(f"{objective.direction} {objective.key}" for objective in chosen)
            raise ValueError(f"the study would {', '.join(directions)}; expected objectives that do, got {given}")
    feasible: list[Evaluation] = []
    infeasible: list[Evaluation] = []
    for trial in trials:
        evaluation = _of_trial(trial, chosen)
        if evaluation is not None:
            broken = any(violation > 0 for violation in trial.constraints.values())
            (infeasible if broken else feasible).append(evaluation)
    front = ParetoFront.of(feasible, chosen, noise=noise, space=study.study_name)
    return ParetoFront(front.objectives, front.points, (*front.others, *infeasible), front.space, noise=front.noise)


def _of_trial(trial: optuna.trial.FrozenTrial, objectives: Sequence[Objective]) -> Evaluation | None:
    """The evaluation that a finished trial is; None where an objective is not known or not finite."""
    held = trial.user_attrs.get("figures")
    if held is not None:
        figures = {key: Figure(**figure) for key, figure in held.items()}
    else:
        figures = {o.key: Figure(v, None, None, "given") for o, v in zip(objectives, trial.values, strict=True)}
    if not all(o.key in figures and math.isfinite(figures[o.key].value) for o in objectives):
        return None
    drawn = ",".join(f"{name}={value}" for name, value in trial.params.items())
    return Evaluation(f"trial{trial.number}", str(trial.user_attrs.get("architecture", drawn)), figures, {})


# tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, list[str]], ...]  # line of the file, cells

    def column(self, name: str) -> int:
        if name not in self.header:
            shown = ", ".join(self.header[:30]) + (", ..." if len(self.header) > 30 else "")
            raise ValueError(f"{self.path} has no column {name!r}; it has {shown}")
        return self.header.index(name)

    def numbers(self, name: str, *, share: bool) -> list[float]:
        """A column as numbers; raises ValueError, with the line, for a cell that is none."""
        at, found = self.column(name), []
        for line, cells in self.rows:
            try:
                value = float(cells[at])
            except ValueError:
                value = math.nan
            if not math.isfinite(value) or (share and not 0 <= value <= 1):
                wanted = f"a share from 0 to 1 (or {name}:max for another unit)" if share else "a finite number"
                raise ValueError(f"{self.path}: line {line}: {name}: expected {wanted}, got {cells[at]!r}")
            found.append(value)
        return found


def front_of_csv(
    path: Path,
    objectives: Sequence[Objective | str],
    *,
    id_column: str | None = None,
    architecture_columns: Sequence[str] = (),
    limits: Sequence[Limit | str] = (),
) -> ParetoFront:
    """The front of a table: comma-separated, a header, a row an architecture; gzip-compressed if it ends in .gz.

    Args:
        objectives: such as `acc:max`, a column of any unit; or, without a direction, one of our figures, such as
            `accuracy` (0..1) or `latency_ms@host-cpu`.
        id_column: what a row is called; `id` if there is such a column, else its line.
        architecture_columns: names or patterns such as `op_*`. One column is the text of the architecture, several
            make one, `name=value,...`; `architecture` if there is such a column.
        limits: on any column. Rows beyond one are among the `others`.

    Raises ValueError for a file, column or cell that is not as expected, with the line; UnknownFigure for an
    objective that is neither a figure of ours nor has a direction; OSError where the file cannot be read.
    """
    table, chosen = _read(path), _objectives(objectives)
    asked = [limit_on(item, chosen, table.header) if isinstance(item, str) else item for item in limits]
    items: list[Objective | Limit] = [*chosen, *asked]
    columns = {
        item.key: table.numbers(item.key, share=not item.foreign and FIGURES[item.name][0] == "fraction")
        for item in items
    }
    ids = _ids(table, id_column)
    architectures = _architectures(table, architecture_columns)
    evaluations = [
        Evaluation(id_, text, {k: Figure(v, None, None, "given") for k, v in zip(columns, row, strict=True)}, {})
        for id_, text, *row in zip(ids, architectures, *columns.values(), strict=True)
    ]
    return ParetoFront.of(evaluations, chosen, limits=asked, space=path.name)


def _ids(table: _Table, column: str | None) -> list[str]:
    if column is None and "id" not in table.header:
        return [f"line{line}" for line, _ in table.rows]
    at = table.column(column or "id")
    return [cells[at] for _, cells in table.rows]


def _architectures(table: _Table, patterns: Sequence[str]) -> list[str]:
    if not patterns and "architecture" in table.header:
        patterns = ("architecture",)
    chosen: list[str] = []
    for pattern in patterns:
        found = [name for name in table.header if fnmatchcase(name, pattern)]
        chosen += found or [table.header[table.column(pattern)]]
    places = [(name, table.column(name)) for name in dict.fromkeys(chosen)]
    if len(places) == 1:
        return [cells[places[0][1]] for _, cells in table.rows]
    return [",".join(f"{name}={cells[at]}" for name, at in places) for _, cells in table.rows]


def _read(path: Path) -> _Table:
    rows = list(_lines(path))
    if not rows:
        raise ValueError(f"{path}: expected a header and a row an architecture, got an empty file")
    header = tuple(name.strip() for name in rows[0][1])
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}: line 1: two columns are called {name!r}; rename one")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise ValueError(f"{path}: line {line}: expected {len(header)} cells as in the header, got {len(cells)}")
    return _Table(path, header, tuple(rows[1:]))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, stripped cells) of each line that is not empty."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8, gzip-compressed if it ends in .gz ({error})") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: expected comma-separated values ({error})") from None
