"""ncnn graphs: read by hand-counted examples, and against our own layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.ncnn_graphs import graph_features, output_shapes, read_graph, read_operators
from hardware_profiles.cost_model import features, shape_features
from search_spaces import INPUT
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

# The same network twice: with the shapes of the outputs written out, and with only the input's.
PARAM = """7767517
9 10
Input input 0 1 image{0} 0=8 1=8 2=3
Convolution stem 1 1 image stem{1} 0=16 1=3 3=2 4=1 5=1 6=432
Split split 1 2 stem left right{2}
ConvolutionDepthWise depthwise 1 1 left dw{1} 0=16 1=3 4=1 5=1 6=144 7=16
Convolution project 1 1 dw pw{1} 0=16 1=1 5=1 6=256
BinaryOp add 2 1 pw right sum{1} 0=0
Convolution fast 1 1 sum fast{1} 0=16 1=3 4=1 5=1 6=2304
Pooling pool 1 1 fast pooled{3} 0=1 1=4 2=4
Permute permute 1 1 pooled moved{4} 0=3
"""
HINTS = (
    " -23330=4,3,8,8,3",
    " -23330=4,3,4,4,16",
    " -23330=8,3,4,4,16,3,4,4,16",
    " -23330=4,3,1,1,16",
    " -23330=4,3,16,1,1",
)


@pytest.mark.parametrize("hints", [HINTS, ("",) * 5], ids=["hinted", "derived"])
def test_a_graph_has_the_features_of_the_same_network_in_our_layers(hints: tuple[str, ...]) -> None:
    stem = L.conv2d("stem", Port(INPUT, (3, 8, 8)), 16, kernel=3, stride=2)
    depthwise = L.conv2d("depthwise", port(stem), 16, kernel=3, groups=16)
    project = L.conv2d("project", port(depthwise), 16)
    total = L.add("add", port(project), port(stem))
    fast = L.conv2d("fast", port(total), 16, kernel=3)
    pool = L.global_average_pool("pool", port(fast))
    move = L.permute("permute", port(pool), (1, 2, 0))
    network = assemble((3, 8, 8), [(stem, depthwise, project, total, fast, pool, move)])
    found = graph_features(read_operators(PARAM.format(*hints)))
    assert found == features(network) | shape_features(network.layers)
    assert found["conv.fp32.direct_macs"] == 16 * 16 * 27  # the stem alone
    assert found["conv.fp32.reduction"] == 27 + 16 * 9


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="not an ncnn param file"):
        read_operators("hello\n")
    with pytest.raises(ValueError, match="cannot derive the shape of a Mystery"):
        graph_features(read_operators("7767517\n2 2\nInput i 0 1 x 0=4 1=4 2=3\nMystery m 1 1 x y\n"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Slice s 1 2 x a b -23300=2,-233,-233 1=0", [(4, 6, 5)] * 2),
        ("ShuffleChannel s 1 1 x y 0=2", [(8, 6, 5)]),
        ("Interp i 1 1 x y 0=1 1=2.0 2=2.0", [(8, 12, 10)]),
        ("Pooling p 1 1 x y 0=0 1=3 2=2 3=1", [(8, 3, 3)]),
        ("Reshape r 1 1 x y 0=-1 1=8", [(8, 30)]),
    ],
)
def test_shapes_that_the_file_does_not_give(line: str, expected: list[tuple[int, ...]]) -> None:
    operator = read_operators(f"7767517\n1 1\n{line}\n")[0]
    assert output_shapes(operator, [(8, 6, 5)]) == expected


def test_a_transposed_convolution_multiplies_once_an_input() -> None:
    text = "7767517\n2 2\nInput i 0 1 x 0=5 1=5 2=4\nDeconvolutionDepthWise d 1 1 x y 0=4 1=2 3=2 6=16 7=4 "
    found = graph_features(read_operators(text + "-23330=4,3,10,10,4"))
    assert found["DeconvolutionDepthWise.fp32.macs"] == 25 * 4 * 4


def test_published_networks_have_their_known_macs(data_folder: Path) -> None:
    # millions, from the papers: 1801.04381, 1512.03385 (ResNet-18, -50), 1409.1556
    for name, macs in {"mobilenet_v2": 300, "resnet18": 1820, "resnet50": 3860, "vgg16": 15470}.items():
        row = graph_features(read_graph(data_folder / "ncnn_param", name))
        assert sum(value for key, value in row.items() if key.endswith(".macs")) / 1e6 == pytest.approx(macs, rel=0.05)
