"""The fit of phone GPUs: which runs it uses, and that its command reproduces the shipped profiles."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import rankdata

from experiments.phone_gpus import GPUS, GRAPHS, PRICES, TABLE, PhoneTable, read_phone_table, seven_features
from hardware_profiles import load_device
from hardware_profiles.device import SHIPPED
from search_spaces import MobileNet


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fit_phones")


@pytest.fixture(scope="module")
def table(data_folder: Path) -> PhoneTable:
    return read_phone_table(data_folder / TABLE, data_folder / GRAPHS)


@pytest.fixture(scope="module")
def result(script: ModuleType, data_folder: Path) -> dict[str, Any]:
    return script.fit(data_folder)


def test_the_table_is_what_the_file_says(table: PhoneTable, data_folder: Path) -> None:
    with gzip.open(data_folder / "ncnn_phone_latency.csv.gz", "rt", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["backend"] == "gpu_vulkan"]
    assert not [name for name in table.names if "int8" in name]
    for gpu, device in (("adreno540", "Adreno 540"), ("adreno740", "Adreno 740"), ("mali-g52", "Mali-G52")):
        i = [one.name for one in table.gpus].index(gpu)
        for name, latency_ms in zip(table.names, table.latency_ms[i].tolist(), strict=True):
            runs = [float(row["min_ms"]) for row in rows if device in row["device"] and row["model"] == name]
            assert latency_ms == min(runs) if runs else np.isnan(latency_ms)


def test_two_runs_that_do_not_follow_the_work_are_not_used(table: PhoneTable) -> None:
    unused = {name for name, judged in table.judged.items() if not judged["used"]}
    assert unused == {"mali-g610-rk3588s", "mali-g720"}
    assert {gpu.name for gpu in table.gpus} == {gpu.name for gpu in GPUS} - unused
    for i, gpu in enumerate(table.gpus):
        ran = ~np.isnan(table.latency_ms[i])
        assert ran.sum() >= 15
        rho = np.corrcoef(rankdata(table.macs[ran]), rankdata(table.latency_ms[i, ran]))[0, 1]
        assert rho >= 0.6, gpu.name


def test_seven_features_by_hand() -> None:
    row = {
        "conv.fp32.count": 2.0,
        "conv.fp32.macs": 10.0,
        "grouped.fp32.macs": 5.0,
        "linear.fp32.macs": 1.0,
        "pointwise.fp32.macs": 7.0,
        "depthwise.fp32.macs": 3.0,
        "relu.fp32.count": 4.0,
        "relu.fp32.bytes": 8.0,
        "conv.fp32.bytes": 6.0,
        "conv.fp32.weight_bytes": 9.0,
        "conv.fp32.reduction": 99.0,
    }
    np.testing.assert_array_equal(seven_features(row), [1, 6, 16, 7, 3, 14, 9])


def test_the_command_reproduces_the_shipped_profiles(script: ModuleType, result: dict[str, Any]) -> None:
    names = script.shipped(result)
    assert len(names) >= 8
    for name in names:
        shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["latency"]
        fitted = json.loads(json.dumps(script.device_sections(result, name)))["latency"]
        assert shipped["source"] == fitted["source"]
        assert shipped["coefficients_ms"] == pytest.approx(fitted["coefficients_ms"], rel=1e-4, abs=1e-12)
        assert shipped["held_out"] == pytest.approx(fitted["held_out"], rel=1e-3)


def test_networks_left_out_are_predicted_better_than_by_macs(result: dict[str, Any]) -> None:
    held_out = [gpu["held_out"] for gpu in result["gpus"].values()]
    assert all(one["mape"] < one["macs_only_mape"] for one in held_out)
    assert all(one["spearman"] > one["macs_only_spearman"] for one in held_out)
    assert np.mean([one["mape"] for one in held_out]) < 0.19


def test_a_shipped_profile_charges_a_network_its_prices(result: dict[str, Any], rng: np.random.Generator) -> None:
    """A network of layers costs what its amounts times the prices say, with the shapes of its kernels."""
    space = MobileNet(precisions=("fp32",), nonlinearity="hardswish", squeeze_excite=(True,))
    network = space.lower(space.sample(rng))
    prices = result["gpus"]["mali-t860"]["prices_ms"]
    assert len(prices) == len(PRICES)
    expected = 0.0
    for layer in network.layers:
        moved = 4 * (sum(map(np.prod, layer.in_shapes)) + np.prod(layer.out_shape))
        if layer.has_weights:
            expected += prices["weighted kernel"] + prices["byte of a weighted kernel"] * moved
            expected += prices["byte of weights"] * layer.weight_bytes
            expected += prices["length of a sum"] * layer.macs / np.prod(layer.out_shape)
            if layer.is_depthwise:
                expected += prices["depthwise mac"] * layer.macs
            elif layer.kind == "conv2d" and layer.kernel == 1:
                expected += prices["pointwise mac"] * layer.macs
            else:
                expected += prices["mac"] * layer.macs
            if layer.name == "stem":  # three channels: no fast algorithm
                expected += prices["mac without fast algorithm"] * layer.macs
        else:
            kernel = {"activation": "activation", "pool": "pool", "reshape": "moving"}.get(layer.kind, "other")
            expected += prices[f"{kernel} kernel"] + prices["byte of another kernel"] * moved
    assert load_device("mali-t860").latency(network).mean_ms == pytest.approx(expected, rel=1e-4)


def test_a_folder_without_the_data_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "expected a folder with ncnn_phone_latency.csv.gz" in capsys.readouterr().err
