"""The benchmark of microcontrollers: its file says what a reader needs, and its shares are shares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("mcu_latency")


def test_errors_by_runtime_and_board(script: ModuleType, data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert script.main(["--data", str(data_folder), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["measurements"] == 102 == sum(found["measurements"] for found in result["latency"].values())
    assert 0.87 <= result["latency_coverage_of_all"] <= 0.93
    assert 0.87 <= result["energy_coverage_of_all"] <= 0.93
    inside = []
    for kernels, found in result["latency"].items():
        assert found["ours"]["mape"] < found["macs_only"]["mape"], kernels
        assert found["ours"]["mape"] < found["instructions"]["mape"], kernels
        errors = []
        for board in found["boards"].values():
            rows = board["networks"].values()
            own = [abs(row["left_out_ms"] / row["measured_ms"] - 1) for row in rows]
            assert board["ours"]["mape"] == pytest.approx(sum(own) / len(own))
            assert board["ours"]["max_error"] == pytest.approx(max(own))
            errors += own
            inside += [row["inside_its_interval"] for row in rows]
        assert found["ours"]["mape"] == pytest.approx(sum(errors) / len(errors))
    assert result["latency_coverage_of_all"] == pytest.approx(sum(inside) / len(inside))
