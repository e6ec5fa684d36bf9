"""The microcontroller fit: what it reads, and that its command reproduces the shipped numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from hardware_profiles.device import SHIPPED, load_device


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fit_mcu")


def test_a_zoo_structure_becomes_the_network_it_describes(script: ModuleType) -> None:
    def block(channels: int, width: int, expand: int, stride: int, shortcut: bool) -> dict[str, Any]:
        body = {"name": "MBInvertedConvLayer", "in_channels": channels, "out_channels": width}
        body |= {"kernel_size": 3, "stride": stride, "expand_ratio": expand}
        return {"mobile_inverted_conv": body, "shortcut": {} if not shortcut else {"name": "IdentityLayer"}}

    structure = {
        "first_conv": {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "stride": 2},
        "blocks": [
            block(8, 4, 1, 1, False),
            block(4, 4, 6, 1, True),
            {"mobile_inverted_conv": {"name": "ZeroLayer", "stride": 1}, "shortcut": {"name": "IdentityLayer"}},
        ],
        "feature_mix_layer": None,
        "classifier": {"in_features": 4, "out_features": 10},
    }
    network = script.zoo_network(structure, 16)
    # 8x8 maps: stem, depthwise + project, expand + depthwise + project, classifier
    by_hand = 64 * (8 * 27 + 8 * 9 + 8 * 4 + 4 * 24 + 24 * 9 + 24 * 4) + 40
    assert network.macs == by_hand
    assert [layer.name for layer in network.layers if layer.kind == "add"] == ["block1.add"]
    assert load_device("stm32h743").illegal_layers(network) == ()


def test_published_networks_have_their_published_size(script: ModuleType, data_folder: Path) -> None:
    names, networks, _ = script.read_networks(data_folder)
    macs = {name: network.macs / 1e6 for name, network in zip(names, networks, strict=True)}
    # MCUNet's model zoo, millions of MACs
    for name, published in {"in0": 6.4, "in1": 12.8, "in2": 67.3, "in3": 81.8, "in4": 125.9}.items():
        assert macs[f"mcunet-{name}"] == pytest.approx(published, abs=0.06)


def test_the_command_reproduces_the_shipped_numbers(script: ModuleType, data_folder: Path) -> None:
    result = script.fit(data_folder)
    for name, scale in (("stm32h743", 1), ("stm32f746", 480 / 216)):
        shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
        fitted = json.loads(json.dumps(script.device_sections(result, scale)))
        assert shipped["memory"] == fitted["memory"]
        assert shipped["latency"]["source"] == fitted["latency"]["source"]
        assert shipped["latency"]["coefficients_ms"] == pytest.approx(fitted["latency"]["coefficients_ms"], rel=1e-4)
        assert shipped["latency"].get("held_out", {}) == pytest.approx(fitted["latency"].get("held_out", {}), rel=1e-3)
    assert result["held_out"]["mape"] < 0.03 < result["held_out"]["macs_only_mape"]


def test_the_shipped_profile_gives_what_was_measured(script: ModuleType, data_folder: Path) -> None:
    device = load_device("stm32h743")
    for network, row in zip(*script.read_networks(data_folder)[1:], strict=True):
        assert device.latency(network).mean_ms == pytest.approx(float(row["latency_ms"]), rel=0.06)
        assert device.sram_bytes(network) == pytest.approx(float(row["sram_kB"]) * 1024, rel=0.05)
        assert device.flash_bytes(network) == pytest.approx(float(row["flash_kB"]) * 1024, rel=0.10)


def test_a_folder_without_the_data_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "expected a folder with mcu_stm32h743.csv" in capsys.readouterr().err
