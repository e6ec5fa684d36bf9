"""What the benchmarks of tables share: their files and columns as arguments, and bad input told in one line."""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from common import finish

from experiments.measurements import BadInput

NOT_DEVICES = re.compile(r"(^|_)(i?dx|index|id|macs|flops|params|std|acc|accuracy|unnamed)(_|$|:)", re.IGNORECASE)
MACS = re.compile(r"(^|_)(macs|flops)(_|$)", re.IGNORECASE)


# tables --------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # pandas' errors of reading are ValueErrors
        raise BadInput(f"{path} cannot be read as CSV ({' '.join(str(error).split())})") from None
    if frame.empty:
        raise BadInput(f"{path} has a header and no rows; expected a row an architecture or a measurement")
    return frame


def check_numbers(frame: pd.DataFrame, names: Sequence[str], where: object) -> None:
    """Refuse columns of numbers that have some text in them, with the line of the first."""
    for name in names:
        if name in frame and not pd.api.types.is_numeric_dtype(frame[name]):
            wrong = (frame[name].notna() & pd.to_numeric(frame[name], errors="coerce").isna()).to_numpy()
            if 0 < wrong.sum() < len(frame) / 10:
                row = int(wrong.argmax())
                raise BadInput(f"{where}: line {row + 2}: {name}: expected a number, got {frame[name].iloc[row]!r}")


def joined(frame: pd.DataFrame, other: pd.DataFrame, on: str | None, path: Path, otherwise: str = "") -> pd.DataFrame:
    """The frame with the columns of `other` that it lacks; `otherwise` ends the error for several rows of one."""
    if on is None or on not in frame or on not in other:
        raise BadInput(f"--join {path} needs --on with a column that both tables have; got {on!r}")
    if other[on].duplicated().any():
        raise BadInput(f"{path} has several rows of one {on}; expected one row each{otherwise}")
    return frame.merge(other[[on, *(name for name in other.columns if name not in frame)]], on=on, how="left")


def turned(frame: pd.DataFrame, key: Sequence[str], device: str, latency: str | None) -> tuple[pd.DataFrame, list[str]]:
    """One row an architecture, one column a device, of a table with one row a measurement; and those columns."""
    if missing := [name for name in (latency, *key) if name not in frame]:
        raise BadInput(f"no column {', '.join(map(repr, missing))}; columns are {', '.join(frame.columns)}")
    wide = frame.pivot_table(index=list(key), columns=device, values=latency, aggfunc="median").reset_index()
    wide.columns.name = None
    return wide, [name for name in wide.columns if name not in key]


# columns -------------------------------------------------------------------------------------------------


def listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def matching(frame: pd.DataFrame, patterns: str) -> list[str]:
    """Columns that match patterns separated by commas, in the order of the patterns, then of the table."""
    names: dict[str, None] = {}
    for pattern in listed(patterns):
        found = [str(name) for name in frame.columns if fnmatch.fnmatchcase(str(name), pattern)]
        if not found:
            raise BadInput(
                f"no architecture column matches {pattern!r}; columns are {', '.join(map(str, frame.columns))}"
            )
        names |= dict.fromkeys(found)
    return list(names)


def latency_names(frame: pd.DataFrame, others: Sequence[str | None]) -> list[str]:
    """Numeric columns that can be latencies: none of the others, no index, MACs, parameters, accuracy or deviation."""
    numeric = [str(name) for name in frame.select_dtypes("number").columns]
    return [name for name in numeric if name not in others and not NOT_DEVICES.search(name)]


def macs_column(frame: pd.DataFrame, asked: str | None) -> str | None:
    if asked is None:
        return next((str(name) for name in frame.select_dtypes("number").columns if MACS.search(str(name))), None)
    if asked not in frame:
        raise BadInput(f"no column {asked!r} of MACs; columns are {', '.join(map(str, frame.columns))}")
    return asked


def present(frame: pd.DataFrame, names: Sequence[str], where: object) -> None:
    if missing := [name for name in names if name not in frame]:
        raise BadInput(f"{where}: no column {missing[0]!r}; columns are {', '.join(map(str, frame.columns))}")


def as_many(option: str, text: str, names: Sequence[str]) -> list[str]:
    """The columns that an option names, one for each of `names`."""
    found = listed(text)
    if len(found) != len(names):
        raise BadInput(f"{option} {text!r}: expected {len(names)} separated by commas ({', '.join(names)})")
    return found


# the command ---------------------------------------------------------------------------------------------


def file_options(parser: argparse.ArgumentParser, files: Mapping[str, tuple[str, str]]) -> None:
    """An option for each file, option -> (its name in the folder of --data, what it is), and --data."""
    for option, (name, what) in files.items():
        parser.add_argument(f"--{option}", type=Path, help=f"{what}, as {name}")
    parser.add_argument(
        "--data",
        type=Path,
        help=f"the folder of {', '.join(name for name, _ in files.values())}, of which those are taken that no option "
        "names; by default $FITNEST_DATA where none is named",
    )


def files_of(asked: argparse.Namespace, files: Mapping[str, tuple[str, str]]) -> dict[str, Path | None]:
    """The path of each of `file_options`; None where neither it nor a folder is given."""
    given: dict[str, Path | None] = {option: getattr(asked, option) for option in files}
    folder = asked.data
    if folder is None and not any(given.values()):
        if not os.environ.get("FITNEST_DATA"):
            options = ", ".join(f"--{option}" for option in files)
            raise BadInput(f"name the files ({options}), or their folder: --data DIR, or the variable FITNEST_DATA")
        folder = Path(os.environ["FITNEST_DATA"])
    return {option: path or (folder and folder / files[option][0]) for option, path in given.items()}


def chosen(asked: Sequence[str], known: Sequence[str], where: object) -> list[str]:
    """The devices asked for, all that are known by default."""
    if unknown := [name for name in asked if name not in known]:
        raise BadInput(f"{where}: no device {unknown[0]!r}; devices are {', '.join(known)}")
    return list(dict.fromkeys(asked)) or list(known)


def command(
    script: str, benchmark: Callable[[argparse.Namespace], Mapping[str, Any]], asked: argparse.Namespace
) -> int:
    """Print and write the result of a benchmark; returns the exit status, 2 after a line about bad input."""
    try:
        result = benchmark(asked)
    except BadInput as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    finish(result, asked.out)
    return 0
