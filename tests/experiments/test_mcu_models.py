"""Models that boards share: planted ratios and speeds come back, and nothing of what is left out gets in."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SPEEDS = {"slow": 3.0, "fast": 0.5}
RATIOS = (2.0, 0.25, 1.0)
COLUMNS = ({"conv.int8.macs": 1.0}, {"pointwise.int8.macs": 2.0}, {"add.int8.bytes": 1.0, "conv.int8.bytes": 3.0})


@pytest.fixture(scope="module")
def models(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("mcu_models")


def work(features: dict[str, float], ratios: tuple[float, ...] = RATIOS) -> float:
    kinds = (
        features["conv.int8.macs"],
        2 * features["pointwise.int8.macs"],
        features["add.int8.bytes"] + 3 * features["conv.int8.bytes"],
    )
    return sum(ratio * amount for ratio, amount in zip(ratios, kinds, strict=True))


def planted(networks: int = 5, seed: int = 0) -> list[Any]:
    """Runs of the same networks on both boards, exactly as the planted model says."""
    run = sys.modules["mcu_data"].Run
    rng = np.random.default_rng(seed)
    made = []
    for index in range(networks):
        names = ("conv.int8.macs", "pointwise.int8.macs", "add.int8.bytes", "conv.int8.bytes")
        features = dict(zip(names, rng.uniform(1, 100, 4).tolist(), strict=True))
        for board, speed in SPEEDS.items():
            made.append(run("kernels", board, f"net{index}", f"net{index}", features, speed * work(features)))
    return made


def test_planted_ratios_and_speeds_come_back(models: ModuleType) -> None:
    runs = planted()
    model = models.fit_shared(runs, models.Form(COLUMNS, 0.0))
    assert model.ratios / model.ratios[2] == pytest.approx(RATIOS, rel=1e-5)
    assert model.ms_per_unit["slow"] / model.ms_per_unit["fast"] == pytest.approx(6, rel=1e-9)
    for run in runs:
        assert model.predict_ms(run.board, run.features) == pytest.approx(run.latency_ms, rel=1e-6)
        prices = model.coefficients_ms(run.board)
        assert sum(prices[name] * amount for name, amount in run.features.items()) == pytest.approx(run.latency_ms)
    assert prices["reshape.int8.count"] == prices["quantize.int8.count"] == 0.0


def test_a_strong_ridge_leaves_the_expected_ratios_and_fits_the_speed_alone(models: ModuleType) -> None:
    runs = [run for run in planted() if run.board == "slow"]
    model = models.fit_shared(runs, models.Form(COLUMNS, models.FIXED_RIDGE))
    assert model.ratios == pytest.approx(np.ones(3), abs=1e-4)
    share = np.array([work(run.features, (1, 1, 1)) / run.latency_ms for run in runs])
    grid = np.linspace(0.5, 2, 2001) / share.mean()
    best = grid[np.argmin([((speed * share - 1) ** 2).sum() for speed in grid])]
    assert model.ms_per_unit["slow"] == pytest.approx(best, rel=1e-3)


def test_what_is_left_out_is_left_out_on_every_board(models: ModuleType) -> None:
    runs, form = planted(), models.Form(COLUMNS, 0.01)
    before = models.predict_left_out_ms(runs, form)
    spoilt = [dataclasses.replace(run, latency_ms=run.latency_ms * 9) if run.name == "net1" else run for run in runs]
    after = models.predict_left_out_ms(spoilt, form)
    at = [index for index, run in enumerate(runs) if run.name == "net1"]
    assert after[at] == pytest.approx(before[at], rel=1e-12) and len(at) == 2
    others = [index for index in range(len(runs)) if index not in at]
    assert not np.allclose(after[others], before[others], rtol=0.01)


def test_the_baseline_is_one_price_a_mac_on_each_board(models: ModuleType) -> None:
    runs = planted(networks=3)
    expected = []
    for run in runs:
        ratio = [o.macs / o.latency_ms for o in runs if o.board == run.board and o.name != run.name]
        expected.append(run.macs * sum(ratio) / sum(r * r for r in ratio))
    assert models.macs_left_out_ms(runs) == pytest.approx(np.array(expected), rel=1e-6)


def test_a_network_outside_the_residuals_of_the_others_is_not_covered(models: ModuleType) -> None:
    runs = [run for run in planted(networks=10) if run.board == "fast"]
    predicted = np.ones(10)
    measured = 1 + np.arange(10) / 100  # the largest residual lies beyond the nine others, and no other does
    assert models.covered(runs, predicted, measured) == [True] * 9 + [False]


def test_power_times_latency(models: ModuleType) -> None:
    runs = [dataclasses.replace(run, energy_uj=run.latency_ms * 40) for run in planted()]
    assert models.fit_power_mw(runs) == pytest.approx(40)
    spoilt = [dataclasses.replace(run, energy_uj=run.latency_ms * 80) if run.name == "net2" else run for run in runs]
    left_out = models.energy_left_out_uj(spoilt, np.array([run.latency_ms for run in spoilt]))
    for run, energy in zip(spoilt, left_out, strict=True):
        if run.name == "net2":
            assert energy == pytest.approx(40 * run.latency_ms)
        else:
            assert 40 * run.latency_ms < energy < 80 * run.latency_ms


def test_the_expected_instructions_are_those_counted(models: ModuleType, data_folder: Path) -> None:
    runs = {run.name: run for run in sys.modules["mcu_data"].read_runs(data_folder)}
    for name, counted in models.COUNTED.items():
        total = sum(models.NOTHING_FITTED.row(runs[name].features))
        assert total == pytest.approx(counted, rel=0.06)
