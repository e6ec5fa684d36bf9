"""Latencies of single blocks on phone CPUs (nn-Meter's tables for ElasticViT, arXiv 2303.09730), as networks of layers.

The key of a block says what it is; sizes are those of the input map:

    firstconv_SIDE_IN_OUT_STRIDE_KERNEL             3x3 convolution, hard swish
    conv_SIDE_IN_OUT_EXPAND_STRIDE_ACT_KERNEL_SE    inverted residual, with or without squeeze-excite
    transds_SIDE_IN_OUT_STRIDE_EXPAND               the same with a 3x3 kernel and squeeze-excite, between tokens
    transattn_SIDE_WIDTH_ACT_VALUES_ln              layer norm, attention with heads of 16, hard swish, projection
    transffn_SIDE_WIDTH_RATIO_ACT_ln                layer norm, two linear layers with hard swish between, shortcut
    mbpool_SIDE_IN_OUT_EXPAND_ACT                   1x1 convolution, pool, 1x1 convolution, 1000 classes
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.prices import Price
from hardware_profiles.cost_model import features
from search_spaces import layers as L
from search_spaces.layers import INPUT, Layer, Network, Port, assemble, port

TABLE = "mobile_block_latency.csv.gz"
HEAD_SIZE = 16
CLASSES = 1000

WEIGHTED = ("conv", "pointwise", "depthwise", "linear")
MOVING = ("hardswish", "hardsigmoid", "multiply", "add", "average_pool", "reshape", "permute")
# A hard swish follows every depthwise convolution and every first linear layer, a reshape comes with a permute, and so
# on: the table tells what they cost together. So all kernels but the two slow ones share the price of a byte.
PRICES = (
    Price("kernel", (*WEIGHTED, *MOVING, "matmul", "norm", "softmax"), "count"),
    Price("mac", ("conv",), "macs"),
    Price("pointwise mac", ("pointwise",), "macs"),
    Price("depthwise mac", ("depthwise",), "macs"),
    Price("linear mac", ("linear",), "macs"),
    Price("matmul mac", ("matmul",), "macs"),
    Price("byte", (*WEIGHTED, *MOVING, "matmul"), "bytes"),
    Price("byte of a norm", ("norm",), "bytes"),
    Price("byte of a softmax", ("softmax",), "bytes"),
    Price("byte of weights", WEIGHTED, "weight_bytes"),
)


@dataclass(frozen=True)
class BlockTable:
    """n blocks: their keys, kinds, features, MACs (n,), and latencies (n,) in ms by column of the table.

    `side` (n,) is that of the input map; `group` (n,) numbers the side and the input channels. Blocks of all kinds
    share a group: a `transds` is a `conv` too.
    """

    keys: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[dict[str, float], ...]
    macs: np.ndarray
    side: np.ndarray
    group: np.ndarray
    latency_ms: dict[str, np.ndarray]


def read_block_table(data: Path, columns: tuple[str, ...]) -> BlockTable:
    with gzip.open(data / TABLE, "rt", encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    keys = [row["key"] for row in read]
    networks = [block_network(key) for key in keys]
    groups = ["_".join(key.split("_")[1:3]) for key in keys]
    return BlockTable(
        keys=tuple(keys),
        kinds=tuple(row["kind"] for row in read),
        rows=tuple(features(network) for network in networks),
        macs=np.array([float(network.macs) for network in networks]),
        side=np.array([int(key.split("_")[1]) for key in keys]),
        group=np.unique(groups, return_inverse=True)[1],
        latency_ms={column: np.array([float(row[column]) for row in read]) for column in columns},
    )


def block_network(key: str) -> Network:
    """The block that a key of the table names; raises ValueError for a key of no known form."""
    kind, *fields = key.replace("hard_swish", "hardswish").split("_")
    numbers = [int(field) for field in fields if field.isdigit()]
    match kind, numbers:
        case "firstconv", [side, channels, width, stride, kernel]:
            source = Port(INPUT, (channels, side, side))
            made: list[Layer] = []
            _conv(made, "conv", source, width, kernel=kernel, stride=stride, activation="hardswish")
        case "conv", [side, channels, width, expand, stride, kernel] if fields[-1] in ("se", "nose"):
            made = _inverted_residual(side, channels, width, expand, stride, kernel, excite=fields[-1] == "se")
        case "transds", [side, channels, width, stride, expand]:
            made = _inverted_residual(side, channels, width, expand, stride, 3, excite=True)
        case "transattn", [side, width, values]:
            made = _attention(side, width, values)
        case "transffn", [side, width, ratio]:
            made = _feed_forward(side, width, ratio)
        case "mbpool", [side, channels, width, expand]:
            made = _final_pool(side, channels, width, expand)
        case _:
            raise ValueError(
                f"{key!r} is no key of the block table; expected one such as transffn_16_48_2_hard_swish_ln"
            )
    return assemble(made[0].in_shapes[0], [tuple(made)])


def _added(made: list[Layer], layer: Layer) -> Port:
    made.append(layer)
    return port(layer)


def _conv(
    made: list[Layer],
    name: str,
    source: Port,
    width: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: str = "",
) -> Port:
    """A convolution; hard swish and hard sigmoid are layers of their own, relu is fused."""
    fused = activation if activation == "relu" else ""
    made.append(
        L.conv2d(name, source, width, kernel=kernel, stride=stride, groups=groups, activation=fused, padding="same")
    )
    tensor = port(made[-1])
    return tensor if activation == fused else _added(made, L.activation(f"{name}.activation", tensor, activation))


def _inverted_residual(
    side: int, channels: int, width: int, expand: int, stride: int, kernel: int, *, excite: bool
) -> list[Layer]:
    """Expansion, depthwise, squeeze-excite, projection; the shortcut is pooled and projected where shapes differ."""
    made: list[Layer] = []
    source = tensor = Port(INPUT, (channels, side, side))
    hidden = channels * expand
    if expand > 1:
        tensor = _conv(made, "expand", tensor, hidden, activation="hardswish")
    tensor = _conv(
        made, "depthwise", tensor, hidden, kernel=kernel, stride=stride, groups=hidden, activation="hardswish"
    )
    if excite:
        pooled = _added(made, L.global_average_pool("excite.pool", tensor))
        reduced = _conv(made, "excite.reduce", pooled, max(hidden // 4, 1), activation="relu")
        gate = _conv(made, "excite.expand", reduced, hidden, activation="hardsigmoid")
        tensor = _added(made, L.multiply("excite.scale", tensor, gate))
    tensor = _conv(made, "project", tensor, width)
    if channels == width and stride == 1:
        _added(made, L.add("add", tensor, source))
    elif channels != width:
        shortcut = source
        if stride == 2:
            shortcut = _added(made, L.average_pool("shortcut.pool", source, kernel=2, stride=2))
        _added(made, L.add("add", tensor, _conv(made, "shortcut", shortcut, width)))
    return made


def _attention(side: int, width: int, values: int) -> list[Layer]:
    made: list[Layer] = []
    count, heads = side * side, width // HEAD_SIZE
    normed = _added(made, L.layer_norm("norm", Port(INPUT, (count, width))))

    def projected(name: str, size: int, order: tuple[int, ...]) -> Port:
        flat = _added(made, L.linear(name, normed, heads * size))
        active = _added(made, L.activation(f"{name}.activation", flat, "hardswish"))
        split = _added(made, L.reshape(f"{name}.split", active, (count, heads, size)))
        return _added(made, L.permute(f"{name}.permute", split, order))

    query, key = projected("query", HEAD_SIZE, (1, 0, 2)), projected("key", HEAD_SIZE, (1, 2, 0))
    value = projected("value", HEAD_SIZE * values, (1, 0, 2))
    scores = _added(made, L.matmul("scores", query, key, scale=HEAD_SIZE**-0.5))
    bias = _added(made, L.parameter("bias", (heads, count, count)))
    weights = _added(made, L.softmax("softmax", _added(made, L.add("bias.add", scores, bias))))
    mixed = _added(made, L.matmul("mix", weights, value))
    back = _added(made, L.permute("permute", mixed, (1, 0, 2)))
    joined = _added(made, L.reshape("join", back, (count, heads * HEAD_SIZE * values)))
    _added(made, L.linear("out", _added(made, L.activation("activation", joined, "hardswish")), width))
    return made


def _feed_forward(side: int, width: int, ratio: int) -> list[Layer]:
    made: list[Layer] = []
    normed = _added(made, L.layer_norm("norm", Port(INPUT, (side * side, width))))
    hidden = _added(made, L.linear("expand", normed, width * ratio))
    reduced = _added(made, L.linear("reduce", _added(made, L.activation("activation", hidden, "hardswish")), width))
    _added(made, L.add("add", reduced, normed))
    return made


def _final_pool(side: int, channels: int, width: int, expand: int) -> list[Layer]:
    made: list[Layer] = []
    wide = _conv(made, "expand", Port(INPUT, (channels, side, side)), channels * expand, activation="hardswish")
    pooled = _added(made, L.global_average_pool("pool", wide))
    flat = _added(made, L.reshape("flatten", _conv(made, "head", pooled, width), (width,)))
    _added(made, L.linear("classifier", flat, CLASSES))
    return made
