"""Int8 networks as .tflite files with random weights, for compilers that read nothing else.

A .tflite file is a FlatBuffer; tables are written here by the numbers that their fields have in TFLite's schema,
version 3, so that no generated code is needed. `flatbuffers` comes with onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from hardware_profiles.cost_model import UnsupportedLayer
from search_spaces import INPUT, Layer, Network
from search_spaces.layers import Padding, pad_for

# operator: its number, and the number of its options in the union of all options
ADD, AVERAGE_POOL, CONV, DEPTHWISE, LINEAR = (0, 11), (1, 5), (3, 1), (4, 2), (9, 8)
MAX_POOL, MULTIPLY, RESHAPE, PAD = (17, 5), (18, 21), (22, 17), (34, 22)
SAME, VALID = 0, 1
ACTIVATIONS = {"": 0, "relu": 1, "relu6": 3}
INT32_TYPE, INT8_TYPE = 2, 9
ACTIVATION_SCALE = 1 / 32
LARGEST = 127  # of an int8 weight, as symmetric quantization leaves it in every channel

Fields = Mapping[int, tuple[str, Any]]  # number of a field -> how it is stored, value


def write_tflite(network: Network, rng: np.random.Generator) -> bytes:
    """A network of int8 layers with normally distributed weights; images are (height, width, channels) there.

    A padding that is neither none nor TensorFlow's `same` becomes an operator of its own. Raises UnsupportedLayer
    naming a layer that is not int8 or of a kind that is not written.
    """
    return _Writer(rng).content(network)


class _Writer:
    def __init__(self, rng: np.random.Generator) -> None:
        import flatbuffers

        self.builder = flatbuffers.Builder(1 << 16)
        self.rng = rng
        self.buffers = [self._table({})]  # number 0 is that of every tensor without stored numbers
        self.tensors: list[int] = []
        self.operators: list[int] = []
        self.codes: list[int] = []

    def content(self, network: Network) -> bytes:
        made = {INPUT: self._activation(INPUT, network.input_shape)}
        for layer in network.layers:
            if layer.precision.name != "int8":
                raise UnsupportedLayer(
                    f"layer {layer.name!r} is {layer.precision.name}; only int8 is written as TFLite"
                )
            made[layer.name] = self._layer(layer, [made[source] for source in layer.inputs])
        graph = self._table(
            {
                0: ("offset", self._offsets(self.tensors)),
                1: ("offset", self._numbers([made[INPUT]], np.int32)),
                2: ("offset", self._numbers([made[network.output.name]], np.int32)),
                3: ("offset", self._offsets(self.operators)),
            }
        )
        model = self._table(
            {
                0: ("Uint32", 3),
                1: ("offset", self._offsets(self.codes)),
                2: ("offset", self._offsets([graph])),
                4: ("offset", self._offsets(self.buffers)),
            }
        )
        self.builder.Finish(model, file_identifier=b"TFL3")
        return bytes(self.builder.Output())

    # layers --------------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer, sources: list[int]) -> int:
        """Write a layer; returns the number of its output tensor."""
        fused = ("Int8", ACTIVATIONS[layer.activation])
        if layer.kind == "conv2d":
            return self._convolution(layer, sources[0])
        if layer.kind == "linear":
            weights = self._weights(layer, layer.parameter_shapes["weight"], 0)
            return self._operator(LINEAR, [*sources, *weights], layer, {0: fused, 2: ("Bool", True)})
        if layer.kind == "add":
            return self._operator(ADD, sources, layer, {})
        if layer.kind == "multiply":
            return self._operator(MULTIPLY, sources, layer, {})
        if layer.kind == "pool":
            return self._pool(layer, sources[0])
        if layer.kind == "reshape":
            shape = self._constant(layer.name, np.array(_stored_shape(layer.out_shape), np.int32))
            return self._operator(RESHAPE, [*sources, shape], layer, {})
        raise UnsupportedLayer(f"layer {layer.name!r}: the kind {layer.kind} is not written as TFLite")

    def _convolution(self, layer: Layer, source: int) -> int:
        if layer.groups > 1 and not layer.is_depthwise:
            raise UnsupportedLayer(f"layer {layer.name!r}: TFLite has 1 group or one a channel, got {layer.groups}")
        out_channels, in_channels, kernel, _ = layer.parameter_shapes["weight"]
        source, padding = self._padded(layer, source)
        strides = {0: ("Int8", padding), 1: ("Int32", layer.stride), 2: ("Int32", layer.stride)}
        fused = ("Int8", ACTIVATIONS[layer.activation])
        one = ("Int32", 1)
        if layer.is_depthwise:
            weights = self._weights(layer, (1, kernel, kernel, out_channels), 3)
            return self._operator(DEPTHWISE, [source, *weights], layer, {**strides, 3: one, 4: fused, 5: one, 6: one})
        weights = self._weights(layer, (out_channels, kernel, kernel, in_channels), 0)
        return self._operator(CONV, [source, *weights], layer, {**strides, 3: fused, 4: one, 5: one})

    def _pool(self, layer: Layer, source: int) -> int:
        operator, padding, stride, height, width = MAX_POOL, VALID, layer.stride, layer.kernel, layer.kernel
        if layer["mode"] == "global_average":
            operator, stride, (_, height, width) = AVERAGE_POOL, 1, layer.in_shapes[0]
        else:
            source, padding = self._padded(layer, source)
        window = {1: stride, 2: stride, 3: width, 4: height}
        options = {0: ("Int8", padding)} | {number: ("Int32", value) for number, value in window.items()}
        return self._operator(operator, [source], layer, options)

    def _padded(self, layer: Layer, source: int) -> tuple[int, int]:
        """The tensor to read and the padding to name."""
        if not any(layer.padding):
            return source, VALID
        if layer.padding == _same_padding(layer):
            return source, SAME
        top, left, bottom, right = layer.padding
        channels, height, width = layer.in_shapes[0]
        pads = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        padded = self._activation(f"{layer.name}.padded", (channels, height + top + bottom, width + left + right))
        self._append(PAD, [source, self._constant(f"{layer.name}.padding", pads)], padded, {})
        return padded, VALID

    def _operator(self, operator: tuple[int, int], inputs: Sequence[int], layer: Layer, options: Fields) -> int:
        output = self._activation(layer.name, layer.out_shape)
        self._append(operator, inputs, output, options)
        return output

    def _append(self, operator: tuple[int, int], inputs: Sequence[int], output: int, options: Fields) -> None:
        code, options_type = operator
        fields: dict[int, tuple[str, Any]] = {
            0: ("Uint32", len(self.codes)),
            1: ("offset", self._numbers(inputs, np.int32)),
            2: ("offset", self._numbers([output], np.int32)),
            3: ("Uint8", options_type),
            4: ("offset", self._table(options)),
        }
        self.operators.append(self._table(fields))
        self.codes.append(self._table({0: ("Int8", code), 2: ("Int32", 1), 3: ("Int32", code)}))

    # tensors -------------------------------------------------------------------------------------------------

    def _weights(self, layer: Layer, shape: tuple[int, ...], channel_axis: int) -> tuple[int, int]:
        """Weights with the output channel on `channel_axis`, and biases."""
        drawn = self.rng.standard_normal(shape)
        others = tuple(axis for axis in range(len(shape)) if axis != channel_axis)
        weight = np.rint(drawn / np.abs(drawn).max(axis=others, keepdims=True) * LARGEST).astype(np.int8)
        channels = shape[channel_axis]
        scale = 1 / (LARGEST * prod(shape) / channels)
        return (
            self._constant(f"{layer.name}.weight", weight, [scale] * channels, channel_axis),
            self._constant(f"{layer.name}.bias", np.zeros(channels, np.int32), [scale * ACTIVATION_SCALE] * channels),
        )

    def _activation(self, name: str, shape: tuple[int, ...]) -> int:
        return self._tensor(name, _stored_shape(shape), INT8_TYPE, 0, [ACTIVATION_SCALE], 0)

    def _constant(self, name: str, value: np.ndarray, scales: Sequence[float] = (), axis: int = 0) -> int:
        data = self.builder.CreateNumpyVector(np.frombuffer(value.tobytes(), np.uint8))
        self.buffers.append(self._table({0: ("offset", data)}))
        kind = INT8_TYPE if value.dtype == np.int8 else INT32_TYPE
        return self._tensor(name, value.shape, kind, len(self.buffers) - 1, scales, axis)

    def _tensor(
        self, name: str, shape: Sequence[int], kind: int, buffer: int, scales: Sequence[float], axis: int
    ) -> int:
        fields: dict[int, tuple[str, Any]] = {
            0: ("offset", self._numbers(shape, np.int32)),
            1: ("Int8", kind),
            2: ("Uint32", buffer),
            3: ("offset", self.builder.CreateString(name)),
        }
        if scales:
            quantization: Fields = {
                2: ("offset", self._numbers(scales, np.float32)),
                3: ("offset", self._numbers([0] * len(scales), np.int64)),
                6: ("Int32", axis),
            }
            fields[4] = ("offset", self._table(quantization))
        self.tensors.append(self._table(fields))
        return len(self.tensors) - 1

    # FlatBuffers ---------------------------------------------------------------------------------------------

    def _table(self, fields: Fields) -> int:
        """What a field refers to must be written before the table is begun."""
        self.builder.StartObject(max(fields, default=-1) + 1)
        for number, (stored, value) in fields.items():
            if stored == "offset":
                self.builder.PrependUOffsetTRelativeSlot(number, value, 0)
            else:
                getattr(self.builder, f"Prepend{stored}Slot")(number, value, 0)
        return int(self.builder.EndObject())

    def _numbers(self, values: Sequence[float], kind: type) -> int:
        return int(self.builder.CreateNumpyVector(np.array(values, kind)))

    def _offsets(self, tables: Sequence[int]) -> int:
        self.builder.StartVector(4, len(tables), 4)
        for table in reversed(tables):
            self.builder.PrependUOffsetTRelative(table)
        return int(self.builder.EndVector())


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With a batch of one in front and an image's channels last."""
    return (1, *shape[1:], shape[0]) if len(shape) == 3 else (1, *shape)


def _same_padding(layer: Layer) -> Padding:
    _, height, width = layer.in_shapes[0]
    top, bottom = pad_for(layer.kernel, layer.stride, height, "same")
    left, right = pad_for(layer.kernel, layer.stride, width, "same")
    return top, left, bottom, right
