"""Int8 networks as .tflite files with random weights, and the arena that TensorFlow Lite Micro plans for such a file.

Both need the package tflite-micro, which brings the schema of the format; it is not a dependency of the project.
The arena does not depend on the weights, so that random ones do.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.memory import UNLESS_SAME, pads_explicitly
from search_spaces import INPUT, Layer, Network

PACKAGE = "tflite_micro"
SCHEMA_MODULE = "tflite_micro.tensorflow.lite.micro.python.schema_py_generated"
ARENA_HEAD = re.compile(r"Arena allocation head (\d+) bytes")
ACTIVATIONS = {"": "NONE", "relu": "RELU", "relu6": "RELU6"}


def has_tflite_micro() -> bool:
    """Whether the package is installed."""
    return find_spec(PACKAGE) is not None


def schema() -> Any:
    """The classes that the package generates from the schema of .tflite files."""
    return import_module(SCHEMA_MODULE)


def arena_head_bytes(path: Path) -> int:
    """Bytes of activations in the arena that TensorFlow Lite Micro plans for a .tflite file.

    Raises RuntimeError where it prints no such number.
    """
    interpreter = import_module(PACKAGE).runtime.Interpreter.from_file(str(path))
    with _standard_streams() as printed:
        interpreter.print_allocations()
        text = printed()
    found = ARENA_HEAD.search(text)
    if not found:
        raise RuntimeError(f"{path.name}: expected the size of the arena's head, tflite-micro printed {text!r}")
    return int(found[1])


@contextmanager
def _standard_streams() -> Iterator[Any]:
    """What C code prints meanwhile: it writes to the process's own streams, below Python's."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)

        def printed() -> str:
            ctypes.CDLL(None).fflush(None)
            file.seek(0)
            return file.read().decode()

        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield printed
        finally:
            ctypes.CDLL(None).fflush(None)
            for target, source in enumerate(kept, start=1):
                os.dup2(source, target)
                os.close(source)


def write_tflite(network: Network, path: Path, seed: int = 0) -> None:
    """Write an int8 network with random weights to `path`.

    A padding that the format has no word for (neither none nor TensorFlow's `same`) becomes an operator of its own,
    as converters from PyTorch write it. Raises ValueError for a layer that is not int8 or of a kind not written here.
    """
    path.write_bytes(_Writer(network, np.random.default_rng(seed)).content())


class _Writer:
    def __init__(self, network: Network, rng: np.random.Generator) -> None:
        self.schema, self.network, self.rng = schema(), network, rng
        self.model = self.schema.ModelT()
        self.graph = self.schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.version, self.model.subgraphs, self.model.operatorCodes = 3, [self.graph], []
        self.model.buffers = [self._buffer(b"")]  # buffer 0 is that of every tensor without a constant
        self.tensors: dict[str, int] = {}

    def content(self) -> bytes:
        self.tensors[INPUT] = self._activation(INPUT, self.network.input_shape)
        for layer in self.network.layers:
            if layer.has_weights and layer.precision.name != "int8":
                raise ValueError(f"layer {layer.name!r} is {layer.precision.name}; expected int8")
            self._write(layer)
        self.graph.inputs = [self.tensors[INPUT]]
        self.graph.outputs = [self.tensors[self.network.output.name]]
        flatbuffers = import_module("flatbuffers")
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _write(self, layer: Layer) -> None:
        sources = [self.tensors[source] for source in layer.inputs]
        if layer.kind == "conv2d":
            self._convolution(layer, sources[0])
        elif layer.kind == "linear":
            options = self.schema.FullyConnectedOptionsT()
            options.fusedActivationFunction = self._fused(layer)
            out_features, in_features = layer.parameter_shapes["weight"]
            weights = self._weights(layer, (out_features, in_features), 0)
            self._operator("FULLY_CONNECTED", [sources[0], *weights], layer, options)
        elif layer.kind == "add":
            self._operator("ADD", sources, layer, self.schema.AddOptionsT())
        elif layer.kind == "pool" and layer["mode"] == "global_average":
            options = self.schema.Pool2DOptionsT()
            _, options.filterHeight, options.filterWidth = layer.in_shapes[0]
            options.strideH = options.strideW = 1
            options.padding = self.schema.Padding.VALID
            self._operator("AVERAGE_POOL_2D", sources, layer, options)
        elif layer.kind == "reshape":
            shape = self._constant(f"{layer.name}/shape", np.array([1, *layer.out_shape], np.int32))
            self._operator("RESHAPE", [*sources, shape], layer, self.schema.ReshapeOptionsT())
        else:
            raise ValueError(f"layer {layer.name!r}: the kind {layer.kind} is not written here")

    def _convolution(self, layer: Layer, source: int) -> None:
        out_channels, in_channels, kernel, _ = layer.parameter_shapes["weight"]
        if layer.groups > 1 and not layer.is_depthwise:
            raise ValueError(f"layer {layer.name!r}: {layer.groups} groups; expected 1, or as many as channels")
        options = self.schema.DepthwiseConv2DOptionsT() if layer.is_depthwise else self.schema.Conv2DOptionsT()
        options.strideH = options.strideW = layer.stride
        options.dilationHFactor = options.dilationWFactor = 1
        options.fusedActivationFunction = self._fused(layer)
        options.padding = self.schema.Padding.SAME
        if pads_explicitly(layer, UNLESS_SAME):
            source = self._padded(layer, source)
        if pads_explicitly(layer, UNLESS_SAME) or not any(layer.padding):
            options.padding = self.schema.Padding.VALID
        if layer.is_depthwise:
            options.depthMultiplier = 1
            weights = self._weights(layer, (1, kernel, kernel, out_channels), 3)
            self._operator("DEPTHWISE_CONV_2D", [source, *weights], layer, options)
        else:
            weights = self._weights(layer, (out_channels, kernel, kernel, in_channels), 0)
            self._operator("CONV_2D", [source, *weights], layer, options)

    def _padded(self, layer: Layer, source: int) -> int:
        top, left, bottom, right = layer.padding
        channels, height, width = layer.in_shapes[0]
        pads = self._constant(f"{layer.name}/pads", np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32))
        padded = self._activation(f"{layer.name}/padded", (channels, height + top + bottom, width + left + right))
        self._append("PAD", [source, pads], padded, self.schema.PadOptionsT())
        return padded

    def _fused(self, layer: Layer) -> int:
        return int(getattr(self.schema.ActivationFunctionType, ACTIVATIONS[layer.activation]))

    def _operator(self, operator: str, inputs: Sequence[int], layer: Layer, options: Any) -> None:
        self.tensors[layer.name] = self._activation(layer.name, layer.out_shape)
        self._append(operator, inputs, self.tensors[layer.name], options)

    def _append(self, operator: str, inputs: Sequence[int], output: int, options: Any) -> None:
        code = self.schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(self.schema.BuiltinOperator, operator)
        code.version = 1
        made = self.schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = len(self.model.operatorCodes), list(inputs), [output]
        made.builtinOptions = options
        made.builtinOptionsType = getattr(self.schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.model.operatorCodes.append(code)
        self.graph.operators.append(made)

    # tensors -------------------------------------------------------------------------------------------

    def _weights(self, layer: Layer, shape: tuple[int, ...], channel_axis: int) -> tuple[int, int]:
        """Weights with the output channel on `channel_axis`, and biases."""
        channels = shape[channel_axis]
        weight = self.rng.integers(-127, 128, shape, dtype=np.int8)
        bias = self.rng.integers(-1000, 1000, channels, dtype=np.int32)
        scales = [0.5 / (127 * prod(shape) / channels)] * channels
        return (
            self._constant(f"{layer.name}/weight", weight, scales, channel_axis),
            self._constant(f"{layer.name}/bias", bias, [scale * _SCALE for scale in scales], 0),
        )

    def _activation(self, name: str, shape: tuple[int, ...]) -> int:
        nhwc = (1, *shape[1:], shape[0]) if len(shape) == 3 else (1, *shape)
        return self._tensor(name, nhwc, self.schema.TensorType.INT8, [_SCALE], 0, buffer=0)

    def _constant(self, name: str, value: np.ndarray, scales: Sequence[float] = (), axis: int = 0) -> int:
        self.model.buffers.append(self._buffer(value.tobytes()))
        kind = self.schema.TensorType.INT8 if value.dtype == np.int8 else self.schema.TensorType.INT32
        return self._tensor(name, value.shape, kind, scales, axis, buffer=len(self.model.buffers) - 1)

    def _tensor(
        self, name: str, shape: Sequence[int], kind: int, scales: Sequence[float], axis: int, buffer: int
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
        if scales:
            tensor.quantization = self.schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = list(scales), [0] * len(scales)
            tensor.quantization.quantizedDimension = axis
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _buffer(self, content: bytes) -> Any:
        buffer = self.schema.BufferT()
        buffer.data = list(content) if not content else np.frombuffer(content, np.uint8)
        return buffer


_SCALE = 1 / 32  # of every activation: adding and averaging then need no rescaling
