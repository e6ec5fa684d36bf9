"""Tables of measurements as rows of texts, and the error for what a script cannot work with."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO


class BadInput(ValueError):
    """A file or an argument that a script cannot work with."""


def read_rows(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, compressed if it ends with .gz; an absent value is an empty text.

    Raises BadInput for a file that cannot be read or lacks one of `columns`.
    """
    try:
        with _opened(path) as stream:
            reader = csv.DictReader(stream, restval="")
            rows, names = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as CSV ({error})") from None
    if missing := [name for name in columns if name not in names]:
        raise BadInput(f"{path}: no column {', '.join(map(repr, missing))}; columns are {', '.join(names)}")
    return rows


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def positive(row: Mapping[str, str], column: str, path: Path) -> float:
    """A number of a row; raises BadInput for anything else."""
    try:
        number = float(row[column])
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BadInput(f"{path}: expected positive numbers in {column}, got {row[column]!r}")
    return number
