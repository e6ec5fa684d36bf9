"""Layers and networks against numbers worked out by hand, and against torch where a shape rule is torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from search_spaces import FP32, INPUT, INT8, InvalidNetwork, Layer, Network, Precision, keeps_quantization
from search_spaces import layers as L
from search_spaces.layers import PREV, Port, assemble, port

IMAGE = Port(INPUT, (3, 16, 16))
TOKENS = Port("tokens", (5, 8))


def chain(*made: Layer, input_shape: tuple[int, ...] = (3, 16, 16)) -> Network:
    return assemble(input_shape, [made])


def test_convolution_by_hand() -> None:
    layer = L.conv2d("c", IMAGE, 8, kernel=3, stride=2)
    assert layer.out_shape == (8, 8, 8)
    assert layer.macs == 8 * 8 * 8 * 27 == 13_824
    assert layer.parameter_shapes == {"weight": (8, 3, 3, 3), "bias": (8,)}
    assert layer.params == 224
    assert layer.weight_bytes == 896
    assert layer.activation_bytes == 4 * 512
    assert not layer.is_depthwise


def test_int8_convolution_by_hand() -> None:
    layer = L.conv2d("c", IMAGE, 8, kernel=3, stride=2, precision=INT8)
    assert layer.weight_bytes == 216 + 4 * 8 + 4 * 8  # weights, int32 biases, float32 scales
    assert layer.activation_bytes == 512


def test_weights_below_eight_bits_are_packed() -> None:
    layer = L.conv2d("c", Port(INPUT, (1, 4, 4)), 3, kernel=3, precision=Precision("w4a8", 4, 8))
    assert layer.weight_bytes == 14 + 12 + 12  # 27 weights of half a byte, rounded up


def test_depthwise_and_grouped_convolutions_by_hand() -> None:
    source = Port(INPUT, (12, 10, 10))
    depthwise = L.conv2d("d", source, 12, kernel=5, groups=12)
    assert (depthwise.macs, depthwise.params, depthwise.is_depthwise) == (12 * 100 * 25, 12 * 25 + 12, True)
    grouped = L.conv2d("g", source, 24, kernel=1, groups=3)
    assert (grouped.macs, grouped.params, grouped.is_depthwise) == (24 * 100 * 4, 24 * 4 + 24, False)


def test_linear_by_hand() -> None:
    tokens = L.linear("l", TOKENS, 3)
    assert (tokens.out_shape, tokens.macs, tokens.params, tokens.weight_bytes) == ((5, 3), 120, 27, 108)
    vector = L.linear("l", Port(INPUT, (8,)), 3, precision=INT8)
    assert (vector.out_shape, vector.macs, vector.weight_bytes, vector.activation_bytes) == ((3,), 24, 24 + 12 + 12, 3)


def test_layers_without_multiplications_by_hand() -> None:
    norm = L.layer_norm("n", TOKENS)
    assert (norm.out_shape, norm.macs, norm.params, norm.weight_bytes) == ((5, 8), 0, 16, 64)
    positions = L.parameter("p", (5, 8))
    assert (positions.out_shape, positions.params, positions.weight_bytes) == ((5, 8), 40, 160)
    for layer, shape in (
        (L.activation("a", IMAGE, "hardswish"), (3, 16, 16)),
        (L.softmax("s", TOKENS), (5, 8)),
        (L.global_average_pool("g", IMAGE), (3, 1, 1)),
        (L.max_pool("m", IMAGE, kernel=3, stride=2), (3, 8, 8)),
        (L.average_pool("v", IMAGE, kernel=3, stride=1), (3, 16, 16)),
        (L.average_pool("v", Port(INPUT, (3, 7, 8)), kernel=2, stride=2), (3, 4, 4)),
        (L.add("+", TOKENS, Port("b", (5, 8))), (5, 8)),
        (L.multiply("*", IMAGE, Port("b", (3, 1, 1))), (3, 16, 16)),
        (L.reshape("r", TOKENS, (10, 2, 2)), (10, 2, 2)),
        (L.permute("t", Port("x", (2, 3, 4)), (2, 0, 1)), (4, 2, 3)),
    ):
        assert (layer.out_shape, layer.macs, layer.params, layer.weight_bytes) == (shape, 0, 0, 0), layer.kind


def test_matmul_by_hand() -> None:
    layer = L.matmul("m", Port("a", (2, 3, 4)), Port("b", (2, 4, 5)), scale=2)
    assert (layer.out_shape, layer.macs, layer.params, layer["scale"]) == ((2, 3, 5), 2 * 3 * 5 * 4, 0, 2.0)


@pytest.mark.parametrize("padding", L.PADDINGS)
def test_convolution_shapes_are_those_of_torch(padding: str, rng: np.random.Generator) -> None:
    for _ in range(40):
        size, stride = int(rng.integers(7, 40)), int(rng.integers(1, 3))
        kernel = int(rng.choice([1, 3, 5, 7]))
        layer = L.conv2d("c", Port(INPUT, (2, size, size + 3)), 4, kernel=kernel, stride=stride, padding=padding)
        top, left, bottom, right = layer.padding
        padded = F.pad(torch.zeros(1, 2, size, size + 3), (left, right, top, bottom))
        assert layer.out_shape == tuple(F.conv2d(padded, torch.zeros(4, 2, kernel, kernel), stride=stride).shape[1:])
        assert layer.out_shape == (4, ceil(size / stride), ceil((size + 3) / stride))


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "expected"),
    # TensorFlow's documented examples of SAME: more after than before, none where windows fit without
    [
        (3, 2, 224, (0, 1)),
        (3, 2, 225, (1, 1)),
        (5, 2, 12, (1, 2)),
        (3, 1, 9, (1, 1)),
        (1, 2, 8, (0, 0)),
        (2, 2, 8, (0, 0)),
    ],
)
def test_same_padding_by_hand(kernel: int, stride: int, size: int, expected: tuple[int, int]) -> None:
    assert L.pad_for(kernel, stride, size, "same") == expected


def test_max_pool_shapes_are_those_of_torch() -> None:
    for size in range(3, 30):
        for kernel, stride in ((3, 2), (3, 1), (2, 2)):
            layer = L.max_pool("m", Port(INPUT, (1, size, size)), kernel=kernel, stride=stride)
            expected = F.max_pool2d(torch.zeros(1, 1, size, size), kernel, stride, kernel // 2).shape[1:]
            assert layer.out_shape == tuple(expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: L.conv2d("c", IMAGE, 4, activation="hardswish"), "'hardswish' is not fused"),
        (lambda: L.linear("c", TOKENS, 4, activation="gelu"), "'gelu' is not fused"),
        (lambda: L.conv2d("c", IMAGE, 4, groups=2), "2 groups do not divide 3 and 4"),
        (lambda: L.conv2d("c", IMAGE, 0), "expected 1 or more of each, got 0 channels"),
        (lambda: L.conv2d("c", IMAGE, 3, groups=0), "0 groups"),
        (lambda: L.linear("c", TOKENS, 0), "0 features"),
        (lambda: L.conv2d("c", IMAGE, 4, padding="valid"), "unknown padding scheme 'valid'; known: symmetric, same"),
        (lambda: L.activation("a", IMAGE, "swish"), "unknown activation 'swish'; known: relu"),
        (lambda: L.matmul("m", TOKENS, TOKENS), r"cannot multiply \(5, 8\) by \(5, 8\)"),
        (lambda: L.add("a", IMAGE, TOKENS), "cannot add"),
        (lambda: L.multiply("m", TOKENS, Port("b", (2, 8))), "element-wise"),
        (lambda: L.reshape("r", TOKENS, (3, 3)), r"cannot reshape \(5, 8\) to \(3, 3\)"),
        (lambda: L.permute("p", TOKENS, (0, 0)), "does not reorder the 2 axes"),
    ],
)
def test_layers_that_cannot_be(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_window_larger_than_its_input_is_refused() -> None:
    layer = L.max_pool("m", IMAGE, kernel=3, stride=2)
    small = Layer("m", "pool", (INPUT,), ((1, 2, 2),), (), kernel=3, attributes=layer.attributes)
    with pytest.raises(InvalidNetwork, match=r"2x2 input is too small for kernel 3.*raise the resolution"):
        L.KINDS["pool"].out_shape(small)


def test_unknown_attribute_names_layer_and_kind() -> None:
    with pytest.raises(KeyError, match="layer 's' of kind 'softmax' has no attribute 'mode'"):
        L.softmax("s", TOKENS)["mode"]


def test_networks_that_do_not_fit_together() -> None:
    first = L.conv2d("a", IMAGE, 4)
    with pytest.raises(InvalidNetwork, match="at least one layer"):
        Network((3, 16, 16), ())
    with pytest.raises(InvalidNetwork, match="two layers are called 'a'"):
        chain(first, L.conv2d("a", port(first), 4))
    with pytest.raises(InvalidNetwork, match=r"'a' expects \(3, 16, 16\) from 'input', got \(3, 8, 8\)"):
        chain(first, input_shape=(3, 8, 8))
    with pytest.raises(InvalidNetwork, match="'b' reads 'later'; a slot reads"):
        chain(L.conv2d("b", Port("later", (3, 16, 16)), 4), first)
    with pytest.raises(InvalidNetwork, match="two layers are called 'input'"):
        chain(L.conv2d(INPUT, IMAGE, 4))


def test_slots_are_chained_and_empty_ones_passed_over() -> None:
    stem = L.conv2d("stem", Port(PREV, (3, 16, 16)), 4)
    grow = L.conv2d("grow", Port(PREV, (4, 16, 16)), 4)
    add = L.add("add", port(grow), Port(PREV, (4, 16, 16)))
    network = assemble((3, 16, 16), [(stem,), (), (grow, add), ()], name="n")
    assert [layer.inputs for layer in network.layers] == [("input",), ("stem",), ("grow", "stem")]
    assert network.output is network.by_name["add"]
    assert network.macs == 256 * (4 * 3 + 4 * 4)
    assert network.params == 16 + 20
    assert network.model_bytes == 4 * 36


def test_layers_without_weights_inherit_a_precision_that_all_inputs_share() -> None:
    a = L.conv2d("a", IMAGE, 4, precision=INT8)
    b = L.conv2d("b", port(a), 4, precision=INT8)
    c = L.conv2d("c", port(b), 4)
    layers = (
        a,
        b,
        c,
        both := L.add("int8+int8", port(a), port(b)),
        L.add("int8+fp32", port(b), port(c)),
        pool := L.global_average_pool("pool", port(both)),
        flat := L.reshape("flat", port(pool), (4,)),
        free := L.activation("free", port(both), "hardswish"),
        L.multiply("fp32*int8", port(free), port(pool)),
        L.linear("classifier", port(flat), 2, precision=INT8),
    )
    found = {layer.name: layer.precision for layer in chain(*layers).layers}
    assert {name for name, precision in found.items() if precision == INT8} == {
        "a", "b", "int8+int8", "pool", "flat", "classifier",
    }  # fmt: skip
    assert found["int8+fp32"] == found["free"] == found["fp32*int8"] == FP32
    network = chain(*layers)
    assert network.precisions == {"a": "int8", "b": "int8", "c": "fp32", "classifier": "int8"}
    assert network.int8_macs_share == pytest.approx((256 * (12 + 16) + 8) / (256 * (12 + 16 + 16) + 8))


def test_the_input_itself_is_fp32() -> None:
    assert chain(L.max_pool("m", IMAGE, kernel=3, stride=2)).output.precision == FP32


def test_rearranging_keeps_the_scale_and_averaging_does_not() -> None:
    assert keeps_quantization(L.reshape("r", TOKENS, (8, 5)))
    assert keeps_quantization(L.permute("p", TOKENS, (1, 0)))
    assert keeps_quantization(L.max_pool("m", IMAGE, kernel=3, stride=2))
    assert not keeps_quantization(L.global_average_pool("g", IMAGE))
    assert not keeps_quantization(L.add("a", TOKENS, TOKENS))
    assert not keeps_quantization(L.conv2d("c", IMAGE, 4))


def test_layers_are_values() -> None:
    assert L.conv2d("c", IMAGE, 4) == L.conv2d("c", IMAGE, 4)
    assert len({L.conv2d("c", IMAGE, 4), L.conv2d("c", IMAGE, 4), L.conv2d("c", IMAGE, 4, precision=INT8)}) == 2
    with pytest.raises(AttributeError):
        L.conv2d("c", IMAGE, 4).stride = 2  # type: ignore[misc]


def test_a_patch_stage_is_the_first_layers_that_run_in_patches() -> None:
    image = Port(INPUT, (3, 8, 8))
    first = L.conv2d("first", image, 4, kernel=3)
    second = L.conv2d("second", port(first), 4, kernel=3, stride=2)
    last = L.global_average_pool("last", port(second))
    stage = tuple(replace(layer, patches=2) for layer in (first, second))
    assert Network(image.shape, (first, second, last)).patch_stage == ()
    network = Network(image.shape, (*stage, last))
    assert network.patch_stage == stage
    assert network != Network(image.shape, (first, second, last))
    assert network.macs == Network(image.shape, (first, second, last)).macs


def patched(*numbers: int) -> tuple[Layer, ...]:
    """Two convolutions, their sum and a pool, in these numbers of patches."""
    first = L.conv2d("first", Port(INPUT, (3, 4, 4)), 4, kernel=3)
    second = L.conv2d("second", port(first), 4, kernel=3)
    layers = (first, second, L.add("sum", port(first), port(second)), L.global_average_pool("pool", port(second)))
    return tuple(replace(layer, patches=number) for layer, number in zip(layers, numbers, strict=True))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((2, 3, 1, 1), "layer 'second' runs in 3 patches a side; expected the first layers"),
        ((1, 2, 1, 1), "layer 'second' runs in 2 patches a side; expected the first layers"),
        ((0, 0, 0, 1), "layer 'first' runs in 0 patches a side"),
        ((2, 2, 2, 2), "layer 'pool' of kind pool has no patches; end the patch stage before"),
        ((2, 2, 1, 1), r"layers \['sum'\] read what the patch stage does not hand over; it ends with 'second'"),
        ((5, 5, 5, 1), r"layers \['pool'\] read what the patch stage does not hand over"),
    ],
)
def test_a_patch_stage_that_cannot_run_is_refused(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidNetwork, match=message):
        Network((3, 4, 4), patched(*numbers))


def test_a_patch_stage_makes_one_map_large_enough() -> None:
    image = Port(INPUT, (3, 4, 4))
    dead, used = (replace(L.conv2d(name, image, 2), patches=5) for name in ("dead", "used"))
    with pytest.raises(InvalidNetwork, match=r"nothing in the patch stage reads \['dead'\]"):
        Network(image.shape, (dead, used))
    with pytest.raises(InvalidNetwork, match=r"layer 'used' makes a map of \(4, 4\), too few for 5 patches a side"):
        Network(image.shape, (used,))
