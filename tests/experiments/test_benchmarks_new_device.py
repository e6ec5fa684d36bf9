"""The benchmark of new devices on a made-up processor: what is measured once, what is judged, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hardware_profiles import load_device
from hardware_profiles.measurement import Measurement
from search_spaces import Architecture, SearchSpace
from tests.nas import tiny

HOST = load_device("host-cpu")


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("new_device")


@pytest.fixture
def calls(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[Architecture]]:
    """What was measured together, by a processor of 3 us a layer, 1 ns a MAC in fp32 and 0.4 in int8."""
    made: list[list[Architecture]] = []

    def measure(
        space: SearchSpace, architectures: Sequence[Architecture], *_: Any, **__: Any
    ) -> dict[str, Measurement]:
        made.append(list(architectures))
        found = {}
        for one in architectures:
            layers = space.lower(one).layers
            ms = sum(3e-3 + layer.macs * (4e-7 if layer.precision.is_quantized else 1e-6) for layer in layers)
            found[one.id] = tiny.measurement(ms)
        return found

    monkeypatch.setattr(script, "measure_untrained", measure)
    return made


def test_what_it_writes_is_true_of_the_processor(
    script: ModuleType, calls: list[list[Architecture]], tmp_path: Path
) -> None:
    out, csv = tmp_path / "out.json", tmp_path / "measured.csv"
    sizes = ["--channels", "1", "--networks", "40", "--samples", "8", "--draws", "2"]
    arguments = [*sizes, "--measurements", str(csv), "--out", str(out)]
    assert script.main(arguments) == 0
    told = json.loads(out.read_text())
    assert (told["networks"], told["samples"], told["draws"]) == (40, 8, 2)
    assert "stm32h743" in told["known_devices"] and "host-cpu" not in told["known_devices"]
    assert set(told["methods"]) == {"ours", "ours_random", "ours_alone", "sources_alone", "macs"}
    error = {name: method["median_error"][0] for name, method in told["methods"].items()}
    assert error["ours"] < 0.05 and error["ours"] < error["sources_alone"] and error["ours"] < error["macs"]
    assert told["all_others"]["networks"] == 40 and told["all_others"]["median_error"] < 0.02
    assert len(calls) == 4 and max(map(len, calls)) == 12  # a dozen in a process
    calls.clear()
    assert script.main(arguments) == 0
    again = json.loads(out.read_text())
    assert calls == [] and again["methods"] == told["methods"]


def test_only_what_the_file_lacks_is_measured(
    script: ModuleType, calls: list[list[Architecture]], tmp_path: Path
) -> None:
    space, path = tiny.space(), tmp_path / "measured.csv"
    first = script.measured(space, HOST, path, 5, 0, 1.0)
    both = script.measured(space, HOST, path, 9, 0, 1.0)
    assert [len(batch) for batch in calls] == [5, 4] and not set(calls[0]) & set(calls[1])
    assert set(first) < set(both) and len(both) == 9
    assert script.measured(space, HOST, path, 7, 0, 1.0).keys() == both.keys() and len(calls) == 2


def test_samples_come_from_the_pool_of_the_draw_and_are_not_judged(script: ModuleType) -> None:
    space = tiny.space()
    networks = [space.lower(space.sample(np.random.default_rng(i))) for i in range(20)]
    task = script.Task(networks, np.ones(20), ())
    pool, chosen = task.pool(3), task.informative(3, 6)
    assert len(set(pool)) == 10 and len(set(chosen)) == 6 and set(chosen) < set(pool)
    assert pool.tolist() == task.pool(3).tolist() != task.pool(4).tolist()
    actual, predicted = np.array([1.0, 2.0, 4.0, 5.0]), np.array([9.0, 2.0, 5.0, 4.0])
    found = script.judged((np.array([0]), predicted, 0.1), actual)
    assert found["max_error"] == pytest.approx(0.25) and found["median_error"] == pytest.approx(0.2)
    assert found["coverage"] == pytest.approx(1 / 3) and found["half_width"] == 0.1
    assert found["spearman"] == pytest.approx(0.5)
    assert "coverage" not in script.judged((np.array([0]), predicted, None), actual)


def test_a_draw_without_a_rank_correlation_has_no_mean(script: ModuleType) -> None:
    rows = [{"median_error": 0.1, "spearman": 0.5}, {"median_error": 0.3, "spearman": None}]
    found = script._mean_and_deviation(rows)
    assert found["median_error"] == [0.2, 0.1] and np.isnan(found["spearman"]).all()
