"""How much of the true front of a table a search finds with so many evaluations.

    python experiments/benchmarks/tabular_search.py --table T.csv[.gz] --architecture-columns 'op_*' \\
        --objective acc:max --objective dev:min [--report acc_test:max] \\
        --budgets 50,100,150,300 --seeds 10 --methods ours,linas,nsga2,tpe,random --json

Searches see the objectives. Shares are those of the hypervolume of what was evaluated in that of the whole table, with
the column of `--report`, if there is one, in place of the first objective of its direction (validation accuracy to
search by, test accuracy to report). The reference point is given with `--reference`, for a report by its own name or
by that of its objective; by default it is what 99 % of the table keep. `--join` adds the columns of another table.

Methods:
    ours         `nas.PredictorGuidedSampler`, told the reference point
    ours_untold  the same without it
    linas        LINAS as its authors' code does it (`linas.py`); what it measures twice counts twice
    linas_unique LINAS with what was measured kept out of the populations
    nsga2, tpe, random   Optuna's, as they are by default; what they ask for twice counts twice

A row that a search asks for and the table lacks is replaced by the first row that differs in the fewest choices;
`ours` is told which rows there are. `--canonical` names a column that is the same for architectures that are the same
network (isomorphic cells): `ours` then evaluates one of each.

`evaluations_for_linas` says how many evaluations the mean of a method takes to reach what LINAS has at each budget.
Each finished search is a line beside the result, and is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from common import RESULTS, about
from csv_tables import BadInput, check_numbers, joined, matching, read_csv
from linas import linas
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from hardware_profiles.files import write_json
from nas.front import hypervolume
from nas.guided_sampler import PredictorGuidedSampler
from predictors.proposals import non_dominated

KEPT = 0.99  # of the architectures are at least as good as the default reference
MOST_CATEGORIES = 12  # a column of more distinct numbers is an integer parameter
STEP = 2  # evaluations between two points of a curve


@dataclass(frozen=True)
class Column:
    """A column of values, its direction, and the worst value that counts."""

    name: str
    sign: float  # -1 where more is better
    reference: float


@dataclass(frozen=True)
class Table:
    """Architectures: codes (n, d), costs (n, m) to search by and to report (less is better), and classes (n,)."""

    codes: np.ndarray
    options: tuple[tuple[str, ...], ...]  # of each choice
    numeric: tuple[bool, ...]
    costs: np.ndarray
    reported: np.ndarray
    reference: np.ndarray  # (m,) costs
    reported_reference: np.ndarray
    classes: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.asarray(self.codes.max(axis=0) + 1)

    @property
    def digest(self) -> str:
        """Of all that a search can see: lines of another table, or of other columns, are not taken for its own."""
        found = hashlib.sha256(repr((self.options, self.numeric)).encode())
        arrays = (self.codes, self.costs, self.reported, self.reference, self.reported_reference)
        for array in (*arrays, np.unique(self.classes, return_inverse=True)[1]):
            found.update(repr((array.shape, array.dtype.str)).encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]

    @cached_property
    def places(self) -> dict[bytes, int]:
        return {row.tobytes(): place for place, row in enumerate(self.codes)}

    @cached_property
    def first_of_class(self) -> np.ndarray:
        """(n,) the first row of the class of each row."""
        _, first, inverse = np.unique(self.classes, return_index=True, return_inverse=True)
        return np.asarray(first[inverse])

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            f"choice{i:02}": IntDistribution(0, len(options) - 1) if numeric else CategoricalDistribution(options)
            for i, (options, numeric) in enumerate(zip(self.options, self.numeric, strict=True))
        }

    def place(self, codes: np.ndarray) -> int:
        """The row of codes (d,), or the nearest."""
        found = self.places.get(np.ascontiguousarray(codes, np.int64).tobytes())
        return int((self.codes != codes).sum(axis=1).argmin()) if found is None else found

    def has(self, codes: np.ndarray) -> np.ndarray:
        return np.array([row.tobytes() in self.places for row in codes])

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        places = [self.places.get(row.tobytes()) for row in np.ascontiguousarray(codes, np.int64)]
        rows = zip(codes, places, strict=True)
        return np.array([row if place is None else self.codes[self.first_of_class[place]] for row, place in rows])


# searches ------------------------------------------------------------------------------------------------


def asked_of(table: Table, sampler: optuna.samplers.BaseSampler, budget: int) -> list[int]:
    """The rows that a sampler of Optuna asks for, in their order."""
    study = optuna.create_study(directions=["minimize"] * table.costs.shape[1], sampler=sampler)
    rows: list[int] = []
    for _ in range(budget):
        trial = study.ask()
        codes = np.array([
            int(distribution.to_internal_repr(trial._suggest(name, distribution)))
            for name, distribution in table.distributions.items()
        ])  # fmt: skip
        rows.append(table.place(codes))
        study.tell(trial, table.costs[rows[-1]].tolist())
    return rows


def guided(table: Table, budget: int, seed: int, *, told: bool = True) -> list[int]:
    sampler = PredictorGuidedSampler(
        seed,
        search_space=table.distributions,
        reference=table.reference.tolist() if told else None,
        canonical=table.canonical if len(np.unique(table.classes)) < len(table.codes) else None,
        allowed=table.has if len(table.codes) < np.prod(table.counts.astype(float)) else None,
    )
    rows = asked_of(table, sampler, budget)
    if len(set(rows)) < len(rows):
        raise AssertionError(f"{len(rows) - len(set(rows))} of {len(rows)} evaluations were repeated")
    return rows


def by_linas(table: Table, budget: int, seed: int, *, unique: bool = False) -> list[int]:
    rows: list[int] = []

    def measure(codes: np.ndarray) -> np.ndarray:
        fresh = [table.place(row) for row in codes]
        rows.extend(fresh)
        return table.costs[fresh]

    linas(measure, table.counts, budget, np.random.default_rng(seed), unique=unique)
    return rows


def by_optuna(sampler: Callable[..., optuna.samplers.BaseSampler], table: Table, budget: int, seed: int) -> list[int]:
    return asked_of(table, sampler(seed=seed), budget)


METHODS: Mapping[str, Callable[[Table, int, int], list[int]]] = {
    "ours": guided,
    "ours_untold": partial(guided, told=False),
    "linas": by_linas,
    "linas_unique": partial(by_linas, unique=True),
    "nsga2": partial(by_optuna, optuna.samplers.NSGAIISampler),
    "tpe": partial(by_optuna, optuna.samplers.TPESampler),
    "random": partial(by_optuna, optuna.samplers.RandomSampler),
}


def searched(table: Table, method: str, seed: int, budgets: Sequence[int]) -> dict[str, Any]:
    """One search: shares at the budgets, the curve of shares, how many evaluations were of their own, and seconds."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    started = time.perf_counter()
    rows = METHODS[method](table, max(budgets), seed)
    seconds = time.perf_counter() - started
    whole = hypervolume(front_of(table.reported), table.reported_reference)

    def share(count: int) -> float:
        return hypervolume(table.reported[rows[:count]], table.reported_reference) / whole

    points = sorted({*range(STEP, max(budgets) + 1, STEP), *budgets})
    return {
        "shares": {str(count): round(share(count), 5) for count in points},
        "unique_share": len(set(rows)) / len(rows),
        "seconds": round(seconds, 2),
    }


def front_of(costs: np.ndarray) -> np.ndarray:
    """Rows of (n, m) costs that no other is better than, in pieces that fit into memory."""
    front = costs[:0]
    for piece in np.array_split(costs[np.argsort(costs.sum(axis=1))], max(1, len(costs) // 500)):
        both = np.concatenate([front, piece])
        front = both[non_dominated(both)]
    return front


# pieces of work ------------------------------------------------------------------------------------------


def run(
    table: Table, described: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], budgets: Sequence[int],
    log: Path, workers: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The lines of all searches; those that have no line yet are done now."""
    items = [{**described, "budgets": list(budgets), "method": m, "seed": s} for s in seeds for m in methods]
    done = lines_of(log)
    missing = [item for item in items if key(item) not in done]
    log.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(searched, table, item["method"], item["seed"], budgets): item for item in missing}
        for count, job in enumerate(as_completed(jobs), start=1):
            item = jobs[job]
            line = {"item": item, **job.result()}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            done[key(item)] = line
            last = line["shares"][str(max(budgets))]
            print(f"{count} of {len(missing)}: {item['method']}, seed {item['seed']}: {last:.4f}", file=sys.stderr)
    return [done[key(item)] for item in items]


def key(item: Mapping[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)


def lines_of(log: Path) -> dict[str, dict[str, Any]]:
    texts = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {key(line["item"]): line for line in map(json.loads, texts)}


def summary(lines: Sequence[Mapping[str, Any]], methods: Sequence[str], budgets: Sequence[int]) -> dict[str, Any]:
    """Means and standard deviations over seeds, of each method."""
    told: dict[str, Any] = {}
    curves: dict[str, dict[int, float]] = {}
    for method in methods:
        own = [line for line in lines if line["item"]["method"] == method]
        shares = {int(count): [line["shares"][count] for line in own] for count in own[0]["shares"]}
        curves[method] = {count: float(np.mean(values)) for count, values in shares.items()}
        told[method] = {
            "hypervolume_share": {
                str(b): [round(float(np.mean(shares[b])), 5), round(float(np.std(shares[b])), 5)] for b in budgets
            },
            "unique_share": round(float(np.mean([line["unique_share"] for line in own])), 4),
            "seconds": round(float(np.mean([line["seconds"] for line in own])), 2),
        }
    for method in methods if "linas" in methods else ():
        told[method]["evaluations_for_linas"] = {
            str(b): next((c for c, share in sorted(curves[method].items()) if share >= curves["linas"][b]), None)
            for b in budgets
        }
    return told


# reading -------------------------------------------------------------------------------------------------


def read_table(asked: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    """The table that the arguments describe, and what names it in results; raises BadInput."""
    frame = read_csv(asked.table)
    for path in asked.join:
        frame = joined(frame, read_csv(path), asked.on, path)
    choices = matching(frame, asked.architecture_columns)
    objectives = [named(text, frame) for text in asked.objective]
    reports = list(objectives)
    for name, sign in (named(text, frame) for text in asked.report):
        alike = [i for i, column in enumerate(reports) if column[1] == sign and column == objectives[i]]
        if not alike:
            raise BadInput(f"--report {name}: no objective of its direction is left to replace")
        reports[alike[0]] = (name, sign)
    extra = [asked.canonical] if asked.canonical else []
    if missing := [name for name in extra if name not in frame]:
        raise BadInput(f"no column {missing[0]!r}; columns are {', '.join(map(str, frame.columns))}")
    frame = frame.dropna(subset=[*choices, *(n for n, _ in [*objectives, *reports]), *extra]).reset_index(drop=True)
    if frame.empty:
        raise BadInput(f"no row of {asked.table} has all of {', '.join([*choices, *(n for n, _ in reports)])}")
    given = dict(parsed_reference(text) for text in asked.reference)
    unknown = set(given) - {name for name, _ in [*objectives, *reports]}
    if unknown:
        raise BadInput(f"--reference for {', '.join(sorted(unknown))}, which is no objective and no report")
    searched_by = [Column(name, sign, reference_of(frame, name, sign, given, name)) for name, sign in objectives]
    reported = [
        Column(name, sign, reference_of(frame, name, sign, given, objective))
        for (name, sign), (objective, _) in zip(reports, objectives, strict=True)
    ]
    columns = [pd.factorize(frame[name], sort=True) for name in choices]
    codes = np.column_stack([column for column, _ in columns]).astype(np.int64)
    if len(np.unique(codes, axis=0)) < len(codes):
        raise BadInput(f"several rows have the same {', '.join(choices)}; expected one row an architecture")
    table = Table(
        codes,
        tuple(tuple(map(str, options)) for _, options in columns),
        tuple(pd.api.types.is_numeric_dtype(frame[n]) and frame[n].nunique() > MOST_CATEGORIES for n in choices),
        *(np.column_stack([c.sign * frame[c.name].to_numpy(float) for c in cs]) for cs in (searched_by, reported)),
        *(np.array([c.sign * c.reference for c in cs]) for cs in (searched_by, reported)),
        frame[asked.canonical].to_numpy() if asked.canonical else np.arange(len(frame)),
    )
    if not (table.reported < table.reported_reference).all(axis=1).any():
        raise BadInput(f"nothing in the table is better than the reference, {'; '.join(map(told, reported))}")
    described = {
        "table": asked.table.name,
        "architectures": len(frame),
        "digest": table.digest,
        "objectives": [told(c) for c in searched_by],
        "reported": [told(c) for c in reported],
        "canonical": asked.canonical,
    }
    return table, described


def told(column: Column) -> str:
    return f"{column.name}:{'max' if column.sign < 0 else 'min'}, reference {column.reference:.6g}"


def named(text: str, frame: pd.DataFrame) -> tuple[str, float]:
    """NAME:max or NAME:min as a column and its sign."""
    name, _, direction = text.rpartition(":")
    if direction not in ("max", "min"):
        raise BadInput(f"{text!r}: expected NAME:max or NAME:min")
    check_numbers(frame, [name], "the table")
    if name not in frame or not pd.api.types.is_numeric_dtype(frame[name]):
        numeric = ", ".join(map(str, frame.select_dtypes("number").columns))
        raise BadInput(f"no column of numbers {name!r}; there are {numeric}")
    return name, -1.0 if direction == "max" else 1.0


def parsed_reference(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition(":")
    try:
        return name, float(number)
    except ValueError:
        raise BadInput(f"--reference {text!r}: expected NAME:NUMBER") from None


def reference_of(frame: pd.DataFrame, name: str, sign: float, given: Mapping[str, float], objective: str) -> float:
    if name in given or objective in given:
        return given.get(name, given.get(objective, np.nan))
    return float(np.quantile(frame[name], KEPT if sign > 0 else 1 - KEPT))


# the command ---------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", type=Path, required=True, help="CSV, one row an architecture")
    parser.add_argument("--architecture-columns", required=True, help="names or patterns, separated by commas")
    parser.add_argument("--objective", action="append", required=True, help="NAME:max or NAME:min; repeat it")
    parser.add_argument("--report", action="append", default=[], help="what shares are told of, NAME:max or NAME:min")
    parser.add_argument("--reference", action="append", default=[], help="NAME:NUMBER, the worst value that counts")
    parser.add_argument("--budgets", default="50,100,150,300", help="evaluations, separated by commas")
    parser.add_argument("--seeds", type=int, default=10, help="searches with seeds 0, 1, ... of each method")
    parser.add_argument("--methods", default="ours,linas,nsga2,tpe,random", help=", ".join(METHODS))
    parser.add_argument("--join", type=Path, action="append", default=[], help="another CSV with more columns")
    parser.add_argument("--on", help="the column by which tables are joined")
    parser.add_argument("--canonical", help="the column that names the class of architectures that are the same")
    parser.add_argument("--workers", type=int, default=1, help="searches at once, one process each")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")
    parser.add_argument("--out", type=Path, help="where the JSON goes; by default into experiments/results")
    return parser.parse_args(arguments)


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    methods = [name.strip() for name in asked.methods.split(",")]
    if unknown := [name for name in methods if name not in METHODS]:
        raise BadInput(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    try:
        budgets = sorted({int(part) for part in asked.budgets.split(",")})
    except ValueError:
        raise BadInput(f"--budgets {asked.budgets!r}: expected numbers separated by commas") from None
    table, described = read_table(asked)
    if not 0 < budgets[0] <= budgets[-1] <= len(np.unique(table.classes)) or asked.seeds < 1 or asked.workers < 1:
        raise BadInput(
            f"budgets {budgets}, {asked.seeds} seeds and {asked.workers} workers; expected at least 1 of each, "
            f"and no more evaluations than the {len(np.unique(table.classes))} architectures of the table"
        )
    out = asked.out or RESULTS / f"tabular_search_{'_'.join(slug(text) for text in asked.objective)}.json"
    seeds = range(asked.seeds)
    log = out.with_name(f"{out.stem}_runs.jsonl")
    lines = run(table, described, methods, seeds, budgets, log, asked.workers)
    result = {"methods": summary(lines, methods, budgets), **described, **about(seeds)}
    write_json(out, result)
    return result


def slug(text: str) -> str:
    """An objective as part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in text.rpartition(":")[0])


def as_text(result: Mapping[str, Any]) -> str:
    budgets = list(next(iter(result["methods"].values()))["hypervolume_share"])
    lines = [f"{'method':14}" + "".join(f"{b:>16}" for b in budgets) + f"{'unique':>9}{'seconds':>9}"]
    for name, row in result["methods"].items():
        shares = "".join(f"{100 * mean:10.2f} ±{100 * std:4.2f}" for mean, std in row["hypervolume_share"].values())
        lines.append(f"{name:14}{shares}{row['unique_share']:9.3f}{row['seconds']:9.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    try:
        result = measured(asked)
    except BadInput as error:
        print(f"tabular_search: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if asked.json else as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
