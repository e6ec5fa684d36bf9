"""The latency of a device that was measured ten times: how well the rest is ranked and how close it comes.

    python experiments/benchmarks/latency_transfer.py --table T.csv[.gz] --architecture-columns 'op_*' \\
        [--source-devices a,b,...] [--target-devices x,y,...] --samples 10 --draws 20 --json

Without --target-devices each source device in turn is the new one and the others are known (leave one out); without
--source-devices every numeric column of the table that can be a latency is a device. --join adds the columns of
another table (MACs, architecture columns); a table with one row a measurement is turned with --device-column and
--latency-column.

Protocol of HELP (arXiv 2106.08630): rows in a fixed order, the samples are drawn from rows 0-899 and the queries are
rows 900-1899; Spearman's rank correlation over the queries between the 10 % fastest and the 10 % slowest
(`spearman_mean`) and over all (`spearman_untrimmed_mean`). The order is a permutation with seed 0, since tables may be
sorted (`--order file`: as in the file). A shorter table is divided in the same proportion. HELP trims its samples by
the latencies of the new device, which nobody knows before measuring: here they are not trimmed.
`within_10pct` is the share of all queries predicted within 10 % of what was measured.

Methods:
    ours                  `choose_samples` from a random half of the pool, then `TransferredPredictor`; known devices
                          are known for the whole table, as smooth tables over the codes (`CodeTables`, that add
                          up to milliseconds or their logarithm, whichever is closer to what is left out), MACs where
                          there are any are one more of them, and the codes are the features
    ours_random_samples   the same with samples drawn at random
    ours_strict           `ours` without the other batch sizes of the same machine among the known devices
                          (columns that differ in a last _1, _2, _4, ... _1024); only where there are any
    ours_pool_sources     `ours` with devices known on the rows of the pool only
    samples_only          tables over the codes fitted on the random samples alone: no transfer
    macs                  the number of MACs (where there is such a column)
    count                 how often an option occurs in an architecture, or the value of a numeric column; the one
                          which ranks the pool best on the known devices
    own_table             no method, but what ten samples cannot beat by much: tables fitted on all measurements of the
                          device itself other than the queries
For `macs` and `count` a line through the ten random samples gives latencies; ranks are those of the number itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import about
from csv_tables import BadInput, check_numbers, joined, latency_names, listed, macs_column, matching, read_csv, turned

from hardware_profiles.files import write_json
from predictors import CodeTables, TransferredPredictor, choose_samples

POOL, QUERIES = 900, 1000
FEWEST_QUERIES = 40
FEW = 20  # measurements of a known device in the pool, with fewer of which all of its own are used
MOST_OPTIONS = 32  # a numeric column with more distinct values is cut into bins
BINS = 16
BATCH_SIZE = re.compile(r"_(1|2|4|8|16|32|64|128|256|512|1024)$")


@dataclass(frozen=True)
class Table:
    """Measurements: codes (n, d) of n architectures, latencies (n, D) of D devices (NaN: none), MACs (n,) if known."""

    codes: np.ndarray
    options: tuple[int, ...]
    labels: tuple[tuple[str, ...], ...]  # of the options of each choice
    devices: tuple[str, ...]
    latency_ms: np.ndarray
    macs: np.ndarray | None

    @cached_property
    def machines(self) -> tuple[str, ...]:
        return tuple(BATCH_SIZE.sub("", name) for name in self.devices)

    def beside(self, known: CodeTables, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What is known of architectures (rows,) beside a new device: tables of other devices, and MACs if positive."""
        latency = np.exp(known.log_ms(self.codes[rows]))[:, columns]
        return latency if self.usable_macs is None else np.column_stack([latency, self.usable_macs[rows]])

    @property
    def usable_macs(self) -> np.ndarray | None:
        return self.macs if self.macs is not None and (self.macs > 0).all() else None


@dataclass(frozen=True)
class Split:
    """Rows of a device that samples are drawn from, and those asked for."""

    pool: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True)
class Task:
    """One device as the new one, in one draw. `tables` know every device's latencies as they are allowed to."""

    table: Table
    split: Split
    target: int
    known: np.ndarray  # columns of the known devices
    seed: int
    samples: int

    @cached_property
    def random_samples(self) -> np.ndarray:
        """Positions in the pool."""
        return np.random.default_rng(self.seed).choice(len(self.split.pool), self.samples, replace=False)

    @cached_property
    def log_target(self) -> np.ndarray:
        return np.log(self.table.latency_ms[:, self.target])

    def measured(self, positions: np.ndarray) -> np.ndarray:
        return self.table.latency_ms[self.split.pool[positions], self.target]


Answer = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # ranking number, milliseconds, inside the interval


# methods -------------------------------------------------------------------------------------------------


def transferred(task: Task, known: CodeTables, columns: np.ndarray, chosen: bool) -> Answer:
    """Latencies of the queries by `TransferredPredictor`, the devices in `columns` being known as `known`."""
    table, pool, queries = task.table, task.split.pool, task.split.queries
    source_ms, measured_ms = table.beside(known, columns, pool), table.latency_ms[np.ix_(pool, columns)]
    half = np.random.default_rng(task.seed).permutation(len(pool))[: max(len(pool) // 2, task.samples)]

    def choose(known_ms: np.ndarray) -> np.ndarray:
        return half[choose_samples(known_ms[half], task.samples, task.seed)]

    positions = choose(source_ms) if chosen else task.random_samples
    machines = [table.machines[column] for column in columns]
    if table.usable_macs is not None:  # no device to learn from how far off predictions are
        measured_ms, machines = np.column_stack([measured_ms, np.full(len(pool), np.nan)]), [*machines, "macs"]
    predictor = TransferredPredictor().fit(
        source_ms,
        positions,
        task.measured(positions),
        features=known.encode(table.codes[pool]),
        groups=machines,
        measured_ms=measured_ms,
        choose=choose if chosen else None,
    )
    found = predictor.predict(table.beside(known, columns, queries), known.encode(table.codes[queries]))
    actual = task.table.latency_ms[queries, task.target]
    return found.mean_ms, found.mean_ms, (found.low_ms <= actual) & (actual <= found.high_ms)


def samples_only(task: Task) -> Answer:
    rows = task.split.pool[task.random_samples]
    return _own(task, rows)


def own_table(task: Task) -> Answer:
    measured = np.flatnonzero(np.isfinite(task.log_target))
    return _own(task, np.setdiff1d(measured, task.split.queries))


def _own(task: Task, rows: np.ndarray) -> Answer:
    tables = tables_of(task.table, rows, task.log_target[rows, None])
    latency = np.exp(tables.log_ms(task.table.codes[task.split.queries])[:, 0])
    return latency, latency, None


def single_number(task: Task, number: np.ndarray) -> Answer:
    """A number of each architecture (n,), and the line through it and the samples."""
    rows = task.split.pool[task.random_samples]
    inputs = np.column_stack([np.ones(len(rows)), number[rows]])
    offset, slope = np.linalg.lstsq(inputs, task.measured(task.random_samples), rcond=None)[0]
    asked = number[task.split.queries].astype(float)
    return asked, offset + slope * asked, None


def best_count(table: Table, pool: np.ndarray, known: np.ndarray) -> tuple[str, np.ndarray]:
    """The number that ranks the pool best on known devices, its name, and that number (n,), signed."""
    best, name, number = -1.0, "", np.zeros(len(table.codes))
    measured = np.isfinite(table.latency_ms[np.ix_(pool, known)]).sum(axis=0)
    rows = pool if measured.min() >= FEW else np.arange(len(table.codes))  # known ones have architectures of their own
    for label, count in single_numbers(table).items():
        found = [spearman(count[rows], table.latency_ms[rows, column]) for column in known]
        if abs(mean := float(np.mean(found))) > best:
            best, name, number = abs(mean), label, np.sign(mean or 1.0) * count
    return name, number


def single_numbers(table: Table) -> dict[str, np.ndarray]:
    """Numbers (n,) by name: how often each option occurs, and the value of each choice among numbers."""
    found: dict[str, np.ndarray] = {}
    for label in sorted({label for labels in table.labels for label in labels}):
        where = [labels.index(label) if label in labels else -1 for labels in table.labels]
        found[label] = (table.codes == np.array(where)).sum(axis=1).astype(float)
    for place, labels in enumerate(table.labels):
        try:
            values = np.array(list(map(float, labels)))
        except ValueError:  # names of operations
            continue
        found[f"choice {place}"] = values[table.codes[:, place]]
    return found


# scores --------------------------------------------------------------------------------------------------


def spearman(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Rank correlation where both are known; 0 where either is constant, since that ranks nothing."""
    from scipy.stats import spearmanr

    both = np.isfinite(predicted) & np.isfinite(actual)
    predicted, actual = predicted[both], actual[both]
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return 0.0
    return float(spearmanr(predicted, actual).statistic)


def trimmed(actual: np.ndarray) -> np.ndarray:
    """Rows between the 10 % fastest and the 10 % slowest."""
    order = np.argsort(actual, kind="stable")
    return order[int(0.1 * len(order)) : int(0.9 * len(order))]


def scored(answer: Answer, actual: np.ndarray) -> dict[str, float]:
    number, latency, inside = answer
    kept = trimmed(actual)
    result = {
        "spearman": spearman(number[kept], actual[kept]),
        "spearman_untrimmed": spearman(number, actual),
        "within_10pct": float((np.abs(latency / actual - 1) <= 0.1).mean()),
    }
    return result if inside is None else {**result, "coverage": float(inside.mean())}


def summary(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Over devices and draws, of device -> scores of each draw. The deviation is that of draws, devices averaged."""
    devices = {}
    for device, draws in scores.items():
        means = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
        devices[device] = {_mean_name(name): round(value, 4) for name, value in means.items()}
        devices[device]["spearman_std"] = round(float(np.std([draw["spearman"] for draw in draws])), 4)
    by_draw = np.array([[draw["spearman"] for draw in draws] for draws in scores.values()]).mean(axis=0)
    names = [name for name in next(iter(devices.values())) if name != "spearman_std"]
    means = {name: round(float(np.mean([device[name] for device in devices.values()])), 4) for name in names}
    return {**means, "spearman_std": round(float(by_draw.std()), 4), "devices": devices}


def _mean_name(name: str) -> str:
    return f"{name}_mean" if name.startswith("spearman") else name


def resolution_of(latency: np.ndarray) -> float | None:
    """The step of a clock that all latencies are multiples of, where they are few and evenly spaced; else None."""
    distinct = np.unique(latency[np.isfinite(latency)])
    if not 2 <= len(distinct) <= len(latency) / 10:
        return None
    step = float(np.diff(distinct).min())
    off = np.abs(distinct / step - np.round(distinct / step))
    return step if (off < 1e-3).all() else None


def rounding_ceiling(smooth: np.ndarray, step: float) -> float:
    """Rank correlation of latencies without noise and the same latencies rounded to the steps of the clock."""
    rounded = np.round(smooth / step) * step
    kept = trimmed(rounded)
    return spearman(smooth[kept], rounded[kept])


# the run -------------------------------------------------------------------------------------------------


def run(table: Table, sources: Sequence[str], targets: Sequence[str], samples: int, draws: int) -> dict[str, Any]:
    """Scores of all methods for each target, the known devices being the sources other than it."""
    whole = tables_of(table, np.arange(len(table.codes)), np.log(table.latency_ms))
    on_pool: dict[bytes, CodeTables] = {}
    scores: dict[str, dict[str, list[dict[str, float]]]] = {}
    told: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for device in targets:
        target = table.devices.index(device)
        split = split_of(table.latency_ms[:, target], samples, device)
        known = np.array([table.devices.index(name) for name in sources if name != device])
        strict = np.array([column for column in known if table.machines[column] != table.machines[target]])
        pool_key = split.pool.tobytes()
        if pool_key not in on_pool:
            on_pool[pool_key] = known_on(table, split.pool, whole)
        option, count = best_count(table, split.pool, known)
        methods: dict[str, Callable[[Task], Answer]] = {
            "ours": lambda task, c=known: transferred(task, whole, c, True),
            "ours_random_samples": lambda task, c=known: transferred(task, whole, c, False),
            "ours_strict": lambda task, c=strict: transferred(task, whole, c, True),
            "ours_pool_sources": lambda task, c=known, k=on_pool[pool_key]: transferred(task, k, c, True),
            "samples_only": samples_only,
            "macs": lambda task: single_number(task, table.macs),
            "count": lambda task, n=count: single_number(task, n),
            "own_table": own_table,
        }
        if table.macs is None:
            del methods["macs"]
        if not len(strict) or len(set(table.machines)) == len(table.machines):
            del methods["ours_strict"]
        actual = table.latency_ms[split.queries, target]
        for draw in range(draws):
            task = Task(table, split, target, known, draw, samples)
            for name, method in methods.items():
                rows = scores.setdefault(name, {}).setdefault(device, [])
                repeated = bool(rows) and name == "own_table"  # nothing in it is drawn
                rows.append(rows[0] if repeated else scored(method(task), actual))
        told[device] = {"known": len(known), "known_strict": len(strict), "counted": option}
        told[device] |= {"pool": len(split.pool), "queries": len(split.queries)} | clock(table, split, target)
        seconds = time.perf_counter() - started
        print(f"{device}: {scores['ours'][device][-1]['spearman']:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    methods_told = {name: summary(by_device) for name, by_device in scores.items()}
    return {"methods": methods_told, "targets": told, "seconds": round(time.perf_counter() - started, 1)}


def tables_of(table: Table, rows: np.ndarray, log_ms: np.ndarray) -> CodeTables:
    """Smooth latencies of devices measured as log_ms (rows, D)."""
    return CodeTables.fit(table.codes[rows], log_ms, table.options, milliseconds=True)


def known_on(table: Table, pool: np.ndarray, whole: CodeTables) -> CodeTables:
    """Tables of all devices fitted on the pool; of a device with hardly any measurement there, those of the whole."""
    logs = np.log(table.latency_ms[pool])
    few = np.isfinite(logs).sum(axis=0) < FEW
    logs[:, few] = whole.log_ms(table.codes[pool])[:, few]
    return tables_of(table, pool, logs)


def clock(table: Table, split: Split, target: int) -> dict[str, float]:
    """The resolution of a device's clock and the rank correlation that it allows, where it is coarse."""
    latency = table.latency_ms[:, target]
    step = resolution_of(latency)
    if step is None:
        return {}
    measured = np.flatnonzero(np.isfinite(latency))
    tables = tables_of(table, measured, np.log(latency[measured, None]))
    smooth = np.exp(tables.log_ms(table.codes[split.queries])[:, 0])
    return {"resolution": step, "spearman_allowed_by_resolution": round(rounding_ceiling(smooth, step), 4)}


def split_of(latency: np.ndarray, samples: int, device: str) -> Split:
    rows = np.flatnonzero(np.isfinite(latency))
    pool = min(POOL, len(rows) * POOL // (POOL + QUERIES))
    queries = min(QUERIES, len(rows) - pool)
    if pool < 2 * samples or queries < FEWEST_QUERIES:
        raise BadInput(
            f"{device} has {len(rows)} measurements: a pool of {pool} and {queries} queries; "
            f"expected at least {2 * samples} in the pool for {samples} samples, and {FEWEST_QUERIES} queries"
        )
    return Split(rows[:pool], rows[pool : pool + queries])


# reading -------------------------------------------------------------------------------------------------


def read_table(asked: argparse.Namespace) -> Table:
    """The table that the arguments describe; raises BadInput."""
    frame = read_csv(asked.table)
    device_names = latency_names(frame, (asked.on, asked.macs_column))
    if turns(frame, asked):
        frame, device_names = turned(frame, key_columns(frame, asked), asked.device_column, asked.latency_column)
    for path in asked.join:
        other = read_csv(path)
        if turns(other, asked):
            other, more = turned(other, key_columns(other, asked), asked.device_column, asked.latency_column)
            device_names += more
        frame = joined(frame, other, asked.on, path, ", or --device-column")
    columns = matching(frame, asked.architecture_columns)
    wanted = [*listed(asked.source_devices), *listed(asked.target_devices)]
    if asked.device_column is None:
        others = [str(name) for name in frame.columns if name not in columns]
        check_numbers(frame, wanted if asked.source_devices else others, asked.table)
    candidates = [name for name in device_names if name not in columns]
    devices = tuple(dict.fromkeys([*wanted, *(() if asked.source_devices else candidates)]))
    for name in devices:
        if name not in frame or not pd.api.types.is_numeric_dtype(frame[name]):
            raise BadInput(f"no device column {name!r}; numeric columns are {', '.join(candidates)}")
    if not devices:
        raise BadInput("no numeric column can be a latency; name them with --source-devices")
    macs = macs_column(frame, asked.macs_column)
    frame = frame.dropna(subset=columns)
    if asked.order == "shuffled":
        frame = frame.iloc[np.random.default_rng(0).permutation(len(frame))]
    coded = [coded_column(frame[name]) for name in columns]
    latency = frame[list(devices)].to_numpy(float)
    if (latency <= 0).any() or np.isinf(latency).any():
        bad = [name for name, column in zip(devices, latency.T, strict=True) if (column <= 0).any()]
        raise BadInput(f"expected positive latencies, got others in {', '.join(bad) or 'some column'}")
    return Table(
        np.column_stack([codes for codes, _ in coded]),
        tuple(len(labels) for _, labels in coded),
        tuple(labels for _, labels in coded),
        devices,
        latency,
        None if macs is None else frame[macs].to_numpy(float),
    )


def turns(frame: pd.DataFrame, asked: argparse.Namespace) -> bool:
    return asked.device_column is not None and asked.device_column in frame


def key_columns(frame: pd.DataFrame, asked: argparse.Namespace) -> list[str]:
    """What tells the architecture in a table with one row a measurement."""
    return [asked.on] if asked.on else matching(frame, asked.architecture_columns)


def coded_column(column: pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes of a column and what they stand for; numbers of many values are cut into bins of equal shares."""
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > MOST_OPTIONS:
        column = pd.qcut(column, BINS, duplicates="drop").astype(str)
    codes, labels = pd.factorize(column, sort=True)
    return codes.astype(np.int64), tuple(map(str, labels))


# the command ---------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", type=Path, required=True, help="CSV, one row an architecture, one column a device")
    parser.add_argument("--architecture-columns", required=True, help="names or patterns, separated by commas")
    parser.add_argument("--source-devices", help="columns, separated by commas; all that can be by default")
    parser.add_argument("--target-devices", help="columns, separated by commas; by default leave one source out")
    parser.add_argument("--samples", type=int, default=10, help="measurements of the new device")
    parser.add_argument("--draws", type=int, default=20, help="repetitions, with seeds 0, 1, ...")
    parser.add_argument("--macs-column", help="by default the first column with macs or flops in its name")
    parser.add_argument("--join", type=Path, action="append", default=[], help="another CSV with more columns")
    parser.add_argument("--on", help="the column by which tables are joined")
    parser.add_argument("--device-column", help="of a table with one row a measurement: the device's name")
    parser.add_argument("--latency-column", help="of a table with one row a measurement: the latency")
    parser.add_argument("--order", choices=("shuffled", "file"), default="shuffled", help="of the rows")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    return parser.parse_args(arguments)


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.samples < 4 or asked.draws < 1:
        raise BadInput(f"expected at least 4 samples and 1 draw, got {asked.samples} and {asked.draws}")
    table = read_table(asked)
    sources = listed(asked.source_devices) or [d for d in table.devices if d not in listed(asked.target_devices)]
    targets = listed(asked.target_devices) or sources
    for device in targets:
        if not [name for name in sources if name != device]:
            raise BadInput(f"no known device is left for {device}; expected at least one other device")
    result = run(table, sources, targets, asked.samples, asked.draws)
    return {
        **about(range(asked.draws)),
        "architectures": len(table.codes),
        "order": asked.order,
        "samples": asked.samples,
        "leave_one_out": not asked.target_devices,
        "source_devices": sources,
        "target_devices": targets,
        **result,
    }


def as_text(result: Mapping[str, Any]) -> str:
    lines = [f"{'method':22}{'spearman':>9}{'+-':>7}{'untrimmed':>11}{'within 10%':>12}{'coverage':>10}"]
    for name, told in result["methods"].items():
        coverage = f"{told['coverage']:10.3f}" if "coverage" in told else ""
        lines.append(
            f"{name:22}{told['spearman_mean']:9.3f}{told['spearman_std']:7.3f}{told['spearman_untrimmed_mean']:11.3f}"
            f"{told['within_10pct']:12.3f}{coverage}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    try:
        result = measured(asked)
    except BadInput as error:
        print(f"latency_transfer: {error}", file=sys.stderr)
        return 2
    if asked.out:
        write_json(asked.out, result)
    print(json.dumps(result, indent=1) if asked.json else as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
