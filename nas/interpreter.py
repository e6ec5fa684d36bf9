"""Runs the layers of a network in torch; supernet, extracted subnet and quantized subnet all run this.

Tensors carry the batch first: images are (batch, channels, height, width), tokens (batch, tokens, features).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hardware_profiles.patches import Interval, needed, patch_bounds, read_by
from search_spaces import INPUT, Layer, Network

NORM_EPSILON = 1e-5  # of every folded batch norm

Parameters = Mapping[str, Tensor]


class Tap(Protocol):
    """Sees, and may replace, what flows between layers: observers and fake quantizers are taps.

    A tap changes no tensor in place. A pass of several segments calls it again, for the same layers and tensors,
    during the backward pass, and it must then answer the same. So a tap of random numbers draws once for each layer
    name and keeps the draw for the pass, or makes it a function of the name; what it draws from torch's global
    generator is repeated without its doing.
    """

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        """Called with each tensor a layer reads, just before it does."""

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        """Called with what a layer produced."""


class Normalization:
    """How batch norms behave in one pass: from the batch (updating the running statistics) or from those."""

    def __init__(self, from_batch: bool, momentum: float = 0.1) -> None:
        self.from_batch = from_batch
        self.momentum = momentum


class _Segment:
    """Neighbouring layers of a pass, which can run a second time to compute what the first did not keep.

    Called with the tensors `reads` (made before the segment), it returns the tensors `writes` (read after it).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        writes: Collection[str],
        parameters_of: Callable[[Layer], Parameters],
        normalization: Normalization,
        tap: Tap | None,
    ) -> None:
        made = {layer.name for layer in layers}
        self.reads = tuple(dict.fromkeys(name for layer in layers for name in layer.inputs if name not in made))
        self.writes = tuple(layer.name for layer in layers if layer.name in writes)
        self._layers = layers
        self._parameters_of = parameters_of
        self._normalization = normalization
        self._tap = tap

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.reads, inputs, strict=True))
        del inputs
        normalization, tap = self._normalization, self._tap
        # a batch counts once in the running statistics, however often its pass is computed
        self._normalization = Normalization(normalization.from_batch, momentum=0.0)
        last_reader = {source: layer.name for layer in self._layers for source in layer.inputs}
        for layer in self._layers:
            read = [values[source] for source in layer.inputs]
            if tap is not None:
                read = [tap.read(layer, source, t) for source, t in zip(layer.inputs, read, strict=True)]
            output = OPERATIONS[layer.kind](layer, read, self._parameters_of(layer), normalization)
            values[layer.name] = output if tap is None else tap.write(layer, output)
            for source in layer.inputs:  # a dead tensor's memory is worth more than its name
                if last_reader[source] == layer.name and source not in self.writes:
                    values.pop(source, None)
        return tuple(values[name] for name in self.writes)


def execute(
    network: Network,
    x: Tensor,
    parameters_of: Callable[[Layer], Parameters],
    normalization: Normalization,
    tap: Tap | None = None,
    segments: int = 1,
) -> Tensor:
    """The output of `network` for x of shape (batch, *network.input_shape).

    With `segments` above 1 and gradients wanted, the layers run in about that many segments, and only what passes
    from one to the next is kept: the backward pass computes the rest again (arXiv 1604.06174), except for the last
    segment, which it needs at once. Gradients and running statistics are the same, bit for bit.

    Raises ValueError when x has another shape (resizing happens before, outside the network), or for `segments`
    below 1.
    """
    if tuple(x.shape[1:]) != network.input_shape:
        raise ValueError(f"expected images of shape {network.input_shape}, got {tuple(x.shape[1:])}; resize them first")
    if segments < 1:
        raise ValueError(f"segments is {segments}; expected 1 (everything is kept for the backward pass) or more")
    layers, output = network.layers, network.output.name
    ends = [*(segment_starts(network, segments) if torch.is_grad_enabled() else ()), len(layers)]
    values, start = {INPUT: x}, 0
    for end in ends:
        later = {source for layer in layers[end:] for source in layer.inputs} | {output}
        segment = _Segment(layers[start:end], later, parameters_of, normalization, tap)
        inputs = [values[name] for name in segment.reads]
        kept = end == len(layers)
        made = segment(*inputs) if kept else checkpoint(segment, *inputs, use_reentrant=False)
        values |= zip(segment.writes, made, strict=True)
        start = end
    return values[output]


def execute_in_patches(
    network: Network,
    x: Tensor,
    parameters_of: Callable[[Layer], Parameters],
    tap: Tap | None = None,
) -> Tensor:
    """What `execute` gives with norms from their statistics, the patch stage run patch by patch as on a device.

    A patch computes what lies inside of the maps and pads where a map ends, so that it sees what the layer sees that
    runs whole (`Network.patch_stage`; arXiv 2110.15352). A tap is called for each patch with the part of a tensor that
    the patch holds.
    """
    stage, normalization = network.patch_stage, Normalization(from_batch=False)
    if not stage:
        return execute(network, x, parameters_of, normalization, tap)
    channels, *sides = stage[-1].out_shape
    rows, columns = (
        [needed(network, axis, part, clipped=True) for part in patch_bounds(side, stage[-1].patches)]
        for axis, side in enumerate(sides, start=1)
    )
    whole = x.new_empty(len(x), channels, *sides)
    for vertical in rows:
        for horizontal in columns:
            held = {name: (vertical[name], horizontal[name]) for name in vertical}
            (top, bottom), (left, right) = held[stage[-1].name]
            made = _patch(stage, x, held, parameters_of, normalization, tap)
            whole[:, :, top:bottom, left:right] = made
    after = network.layers[len(stage) :]
    if not after:
        return whole
    (output,) = _Segment(after, {network.output.name}, parameters_of, normalization, tap)(whole)
    return output


Held = Mapping[str, tuple[Interval, Interval]]  # tensor -> the rows and columns of it that a patch has


def _patch(
    stage: Sequence[Layer],
    x: Tensor,
    held: Held,
    parameters_of: Callable[[Layer], Parameters],
    normalization: Normalization,
    tap: Tap | None,
) -> Tensor:
    """What one patch makes of the map of the stage's last layer."""
    (top, bottom), (left, right) = held[INPUT]
    values = {INPUT: x[:, :, top:bottom, left:right]}
    for layer in stage:
        read = [values[source] for source in layer.inputs]
        if tap is not None:
            read = [tap.read(layer, source, t) for source, t in zip(layer.inputs, read, strict=True)]
        cut = [_window(layer, t, held[layer.name], held[source]) for source, t in zip(layer.inputs, read, strict=True)]
        unpadded = replace(layer, padding=(0, 0, 0, 0))
        output = OPERATIONS[layer.kind](unpadded, cut, parameters_of(layer), normalization)
        values[layer.name] = output if tap is None else tap.write(layer, output)
    return values[stage[-1].name]


def _window(layer: Layer, tensor: Tensor, made: tuple[Interval, Interval], held: tuple[Interval, Interval]) -> Tensor:
    """What a layer reads of a patch of its input to make the rows and columns `made`, padded where the map ends.

    tensor (batch, channels, height, width): the rows and columns `held` of the input.
    """
    pads: list[int] = []
    for axis in (2, 1):  # as torch pads: from the last axis to the first
        (first, end), (low, high) = read_by(layer, axis, made[axis - 1]), held[axis - 1]
        start, stop = max(first, low), min(end, high)
        tensor = tensor.narrow(axis + 1, start - low, stop - start)
        pads += [start - first, end - stop]
    beyond = float("-inf") if layer.kind == "pool" else 0.0
    return F.pad(tensor, pads, value=beyond) if any(pads) else tensor


def segment_starts(network: Network, segments: int) -> list[int]:
    """Positions of the layers with which all segments but the first begin, ascending.

    Each is where the sum of two memories is smallest: what lives on across the cut, and by how much the segments
    differ from equal shares of what a backward pass needs. There are fewer when a network has no more places.
    """
    sizes = {layer.name: prod(layer.out_shape) for layer in network.layers}
    last_read = {source: position for position, layer in enumerate(network.layers) for source in layer.inputs}
    needed, alive = [0], [0]  # before each position; in numbers of one sample
    for position, layer in enumerate(network.layers):
        dies = sum(sizes.get(source, 0) for source in set(layer.inputs) if last_read[source] == position)
        alive.append(alive[-1] + sizes[layer.name] - dies)
        views = 0 if layer.kind in ("reshape", "permute") else 1
        # a norm keeps what it read, too, and relu6 a copy of what it overwrote
        needed.append(needed[-1] + sizes[layer.name] * (views + layer.norm + (layer.activation == "relu6")))
    targets = [needed[-1] * number / segments for number in range(1, segments)]
    places = range(1, len(network.layers))
    return sorted({min(places, key=lambda p: alive[p] + abs(needed[p] - target)) for target in targets if places})


class _Relu6(torch.autograd.Function):
    """ReLU6 in place, whose backward pass needs its result only.

    torch's own keeps a copy of what it overwrites: the same gradients, for more memory and time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.clamp_(0.0, 6.0))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, result, 0.0, 6.0)  # between the bounds iff the input was


# a fused activation overwrites the convolution's output, which nothing else reads: a third of the memory traffic
FUSED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu_,
    "relu6": _Relu6.apply,
}
FREE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
}


def _conv2d(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    top, left, bottom, right = layer.padding
    x, padding = inputs[0], (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    x = F.conv2d(x, parameters["weight"], parameters.get("bias"), layer.stride, padding, 1, layer.groups)
    if "norm_scale" in parameters:
        x = F.batch_norm(
            x,
            parameters["norm_mean"],
            parameters["norm_variance"],
            parameters["norm_scale"],
            parameters["norm_shift"],
            normalization.from_batch,
            normalization.momentum,
            NORM_EPSILON,
        )
    return FUSED[layer.activation](x)


def _linear(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return FUSED[layer.activation](F.linear(inputs[0], parameters["weight"], parameters["bias"]))


def _matmul(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return torch.matmul(inputs[0], inputs[1]) * float(layer["scale"])  # type: ignore[arg-type]


def _norm(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    scale, bias = parameters["scale"], parameters["bias"]
    return F.layer_norm(inputs[0], scale.shape, scale, bias, float(layer["epsilon"]))  # type: ignore[arg-type]


def _activation(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return FREE[layer.activation](inputs[0])


def _softmax(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return F.softmax(inputs[0], dim=-1)


def _parameter(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return parameters["value"].unsqueeze(0)


def _pool(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    if layer["mode"] == "global_average":
        return inputs[0].mean(dim=(2, 3), keepdim=True)
    if layer["mode"] == "average":
        top, left, bottom, right = layer.padding
        sums, counts = (
            F.avg_pool2d(F.pad(x, (left, right, top, bottom)), layer.kernel, layer.stride, divisor_override=1)
            for x in (inputs[0], torch.ones_like(inputs[0][:1, :1]))
        )
        return sums / counts
    return F.max_pool2d(inputs[0], layer.kernel, layer.stride, layer.padding[0])


def _add(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return inputs[0] + inputs[1]


def _multiply(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return inputs[0] * inputs[1]


def _reshape(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    return inputs[0].reshape(inputs[0].shape[0], *layer.out_shape)


def _permute(layer: Layer, inputs: list[Tensor], parameters: Parameters, normalization: Normalization) -> Tensor:
    order = layer["order"]
    assert isinstance(order, tuple)
    return inputs[0].permute(0, *(axis + 1 for axis in order))


OPERATIONS: Mapping[str, Callable[[Layer, list[Tensor], Parameters, Normalization], Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "matmul": _matmul,
    "norm": _norm,
    "activation": _activation,
    "softmax": _softmax,
    "parameter": _parameter,
    "pool": _pool,
    "add": _add,
    "multiply": _multiply,
    "reshape": _reshape,
    "permute": _permute,
}
