"""Patches against sets of pixels followed one by one, the published formula, and MCUNetV2's figures of MobileNetV2."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest

from hardware_profiles.patches import (
    computed_positions,
    executed_macs,
    needed,
    patch_bounds,
    patch_sides,
    read_by,
    stage_macs,
)
from search_spaces import INPUT, MobileNet, Network
from search_spaces import layers as L
from search_spaces.layers import Port, port
from tests.stages import random_stage

Pixels = set[tuple[int, int]]


def followed(network: Network, wanted: Pixels) -> dict[str, Pixels]:
    """The pixels of each tensor that those of the stage's map depend on, each window walked through."""
    stage = network.patch_stage
    shapes = {INPUT: network.input_shape} | {layer.name: layer.out_shape for layer in stage}
    found: dict[str, Pixels] = {name: set() for name in shapes} | {stage[-1].name: wanted}
    for layer in reversed(stage):
        window = range(layer.kernel) if layer.kind in ("conv2d", "pool") else range(1)
        for row, column in found[layer.name]:
            for source in layer.inputs:
                _, height, width = shapes[source]
                for down in window:
                    for across in window:
                        y = row * layer.stride - layer.padding[0] + down
                        x = column * layer.stride - layer.padding[1] + across
                        if 0 <= y < height and 0 <= x < width:
                            found[source].add((y, x))
    return found


@pytest.mark.parametrize("patches", [2, 3])
def test_clipped_work_is_that_of_the_pixels_that_each_patch_depends_on(patches: int, rng: np.random.Generator) -> None:
    for _ in range(12):
        height, width = (int(side) for side in rng.integers(3 * patches, 20, 2))
        network = random_stage(rng, height=height, width=width, patches=patches)
        stage = network.patch_stage
        counted = dict.fromkeys((INPUT, *(layer.name for layer in stage)), 0)
        _, rows, columns = stage[-1].out_shape
        for y in range(patches):
            for x in range(patches):
                part = {
                    (row, column)
                    for row in range(rows * y // patches, rows * (y + 1) // patches)
                    for column in range(columns * x // patches, columns * (x + 1) // patches)
                }
                for name, pixels in followed(network, part).items():
                    counted[name] += len(pixels)
        assert computed_positions(network, clipped=True) == counted
        work = [layer.macs // prod(layer.out_shape[1:]) * counted[layer.name] for layer in stage]
        assert stage_macs(network, clipped=True) == sum(work)
        assert executed_macs(network, clipped=True) == network.macs - sum(layer.macs for layer in stage) + sum(work)


def test_unclipped_patches_grow_by_the_published_formula() -> None:
    image = Port(INPUT, (3, 96, 96))
    first = L.conv2d("first", image, 8, kernel=3, stride=2)
    second = L.conv2d("second", port(first), 8, kernel=5, groups=8)
    third = L.conv2d("third", port(second), 4, kernel=3, stride=2)
    stage = tuple(replace(layer, patches=4) for layer in (first, second, third))
    network = Network(image.shape, (*stage, L.global_average_pool("after", port(third))))
    side = 24 // 4
    sides = {"third": side, "second": (side - 1) * 2 + 3}
    sides["first"] = sides["second"] - 1 + 5
    sides[INPUT] = (sides["first"] - 1) * 2 + 3
    assert patch_sides(network) == {name: (value, value) for name, value in sides.items()}
    per_patch = sides["first"] ** 2 * 8 * 27 + sides["second"] ** 2 * 8 * 25 + side**2 * 4 * 8 * 9
    assert stage_macs(network) == executed_macs(network) == 16 * per_patch
    assert computed_positions(network) == {name: 16 * value**2 for name, value in sides.items()}


def test_a_patch_where_the_sides_do_not_divide_is_the_largest_one() -> None:
    assert patch_bounds(10, 4) == ((0, 2), (2, 5), (5, 7), (7, 10))
    image = Port(INPUT, (1, 10, 9))
    stage = (replace(L.conv2d("layer", image, 1, kernel=3), patches=4),)
    assert patch_sides(Network(image.shape, stage)) == {"layer": (3, 3), INPUT: (5, 5)}


def test_a_residual_needs_what_its_longer_path_needs() -> None:
    image = Port(INPUT, (1, 12, 12))
    first = L.conv2d("first", image, 1, kernel=3)
    second = L.conv2d("second", port(first), 1, kernel=5)
    total = L.add("sum", port(second), port(first))
    network = Network(image.shape, tuple(replace(layer, patches=2) for layer in (first, second, total)))
    assert needed(network, 1, (6, 12), clipped=False) == {
        "sum": (6, 12), "second": (6, 12), "first": (4, 14), INPUT: (3, 15)
    }  # fmt: skip
    assert needed(network, 2, (6, 12), clipped=True)["first"] == (4, 12)
    assert read_by(total, 1, (6, 12)) == (6, 12)


def test_without_patches_nothing_is_computed_twice() -> None:
    network = MobileNet().lower(MobileNet().largest)
    assert patch_sides(network) == computed_positions(network) == {}
    assert executed_macs(network) == executed_macs(network, clipped=True) == network.macs
    assert stage_macs(network) == 0
