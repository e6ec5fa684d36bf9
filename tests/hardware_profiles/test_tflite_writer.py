"""The .tflite writer: what a file holds, read by a walker of FlatBuffers that knows no schema."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from hardware_profiles.cost_model import UnsupportedLayer
from hardware_profiles.tflite_writer import write_tflite
from search_spaces import INPUT, INT8, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

CONV, DEPTHWISE, LINEAR, POOL, ADD, RESHAPE, PAD = 3, 4, 9, 1, 0, 22, 34


class Table:
    def __init__(self, content: bytes, place: int) -> None:
        self.content, self.place = content, place

    def at(self, number: int) -> int:
        vtable = self.place - struct.unpack_from("<i", self.content, self.place)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", self.content, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", self.content, vtable + 4 + 2 * number)[0]
        return self.place + offset if offset else 0

    def value(self, number: int, form: str) -> Any:
        return struct.unpack_from(form, self.content, self.at(number))[0] if self.at(number) else 0

    def target(self, number: int) -> int:
        return self.at(number) + struct.unpack_from("<I", self.content, self.at(number))[0]

    def table(self, number: int) -> Table:
        return Table(self.content, self.target(number))

    def array(self, number: int, form: str) -> np.ndarray:
        start = self.target(number)
        return np.frombuffer(self.content, form, struct.unpack_from("<I", self.content, start)[0], start + 4)

    def tables(self, number: int) -> list[Table]:
        start = self.target(number) + 4
        return [Table(self.content, start + 4 * i + int(offset)) for i, offset in enumerate(self.array(number, "<u4"))]


def network() -> Network:
    """8x8x3: stem (stride 2, TensorFlow's padding), depthwise, pointwise, add, padded stride-2 convolution, head."""
    stem = L.conv2d(
        "stem", Port(INPUT, (3, 8, 8)), 4, kernel=3, stride=2, padding="same", activation="relu6", precision=INT8
    )
    depthwise = L.conv2d("depthwise", port(stem), 4, kernel=3, groups=4, activation="relu", precision=INT8)
    project = L.conv2d("project", port(depthwise), 4, precision=INT8)
    total = L.add("add", port(stem), port(project))
    half = L.conv2d("half", port(total), 6, kernel=3, stride=2, precision=INT8)
    pool = L.global_average_pool("pool", port(half))
    flat = L.reshape("flat", port(pool), (6,))
    classifier = L.linear("classifier", port(flat), 5, precision=INT8)
    return assemble((3, 8, 8), [(stem, depthwise, project, total, half, pool, flat, classifier)])


def graph_of(content: bytes) -> tuple[Table, Table]:
    model = Table(content, struct.unpack_from("<I", content)[0])
    assert content[4:8] == b"TFL3" and model.value(0, "<I") == 3
    return model, model.tables(2)[0]


def test_operators_and_their_options() -> None:
    model, graph = graph_of(write_tflite(network(), np.random.default_rng(0)))
    codes = [code.value(3, "<i") for code in model.tables(1)]
    assert codes == [code.value(0, "<b") for code in model.tables(1)]
    operators = graph.tables(3)
    assert [codes[operator.value(0, "<I")] for operator in operators] == [
        *(CONV, DEPTHWISE, CONV, ADD, PAD, CONV, POOL, RESHAPE, LINEAR)
    ]
    stem, depthwise, project, _, _, half, pool, _, _ = (operator.table(4) for operator in operators)
    same, valid = 0, 1
    assert (stem.value(0, "<b"), stem.value(1, "<i"), stem.value(2, "<i"), stem.value(3, "<b")) == (same, 2, 2, 3)
    assert (depthwise.value(0, "<b"), depthwise.value(3, "<i"), depthwise.value(4, "<b")) == (same, 1, 1)
    assert (project.value(0, "<b"), project.value(3, "<b")) == (valid, 0)
    assert (half.value(0, "<b"), half.value(2, "<i")) == (valid, 2)
    assert (pool.value(0, "<b"), pool.value(3, "<i"), pool.value(4, "<i")) == (valid, 2, 2)


def test_tensors_are_stored_with_channels_last_and_connected() -> None:
    _, graph = graph_of(write_tflite(network(), np.random.default_rng(0)))
    tensors = graph.tables(0)
    shapes = [tuple(tensor.array(0, "<i4")) for tensor in tensors]
    made = [shapes[operator.array(2, "<i4")[0]] for operator in graph.tables(3)]
    image = (1, 4, 4, 4)
    assert made == [image, image, image, image, (1, 6, 6, 4), (1, 2, 2, 6), (1, 1, 1, 6), (1, 6), (1, 5)]
    assert [shapes[operator.array(1, "<i4")[1]] for operator in graph.tables(3)[:3]] == [
        *((4, 3, 3, 3), (1, 3, 3, 4), (4, 1, 1, 4))
    ]
    assert shapes[graph.array(1, "<i4")[0]] == (1, 8, 8, 3) and shapes[graph.array(2, "<i4")[0]] == (1, 5)
    add = graph.tables(3)[3].array(1, "<i4")
    assert [shapes[number] for number in add] == [image, image]
    assert add.tolist() == [graph.tables(3)[0].array(2, "<i4")[0], graph.tables(3)[2].array(2, "<i4")[0]]


def test_weights_are_int8_with_a_largest_of_127_in_every_output_channel() -> None:
    model, graph = graph_of(write_tflite(network(), np.random.default_rng(1)))
    tensors, buffers = graph.tables(0), model.tables(4)
    for index, channel_axis in ((0, 0), (1, 3), (8, 0)):
        weight, bias = (tensors[number] for number in graph.tables(3)[index].array(1, "<i4")[1:])
        shape = tuple(weight.array(0, "<i4"))
        stored = buffers[weight.value(2, "<I")].array(0, "<i1").reshape(shape)
        assert weight.value(1, "<b") == 9 and bias.value(1, "<b") == 2
        by_channel = np.moveaxis(stored, channel_axis, 0).reshape(shape[channel_axis], -1)
        assert (np.abs(by_channel.astype(int)).max(axis=1) == 127).all()
        quantization = weight.table(4)
        assert len(quantization.array(2, "<f4")) == len(quantization.array(3, "<i8")) == shape[channel_axis]
        assert quantization.value(6, "<i") == channel_axis
        scale = tensors[graph.tables(3)[index].array(1, "<i4")[0]].table(4).array(2, "<f4")[0]
        assert bias.table(4).array(2, "<f4") == pytest.approx(scale * quantization.array(2, "<f4"))


def test_products_and_windows() -> None:
    stem = L.conv2d("stem", Port(INPUT, (4, 6, 6)), 4, precision=INT8)
    gate = L.conv2d("gate", port(L.global_average_pool("mean", port(stem))), 4, precision=INT8)
    mean = L.global_average_pool("mean", port(stem))
    scaled = L.multiply("scaled", port(stem), port(gate))
    window = L.max_pool("window", port(scaled), kernel=3, stride=2)
    network = assemble((4, 6, 6), [(stem, mean, gate, scaled, window)])
    model, graph = graph_of(write_tflite(network, np.random.default_rng(0)))
    operators = graph.tables(3)
    multiply, pad, max_pool = 18, 34, 17
    codes = [model.tables(1)[operator.value(0, "<I")].value(3, "<i") for operator in operators]
    assert codes == [CONV, POOL, CONV, multiply, pad, max_pool]
    inputs = [operator.array(1, "<i4").tolist() for operator in operators]
    outputs = [operator.array(2, "<i4")[0] for operator in operators]
    assert inputs[3] == [outputs[0], outputs[2]] and inputs[5] == [outputs[4]]
    options = operators[5].table(4)
    assert [options.value(number, "<i") for number in (1, 2, 3, 4)] == [2, 2, 3, 3]
    assert tuple(graph.tables(0)[outputs[5]].array(0, "<i4")) == (1, 3, 3, 4)


def test_the_same_seed_writes_the_same_file() -> None:
    first, again, other = (write_tflite(network(), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_what_cannot_be_written_is_refused_by_name() -> None:
    rng = np.random.default_rng(0)
    image = Port(INPUT, (4, 4, 4))
    for layer, said in (
        (L.conv2d("float", image, 4), "'float' is fp32; only int8"),
        (L.conv2d("groups", image, 4, kernel=3, groups=2, precision=INT8), "1 group or one a channel, got 2"),
    ):
        with pytest.raises(UnsupportedLayer, match=said):
            write_tflite(assemble((4, 4, 4), [(layer,)]), rng)
    stem = L.conv2d("stem", image, 4, precision=INT8)
    turned = L.permute("turned", port(stem), (1, 2, 0))
    with pytest.raises(UnsupportedLayer, match="'turned': the kind permute"):
        write_tflite(assemble((4, 4, 4), [(stem, turned)]), rng)
