"""Features against numbers written out by hand, and the model against their dot product."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from hardware_profiles.cost_model import (
    FAMILIES,
    AdditiveModel,
    UnsupportedLayer,
    block_features,
    conversions,
    family_of,
    features,
    predicted,
    shape_features,
)
from search_spaces import FP32, INPUT, INT8, CompactTransformer, MobileNet, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port


def mixed_network() -> Network:
    """Image -> float conv -> int8 depthwise -> float 1x1 -> add of conv and 1x1 -> pool -> int8 classifier."""
    conv = L.conv2d("conv", Port(INPUT, (3, 8, 8)), 4, kernel=3)
    depthwise = L.conv2d("depthwise", port(conv), 4, kernel=5, groups=4, precision=INT8)
    pointwise = L.conv2d("pointwise", port(depthwise), 4)
    total = L.add("add", port(conv), port(pointwise))
    pool = L.global_average_pool("pool", port(total))
    flat = L.reshape("flat", port(pool), (4,))
    linear = L.linear("linear", port(flat), 10, precision=INT8)
    return assemble((3, 8, 8), [(conv, depthwise, pointwise, total, pool, flat, linear)])


def test_features_of_a_network_counted_by_hand() -> None:
    assert features(mixed_network()) == {
        "conv.fp32.count": 1,
        "conv.fp32.macs": 64 * 4 * 3 * 9,
        "conv.fp32.bytes": 4 * 64 * (3 + 4),
        "conv.fp32.weight_bytes": 4 * (4 * 3 * 9 + 4),
        "depthwise.int8.count": 1,
        "depthwise.int8.macs": 64 * 4 * 25,
        "depthwise.int8.bytes": 64 * (4 + 4),
        "depthwise.int8.weight_bytes": 4 * 25 + 4 * 4 + 4 * 4,
        "pointwise.fp32.count": 1,
        "pointwise.fp32.macs": 64 * 4 * 4,
        "pointwise.fp32.bytes": 4 * 64 * (4 + 4),
        "pointwise.fp32.weight_bytes": 4 * (16 + 4),
        "add.fp32.count": 1,
        "add.fp32.bytes": 4 * 64 * 12,
        "average_pool.fp32.count": 1,
        "average_pool.fp32.bytes": 4 * (64 * 4 + 4),
        "reshape.fp32.count": 1,
        "reshape.fp32.bytes": 4 * 8,
        "linear.int8.count": 1,
        "linear.int8.macs": 40,
        "linear.int8.bytes": 14,
        "linear.int8.weight_bytes": 40 + 10 * 4 + 10 * 4,
        "quantize.int8.count": 2,  # conv's output and the classifier's input
        "quantize.int8.bytes": 5 * (64 * 4 + 4),
        "dequantize.int8.count": 1,
        "dequantize.int8.bytes": 5 * 64 * 4,
    }


def test_a_patch_stage_counts_what_all_patches_do() -> None:
    image = Port(INPUT, (3, 8, 8))
    first = L.conv2d("first", image, 4, kernel=3, precision=INT8)
    second = L.conv2d("second", port(first), 2, kernel=3, precision=INT8)
    after = L.conv2d("after", port(second), 2, precision=INT8)
    stage = tuple(replace(layer, patches=2) for layer in (first, second))
    # each of 4 patches makes 4x4 of 8x8, from 6x6, from the whole image, since 8x8 is what there is
    assert features(assemble(image.shape, [(*stage, after)])) == {
        "conv.int8.count": 2 * 4,
        "conv.int8.macs": 4 * (36 * 4 * 3 * 9 + 16 * 2 * 4 * 9),
        "conv.int8.bytes": 4 * (64 * 3 + 36 * 4 + 36 * 4 + 16 * 2),
        "conv.int8.weight_bytes": 4 * (first.weight_bytes + second.weight_bytes),
        "pointwise.int8.count": 1,
        "pointwise.int8.macs": 64 * 4,
        "pointwise.int8.bytes": 64 * 4,
        "pointwise.int8.weight_bytes": after.weight_bytes,
        "quantize.int8.count": 1,
        "quantize.int8.bytes": 5 * 4 * 64 * 3,
    }


def test_a_tensor_is_converted_once_for_all_its_readers() -> None:
    first = L.conv2d("first", Port(INPUT, (2, 4, 4)), 2)
    readers = [L.conv2d(f"reader{i}", port(first), 2, precision=INT8) for i in range(3)]
    network = assemble((2, 4, 4), [(first, *readers)])
    assert [(copy.reader, copy.source, copy.family) for copy in conversions(network)] == [(1, "first", "quantize")]


def test_the_image_is_quantized_for_an_integer_stem() -> None:
    stem = L.conv2d("stem", Port(INPUT, (3, 4, 4)), 2, precision=INT8)
    assert features(assemble((3, 4, 4), [(stem,)]))["quantize.int8.bytes"] == 5 * 48


def test_every_layer_of_the_spaces_has_a_known_family(rng: np.random.Generator) -> None:
    for space in (MobileNet(squeeze_excite=(True,), nonlinearity="hardswish"), CompactTransformer()):
        for _ in range(5):
            layers = space.lower(space.sample(rng)).layers
            assert {family_of(layer) for layer in layers if layer.kind != "parameter"} <= set(FAMILIES)


def test_a_grouped_convolution_is_not_a_depthwise_one() -> None:
    image = Port(INPUT, (4, 4, 4))
    assert family_of(L.conv2d("grouped", image, 4, kernel=3, groups=2)) == "grouped"
    assert family_of(L.conv2d("multiplied", image, 8, kernel=3, groups=4)) == "grouped"
    assert family_of(L.conv2d("depthwise", image, 4, kernel=1, groups=4)) == "depthwise"
    assert family_of(L.max_pool("pool", image, kernel=3, stride=2)) == "max_pool"


def test_latency_is_the_sum_of_price_times_amount(rng: np.random.Generator) -> None:
    network = mixed_network()
    amounts = features(network)
    prices = {name: float(price) for name, price in zip(amounts, rng.random(len(amounts)), strict=True)}
    expected = 0.25 + sum(prices[name] * amounts[name] for name in amounts)
    assert AdditiveModel(prices, 0.25).latency_ms(network) == pytest.approx(expected, rel=1e-12)


def shaped_network() -> Network:
    """Stem of 3 channels -> fast 3x3 -> strided 3x3 -> 5x5 -> 3x3 to 12 channels -> depthwise -> 1x1 -> classifier."""
    stem = L.conv2d("stem", Port(INPUT, (3, 8, 8)), 16, kernel=3)
    fast = L.conv2d("fast", port(stem), 20, kernel=3)
    strided = L.conv2d("strided", port(fast), 16, kernel=3, stride=2)
    wide = L.conv2d("wide", port(strided), 16, kernel=5)
    narrow = L.conv2d("narrow", port(wide), 12, kernel=3)
    depthwise = L.conv2d("depthwise", port(narrow), 12, kernel=3, groups=12)
    pointwise = L.conv2d("pointwise", port(depthwise), 30)
    pool = L.global_average_pool("pool", port(pointwise))
    flat = L.reshape("flat", port(pool), (30,))
    linear = L.linear("linear", port(flat), 10)
    return assemble((3, 8, 8), [(stem, fast, strided, wide, narrow, depthwise, pointwise, pool, flat, linear)])


def test_shape_features_counted_by_hand() -> None:
    assert shape_features(shaped_network().layers) == {
        "conv.fp32.direct_macs": 64 * 16 * 27 + 16 * 16 * 20 * 9 + 16 * 16 * 16 * 25 + 16 * 12 * 16 * 9,
        "conv.fp32.reduction": 27 + 16 * 9 + 20 * 9 + 16 * 25 + 16 * 9,
        "depthwise.fp32.reduction": 9,
        "pointwise.fp32.reduction": 12,
        "linear.fp32.reduction": 30,
    }


def test_a_model_that_prices_shapes_adds_them_and_one_that_does_not_is_as_before() -> None:
    network = shaped_network()
    prices = dict.fromkeys(features(network), 1.0)
    plain = AdditiveModel(prices).latency_ms(network)
    assert plain == pytest.approx(sum(features(network).values()), rel=1e-12)
    direct = shape_features(network.layers)["conv.fp32.direct_macs"]
    shaped = AdditiveModel({**prices, "conv.fp32.direct_macs": 2.0, "linear.fp32.reduction": 3.0})
    assert shaped.latency_ms(network) == pytest.approx(plain + 2 * direct + 3 * 30, rel=1e-12)


def test_block_features_counted_by_hand() -> None:
    """In blocks of 16, 20 channels are 32, 12 are 16 and the image's 3 are 16."""
    assert block_features(shaped_network().layers, {INPUT: False}, {}, 16) == {
        "conv.fp32.padded_macs": 64 * 16 * 16 * 9
        + 64 * 32 * 16 * 9
        + 16 * 16 * 32 * 9
        + 16 * 16 * 16 * 25
        + 16 * 16 * 16 * 9,
        "conv.fp32.narrow_count": 2,  # the stem, from 3 channels, and the one to 12
        "depthwise.fp32.padded_macs": 16 * 16 * 9,
        "depthwise.fp32.narrow_count": 1,
        "pointwise.fp32.padded_macs": 16 * 16 * 32,
        "pointwise.fp32.narrow_count": 1,
    }


def test_blocks_of_one_channel_fill_nothing_up() -> None:
    network = shaped_network()
    found, plain = block_features(network.layers, {INPUT: False}, {}, 1), features(network)
    kernels = ("conv.fp32", "depthwise.fp32", "pointwise.fp32")
    assert found == {f"{kernel}.padded_macs": plain[f"{kernel}.macs"] for kernel in kernels}


def test_groups_are_filled_up_each_for_itself() -> None:
    grouped = L.conv2d("grouped", Port(INPUT, (12, 4, 4)), 24, kernel=3, groups=2)
    assert block_features([grouped], {INPUT: False}, {}, 8) == {
        "grouped.fp32.padded_macs": 16 * 24 * 8 * 9,  # 6 channels of each group are 8
        "grouped.fp32.narrow_count": 1,
    }


def test_a_float_add_of_integers_is_not_fused() -> None:
    network = mixed_network()  # its float add reads floats only
    assert not [name for name in block_features(network.layers, {INPUT: False}, {}, 1) if "unfused" in name]
    first = L.conv2d("first", Port(INPUT, (2, 4, 4)), 2)
    second = L.conv2d("second", port(first), 2, precision=INT8)
    total = L.add("total", port(first), port(second))
    last = L.add("last", port(total), port(first))
    found = block_features(assemble((2, 4, 4), [(first, second, total, last)]).layers, {INPUT: False}, {}, 1)
    unfused = {name: amount for name, amount in found.items() if "unfused" in name}
    assert unfused == {"add.fp32.unfused_count": 1, "add.fp32.unfused_bytes": 4 * 3 * 32}
    # of a part, what it is fed with says so
    assert "add.fp32.unfused_count" not in block_features([last], {"total": False, "first": False}, {}, 1)
    assert block_features([last], {"total": False, "first": True}, {}, 1)["add.fp32.unfused_count"] == 1


def test_an_integer_add_has_nothing_unfused() -> None:
    first = L.conv2d("first", Port(INPUT, (2, 4, 4)), 2, precision=INT8)
    second = L.conv2d("second", port(first), 2, precision=INT8)
    total = replace(L.add("total", port(first), port(second)), precision=INT8)
    assert not [name for name in features(assemble((2, 4, 4), [(first, second, total)]), 8) if "unfused" in name]


def test_every_patch_adds_for_itself_what_is_not_fused() -> None:
    """Each of 4 patches adds what it computes: 6x6 of 8x8 positions, which the 3x3 after it needs."""
    first = L.conv2d("first", Port(INPUT, (3, 8, 8)), 4)
    second = L.conv2d("second", port(first), 4, precision=INT8)
    total = L.add("total", port(first), port(second))
    last = L.conv2d("last", port(total), 2, kernel=3)
    stage = tuple(replace(layer, patches=2) for layer in (first, second, total, last))
    found = features(assemble((3, 8, 8), [stage]), 8)
    assert found["add.fp32.unfused_count"] == 4
    assert found["add.fp32.unfused_bytes"] == 4 * (3 * 4 * 4 * 36) == found["add.fp32.bytes"]


def test_every_patch_has_blocks_of_its_own() -> None:
    first = L.conv2d("first", Port(INPUT, (3, 8, 8)), 4, kernel=3, precision=INT8)
    second = L.conv2d("second", port(first), 2, kernel=3, precision=INT8)
    stage = tuple(replace(layer, patches=2) for layer in (first, second))
    found = features(assemble((3, 8, 8), [stage]), 8)
    assert found["conv.int8.narrow_count"] == 2 * 4
    assert found["conv.int8.padded_macs"] == 4 * (36 * 8 * 8 * 9 + 16 * 8 * 8 * 9)


def test_a_model_of_blocks_adds_them_and_one_without_is_as_before() -> None:
    network = shaped_network()
    prices = dict.fromkeys(features(network), 1.0)
    plain = AdditiveModel(prices).latency_ms(network)
    blocks = block_features(network.layers, {INPUT: False}, {}, 16)
    blocked = AdditiveModel({**prices, **dict.fromkeys(blocks, 3.0)}, channel_block=16)
    assert blocked.latency_ms(network) == pytest.approx(plain + 3 * sum(blocks.values()), rel=1e-12)
    assert features(network, 16) == features(network) | blocks


def test_a_family_that_cost_nothing_is_known_and_one_never_seen_is_refused_by_name() -> None:
    network = mixed_network()
    prices = dict.fromkeys(features(network), 0.0)
    assert AdditiveModel(prices).latency_ms(network) == 0.0
    without = {name: price for name, price in prices.items() if not name.startswith("depthwise.int8")}
    with pytest.raises(UnsupportedLayer, match=r"covers depthwise; this model knows add\.fp32") as caught:
        AdditiveModel(without).latency_ms(network)
    assert isinstance(caught.value, LookupError)
    other = {name.replace("depthwise.int8", "depthwise.fp32"): price for name, price in prices.items()}
    assert AdditiveModel(other).unsupported_layers(network) == ("depthwise",)


def test_a_conversion_never_seen_is_refused_too() -> None:
    network = mixed_network()
    prices = {name: 1.0 for name in features(network) if not name.startswith("dequantize")}
    with pytest.raises(UnsupportedLayer, match="dequantize depthwise"):
        AdditiveModel(prices).latency_ms(network)


def test_an_interval_is_a_share_of_the_mean_and_never_negative() -> None:
    assert (predicted(10.0, 0.2).low_ms, predicted(10.0, 0.2).high_ms) == (8.0, 12.0)
    assert predicted(10.0, 1.5).low_ms == 0.0
    assert predicted(10.0, None).high_ms is None


def test_features_are_fast_enough_for_a_search() -> None:
    space = MobileNet(depths=(3,), expansions=(4,), precisions=("fp32",))
    network = space.lower(space.largest)
    assert len(network.layers) >= 40
    best = np.inf
    for _ in range(20):
        start = time.perf_counter()
        features(network)
        best = min(best, time.perf_counter() - start)
    assert best / len(network.layers) < 0.5e-3 / 60 * 2  # twice the bound for 60 layers, for slow machines


def test_precision_is_part_of_the_name() -> None:
    image = Port(INPUT, (3, 4, 4))
    names = {
        precision.name: set(features(assemble((3, 4, 4), [(L.conv2d("conv", image, 2, precision=precision),)])))
        for precision in (FP32, INT8)
    }
    assert "pointwise.fp32.macs" in names["fp32"] and "pointwise.int8.macs" in names["int8"]
    assert "quantize.int8.count" not in names["fp32"]
