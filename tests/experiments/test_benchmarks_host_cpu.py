"""The host CPU benchmark on a made-up processor: what it writes adds up."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hardware_profiles.measurement import Measurement
from search_spaces import Architecture, SearchSpace
from tests.nas import tiny

module = importlib.import_module("nas.profile")


def processor(noise: float) -> Any:
    """Latency by MACs and layers; each call differs by noise."""
    rng = np.random.default_rng(0)

    def measure(
        space: SearchSpace, architectures: Sequence[Architecture], *_: Any, **__: Any
    ) -> dict[str, Measurement]:
        found = {}
        for one in architectures:
            network = space.lower(one)
            ms = 0.003 * len(network.layers) + sum(
                layer.macs * (5e-7 if layer.precision.is_quantized else 1e-6) for layer in network.layers
            )
            found[one.id] = tiny.measurement(ms * float(np.exp(rng.normal(0, noise))))
        return found

    return measure


def test_what_it_writes_is_true_of_the_processor(
    load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = load_benchmark("host_cpu")
    for place in (module, script):
        monkeypatch.setattr(place, "measure_untrained", processor(0.01))
    monkeypatch.setattr(script, "MILLION", 1000)
    monkeypatch.setattr(script, "JUDGED_ON", 10)
    monkeypatch.setattr(script, "DRAWS", 2)
    out = tmp_path / "out.json"
    assert script.main(["--recipe", "quickstart", "--samples", "52", "--held-out", "40", "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    for name in ("fp32", "int8", "mixed"):
        held_out = told["held_out"][name]
        assert held_out["networks"] == 40
        assert held_out["ours"]["within_10_percent"] == 1
        assert held_out["ours"]["median_error"] < 0.02 < held_out["macs"]["median_error"]
        assert 0.005 < held_out["repeat"]["median"] < 0.02 <= held_out["repeat"]["max"]
        assert held_out["ours"]["coverage_of_90_percent_interval"] > 0.75
    covered = [each["ours"]["coverage_of_90_percent_interval"] for each in told["held_out"].values()]
    assert told["coverage_of_90_percent_interval"] == pytest.approx(sum(covered) / 3)
    assert told["plan"]["measured"] == 64
    assert told["plan"]["drawn"]["spearman"][0] > 0.9 < told["plan"]["half_picked"]["spearman"][0]
    assert set(told["million_predictions_s"]) == {"empty_table", "filled_table"}
