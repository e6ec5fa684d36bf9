"""Peak memory against published numbers, hand-counted networks and a brute force over time steps."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from hardware_profiles.memory import INPLACE_DEPTHWISE, LIVENESS, UnknownPlanner, flash_bytes, peak_sram_bytes
from search_spaces import FP32, INPUT, INT8, CompactTransformer, Layer, MobileNet, Network, Precision
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

KIB = 1024


def mobilenet_v2(precision: Precision) -> Network:
    """MobileNetV2 1.0 at 224 pixels, from table 2 of arXiv 1801.04381."""
    made: list[Layer] = [
        L.conv2d("stem", Port(INPUT, (3, 224, 224)), 32, kernel=3, stride=2, activation="relu6", precision=precision)
    ]
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    number = 0
    for expansion, width, count, first_stride in stages:
        for i in range(count):
            source, stride, name = port(made[-1]), first_stride if i == 0 else 1, f"block{number}"
            hidden = source.shape[0] * expansion
            if expansion != 1:
                made.append(L.conv2d(f"{name}.expand", source, hidden, precision=precision))
            made.append(
                L.conv2d(
                    f"{name}.dw", port(made[-1]), hidden, kernel=3, stride=stride, groups=hidden, precision=precision
                )
            )
            made.append(L.conv2d(f"{name}.project", port(made[-1]), width, precision=precision))
            if stride == 1 and source.shape[0] == width:
                made.append(L.add(f"{name}.add", port(made[-1]), source))
            number += 1
    made.append(L.conv2d("head", port(made[-1]), 1280, precision=precision))
    made.append(L.global_average_pool("pool", port(made[-1])))
    made.append(L.reshape("flat", port(made[-1]), (1280,)))
    made.append(L.linear("classifier", port(made[-1]), 1000, precision=precision))
    return assemble((3, 224, 224), [tuple(made)])


@pytest.mark.parametrize(("planner", "kib"), [(INPLACE_DEPTHWISE, 1372), (LIVENESS, 1470)])
def test_mobilenet_v2_takes_the_published_memory(planner: str, kib: int) -> None:
    network = mobilenet_v2(INT8)
    assert network.macs == pytest.approx(300e6, rel=0.01)  # the paper's 300 M: it is the network meant
    assert peak_sram_bytes(network, planner) == kib * KIB


def test_floats_take_four_times_the_bytes() -> None:
    assert peak_sram_bytes(mobilenet_v2(FP32)) == 4 * 1470 * KIB


def test_a_residual_is_held_until_it_is_added() -> None:
    image = Port(INPUT, (2, 4, 4))  # 32 bytes in int8
    stem = L.conv2d("stem", image, 4, precision=INT8)  # 64
    wide = L.conv2d("wide", port(stem), 8, precision=INT8)  # 128
    back = L.conv2d("back", port(wide), 4, precision=INT8)  # 64
    network = assemble(image.shape, [(stem, wide, back, L.add("sum", port(back), port(stem)))])
    assert peak_sram_bytes(network, LIVENESS) == 64 + 128 + 64


def test_an_element_wise_layer_overwrites_only_what_is_not_needed_any_more() -> None:
    image = Port(INPUT, (1, 4, 4))  # 64 bytes in fp32
    first = L.activation("first", image, "hardswish")
    second = L.activation("second", port(first), "hardswish")
    total = L.add("total", port(second), port(first))
    network = assemble(image.shape, [(first, second, total)])
    assert peak_sram_bytes(network, LIVENESS) == 3 * 64
    assert peak_sram_bytes(network, INPLACE_DEPTHWISE) == 2 * 64  # `second` may not overwrite `first`


def test_an_in_place_depthwise_needs_one_output_channel_more() -> None:
    image = Port(INPUT, (8, 6, 6))
    depthwise = L.conv2d("depthwise", image, 8, kernel=3, stride=2, groups=8, precision=INT8)
    network = assemble(image.shape, [(depthwise,)])
    assert peak_sram_bytes(network, LIVENESS) == 8 * 36 + 8 * 9
    assert peak_sram_bytes(network, INPLACE_DEPTHWISE) == 8 * 36 + 9


def test_a_depthwise_whose_input_is_read_again_gets_memory_of_its_own() -> None:
    image = Port(INPUT, (8, 6, 6))
    depthwise = L.conv2d("depthwise", image, 8, kernel=3, groups=8, precision=INT8)
    shortcut = L.conv2d("shortcut", image, 8, precision=INT8)
    network = assemble(image.shape, [(depthwise, shortcut, L.add("sum", port(depthwise), port(shortcut)))])
    assert peak_sram_bytes(network, INPLACE_DEPTHWISE) == 3 * 8 * 36


def test_a_view_keeps_what_it_shows_alive() -> None:
    image = Port(INPUT, (4, 2, 2))  # 64 bytes
    flat = L.reshape("flat", image, (16,))
    wide = L.linear("wide", port(flat), 32)  # 128
    narrow = L.linear("narrow", port(wide), 16)  # 64
    network = assemble(image.shape, [(flat, wide, narrow, L.add("sum", port(narrow), port(flat)))])
    assert peak_sram_bytes(network, LIVENESS) == 64 + 128 + 64


def test_a_tensor_read_in_two_precisions_lives_twice() -> None:
    image = Port(INPUT, (4, 2, 2))
    first = L.conv2d("first", image, 4, precision=FP32)  # 64 bytes; the image too
    integer = L.conv2d("integer", port(first), 4, precision=INT8)  # 16, of a copy of 16
    network = assemble(image.shape, [(first, integer, L.conv2d("float", port(first), 1, precision=FP32))])
    # while `integer` runs: first 64, its integer copy 16, the result 16; before: image 64 + first 64
    assert peak_sram_bytes(network, LIVENESS) == 128


@pytest.mark.parametrize("planner", [LIVENESS, INPLACE_DEPTHWISE])
@pytest.mark.parametrize("family", ["mobilenet", "compact_transformer"])
def test_peak_is_that_of_a_brute_force_over_time_steps(family: str, planner: str, rng: np.random.Generator) -> None:
    space = (
        MobileNet(resolutions=(8, 16), squeeze_excite=(False, True), nonlinearity="hardswish", expansions=(1, 2, 4))
        if family == "mobilenet"
        else CompactTransformer(resolutions=(8, 16), embeddings=(32, 64), tokenizer_widths=(16,))
    )
    for _ in range(25):
        network = space.lower(space.sample(rng))
        assert peak_sram_bytes(network, planner) == brute_force(network, planner)


def brute_force(network: Network, planner: str) -> int:
    """Write the schedule out, conversions as steps; at each step add up every tensor made before and read later."""
    read_by_floats = any(INPUT in layer.inputs and not layer.precision.is_quantized for layer in network.layers)
    size = {INPUT: prod(network.input_shape) * (4 if read_by_floats else 1)}
    integer = {INPUT: not read_by_floats}
    shows = {INPUT: INPUT}  # tensor -> the buffer it is in
    schedule: list[tuple[list[str], str, str]] = []  # what runs: buffers read, buffer made, in-place rule
    channel: dict[str, int] = {}
    for layer in network.layers:
        wants, reads = layer.precision.is_quantized, []
        for name, shape in zip(layer.inputs, layer.in_shapes, strict=True):
            buffer = shows[name]
            if integer[name] != wants:
                copy = f"{name}, converted"
                if copy not in size:
                    size[copy] = prod(shape) * (1 if wants else 4)
                    schedule.append(([buffer] if buffer != "flash" else [], copy, ""))
                buffer = copy
            if buffer != "flash":
                reads.append(buffer)
        integer[layer.name] = wants
        if layer.kind == "parameter":
            shows[layer.name] = "flash"
        elif layer.kind == "reshape":
            shows[layer.name] = reads[0]
        else:
            shows[layer.name] = layer.name
            size[layer.name] = prod(layer.out_shape) * (1 if wants else 4)
            channel[layer.name] = size[layer.name] // layer.out_shape[0]
            rule = layer.kind if layer.kind in ("add", "multiply", "activation") else ""
            if layer.kind == "conv2d" and layer.groups == layer.out_shape[0] == layer.in_shapes[0][0] > 1:
                rule = "depthwise"
            schedule.append((reads, layer.name, rule))
    made_at = {INPUT: -1} | {made: step for step, (_, made, _) in enumerate(schedule)}
    last_use = dict(made_at)
    for step, (reads, _, _) in enumerate(schedule):
        for buffer in reads:
            last_use[buffer] = step
    last_use[shows[network.output.name]] = len(schedule)
    peak = size[INPUT]
    for step, (reads, made, rule) in enumerate(schedule):
        alive = sum(size[buffer] for buffer in size if made_at[buffer] <= step <= last_use[buffer])
        dying = [buffer for buffer in reads if last_use[buffer] == step]
        if planner == INPLACE_DEPTHWISE and dying:
            if rule == "depthwise":
                alive += channel[made] - min(size[made], size[dying[0]])
            elif rule and any(size[buffer] == size[made] for buffer in dying):
                alive -= size[made]
        peak = max(peak, alive)
    return peak


def test_an_unknown_planner_is_refused() -> None:
    with pytest.raises(UnknownPlanner, match="unknown memory planner 'greedy'; known: liveness, inplace_depthwise"):
        peak_sram_bytes(mobilenet_v2(INT8), "greedy")


def test_flash_is_the_parameters_and_the_overhead() -> None:
    image = Port(INPUT, (3, 8, 8))
    conv = L.conv2d("conv", image, 10, kernel=3, precision=INT8)
    network = assemble(image.shape, [(conv,)])
    assert flash_bytes(network) == 10 * 3 * 9 + 10 * 4 + 10 * 4  # weights, int32 biases, float32 scales
    assert flash_bytes(network, 1000) == 1000 + 350
