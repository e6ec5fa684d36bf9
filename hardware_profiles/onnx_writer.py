"""From layers, weights and ranges to an ONNX model: the one file that is measured and shipped.

Quantized layers are written in QDQ form (QuantizeLinear / DequantizeLinear around the float operation), which
any ONNX runtime understands, placed so that onnxruntime turns each into an integer kernel: activations uint8,
weights int8 per channel, biases int32. `integer_kernels` checks that it did.

A linear layer is a Gemm over rows, (batch * tokens, features), because that is the form onnxruntime has a
quantized kernel with bias for (QGemm); rearrangements and max pooling of a quantized tensor work on its integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from hardware_profiles.quantization import (
    WEIGHT_LIMIT,
    Affine,
    Range,
    affines_of,
    bias_scales,
    is_integer,
    observed_tensors,
    quantize_bias,
    quantize_weight,
)
from search_spaces.layers import INPUT, Layer, Network, keeps_quantization

OPSET = 21  # the newest that every onnxruntime since 1.20 runs; Gelu needs 20
IR_VERSION = 10  # goes with it
OUTPUT = "logits"

# onnxruntime's operators that multiply or add integers (those of its own domain included)
INTEGER_OPERATORS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "QLinearAdd",
        "QLinearMul",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
    }
)
_TOKEN = re.compile(r"_token_\d+$")

Weights = Mapping[str, Mapping[str, np.ndarray]]


@dataclass
class _Graph:
    """The model under construction; tensors are named after layers: stem/output, stem/quantized, stem/weight."""

    network: Network
    weights: Weights
    affines: Mapping[str, Affine]
    weight_limit: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        made = numpy_helper.from_array(np.asarray(value), name)
        if self.constants.setdefault(name, made) != made:
            raise ValueError(f"two constants of the model would be called {name!r}; rename the layer")
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        self.made.add(output)
        return output

    # forms of a tensor ---------------------------------------------------------------------------------

    def raw(self, tensor: str) -> str:
        """The floats that a layer computes, before any quantization."""
        if tensor == INPUT:
            return INPUT
        return OUTPUT if tensor == self.network.output.name else f"{tensor}/output"

    def floats(self, tensor: str) -> str:
        """The tensor as a float layer reads it: dequantized if its producer writes integers."""
        if not is_integer(self.network, tensor):
            return self.raw(tensor)
        name = f"{tensor}/dequantized"
        return name if name in self.made else self.dequantized(tensor, self.integers(tensor), name)

    def integers(self, tensor: str) -> str:
        """The tensor as a quantized layer reads it; quantizes a float one at its first integer reader."""
        name = f"{tensor}/quantized"
        if name not in self.made:
            self.node("QuantizeLinear", [self.raw(tensor), *self.parameters(tensor)], name, f"{tensor}/quantize")
        return name

    def parameters(self, tensor: str) -> tuple[str, str]:
        affine = self.affines[tensor]
        return (
            self.constant(f"{tensor}/quantized_scale", np.float32(affine.scale)),
            self.constant(f"{tensor}/quantized_zero_point", np.uint8(affine.zero_point)),
        )

    def floats_for_weights(self, tensor: str) -> str:
        """The tensor as a float convolution or linear layer reads it.

        onnxruntime quantizes the weights of a float convolution by itself where a DequantizeLinear with one scale
        goes in and a QuantizeLinear comes out. The same scale written once per channel keeps it from doing so.
        """
        if not is_integer(self.network, tensor):
            return self.raw(tensor)
        name = f"{tensor}/dequantized_per_channel"
        if name not in self.made:
            affine, channels = self.affines[tensor], self.network.by_name[tensor].out_shape[0]
            parameters = (
                self.constant(f"{tensor}/channel_scales", np.full(channels, affine.scale, np.float32)),
                self.constant(f"{tensor}/channel_zero_points", np.full(channels, affine.zero_point, np.uint8)),
            )
            self.node("DequantizeLinear", [self.integers(tensor), *parameters], name, name, axis=1)
        return name

    def dequantized(self, tensor: str, integers: str, name: str) -> str:
        return self.node("DequantizeLinear", [integers, *self.parameters(tensor)], name, name)

    def operand(self, layer: Layer, index: int, rows: int = 0) -> str:
        """Input `index` of a layer, dequantized for it alone if it is quantized, reshaped to rows of `rows`."""
        tensor = layer.inputs[index]
        if not layer.precision.is_quantized:
            values = self.floats_for_weights(tensor) if layer.has_weights else self.floats(tensor)
            return self.rows(layer, values, rows)
        integers = self.rows(layer, self.integers(tensor), rows)
        return self.dequantized(tensor, integers, f"{layer.name}/operand{index}")

    def rows(self, layer: Layer, values: str, features: int) -> str:
        if not features:
            return values
        return self.reshaped(values, (-1, features), f"{layer.name}/rows")

    def reshaped(self, values: str, shape: tuple[int, ...], output: str) -> str:
        """A Reshape; an axis of 0 is copied from the input, one of -1 is whatever remains."""
        target = self.constant("shape/" + "x".join(map(str, shape)), np.array(shape, np.int64))
        return self.node("Reshape", [values, target], output, output)

    # parameters of a layer -----------------------------------------------------------------------------

    def array(self, layer: Layer, parameter: str) -> np.ndarray:
        expected = layer.parameter_shapes[parameter]
        found = self.weights.get(layer.name, {}).get(parameter)
        if found is None or tuple(np.shape(found)) != expected:
            shape = "nothing" if found is None else f"shape {tuple(np.shape(found))}"
            raise ValueError(f"layer {layer.name!r}: expected {parameter} of shape {expected}, got {shape}")
        return np.asarray(found, dtype=np.float32)

    def floating(self, layer: Layer, parameter: str) -> str:
        return self.constant(f"{layer.name}/{parameter}", self.array(layer, parameter))

    def kernel(self, layer: Layer) -> tuple[str, str]:
        """Weight and bias of a convolution or linear layer, dequantized from integers if it is quantized."""
        if not layer.precision.is_quantized:
            return self.floating(layer, "weight"), self.floating(layer, "bias")
        input_scale = self.affines[layer.inputs[0]].scale
        try:
            weight, scales = quantize_weight(self.array(layer, "weight"), self.weight_limit)
            bias = quantize_bias(self.array(layer, "bias"), input_scale, scales)
        except ValueError as error:
            raise ValueError(f"layer {layer.name!r}: {error}") from None
        # onnxruntime fuses weights only with zero points, biases also without
        zero_points = self.constant(f"{layer.name}/weight_zero_point", np.zeros_like(weight, shape=len(weight)))
        return (
            self.per_channel(f"{layer.name}/weight", weight, scales, zero_points),
            self.per_channel(f"{layer.name}/bias", bias, bias_scales(input_scale, scales)),
        )

    def per_channel(self, name: str, integers: np.ndarray, scales: np.ndarray, *zero_points: str) -> str:
        inputs = (self.constant(name, integers), self.constant(f"{name}_scale", scales), *zero_points)
        return self.node("DequantizeLinear", inputs, f"{name}_dequantized", f"{name}_dequantize", axis=0)

    def finish(self, layer: Layer, values: str) -> None:
        """Quantize what a float operation computed, where the layer writes integers."""
        assert values == self.raw(layer.name), f"{layer.name!r} was written to {values!r}"
        if is_integer(self.network, layer.name):
            self.integers(layer.name)

    def activated(self, layer: Layer, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """The operation and its fused activation, which saturation does where the output is quantized."""
        fused = "" if is_integer(self.network, layer.name) else layer.activation
        linear = self.node(operator, inputs, f"{layer.name}/linear" if fused else output, layer.name, **attributes)
        return _ACTIVATIONS[fused](self, layer, linear, output) if fused else linear


# activations: (graph, layer, input, output) -> output -----------------------------------------------------


def _relu(graph: _Graph, layer: Layer, values: str, output: str) -> str:
    return graph.node("Relu", [values], output, f"{layer.name}/relu")


def _relu6(graph: _Graph, layer: Layer, values: str, output: str) -> str:
    limits = (graph.constant("zero", np.float32(0)), graph.constant("six", np.float32(6)))
    return graph.node("Clip", [values, *limits], output, f"{layer.name}/relu6")


def _hardswish(graph: _Graph, layer: Layer, values: str, output: str) -> str:
    return graph.node("HardSwish", [values], output, layer.name)


def _hardsigmoid(graph: _Graph, layer: Layer, values: str, output: str) -> str:
    return graph.node("HardSigmoid", [values], output, layer.name, alpha=1 / 6, beta=0.5)


def _gelu(graph: _Graph, layer: Layer, values: str, output: str) -> str:
    return graph.node("Gelu", [values], output, layer.name)


_ACTIVATIONS: Mapping[str, Callable[[_Graph, Layer, str, str], str]] = {
    "relu": _relu,
    "relu6": _relu6,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "gelu": _gelu,
}


# kinds: (graph, layer) -> None -----------------------------------------------------------------------------


def _conv2d(graph: _Graph, layer: Layer) -> None:
    inputs = (graph.operand(layer, 0), *graph.kernel(layer))
    output = graph.activated(
        layer,
        "Conv",
        inputs,
        graph.raw(layer.name),
        kernel_shape=[layer.kernel] * 2,
        strides=[layer.stride] * 2,
        pads=list(layer.padding),
        group=layer.groups,
    )
    graph.finish(layer, output)


def _linear(graph: _Graph, layer: Layer) -> None:
    *lead, features = layer.in_shapes[0]
    inputs = (graph.operand(layer, 0, rows=features if lead else 0), *graph.kernel(layer))
    output = graph.raw(layer.name)
    if not lead:
        graph.finish(layer, graph.activated(layer, "Gemm", inputs, output, transB=1))
        return
    rows = graph.activated(layer, "Gemm", inputs, f"{layer.name}/rows_output", transB=1)
    shape = (-1, *layer.out_shape)
    if not is_integer(graph.network, layer.name):
        graph.reshaped(rows, shape, output)
        return
    quantized = f"{layer.name}/rows_quantized"
    graph.node("QuantizeLinear", [rows, *graph.parameters(layer.name)], quantized, f"{layer.name}/quantize")
    graph.reshaped(quantized, shape, f"{layer.name}/quantized")


def _matmul(graph: _Graph, layer: Layer) -> None:
    scale, output = layer["scale"], graph.raw(layer.name)
    assert isinstance(scale, float)
    inputs = [graph.floats(tensor) for tensor in layer.inputs]
    if scale == 1.0:
        graph.node("MatMul", inputs, output, layer.name)
        return
    product = graph.node("MatMul", inputs, f"{layer.name}/unscaled", layer.name)
    factor = graph.constant(f"{layer.name}/factor", np.float32(scale))
    graph.node("Mul", [product, factor], output, f"{layer.name}/scale")


def _norm(graph: _Graph, layer: Layer) -> None:
    inputs = (graph.floats(layer.inputs[0]), graph.floating(layer, "scale"), graph.floating(layer, "bias"))
    graph.node("LayerNormalization", inputs, graph.raw(layer.name), layer.name, axis=-1, epsilon=layer["epsilon"])


def _activation(graph: _Graph, layer: Layer) -> None:
    _ACTIVATIONS[layer.activation](graph, layer, graph.floats(layer.inputs[0]), graph.raw(layer.name))


def _softmax(graph: _Graph, layer: Layer) -> None:
    graph.node("Softmax", [graph.floats(layer.inputs[0])], graph.raw(layer.name), layer.name, axis=-1)


def _parameter(graph: _Graph, layer: Layer) -> None:
    """A constant; a batch axis of one, so that it broadcasts against tensors of the same rank."""
    value = graph.array(layer, "value")[None]
    graph.constant(graph.raw(layer.name), value)


def _element_wise(operator: str) -> Callable[[_Graph, Layer], None]:
    def write(graph: _Graph, layer: Layer) -> None:
        inputs = [graph.operand(layer, index) for index in range(2)]
        graph.finish(layer, graph.node(operator, inputs, graph.raw(layer.name), layer.name))

    return write


def _pool(graph: _Graph, layer: Layer) -> None:
    if layer["mode"] == "global_average":
        output = graph.raw(layer.name)
        graph.finish(layer, graph.node("GlobalAveragePool", [graph.operand(layer, 0)], output, layer.name))
        return
    window = {
        "kernel_shape": [layer.kernel] * 2,
        "strides": [layer.stride] * 2,
        "pads": list(layer.padding),
    }
    if layer["mode"] == "average":
        output = graph.raw(layer.name)
        graph.finish(layer, graph.node("AveragePool", [graph.operand(layer, 0)], output, layer.name, **window))
        return
    _rearrange(graph, layer, "MaxPool", **window)


def _reshape(graph: _Graph, layer: Layer) -> None:
    shape = (-1, *layer.out_shape)
    target = graph.constant("shape/" + "x".join(map(str, shape)), np.array(shape, np.int64))
    _rearrange(graph, layer, "Reshape", target)


def _permute(graph: _Graph, layer: Layer) -> None:
    order = layer["order"]
    assert isinstance(order, tuple)
    _rearrange(graph, layer, "Transpose", perm=[0, *(axis + 1 for axis in order)])


def _rearrange(graph: _Graph, layer: Layer, operator: str, *inputs: str, **attributes: Any) -> None:
    """An operation that moves or picks values without changing them: on integers where it reads integers."""
    tensor, integer = layer.inputs[0], layer.precision.is_quantized
    output = f"{layer.name}/quantized" if integer else graph.raw(layer.name)
    source = graph.integers(tensor) if integer else graph.floats(tensor)
    graph.node(operator, [source, *inputs], output, layer.name, **attributes)
    if integer and not is_integer(graph.network, layer.name):
        graph.dequantized(tensor, output, graph.raw(layer.name))


_WRITERS: Mapping[str, Callable[[_Graph, Layer], None]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "matmul": _matmul,
    "norm": _norm,
    "activation": _activation,
    "softmax": _softmax,
    "parameter": _parameter,
    "pool": _pool,
    "add": _element_wise("Add"),
    "multiply": _element_wise("Mul"),
    "reshape": _reshape,
    "permute": _permute,
}


def write_onnx(
    network: Network,
    weights: Weights,
    ranges: Mapping[str, Range] | None = None,
    *,
    weight_limit: int = WEIGHT_LIMIT,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The network as an ONNX model with input `input` (batch, *input_shape) and output `logits`, float32 both.

    Args:
        network: what to write.
        weights: layer name -> parameter name -> float32 array of the layer's `parameter_shapes`, norms folded.
        ranges: (low, high) of each of `observed_tensors(network)`; only needed if a layer is quantized.
        weight_limit: integer weights stay in [-limit, limit]; see `machine.int8_weight_limit`.
        metadata: written into the file.

    The same arguments give the same bytes. Raises ValueError naming the weight or range that is missing or wrong.
    """
    graph = _Graph(network, weights, affines_of(network, ranges or {}), weight_limit)
    for layer in network.layers:
        _WRITERS[layer.kind](graph, layer)
    proto = helper.make_graph(
        graph.nodes,
        network.name or "network",
        [_tensor_info(INPUT, network.input_shape)],
        [_tensor_info(OUTPUT, network.output.out_shape)],
        initializer=list(graph.constants.values()),
    )
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fitnest"
    )
    helper.set_model_props(model, dict(sorted((metadata or {}).items())))
    return model


def _tensor_info(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])


# untrained networks, to be measured ------------------------------------------------------------------------


def random_weights(network: Network, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """Weights of an untrained network: He-scaled (arXiv 1502.01852), biases and constants small, norms near one."""
    return {
        layer.name: {name: _random_array(name, shape, rng) for name, shape in layer.parameter_shapes.items()}
        for layer in network.layers
        if layer.parameter_shapes
    }


def _random_array(parameter: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    mean = 1.0 if parameter == "scale" else 0.0
    deviation = sqrt(2 / prod(shape[1:])) if parameter == "weight" else 0.1
    return rng.normal(mean, deviation, shape).astype(np.float32)


def random_ranges(network: Network) -> dict[str, Range]:
    """Ranges for an untrained network: those of unit-variance tensors, one-sided behind a fused activation."""
    return {
        name: (0.0, 4.0) if name in network.by_name and network.by_name[name].activation else (-4.0, 4.0)
        for name in observed_tensors(network)
    }


# what onnxruntime makes of it ------------------------------------------------------------------------------


def integer_kernels(model: bytes | Path, network: Network) -> dict[str, str]:
    """The operator that computes each quantized layer once onnxruntime has optimised the model on this machine.

    An operator outside `INTEGER_OPERATORS` means that the layer runs in floats after all. Rearrangements and
    max pooling are left out: they compute nothing. A layer whose node is gone is reported as `missing`.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it warns that the optimised file only suits this machine
        options.optimized_model_filepath = str(path)
        source = model if isinstance(model, bytes) else str(model)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(path).graph.node
    quantized = (layer for layer in network.layers if layer.precision.is_quantized)
    computing = [layer.name for layer in quantized if not keeps_quantization(layer)]
    # A fused node keeps the name of the operation it came from; a change of layout appends "_token_<number>".
    operators = {_TOKEN.sub("", node.name): node.op_type for node in nodes}
    return {name: operators.get(name, "missing") for name in computing}
