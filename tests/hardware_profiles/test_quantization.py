"""Oracles: numbers by hand, torch's own fake quantization, and networks small enough to reason about."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hardware_profiles.quantization import (
    affine_of,
    affines_of,
    bias_scales,
    observed_tensors,
    quantize_bias,
    quantize_weight,
    quantized_tensors,
    source_of,
)
from search_spaces import INT8, CompactTransformer, MobileNet, Network
from search_spaces.layers import (
    Layer,
    Port,
    activation,
    add,
    assemble,
    conv2d,
    global_average_pool,
    linear,
    max_pool,
    port,
    reshape,
)


def test_affine_by_hand() -> None:
    asymmetric = affine_of(-1.0, 4.0)  # 255 steps over 5.0; zero lies 51 steps up
    assert asymmetric.scale == pytest.approx(5 / 255, rel=1e-7)
    assert asymmetric.zero_point == 51
    positive = affine_of(2.0, 6.0)  # widened to contain 0
    assert (positive.zero_point, positive.high) == (0, pytest.approx(6.0, rel=1e-6))
    negative = affine_of(-6.0, -2.0)
    assert (negative.zero_point, negative.low) == (255, pytest.approx(-6.0, rel=1e-6))


def test_affine_covers_the_range_up_to_half_a_step(rng: np.random.Generator) -> None:
    for low, high in rng.normal(0, 3, (200, 2)):
        low, high = min(low, high), max(low, high)
        affine = affine_of(low, high)
        assert affine.scale == float(np.float32(affine.scale))
        assert affine.low <= min(low, 0) + 0.51 * affine.scale
        assert affine.high >= max(high, 0) - 0.51 * affine.scale


@pytest.mark.parametrize("low, high", [(0.0, 0.0), (0.0, 1e-30), (-1e-38, 0.0)])
def test_affine_of_a_dead_tensor_has_a_usable_scale(low: float, high: float) -> None:
    affine = affine_of(low, high)
    assert 1e-9 < affine.scale < 1e-6
    assert 0 <= affine.zero_point <= 255


@pytest.mark.parametrize("low, high", [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_affine_refuses_what_is_no_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="finite range"):
        affine_of(low, high)


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 3, 3)])
def test_weights_like_torch_fake_quantize(limit: int, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    weight = rng.normal(0, 0.3, shape).astype(np.float32)
    integers, scales = quantize_weight(weight, limit)
    assert (integers.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (shape[0],))
    for channel in range(shape[0]):  # by definition: the largest magnitude of a channel becomes the limit
        assert scales[channel] == pytest.approx(np.abs(weight[channel]).max() / limit, rel=1e-6)
        assert np.abs(integers[channel]).max() == limit
    torch_values = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weight), torch.from_numpy(scales), torch.zeros(shape[0], dtype=torch.int32), 0, -128, 127
    )
    ours = integers * scales.reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_allclose(ours, torch_values.numpy(), rtol=1e-6, atol=1e-7)


def test_weights_of_dead_channels_keep_a_scale_that_the_bias_fits() -> None:
    weight = np.array([[1.0, -0.5], [0.0, 0.0], [1e-25, 0.0]], np.float32)
    integers, scales = quantize_weight(weight)
    assert integers.tolist() == [[127, -64], [0, 0], [0, 0]]  # -63.5 rounds to even
    assert scales[1] == scales[2] == pytest.approx(1 / 127 / 4096, rel=1e-6)
    quantize_bias(np.array([0.1, 3.0, -3.0], np.float32), 0.02, scales)


def test_weights_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="limit from 1 to 127, got 128"):
        quantize_weight(np.ones((2, 2), np.float32), 128)
    with pytest.raises(ValueError, match="finite weights"):
        quantize_weight(np.array([[np.nan]], np.float32))


def test_bias_by_hand() -> None:
    scales = np.array([0.5, 0.25], np.float32)
    np.testing.assert_array_equal(bias_scales(0.125, scales), [0.0625, 0.03125])
    integers = quantize_bias(np.array([1.0, -0.5], np.float32), 0.125, scales)
    assert integers.dtype == np.int32
    assert integers.tolist() == [16, -16]


def test_bias_that_does_not_fit_is_refused_by_channel() -> None:
    with pytest.raises(ValueError, match="channel 1"):
        quantize_bias(np.array([0.0, 1e4], np.float32), 1e-4, np.array([1.0, 1e-3], np.float32))


def _network(*layers: Layer) -> Network:
    return assemble((3, 8, 8), [layers])


def _convs(*, quantized: tuple[bool, bool]) -> tuple[Layer, Layer]:
    first, second = ({"precision": INT8} if q else {} for q in quantized)
    a = conv2d("a", Port("input", (3, 8, 8)), 4, activation="relu6", **first)
    return a, conv2d("b", port(a), 4, activation="relu", **second)


def test_quantized_tensors_by_hand() -> None:
    a, b = _convs(quantized=(True, False))
    assert quantized_tensors(_network(a, b)) == ("input", "a")  # b reads a dequantized
    a, b = _convs(quantized=(False, True))
    assert quantized_tensors(_network(a, b)) == ("a",)  # on the edge to b; b is the output, so float
    pool = max_pool("p", port(b), kernel=3, stride=2)
    network = _network(a, b, pool, reshape("r", port(pool), (64,)), linear("c", Port("r", (64,)), 5, precision=INT8))
    assert quantized_tensors(network) == ("a", "b", "p", "r")
    assert observed_tensors(network) == ("a", "b")
    assert [source_of(network, name) for name in ("input", "a", "b", "p", "r")] == ["input", "a", "b", "b", "b"]


def test_a_float_rearrangement_is_observed_itself() -> None:
    flat = reshape("r", Port("input", (3, 8, 8)), (192,))
    network = _network(flat, linear("c", port(flat), 5, precision=INT8), linear("d", Port("c", (5,)), 5))
    assert observed_tensors(network) == ("r", "c")


def test_ranges_behind_activations_are_clipped() -> None:
    a, b = _convs(quantized=(True, True))
    network = _network(a, b, activation("swish", port(b), "hardswish"), add("sum", Port("swish", b.out_shape), port(b)))
    affines = affines_of(network, {"input": (-1.0, 1.0), "a": (-2.0, 9.0), "b": (-2.0, 9.0)})
    assert (affines["a"].zero_point, affines["a"].high) == (0, pytest.approx(6.0, rel=1e-6))
    assert (affines["b"].zero_point, affines["b"].high) == (0, pytest.approx(9.0, rel=1e-6))
    assert set(affines) == {"input", "a", "b"}


def test_missing_and_bad_ranges_name_the_tensor() -> None:
    network = _network(*_convs(quantized=(True, True)))
    with pytest.raises(ValueError, match="'a'"):
        affines_of(network, {"input": (-1.0, 1.0)})
    with pytest.raises(ValueError, match=r"'input': expected a finite range"):
        affines_of(network, {"input": (math.nan, 1.0), "a": (0.0, 1.0)})


@pytest.mark.parametrize("space", [MobileNet(squeeze_excite=(False, True)), CompactTransformer()])
def test_all_fp32_needs_no_range_and_all_int8_one_for_each_source(space: MobileNet, rng: np.random.Generator) -> None:
    for _ in range(10):
        architecture = space.sample(rng)
        assert observed_tensors(space.lower(space.with_precision(architecture, "fp32"))) == ()
        network = space.lower(space.with_precision(architecture, "int8"))
        observed = observed_tensors(network)
        assert observed[0] == "input"
        assert network.output.name not in observed
        weighted = {layer.name for layer in network.layers[:-1] if layer.has_weights}
        assert weighted <= set(observed)
        assert {source_of(network, name) for name in quantized_tensors(network)} == set(observed)


def test_global_average_pool_has_parameters_of_its_own() -> None:
    a, _ = _convs(quantized=(True, False))
    pool = global_average_pool("p", port(a))
    network = _network(a, pool, conv2d("c", port(pool), 5))
    assert source_of(network, "p") == "p"
    assert observed_tensors(network) == ("input", "a", "p")
