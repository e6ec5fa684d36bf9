"""Times and memory of stages add up over restarts."""

from __future__ import annotations

import time
from pathlib import Path

from hardware_profiles.files import read_json
from nas.stages import peak_memory_bytes, stage


def test_seconds_add_up_over_restarts(tmp_path: Path) -> None:
    for _ in range(2):
        with stage(tmp_path, "train"):
            time.sleep(0.05)
    with stage(tmp_path, "search"):
        pass
    stages = read_json(tmp_path / "stages.json")
    assert 0.1 <= stages["train"]["seconds"] < 1.0  # type: ignore[index]
    assert stages["search"]["seconds"] < 0.05  # type: ignore[index]


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_memory_bytes()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    after = peak_memory_bytes()
    assert before is not None and after is not None
    assert after - before >= 0 and after >= 64 * 2**20
