"""How long each stage of a run took, and how much memory: RUN/stages.json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hardware_profiles.files import read_json, write_json


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Add the seconds of the block to what the stage took before it was stopped, and note the peak memory so far.

    A process that is killed outright adds nothing.
    """
    started = time.monotonic()
    try:
        yield
    finally:
        path = folder / "stages.json"
        stages = read_json(path) if path.exists() else {}
        before = stages.get(name)
        seconds = before["seconds"] if isinstance(before, dict) else 0.0
        stages[name] = {
            "seconds": round(seconds + time.monotonic() - started, 2),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(path, stages)


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process, or of one of its finished children, so far; None where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
