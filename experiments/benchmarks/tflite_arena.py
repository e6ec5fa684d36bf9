"""The arena that TensorFlow Lite Micro plans for a .tflite file.

Needs the package tflite-micro, which is not a dependency of the project.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "tflite_micro"
ARENA_HEAD = re.compile(r"Arena allocation head (\d+) bytes")


def has_tflite_micro() -> bool:
    """Whether the package is installed."""
    return find_spec(PACKAGE) is not None


def arena_head_bytes(path: Path) -> int:
    """Bytes of activations in the arena that TensorFlow Lite Micro plans for a .tflite file.

    Raises RuntimeError where it prints no such number.
    """
    interpreter = import_module(PACKAGE).runtime.Interpreter.from_file(str(path))
    with _standard_streams() as printed:
        interpreter.print_allocations()
        text = printed()
    found = ARENA_HEAD.search(text)
    if not found:
        raise RuntimeError(f"{path.name}: expected the size of the arena's head, tflite-micro printed {text!r}")
    return int(found[1])


@contextmanager
def _standard_streams() -> Iterator[Any]:
    """What C code prints meanwhile: it writes to the process's own streams, below Python's."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)

        def printed() -> str:
            ctypes.CDLL(None).fflush(None)
            file.seek(0)
            return file.read().decode()

        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield printed
        finally:
            ctypes.CDLL(None).fflush(None)
            for target, source in enumerate(kept, start=1):
                os.dup2(source, target)
                os.close(source)
