"""Runs the layers of a network in torch; supernet, extracted subnet and quantized subnet all run this.

Tensors carry the batch first: images are (batch, channels, height, width), tokens (batch, tokens, features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces import INPUT, Layer, Network

NORM_EPSILON = 1e-5  # of every folded batch norm

Parameters = Mapping[str, Tensor]


class Tap(Protocol):
    """Sees, and may replace, what flows between layers: observers and fake quantizers are taps."""

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        """Called with each tensor a layer reads, just before it does."""

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        """Called with what a layer produced."""


class Normalization:
    """How batch norms behave in one pass: from the batch (updating the running statistics) or from those."""

    def __init__(self, from_batch: bool, momentum: float = 0.1) -> None:
        self.from_batch = from_batch
        self.momentum = momentum


def execute(
    network: Network,
    x: Tensor,
    parameters_of: Callable[[Layer], Parameters],
    normalization: Normalization,
    tap: Tap | None = None,
) -> Tensor:
    """The output of `network` for x of shape (batch, *network.input_shape).

    Raises ValueError when x has another shape: resizing happens before, outside the network.
    """
    if tuple(x.shape[1:]) != network.input_shape:
        raise ValueError(f"expected images of shape {network.input_shape}, got {tuple(x.shape[1:])}; resize them first")
    values = {INPUT: x}
    last_reader = {source: layer.name for layer in network.layers for source in layer.inputs}
    for layer in network.layers:
        inputs = [values[source] for source in layer.inputs]
        if tap is not None:
            inputs = [tap.read(layer, source, t) for source, t in zip(layer.inputs, inputs, strict=True)]
        output = OPERATIONS[layer.kind](layer, inputs, parameters_of(layer), normalization)
        values[layer.name] = output if tap is None else tap.write(layer, output)
        for source in layer.inputs:  # a dead tensor's memory is worth more than its name
            if last_reader[source] == layer.name:
                values.pop(source, None)
    return values[network.output.name]


# a fused activation overwrites the convolution's output, which nothing else reads: a third of the memory traffic
FUSED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
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
