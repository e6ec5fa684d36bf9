"""The fits of phone CPUs and of NAS-Bench-201 networks: blocks counted by hand, and the shipped profiles reproduced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.fitted import fold_coverage
from experiments.mobile_blocks import BlockTable, block_network, read_block_table
from experiments.nasbench201_table import CELLS, DEVICES, TABLE, read_cell_tables
from hardware_profiles import UnsupportedLayer, load_device
from hardware_profiles.device import SHIPPED
from search_spaces import CompactTransformer, MobileNet
from search_spaces.nasbench201 import nasbench201_network


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fit_mobile_cpu")


@pytest.fixture(scope="module")
def cells_script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fit_nasbench201")


@pytest.fixture(scope="module")
def blocks(data_folder: Path) -> BlockTable:
    return read_block_table(data_folder, ("pixel4_v3", "xiaomi11_v3"))


@pytest.mark.parametrize(
    ("key", "macs"),
    [
        ("firstconv_128_3_16_2_3", 64**2 * 16 * 27),
        # depthwise 5x5 and projection; no expansion, a plain shortcut
        ("conv_64_16_16_1_1_hard_swish_5_nose", 64**2 * (16 * 25 + 16 * 16)),
        # expansion at 32, depthwise and projection at 16; squeeze-excite of 64 channels by 16; pooled shortcut
        ("conv_32_16_24_4_2_hard_swish_3_se", 32**2 * 16 * 64 + 16**2 * (64 * 9 + 64 * 24 + 16 * 24) + 2 * 64 * 16),
        ("transds_16_16_48_2_4", 16**2 * 16 * 64 + 8**2 * (64 * 9 + 64 * 48 + 16 * 48) + 2 * 64 * 16),
        # 5 and 7 pixels: strides round up
        ("transds_7_16_48_2_4", 7**2 * 16 * 64 + 4**2 * (64 * 9 + 64 * 48 + 16 * 48) + 2 * 64 * 16),
        # 3 heads of 16, values of 32: query, key, value, scores, mix, projection
        ("transattn_4_48_hard_swish_2_ln", 16 * 48 * (48 + 48 + 96) + 3 * 16**2 * (16 + 32) + 16 * 96 * 48),
        # 56 channels are 3 heads and a half
        ("transattn_2_56_hard_swish_3_ln", 4 * 56 * (48 + 48 + 144) + 3 * 4**2 * (16 + 48) + 4 * 144 * 56),
        ("transffn_16_48_3_hard_swish_ln", 2 * 16**2 * 48 * 144),
        ("mbpool_3_160_1984_6_hard_swish", 9 * 160 * 960 + 960 * 1984 + 1984 * 1000),
    ],
)
def test_macs_of_blocks_by_hand(key: str, macs: int) -> None:
    assert block_network(key).macs == macs


def test_layers_of_a_block() -> None:
    with_excite = block_network("conv_32_16_16_2_1_hard_swish_3_se")
    assert [layer.name for layer in with_excite.layers] == [
        "expand", "expand.activation", "depthwise", "depthwise.activation",
        "excite.pool", "excite.reduce", "excite.expand", "excite.expand.activation", "excite.scale",
        "project", "add",
    ]  # fmt: skip
    assert with_excite.output.inputs == ("project", "input")
    strided = block_network("conv_33_16_24_1_2_hard_swish_3_nose")
    assert [layer.name for layer in strided.layers][-4:] == ["project", "shortcut.pool", "shortcut", "add"]
    assert strided.output.out_shape == (24, 17, 17)
    assert block_network("transds_8_48_48_2_4").output.name == "project"  # no shortcut to a smaller map of equal width


@pytest.mark.parametrize("key", ["conv_64_16", "block_1_2_3", "transffn_16_48_hard_swish_ln", "conv_8_8_8_1_1_x_3_no"])
def test_what_is_no_block_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is no key of the block table"):
        block_network(key)


def test_blocks_of_one_side_and_width_are_left_out_together(blocks: BlockTable) -> None:
    table = blocks
    twins = [table.keys.index(key) for key in ("conv_16_48_48_4_1_hard_swish_3_se", "transds_16_48_80_1_4")]
    assert table.group[twins[0]] == table.group[twins[1]]
    sides = [tuple(key.split("_")[1:3]) for key in table.keys]
    assert len({*zip(table.group.tolist(), sides, strict=True)}) == len(set(sides)) == len(set(table.group.tolist()))


def test_coverage_is_counted_outside_the_fold_that_made_the_interval() -> None:
    predicted = np.ones(40)
    measured = np.concatenate([1 + np.linspace(0.01, 0.2, 20), 1 + np.linspace(0.1, 2.0, 20)])
    fold = np.repeat([0, 1], 20)
    # the interval of the second half (19th of 20 residuals: 1.9) holds all of the first; its own 0.19 holds one of it
    assert fold_coverage(predicted, measured, fold) == (20 + 1) / 40


def reproduced(script: ModuleType, result: dict[str, Any], name: str) -> None:
    shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["latency"]
    fitted = json.loads(json.dumps(script.device_sections(result, name)))["latency"]
    assert shipped["source"] == fitted["source"]
    assert shipped["coefficients_ms"] == pytest.approx(fitted["coefficients_ms"], rel=1e-4, abs=1e-12)
    assert shipped["held_out"] == pytest.approx(fitted["held_out"], rel=1e-3)


def test_the_command_reproduces_the_shipped_cpu_profiles(script: ModuleType, data_folder: Path) -> None:
    result = script.fit(data_folder)
    for name, own in result["devices"].items():
        reproduced(script, result, name)
        assert own["held_out"]["mape"] < 0.07 < 0.1 < own["held_out"]["macs_only_mape"]
        assert 0.87 < own["coverage_of_blocks_left_out"] < 0.93


def test_a_shipped_cpu_profile_gives_what_was_measured(blocks: BlockTable) -> None:
    for name in ("pixel4", "xiaomi11"):
        device, measured = load_device(name), blocks.latency_ms[f"{name}_v3"]
        error = [
            abs(device.latency(block_network(blocks.keys[i])).mean_ms / measured[i] - 1)
            for i in range(0, len(measured), 97)
        ]
        assert np.mean(error) < 0.08


def test_what_the_blocks_lack_is_refused() -> None:
    space = MobileNet(precisions=("fp32",), nonlinearity="hardswish")
    assert load_device("pixel4").latency(space.lower(space.largest)).mean_ms > 0
    transformer = CompactTransformer(precisions=("fp32",))
    with pytest.raises(UnsupportedLayer, match=r"tokenizer0\.pool.*mlp\.activation"):
        load_device("pixel4").latency(transformer.lower(transformer.smallest))
    with pytest.raises(UnsupportedLayer, match="depthwise"):
        load_device("adreno640").latency(space.lower(space.largest))


def test_the_command_reproduces_the_shipped_profiles_of_cells(cells_script: ModuleType, data_folder: Path) -> None:
    result = cells_script.fit(data_folder)
    tables = read_cell_tables(data_folder / TABLE, data_folder / CELLS, list(DEVICES.values()))
    for name, own in result["devices"].items():
        reproduced(cells_script, result, name)
        assert own["held_out"]["within_10_percent"] > 0.99
        assert own["held_out"]["mape"] < 0.03 < 0.1 < own["held_out"]["macs_only_mape"]
        table = tables[DEVICES[name]]
        assert len(table.latency_ms) == 2000 and (table.macs <= table.counted_macs).all()


def test_a_profile_of_cells_charges_a_network_its_prices(data_folder: Path) -> None:
    """By the numbers in the file: kernels, MACs, bytes of pools and bytes of additions and relus."""
    network = nasbench201_network(["nor_conv_3x3", "none", "avg_pool_3x3", "skip_connect", "none", "nor_conv_1x1"])
    for name in DEVICES:
        prices = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["latency"]["coefficients_ms"]
        expected = 0.0
        for layer in network.layers:
            moved = 4 * (sum(map(np.prod, layer.in_shapes)) + np.prod(layer.out_shape))
            if layer.has_weights:
                expected += prices["conv.fp32.count"] + prices["conv.fp32.macs"] * layer.macs
            elif layer.kind == "pool":
                expected += prices["average_pool.fp32.count"] + prices["average_pool.fp32.bytes"] * moved
            elif layer.kind in ("add", "activation"):
                expected += prices["add.fp32.bytes"] * moved
        assert load_device(name).latency(network).mean_ms == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["fit_mobile_cpu", "fit_nasbench201"])
def test_a_folder_without_the_data_is_refused(
    load_script: Callable[[str], ModuleType], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_script(name).main([str(tmp_path)]) == 2
    assert "expected a folder with mobile_" in capsys.readouterr().err
