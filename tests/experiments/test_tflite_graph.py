"""The reader of .tflite files: files written by the project, and the four of MLPerf Tiny against hand counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hardware_profiles.cost_model import features
from hardware_profiles.tflite_writer import write_tflite
from search_spaces import INPUT, INT8
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tflite_graph")


def write(folder: Path, content: bytes) -> Path:
    path = folder / "network.tflite"
    path.write_bytes(content)
    return path


def test_a_written_network_has_the_features_of_its_layers(script: ModuleType, tmp_path: Path) -> None:
    stem = L.conv2d("stem", Port(INPUT, (3, 9, 9)), 8, kernel=3, stride=2, padding="same", precision=INT8)
    depthwise = L.conv2d("depthwise", port(stem), 8, kernel=5, groups=8, padding="same", precision=INT8)
    project = L.conv2d("project", port(depthwise), 8, precision=INT8)
    total = L.add("add", port(project), port(stem))
    pool = L.global_average_pool("pool", port(total))
    flat = L.reshape("flat", port(pool), (8,))
    classifier = L.linear("classifier", port(flat), 10, precision=INT8)
    network = assemble((3, 9, 9), [(stem, depthwise, project, total, pool, flat, classifier)])
    path = write(tmp_path, write_tflite(network, np.random.default_rng(0)))
    assert script.graph_features(script.read_operators(path)) == features(network)


# By hand from the reference models (MLPerf Tiny, arXiv 2106.07597): an autoencoder 640-128x4-8-128x4-640; a 10x4
# convolution and four blocks of 64 channels on 25x5; three residual stages of 16, 32, 64 channels on 32x32; and
# MobileNetV1 at a quarter of the width on 96x96: (size, channels in, channels out) of its blocks.
BLOCK = 25 * 5 * 64 * (9 + 64)
STAGES = 32 * 32 * 16 * 9 * (3 + 16 + 16) + 16 * 16 * 32 * (9 * (16 + 32) + 16) + 8 * 8 * 64 * (9 * (32 + 64) + 32)
MOBILENET = [(48, 8, 16), (24, 16, 32), (24, 32, 32), (12, 32, 64), (12, 64, 64), (6, 64, 128)]
MOBILENET += [(6, 128, 128)] * 5 + [(3, 128, 256), (3, 256, 256)]
BY_HAND = {
    "ad01_int8": 2 * (640 * 128 + 3 * 128 * 128 + 128 * 8),
    "kws_ref_model": 25 * 5 * 64 * 40 + 4 * BLOCK + 64 * 12,
    "pretrainedResnet_quant": STAGES + 64 * 10,
    "vww_96_int8": 48 * 48 * 8 * 27 + sum(s * s * i * (9 + o) for s, i, o in MOBILENET) + 256 * 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_networks_of_mlperf_tiny_have_their_macs(name: str, script: ModuleType, data_folder: Path) -> None:
    operators = script.read_operators(data_folder / "mlperf_tiny_models" / f"{name}.tflite")
    assert sum(operator.macs for operator in operators) == BY_HAND[name]
    row = script.graph_features(operators)
    assert sum(amount for key, amount in row.items() if key.endswith(".macs")) == BY_HAND[name]
    assert not any(key.startswith("softmax") for key in row)


def test_families_of_the_keyword_network(script: ModuleType, data_folder: Path) -> None:
    row = script.graph_features(script.read_operators(data_folder / "mlperf_tiny_models" / "kws_ref_model.tflite"))
    assert {key: row[f"{key}.int8.count"] for key in ("conv", "depthwise", "pointwise", "linear", "average_pool")} == {
        "conv": 1,
        "depthwise": 4,
        "pointwise": 4,
        "linear": 1,
        "average_pool": 1,
    }
    assert row["depthwise.int8.bytes"] == 4 * 2 * 25 * 5 * 64
    assert row["linear.int8.weight_bytes"] == 64 * 12 + 12 * 8
    assert row["quantize.int8.bytes"] == 5 * 49 * 10


def test_what_is_no_such_file_is_refused_by_name(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"network\.tflite: expected a TFLite file"):
        script.read_operators(write(tmp_path, b"not a network at all"))
    stem = L.conv2d("stem", Port(INPUT, (4, 4, 4)), 4, precision=INT8)
    whole = write_tflite(assemble((4, 4, 4), [(stem,)]), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"network\.tflite: a damaged TFLite file"):
        script.read_operators(write(tmp_path, whole[:200]))
    padded = L.conv2d("half", Port(INPUT, (4, 4, 4)), 4, kernel=3, stride=2, precision=INT8)
    path = write(tmp_path, write_tflite(assemble((4, 4, 4), [(padded,)]), np.random.default_rng(0)))
    with pytest.raises(ValueError, match="operator 34 of TFLite's schema"):
        script.read_operators(path)
