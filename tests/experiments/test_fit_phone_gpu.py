"""The phone GPU fit: ncnn graphs read by hand-counted examples, and that its command reproduces the shipped numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from hardware_profiles.cost_model import features
from hardware_profiles.device import SHIPPED
from search_spaces import INPUT
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

# The same network twice: with the shapes of the outputs written out, and with only the input's.
PARAM = """7767517
8 9
Input input 0 1 image{0} 0=8 1=8 2=3
Convolution stem 1 1 image stem{1} 0=4 1=3 3=2 4=1 5=1 6=108
Split split 1 2 stem left right{2}
ConvolutionDepthWise depthwise 1 1 left dw{1} 0=4 1=3 4=1 5=1 6=36 7=4
Convolution project 1 1 dw pw{1} 0=4 1=1 5=1 6=16
BinaryOp add 2 1 pw right sum{1} 0=0
Pooling pool 1 1 sum pooled{3} 0=1 1=4 2=4
Permute permute 1 1 pooled moved{4} 0=3
"""
HINTS = (
    " -23330=4,3,8,8,3",
    " -23330=4,3,4,4,4",
    " -23330=8,3,4,4,4,3,4,4,4",
    " -23330=4,3,1,1,4",
    " -23330=4,3,4,1,1",
)


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fit_phone_gpu")


@pytest.mark.parametrize("hints", [HINTS, ("",) * 5], ids=["hinted", "derived"])
def test_a_graph_has_the_features_of_the_same_network_in_our_layers(script: ModuleType, hints: tuple[str, ...]) -> None:
    stem = L.conv2d("stem", Port(INPUT, (3, 8, 8)), 4, kernel=3, stride=2)
    depthwise = L.conv2d("depthwise", port(stem), 4, kernel=3, groups=4)
    project = L.conv2d("project", port(depthwise), 4)
    total = L.add("add", port(project), port(stem))
    pool = L.global_average_pool("pool", port(total))
    move = L.permute("permute", port(pool), (1, 2, 0))
    network = assemble((3, 8, 8), [(stem, depthwise, project, total, pool, move)])
    assert script.graph_features(script.read_operators(PARAM.format(*hints))) == features(network)


def test_what_is_no_graph_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="not an ncnn param file"):
        script.read_operators("hello\n")
    with pytest.raises(ValueError, match="cannot derive the shape of a Mystery"):
        script.graph_features(script.read_operators("7767517\n2 2\nInput i 0 1 x 0=4 1=4 2=3\nMystery m 1 1 x y\n"))


def test_published_networks_have_their_known_macs(script: ModuleType, data_folder: Path) -> None:
    # millions, from the papers: 1801.04381, 1512.03385 (ResNet-18, -50), 1409.1556
    for name, macs in {"mobilenet_v2": 300, "resnet18": 1820, "resnet50": 3860, "vgg16": 15470}.items():
        text = (data_folder / "ncnn_param" / f"{name}.param").read_text()
        row = script.graph_features(script.read_operators(text))
        assert sum(value for key, value in row.items() if key.endswith(".macs")) / 1e6 == pytest.approx(macs, rel=0.05)


def test_the_command_reproduces_the_shipped_numbers(script: ModuleType, data_folder: Path) -> None:
    result = script.fit(data_folder)
    shipped = yaml.safe_load((SHIPPED / "adreno540.yaml").read_text())["latency"]
    fitted = json.loads(json.dumps(script.device_sections(result)))["latency"]
    assert shipped["source"] == fitted["source"]
    assert shipped["coefficients_ms"] == pytest.approx(fitted["coefficients_ms"], rel=1e-4)
    assert shipped["held_out"] == pytest.approx(fitted["held_out"], rel=1e-3)
    assert result["held_out"]["mape"] < 0.17 < 0.25 < result["held_out"]["macs_only_mape"]
    assert result["held_out"]["spearman"] > 0.9


def test_a_folder_without_the_data_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "expected a folder with ncnn_phone_latency.csv.gz" in capsys.readouterr().err
