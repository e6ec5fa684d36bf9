"""Benchmarks of phone latencies: their parts on numbers made by hand, and short runs on the tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from experiments.nasbench201_table import CellTable
from experiments.phone_gpus import GPUS, GRAPHS, TABLE, PhoneTable, read_phone_table

Load = Callable[[str], ModuleType]


def made_table(rng: np.random.Generator, networks: int = 14) -> PhoneTable:
    """Three GPUs on which time is a kernel's price times kernels and a price a MAC, 5 % of noise."""
    rows = tuple(
        {"conv.fp32.count": float(rng.integers(5, 50)), "conv.fp32.macs": float(rng.integers(1, 1000)) * 1e6}
        for _ in range(networks)
    )
    exact = np.array([[0.2 * row["conv.fp32.count"] + 3e-8 * row["conv.fp32.macs"] for row in rows]])
    latency_ms = exact * np.array([[1.0], [2.0], [0.5]]) * rng.lognormal(0, 0.05, (3, networks))
    latency_ms[1, 4] = np.nan
    return PhoneTable(tuple(f"net{i}" for i in range(networks)), rows, GPUS[:3], latency_ms, {})


def test_each_gpu_alone_is_one_fit_a_network_left_out(load_benchmark: Load, rng: np.random.Generator) -> None:
    script, table = load_benchmark("phone_networks"), made_table(rng)
    line = np.column_stack([table.macs, np.ones(14)])
    predicted = script.each_alone(table, line, ridge=0.0)
    ran = [i for i in range(14) if i not in (4, 9)]
    measured = table.latency_ms[1, ran]
    fitted = np.linalg.lstsq(line[ran] / measured[:, None], np.ones(len(ran)), rcond=None)[0]  # positive anyway
    assert (fitted > 0).all() and predicted[1, 9] == pytest.approx(line[9] @ fitted)
    assert np.isnan(predicted[1, 4]) and np.isnan(predicted).sum() == 1


def test_relatives_share_a_number(load_benchmark: Load) -> None:
    script = load_benchmark("phone_networks")
    number = script.families_of(("resnet18", "vgg16", "mobilenet_ssd", "resnet50", "mobilenet"))
    assert number[0] == number[3] and number[2] == number[4] and len(set(number.tolist())) == 3


def test_intervals_are_made_without_the_network_that_they_are_of(
    load_benchmark: Load, rng: np.random.Generator
) -> None:
    script, table = load_benchmark("phone_networks"), made_table(rng)
    predicted = np.where(np.isnan(table.latency_ms), np.nan, table.latency_ms * 1.001)
    assert script.nested_coverage(table, predicted)["coverage"] == 1.0
    far = script.nested_coverage(table, predicted * 3)
    assert far["coverage"] == 0.0 and far["n"] == 3 * 14 - 1


def test_a_draw_is_judged_on_what_it_did_not_see(load_benchmark: Load, rng: np.random.Generator) -> None:
    script = load_benchmark("mobile_nasbench201")
    amounts = np.repeat(rng.lognormal(0, 1, (60, 2)), 2, axis=0)
    latency_ms = amounts @ [2.0, 3.0]
    latency_ms[100:] *= 1.5  # networks that the sample never sees
    sample = np.arange(120) < 80
    found = script.draw_scores(amounts, latency_ms, sample, np.arange(120) // 2, rng)
    assert found["within_10_percent"] == found["coverage"] == 0.5
    assert found["unseen"] == 40 and found["unseen_within_10_percent"] == 0.5
    seen = np.arange(120) % 2 == 0
    found = script.draw_scores(amounts, latency_ms, seen, np.arange(120) // 2, rng)
    assert found["unseen"] == 0 and np.isnan(found["unseen_within_10_percent"])


def test_a_report_has_the_baseline_and_spread_over_draws(load_benchmark: Load, rng: np.random.Generator) -> None:
    script = load_benchmark("mobile_nasbench201")
    rows = tuple(
        {
            "conv.fp32.count": 3.0,
            "conv.fp32.macs": 1e6 * rng.integers(1, 50),
            "add.fp32.bytes": 1e5 * rng.integers(1, 9),
        }
        for _ in range(60)
    )
    macs = np.array([row["conv.fp32.macs"] for row in rows])
    latency_ms = macs * 1e-7 + np.array([row["add.fp32.bytes"] for row in rows]) * 1e-5
    report = script.device_report(CellTable(rows, macs, macs * 2, latency_ms), samples=20, draws=3, seed=1)
    assert report["judged"] == 40
    ours, baseline = report["methods"]["ours"], report["methods"]["macs_only"]
    assert ours["mape"]["mean"] < 0.01 < baseline["mape"]["mean"]
    assert baseline["mape"]["std"] > 0 and set(report["methods"]) == {"macs_only", "live_macs_only", "ours"}


def test_on_the_table_pooling_beats_seven_features_and_macs(load_benchmark: Load, data_folder: Path) -> None:
    script = load_benchmark("phone_networks")
    table = read_phone_table(data_folder / TABLE, data_folder / GRAPHS)
    macs = script.judged(table, script.each_alone(table, np.column_stack([table.macs, np.ones(len(table.macs))]), 0.0))
    seven = script.judged(table, script.each_alone(table, table.seven, 0.0))
    pooled = script.predict_networks_left_out(table.priced, table.latency_ms, np.arange(len(table.names)))
    ours = script.judged(table, pooled)
    assert ours["mean_mape"] < 0.75 * seven["mean_mape"] < 0.75 * macs["mean_mape"]
    assert ours["mean_spearman"] > seven["mean_spearman"] > macs["mean_spearman"]
