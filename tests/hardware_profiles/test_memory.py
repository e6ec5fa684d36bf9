"""Peak memory against published numbers, hand-counted networks and a brute force over time steps."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest

from hardware_profiles.memory import (
    ALWAYS,
    INPLACE_DEPTHWISE,
    INPLACE_RESIDUAL,
    LIVENESS,
    NEVER,
    TFLM_GREEDY,
    UNLESS_SAME,
    Buffer,
    UnknownPlanner,
    UnknownStorage,
    flash_bytes,
    greedy_arena_bytes,
    peak_sram_bytes,
    persistent_sram_bytes,
)
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


@pytest.mark.parametrize(("planner", "kib"), [(INPLACE_DEPTHWISE, 1372), (INPLACE_RESIDUAL, 1372), (LIVENESS, 1470)])
def test_mobilenet_v2_takes_the_published_memory(planner: str, kib: int) -> None:
    network = mobilenet_v2(INT8)
    assert network.macs == pytest.approx(300e6, rel=0.01)  # the paper's 300 M: it is the network meant
    assert peak_sram_bytes(network, planner) == kib * KIB


@pytest.mark.parametrize(
    ("planner", "peak_bytes"),
    [
        # 28x28: block 4 holds its input of 32 channels, 192 expanded ones and one more (published as 172 KiB)
        (INPLACE_RESIDUAL, 28 * 28 * (32 + 192 + 1)),
        (INPLACE_DEPTHWISE, 28 * 28 * (32 + 192 + 32)),  # and its projection, which is added only then
        # within a patch, 16 channels in and 96 out on 35x35, beside the whole map of 28x28x32
        (LIVENESS, 28 * 28 * (32 + 192 + 192)),
    ],
)
def test_mobilenet_v2_in_four_by_four_patches(planner: str, peak_bytes: int) -> None:
    network = in_patches(mobilenet_v2(INT8), 4, "block3.project")
    assert network.patch_stage[-1].out_shape == (32, 28, 28)
    assert peak_sram_bytes(network, planner) == peak_bytes
    if planner == INPLACE_RESIDUAL:
        assert round(peak_bytes / KIB) == 172


def in_patches(network: Network, patches: int, last: str) -> Network:
    end = [layer.name for layer in network.layers].index(last) + 1
    made = tuple(replace(layer, patches=patches) for layer in network.layers[:end])
    return Network(network.input_shape, (*made, *network.layers[end:]))


@pytest.mark.parametrize("planner", [LIVENESS, TFLM_GREEDY])
def test_a_patch_stands_beside_the_whole_map_that_patches_make(planner: str) -> None:
    image = Port(INPUT, (4, 16, 16))
    first = L.conv2d("first", image, 8, kernel=3, precision=INT8)
    second = L.conv2d("second", port(first), 4, kernel=3, stride=2, precision=INT8)  # 8x8
    last = L.conv2d("last", port(second), 2, precision=INT8)
    network = assemble(image.shape, [(first, second, last)])
    # one of 2x2 patches of 4x4 needs 9x9 of the first map and 11x11 of the image
    within = max(4 * 11 * 11 + 8 * 9 * 9, 8 * 9 * 9 + 4 * 4 * 4)
    planned = in_patches(network, 2, "second")
    sixteens = -(-4 * 11 * 11 // 16) * 16 + -(-8 * 9 * 9 // 16) * 16
    assert peak_sram_bytes(planned, planner) == (within if planner == LIVENESS else sixteens) + 4 * 8 * 8
    # where nothing is saved within, the layers after the patches may be what takes most
    heavy = L.conv2d("heavy", port(second), 64, precision=INT8)
    network = assemble(image.shape, [(first, second, heavy)])
    assert peak_sram_bytes(in_patches(network, 2, "second"), planner) == (4 + 64) * 8 * 8


def test_a_patch_is_never_larger_than_the_map() -> None:
    image = Port(INPUT, (1, 6, 6))
    layer = L.conv2d("layer", image, 3, kernel=5, precision=INT8)
    network = in_patches(assemble(image.shape, [(layer, L.conv2d("next", port(layer), 1, precision=INT8))]), 2, "layer")
    # 3 pixels of the map need 7 rows, of which there are 6
    assert peak_sram_bytes(network, LIVENESS) == 6 * 6 + 3 * 3 * 3 + 3 * 6 * 6


def test_floats_in_a_patch_take_four_times_the_bytes() -> None:
    int8, fp32 = (in_patches(mobilenet_v2(precision), 4, "block3.project") for precision in (INT8, FP32))
    assert peak_sram_bytes(fp32) == 4 * peak_sram_bytes(int8)


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


def test_a_projection_adds_to_its_shortcut_as_it_goes() -> None:
    image = Port(INPUT, (1, 5, 5))
    stem = L.conv2d("stem", image, 4, precision=INT8)
    wide = L.conv2d("wide", port(stem), 16, precision=INT8)
    back = L.conv2d("back", port(wide), 4, precision=INT8)
    total = L.add("sum", port(back), port(stem))
    network = assemble(image.shape, [(stem, wide, back, total)])
    assert peak_sram_bytes(network, INPLACE_DEPTHWISE) == (4 + 16 + 4) * 25
    assert peak_sram_bytes(network, INPLACE_RESIDUAL) == (4 + 16) * 25
    last = L.conv2d("last", port(stem), 4, precision=INT8)  # it reads the stem again: the sum needs its own memory
    network = assemble(image.shape, [(stem, wide, back, total, last, L.add("end", port(last), port(total)))])
    assert peak_sram_bytes(network, INPLACE_RESIDUAL) == (4 + 16 + 4) * 25
    also = L.conv2d("also", port(back), 1, precision=INT8)  # it reads the projection, which so must stay itself
    network = assemble(image.shape, [(stem, wide, back, total, also)])
    assert peak_sram_bytes(network, INPLACE_RESIDUAL) == (4 + 16 + 4) * 25


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


def test_the_greedy_planner_puts_large_buffers_first_and_later_ones_of_equals() -> None:
    assert greedy_arena_bytes([]) == 0
    assert greedy_arena_bytes([Buffer(1, 0, 0)]) == 16
    assert greedy_arena_bytes([Buffer(17, 0, 1), Buffer(16, 1, 2)]) == 48
    assert greedy_arena_bytes([Buffer(160, 0, 1), Buffer(160, 2, 3)]) == 160
    # the large one lies at 0; of the two others, which live with it but not together, both come after it; the last
    # one lives with those two, and the room beside the first of them is too small
    buffers = [Buffer(64, 0, 2), Buffer(32, 0, 0), Buffer(48, 2, 3), Buffer(64, 3, 3)]
    assert greedy_arena_bytes(buffers) == 64 + 48
    # of the equal ones the last is placed first, at 0; the order decides what fits beneath the others
    equals = [Buffer(32, 0, 1), Buffer(32, 1, 2), Buffer(32, 2, 3), Buffer(32, 3, 3), Buffer(16, 0, 3)]
    assert greedy_arena_bytes(equals) == grid_scan(equals)


def test_the_greedy_planner_finds_the_lowest_free_offset(rng: np.random.Generator) -> None:
    worse = 0
    for _ in range(150):
        starts = rng.integers(0, 12, 14)
        lengths = rng.integers(0, 5, 14)
        sizes = rng.integers(1, 8, 14) * 16 - rng.integers(0, 16, 14)
        buffers = [Buffer(int(b), int(t), int(t + n)) for b, t, n in zip(sizes, starts, lengths, strict=True)]
        assert greedy_arena_bytes(buffers) == grid_scan(buffers)
        alive = [sum(-(-b.bytes // 16) * 16 for b in buffers if b.first <= t <= b.last) for t in range(17)]
        worse += greedy_arena_bytes(buffers) > max(alive)
    assert worse  # some arenas are fragmented, else nothing would tell a greedy planner from a perfect one


def grid_scan(buffers: list[Buffer]) -> int:
    """Mark what is taken on a grid of steps and units of 16 bytes; try each offset from 0."""
    taken = np.zeros((1 + max(buffer.last for buffer in buffers), 4096), dtype=bool)
    needs = [-(-buffer.bytes // 16) for buffer in buffers]
    for index in sorted(range(len(buffers)), key=lambda i: (needs[i], i), reverse=True):
        buffer, units = buffers[index], needs[index]
        span = taken[buffer.first : buffer.last + 1]
        offset = next(start for start in range(4096) if not span[:, start : start + units].any())
        span[:, offset : offset + units] = True
    return 16 * int(taken.any(axis=0).nonzero()[0].max() + 1)


def test_a_reshape_is_a_buffer_in_the_arena_and_a_view_elsewhere() -> None:
    image = Port(INPUT, (1, 8, 8))
    stem = L.conv2d("stem", image, 4, precision=INT8)  # 256 bytes
    flat = L.reshape("flat", port(stem), (256,))
    network = assemble(image.shape, [(stem, flat, L.linear("linear", port(flat), 16, precision=INT8))])
    assert peak_sram_bytes(network, LIVENESS) == 64 + 256
    assert peak_sram_bytes(network, TFLM_GREEDY) == 256 + 256


@pytest.mark.parametrize("planner", [LIVENESS, TFLM_GREEDY])
@pytest.mark.parametrize(
    ("kernel", "stride", "scheme", "padded_by"),
    [
        (3, 2, "symmetric", (UNLESS_SAME, ALWAYS)),
        (3, 1, "symmetric", (ALWAYS,)),
        (3, 2, "same", (ALWAYS,)),
        (1, 2, "symmetric", ()),
    ],
)
def test_a_padding_operator_copies_what_it_pads(
    kernel: int, stride: int, scheme: str, padded_by: tuple[str, ...], planner: str
) -> None:
    image = Port(INPUT, (16, 8, 8))
    layer = L.conv2d("layer", image, 16, kernel=kernel, stride=stride, padding=scheme, precision=INT8)
    network = assemble(image.shape, [(layer,)])
    out = 16 * (8 // stride) ** 2
    side = 9 if scheme == "same" else 10
    for option in (NEVER, UNLESS_SAME, ALWAYS):
        expected = max(16 * 64 + 16 * side**2, 16 * side**2 + out) if option in padded_by else 16 * 64 + out
        assert peak_sram_bytes(network, planner, explicit_padding=option) == expected


def test_an_odd_size_pads_alike_on_both_sides_in_both_schemes() -> None:
    image = Port(INPUT, (1, 13, 13))
    network = assemble(image.shape, [(L.conv2d("layer", image, 1, kernel=3, stride=2, precision=INT8),)])
    assert peak_sram_bytes(network, LIVENESS, explicit_padding=UNLESS_SAME) == 13 * 13 + 7 * 7


def test_an_unknown_planner_or_padding_is_refused() -> None:
    with pytest.raises(UnknownPlanner, match="unknown memory planner 'greedy'; known: liveness, inplace_depthwise"):
        peak_sram_bytes(mobilenet_v2(INT8), "greedy")
    with pytest.raises(ValueError, match="explicit_padding = 'sometimes': expected one of never, unless_same, always"):
        peak_sram_bytes(mobilenet_v2(INT8), explicit_padding="sometimes")


def test_flash_is_the_parameters_and_the_overhead() -> None:
    image = Port(INPUT, (3, 8, 8))
    conv = L.conv2d("conv", image, 10, kernel=3, precision=INT8)
    network = assemble(image.shape, [(conv,)])
    assert flash_bytes(network) == 10 * 3 * 9 + 10 * 4 + 10 * 4  # weights, int32 biases, float32 scales
    assert flash_bytes(network, 1000) == 1000 + 350


def test_a_tflite_file_describes_layers_and_the_channels_of_convolutions() -> None:
    image = Port(INPUT, (3, 8, 8))
    conv = L.conv2d("conv", image, 10, kernel=3, precision=INT8)
    flat = L.reshape("flat", port(conv), (640,))
    network = assemble(image.shape, [(conv, flat, L.linear("linear", port(flat), 5, precision=INT8))])
    parameters = 10 * 3 * 9 + 4 * 10 + 640 * 5 + 4 * 5  # weights and int32 biases
    assert flash_bytes(network) == parameters + 4 * 10 + 4 * 5
    assert flash_bytes(network, 1000, "tflite") == 1000 + parameters + 24 * 10 + 737 * 3
    assert persistent_sram_bytes(network) == 0
    assert persistent_sram_bytes(network, "tflite") == 8 * 10 + 257 * 3 + 9057
    for refused in (flash_bytes, persistent_sram_bytes):
        with pytest.raises(UnknownStorage, match="unknown storage 'zip'; known: c_arrays, tflite"):
            refused(network, storage="zip")
