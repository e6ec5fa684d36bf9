"""Small runs of the benchmarks of the supernet: what they write is there and adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


def test_supernet_overhead(load_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = load_benchmark("supernet_overhead")
    out = tmp_path / "result.json"
    sizes = ["--architectures", "3", "--rounds", "2", "--batch", "4", "--extractions", "2"]
    assert script.main([*sizes, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["extraction"]["blocks"] == 20
    assert result["extraction"]["again_ms"] > 0
    rows = result["steps"]["rows"]
    assert len(rows) == 3 and [row["macs"] for row in rows] == sorted(row["macs"] for row in rows)
    for row in rows:
        assert row["ratio"].keys() == {"pass", "step_loop", "step_foreach", "step_fused"}
        assert row["updated_numbers"]["subnet"] <= row["updated_numbers"]["supernet"]
        assert all(row["subnet_ms"]["pass"] <= row["subnet_ms"][part] for part in row["ratio"])
    largest = rows[-1]["updated_numbers"]
    space = script.cifar_space()
    if space.parse(rows[-1]["architecture"]) == space.largest:
        assert largest["subnet"] == largest["supernet"]


def test_memory_of_segments(load_benchmark: Callable[[str], ModuleType]) -> None:
    script = load_benchmark("activation_checkpointing")
    trial = script.Pass("cifar_32px", batch=8, seed=0)
    trial.run(1)
    kept, allocated = ({n: measure(n) for n in (1, 4)} for measure in (trial.kept_bytes, trial.allocated_bytes))
    assert kept[4] < 0.5 * kept[1] and allocated[4] < 0.5 * allocated[1]
    assert kept[4] < allocated[4]
    if script.STATUS.exists() and not torch.cuda.is_available():
        assert script.resident_in_own_process("cifar_32px", 1, 8, 0, {}) > kept[1]


@pytest.mark.slow
def test_activation_checkpointing(load_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = load_benchmark("activation_checkpointing")
    out = tmp_path / "result.json"
    sizes = ["--networks", "cifar_32px", "--segments", "4", "--batch", "32", "--rounds", "1"]
    assert script.main([*sizes, "--out", str(out)]) == 0
    whole, parts = json.loads(out.read_text())["networks"]["cifar_32px"]["rows"]
    assert (whole["segments"], parts["segments"]) == (1, 4)
    assert all(value == 1.0 for name, value in whole.items() if name.endswith("_ratio"))
    assert parts["kept_ratio"] < 0.5 and parts["allocated_ratio"] < 0.5
    assert parts["kept_bytes"] < parts["allocated_bytes"]
    if Path("/proc/self/status").exists() and not torch.cuda.is_available():
        assert parts["resident_mapped_bytes"] > parts["kept_bytes"]
