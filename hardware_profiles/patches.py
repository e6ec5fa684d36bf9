"""Patch-based inference (MCUNetV2, arXiv 2110.15352): what a patch needs, and what computing halos again costs.

The map at the end of the patch stage (`Network.patch_stage`) is cut into p times p patches, as equal as they can be.
A layer that makes n rows needs (n - 1) * stride + kernel rows of its input, so that a patch grows from layer to layer
backwards, and neighbours share a halo that each computes for itself. There are two ways to count that work:

    unclipped   every patch is as large as one in the middle of a large image, but not larger than the whole map; what
                lies beyond the border is stored as zeros and computed on like the rest. So does code that is
                generated for patches of one size, and so count the costs of devices, and the paper its overhead of
                the patch stage.
    clipped     only what lies inside of the maps is computed: what running the patches takes at least.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import prod

from search_spaces import INPUT, Layer, Network

Interval = tuple[int, int]  # the first row (or column), and the one after the last


def patch_bounds(size: int, patches: int) -> tuple[Interval, ...]:
    """The rows of each patch of a map of `size` rows; where they do not divide it, some have one more."""
    edges = [size * number // patches for number in range(patches + 1)]
    return tuple(itertools.pairwise(edges))


def needed(network: Network, axis: int, part: Interval, *, clipped: bool) -> dict[str, Interval]:
    """What the rows (axis 1) or columns (axis 2) `part` of the patch stage's map need of every tensor before it.

    The network's input and the names of the stage's layers -> interval, in the tensor's own rows. Unclipped, it may
    begin below 0 and end beyond the tensor.
    """
    stage = network.patch_stage
    found: dict[str, Interval] = {stage[-1].name: part}
    for layer in reversed(stage):
        first, end = read_by(layer, axis, found[layer.name])
        for source, shape in zip(layer.inputs, layer.in_shapes, strict=True):
            low, high = found.get(source, (first, end))
            low, high = min(low, first), max(high, end)
            found[source] = (max(low, 0), min(high, shape[axis])) if clipped else (low, high)
    return found


def read_by(layer: Layer, axis: int, part: Interval) -> Interval:
    """The rows (axis 1) or columns (axis 2) of its inputs that a layer reads to make `part` of its output.

    What lies below 0 or beyond the input is padding.
    """
    if layer.kind not in ("conv2d", "pool"):
        return part
    first = part[0] * layer.stride - layer.padding[axis - 1]  # top, left, bottom, right
    return first, first + (part[1] - part[0] - 1) * layer.stride + layer.kernel


def patch_sides(network: Network) -> dict[str, tuple[int, int]]:
    """(height, width) of every tensor of the patch stage in one patch, unclipped; empty without a patch stage.

    The largest patch counts, where they differ.
    """
    stage = network.patch_stage
    if not stage:
        return {}
    whole = {INPUT: network.input_shape, **{layer.name: layer.out_shape for layer in stage}}
    sides: list[dict[str, int]] = []
    for axis in (1, 2):
        part = (0, -(-stage[-1].out_shape[axis] // stage[-1].patches))
        grown = needed(network, axis, part, clipped=False)
        sides.append({name: min(end - first, whole[name][axis]) for name, (first, end) in grown.items()})
    return {name: (height, sides[1][name]) for name, height in sides[0].items()}


def computed_positions(network: Network, *, clipped: bool = False) -> dict[str, int]:
    """Positions of the map (pixels) that all patches together compute of every tensor of the patch stage.

    Of the network's input: those that they read. Empty without a patch stage.
    """
    stage = network.patch_stage
    if not stage:
        return {}
    p = stage[-1].patches
    if not clipped:
        return {name: p * p * height * width for name, (height, width) in patch_sides(network).items()}
    sums: list[dict[str, int]] = []
    for axis in (1, 2):
        total = dict.fromkeys((INPUT, *(layer.name for layer in stage)), 0)
        for part in patch_bounds(stage[-1].out_shape[axis], p):
            for name, (first, end) in needed(network, axis, part, clipped=True).items():
                total[name] += end - first
        sums.append(total)
    return {name: rows * sums[1][name] for name, rows in sums[0].items()}


def executed_macs(network: Network, *, clipped: bool = False) -> int:
    """Multiply-accumulates of one forward pass, those of halos that are computed again included."""
    positions = computed_positions(network, clipped=clipped)
    return sum(executed_layer_macs(layer, positions) for layer in network.layers)


def stage_macs(network: Network, *, clipped: bool = False) -> int:
    """Those of `executed_macs` that the patch stage does; 0 without one."""
    positions = computed_positions(network, clipped=clipped)
    return sum(executed_layer_macs(layer, positions) for layer in network.patch_stage)


def executed_layer_macs(layer: Layer, positions: Mapping[str, int]) -> int:
    """Multiply-accumulates of a layer in all patches, given the `computed_positions` of its network."""
    if layer.patches == 1:
        return layer.macs
    return layer.macs // prod(layer.out_shape[1:]) * positions[layer.name]


def moved_elements(layer: Layer, positions: Mapping[str, int]) -> int:
    """Elements of activations that a layer reads and writes in all patches."""
    if layer.patches == 1:
        return sum(map(prod, layer.in_shapes)) + prod(layer.out_shape)
    tensors = (*zip(layer.inputs, layer.in_shapes, strict=True), (layer.name, layer.out_shape))
    return sum(shape[0] * positions[name] for name, shape in tensors)
