"""Memory of microcontrollers: arenas that tflite-micro reported (or reports, where it is), .tflite files, boards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hardware_profiles.memory import (
    STORAGES,
    TFLM_GREEDY,
    UNLESS_SAME,
    peak_sram_bytes,
)
from hardware_profiles.tflite_writer import write_tflite
from search_spaces import INT8, MobileNet, Network


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("mcu_memory")


@pytest.fixture
def arena_head_bytes(load_benchmark: Callable[[str], ModuleType]) -> Callable[[Path], int]:
    made = load_benchmark("tflite_arena")
    if not made.has_tflite_micro():
        pytest.skip("needs the package tflite-micro")
    return made.arena_head_bytes


# head of the arena in bytes, from print_allocations() of tflite-micro 0.dev20261023; the first four are MLPerf Tiny's
# reference models, the others were converted from PyTorch
@pytest.mark.parametrize(
    ("name", "arena_bytes"),
    [
        ("AD", 768),
        ("KWS", 16_000),
        ("IC", 49_152),
        ("VWW", 73_728),
        ("32_0.5", 104_640),
        ("32_1.0", 209_280),
        ("96_0.35", 230_592),
        ("96_1.0", 461_184),
    ],
)
def test_the_arena_is_what_tflite_micro_said(name: str, arena_bytes: int, script: ModuleType) -> None:
    network = script.NETWORKS[name]()
    assert peak_sram_bytes(network, TFLM_GREEDY, explicit_padding=UNLESS_SAME) == arena_bytes
    assert script.ARENA_BYTES[name] == arena_bytes
    assert {layer.precision for layer in network.layers if layer.has_weights} == {INT8}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("AD", 0.264), ("KWS", 2.66), ("IC", 12.5), ("VWW", 7.49)],
)
def test_the_reference_models_do_the_published_work(name: str, millions: float, script: ModuleType) -> None:
    assert script.NETWORKS[name]().macs / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_arenas_of_random_networks_are_those_of_tflite_micro(
    padding: str, arena_head_bytes: Callable[[Path], int], tmp_path: Path, rng: np.random.Generator
) -> None:
    space = MobileNet(
        resolutions=(8, 13, 24, 37), precisions=("int8",), kernels=(3, 5), widths=(8, 16, 24), padding=padding
    )
    for index in range(12):
        network = space.lower(space.sample(rng))
        path = tmp_path / f"{index}.tflite"
        path.write_bytes(write_tflite(network, rng))
        planned = peak_sram_bytes(network, TFLM_GREEDY, explicit_padding=UNLESS_SAME)
        assert planned == arena_head_bytes(path), (padding, index)


def test_files_hold_what_is_computed_for_them(script: ModuleType, data_folder: Path) -> None:
    errors = {row["name"]: row["error"] for row in script.file_sizes(data_folder / "mlperf_tiny_models")}
    assert abs(errors["AD"]) < 0.01 and abs(errors["IC"]) < 0.01
    # these two also keep a range, of eight bytes, for each channel, and names of 156 bytes a tensor
    for name in ("KWS", "VWW"):
        channels = sum(layer.out_shape[0] for layer in script.NETWORKS[name]().layers if layer.kind == "conv2d")
        size = (data_folder / "mlperf_tiny_models" / script.FILES[name]).stat().st_size
        assert abs(errors[name] + 8 * channels / size) < 0.06


def test_boards_of_the_interpreter_are_met_and_the_shipped_numbers_are_the_fit(
    script: ModuleType, data_folder: Path
) -> None:
    found = script.boards(data_folder / "mcu_stm32h743.csv", data_folder / "mcunet")["tflite_micro"]
    kept = STORAGES["tflite"]
    assert found["sram"]["left_out_max_error"] < 0.005 and found["flash"]["left_out_max_error"] < 0.002
    assert found["sram_if_kernels_padded"]["left_out_max_error"] > 0.1
    assert round(found["sram"]["free"]["channel_bytes"]) == kept.sram_channel_bytes
    assert round(found["flash"]["free"]["channel_bytes"]) == kept.flash_channel_bytes
    assert round(found["sram"]["layer_bytes"]) == kept.sram_layer_bytes
    assert round(found["flash"]["layer_bytes"]) == kept.flash_layer_bytes
    assert found["sram"]["fixed_bytes"] == kept.sram_fixed_bytes


def test_mobilenet_v2_is_a_network_of_a_shipped_space(script: ModuleType) -> None:
    space, architecture = script.mobilenet_v2()
    network: Network = space.lower(space.unpatched(architecture))
    assert network.params == pytest.approx(3.5e6, rel=0.01) and network.macs == pytest.approx(300e6, rel=0.01)
    told = script.patched()
    assert told["patch_side"] == 75 and told["stage_map"] == (32, 28, 28)
    assert round(told["stage_overhead"]["unclipped"], 2) == 0.42
    assert round(told["total_overhead"]["unclipped"], 3) == 0.127
    assert round(told["total_overhead"]["clipped"], 3) == 0.093
    peaks = told["peak_kib"]["inplace_residual"]
    assert peaks["whole"] == 1372 and round(peaks["patches"]) == 172


def test_the_benchmark_writes_what_it_prints(
    script: ModuleType, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert script.main(["--data", str(data_folder), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result["arenas_equal"] == "8 of 8"
    assert result["planning_ms"]["blocks"] == 20
    assert script.main(["--data", str(tmp_path), "--out", str(tmp_path / "none.json")]) == 2
    assert not (tmp_path / "none.json").exists()
