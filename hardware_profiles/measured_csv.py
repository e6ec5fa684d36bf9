"""Measurements in a CSV file: made by other means, kept, or shared.

    architecture,latency_ms
    "resolution=24,stage1.depth=2",12.3

A row is one measurement of one architecture; several rows of one are repeats of it.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from hardware_profiles.files import write_text
from hardware_profiles.measurement import Measurement, Provenance
from search_spaces import Architecture, InvalidArchitecture, SearchSpace

NUMBERS = ("latency_ms", "p50_ms", "p95_ms", "spread", "rounds", "runs", "outliers", "anchor_ms")
CONDITIONS = ("device", "runtime", "threads", "hardware")  # the same in all rows
COLUMNS = ("architecture", "id", *NUMBERS, *CONDITIONS, "date")
IGNORED = "note"
COUNTS = {"rounds": 1, "runs": 1, "outliers": 0}  # whole numbers, and the lowest of each
MOST_TOLD = 5  # bad rows in one message


class InvalidMeasurements(ValueError):
    """A CSV file that does not hold measurements of this space on this device."""


class _BadRow(ValueError):
    pass


@dataclass(frozen=True, slots=True)
class _Row:
    architecture: Architecture
    numbers: Mapping[str, float]
    date: str

    def number(self, name: str) -> float:
        """A figure of the row; what it does not tell is the latency."""
        return self.numbers.get(name, self.numbers["latency_ms"])


def read_measurements(
    path: Path,
    space: SearchSpace,
    *,
    device: str,
    runtime: str,
    threads: int = 1,
    hardware: str = "",
    known: Iterable[Architecture] = (),
) -> dict[Architecture, Measurement]:
    """The measurements in a CSV file, one for each architecture, in the order of the file.

    Several rows of one architecture become one measurement: the median of their `latency_ms`, with their scaled
    median absolute deviation over it as the spread.

    Args:
        path: the file; docs/measure_a_device.md lists the columns.
        space: whose architectures.
        device, threads: what the measurements must be of, where the file says.
        runtime, hardware: what they are of where the file does not say.
        known: architectures that a row may name by `id` alone.

    Raises InvalidMeasurements naming the lines that are wrong, what they hold and what was expected, or that
    the file cannot be read.
    """
    by_id = {architecture.id: architecture for architecture in known}
    said = {"device": device, "threads": str(threads)}
    rows: dict[Architecture, list[_Row]] = {}
    bad: list[str] = []
    count = 0
    for line, cells in _lines(path):
        count += 1
        try:
            row = _row(cells, space, by_id)
            _agree(cells, said)
        except _BadRow as error:
            bad.append(f"line {line}: {error}")
        else:
            rows.setdefault(row.architecture, []).append(row)
    if bad:
        more = f"; and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
        told = f"{count - len(bad)} of {count} rows are measurements of {space.name}"
        raise InvalidMeasurements(f"{path}: {'; '.join(bad[:MOST_TOLD])}{more} ({told})")
    if not rows:
        raise InvalidMeasurements(f"{path}: expected measurements below the header, got none")
    conditions = (device, said.get("runtime", runtime), threads, 1)
    processor = said.get("hardware", hardware)
    found = {}
    for architecture, repeats in rows.items():
        date, anchors = max(row.date for row in repeats), _given(repeats, "anchor_ms")
        anchor_ms = float(np.median(anchors)) if anchors else None
        provenance = Provenance(*conditions, _precision(space, architecture), processor, date, anchor_ms)
        found[architecture] = _combined(repeats, provenance)
    return found


def write_measurements(path: Path, measurements: Mapping[Architecture, Measurement]) -> None:
    """Write a CSV file that `read_measurements` reads back; raises ValueError for measurements that do not mix."""
    if len({measurement.provenance.key for measurement in measurements.values()}) > 1:
        raise ValueError("expected measurements of one device, runtime, number of threads and hardware; got several")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for architecture, m in measurements.items():
        p = m.provenance
        numbers = (m.latency_ms, m.p50_ms, m.p95_ms, m.spread, m.rounds, m.runs_per_round, m.outliers, p.anchor_ms)
        writer.writerow([architecture, architecture.id, *numbers, p.device, p.runtime, p.threads, p.cpu, p.date])
    write_text(path, text.getvalue())


def write_unmeasured(path: Path, architectures: Iterable[Architecture]) -> None:
    """Write a CSV file of architectures whose latencies are still to be filled in."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("architecture", "id", "latency_ms"))
    writer.writerows((architecture, architecture.id, "") for architecture in architectures)
    write_text(path, text.getvalue())


def _combined(repeats: Sequence[_Row], provenance: Provenance) -> Measurement:
    latencies_ms = np.array([row.numbers["latency_ms"] for row in repeats])
    middle = float(np.median(latencies_ms))
    spread = repeats[0].numbers.get("spread")
    if len(repeats) > 1:
        spread = 1.4826 * float(np.median(np.abs(latencies_ms - middle))) / middle
    return Measurement(
        latency_ms=middle,
        p50_ms=float(np.percentile([row.number("p50_ms") for row in repeats], 50)),
        p95_ms=float(np.percentile([row.number("p95_ms") for row in repeats], 95)),
        spread=spread,
        rounds=int(sum(row.numbers.get("rounds", 1) for row in repeats)),
        runs_per_round=int(np.median([row.numbers.get("runs", 1) for row in repeats])),
        provenance=provenance,
        outliers=int(sum(_given(repeats, "outliers"))),
    )


def _given(rows: Iterable[_Row], name: str) -> list[float]:
    return [row.numbers[name] for row in rows if name in row.numbers]


def _precision(space: SearchSpace, architecture: Architecture) -> str:
    """The one precision of the layers that have weights, else mixed."""
    names = set(space.lower(architecture).precisions.values())
    return names.pop() if len(names) == 1 else "mixed"


# rows --------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> cell without empty ones) of each row; a row of another length has its cells under ''."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                pairs = zip(header, cells, strict=True) if len(cells) == len(header) else [("", ",".join(row))]
                yield reader.line_num, {name: cell for name, cell in pairs if cell}
    except OSError as error:
        raise InvalidMeasurements(f"{path} cannot be read ({error.strerror}); expected a CSV file") from None
    except UnicodeDecodeError as error:
        raise InvalidMeasurements(f"{path}: expected a CSV file in UTF-8 ({error})") from None
    except csv.Error as error:
        raise InvalidMeasurements(
            f"{path}: line {reader.line_num}: expected comma-separated values ({error})"
        ) from None


def _check_header(path: Path, header: Sequence[str]) -> None:
    for name in header:
        if name not in (*COLUMNS, IGNORED):
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(COLUMNS)}, or {IGNORED} for remarks"
            raise InvalidMeasurements(f"{path}: unknown column {name!r}; {hint}")
        if header.count(name) > 1:
            raise InvalidMeasurements(f"{path}: two columns are called {name!r}")
    if "latency_ms" not in header or not {"architecture", "id"} & set(header):
        raise InvalidMeasurements(
            f"{path}: expected a first line that names the columns architecture (or id) and latency_ms, "
            f"got {','.join(header)!r}"
        )


def _row(cells: Mapping[str, str], space: SearchSpace, by_id: Mapping[str, Architecture]) -> _Row:
    if "" in cells:
        raise _BadRow(
            f"expected as many values as the header has names, got {cells['']!r}; "
            "an architecture stands in double quotes, for its commas"
        )
    numbers = {name: _number(name, cells[name]) for name in NUMBERS if name in cells}
    if "latency_ms" not in numbers:
        raise _BadRow("latency_ms: expected a number above 0, got nothing")
    date = cells.get("date", "")
    try:
        if date:
            datetime.fromisoformat(date)
    except ValueError:
        raise _BadRow(f"date: expected one such as 2026-05-31 or 2026-05-31T12:00:00+00:00, got {date!r}") from None
    return _Row(_architecture(cells, space, by_id), numbers, date)


def _architecture(cells: Mapping[str, str], space: SearchSpace, by_id: Mapping[str, Architecture]) -> Architecture:
    text, id_ = cells.get("architecture"), cells.get("id")
    if text is None and id_ is None:
        raise _BadRow("expected an architecture or an id, got neither")
    if text is None:
        if id_ not in by_id:
            raise _BadRow(f"id: {id_!r} is none of the {len(by_id)} architectures asked for; give the architecture")
        return by_id[str(id_)]
    try:
        architecture = space.parse(text)
    except InvalidArchitecture as error:
        raise _BadRow(f"architecture: {error}") from None
    if id_ not in (None, architecture.id):
        raise _BadRow(f"id: expected {architecture.id!r}, that of the architecture in {space.name}, got {id_!r}")
    return architecture


def _number(name: str, cell: str) -> float:
    lowest, whole = COUNTS.get(name, 0), name in COUNTS
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    right = math.isfinite(value) and value >= lowest and (not whole or value.is_integer())
    if not right or (name.endswith("_ms") and value <= 0):
        kind = f"a whole number of {lowest} or more" if whole else "a number of 0 or more"
        raise _BadRow(f"{name}: expected {'a number above 0' if name.endswith('_ms') else kind}, got {cell!r}")
    return value


def _agree(cells: Mapping[str, str], said: dict[str, str]) -> None:
    """Keep what a row says of the conditions; raises _BadRow where something else was asked for or said before."""
    for name in CONDITIONS:
        if name in cells and said.setdefault(name, cells[name]) != cells[name]:
            raise _BadRow(
                f"{name}: expected {said[name]!r}, got {cells[name]!r}; "
                "measurements of different conditions are not mixed"
            )
