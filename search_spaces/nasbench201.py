"""Networks of NAS-Bench-201 (arXiv 2001.00326) as layers, for tables that were measured on them.

    stem -> 5 cells -> residual block -> 5 cells -> residual block -> 5 cells -> relu -> pool -> classifier

A cell has four nodes and an operation on each of its six edges; a node is the sum of what its edges bring. It is no
family of spaces: which edges reach the output is not a condition on one choice, so architectures cannot be canonical.
"""

from __future__ import annotations

from collections.abc import Sequence

from search_spaces import layers as L
from search_spaces.layers import INPUT, Layer, Network, Port, assemble, port

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # from node, to node; the order of the operations
CELLS, WIDTHS, SIDE, CLASSES = 5, (16, 32, 64), 32, 10
_NODES = 4


def live_operations(operations: Sequence[str]) -> tuple[str, ...]:
    """The operations with `none` in place of all that no path from the cell's input to its output goes through.

    Raises ValueError for something that is not six known operations.
    """
    if len(operations) != len(EDGES) or not set(operations) <= set(OPERATIONS):
        raise ValueError(f"expected {len(EDGES)} operations out of {', '.join(OPERATIONS)}, got {list(operations)}")
    present = [edge for edge, operation in zip(EDGES, operations, strict=True) if operation != "none"]
    fed, needed = {0}, {_NODES - 1}
    for node in range(1, _NODES):
        if any(start in fed and end == node for start, end in present):
            fed.add(node)
    for node in range(_NODES - 2, -1, -1):
        if any(end in needed and start == node for start, end in present):
            needed.add(node)
    return tuple(
        operation if start in fed and end in needed else "none"
        for (start, end), operation in zip(EDGES, operations, strict=True)
    )


def nasbench201_network(operations: Sequence[str]) -> Network:
    """The network for CIFAR-10 of a cell, without what does not reach its output.

    Convolutions are relu, convolution, folded norm. The scale and shift of the last norm, which no convolution before
    it could take in, are left out.

    Raises ValueError for operations that are not six known ones, and for a cell whose output does not see its input.
    """
    live = live_operations(operations)
    if all(operation == "none" for operation in live):
        raise ValueError(f"no path through the cell {list(operations)}: its output is zero whatever the image")
    made: list[Layer] = []
    stem = L.conv2d("stem", Port(INPUT, (3, SIDE, SIDE)), WIDTHS[0], kernel=3)
    made.append(stem)
    tensor = port(stem)
    for stage, width in enumerate(WIDTHS):
        if stage:
            tensor = _residual_block(made, f"stage{stage}.residual", tensor, width)
        for cell in range(CELLS):
            tensor = _cell(made, f"stage{stage}.cell{cell}", tensor, live)
    relu = L.activation("relu", tensor, "relu")
    pool = L.global_average_pool("pool", port(relu))
    flat = L.reshape("flatten", port(pool), (WIDTHS[-1],))
    return assemble((3, SIDE, SIDE), [(*made, relu, pool, flat, L.linear("classifier", port(flat), CLASSES))])


def _added(made: list[Layer], layer: Layer) -> Port:
    made.append(layer)
    return port(layer)


def _convolution(made: list[Layer], name: str, source: Port, width: int, *, kernel: int, stride: int = 1) -> Port:
    relu = _added(made, L.activation(f"{name}.relu", source, "relu"))
    return _added(made, L.conv2d(name, relu, width, kernel=kernel, stride=stride))


def _cell(made: list[Layer], name: str, source: Port, live: Sequence[str]) -> Port:
    nodes: dict[int, Port] = {0: source}
    for (start, end), operation in zip(EDGES, live, strict=True):
        if operation == "none":
            continue
        edge = f"{name}.edge{start}{end}"
        arriving = _edge(made, edge, operation, nodes[start])
        nodes[end] = _added(made, L.add(f"{edge}.add", nodes[end], arriving)) if end in nodes else arriving
    return nodes[_NODES - 1]


def _edge(made: list[Layer], name: str, operation: str, source: Port) -> Port:
    if operation == "skip_connect":
        return source
    if operation == "avg_pool_3x3":
        return _added(made, L.average_pool(name, source, kernel=3, stride=1))
    return _convolution(made, name, source, source.shape[0], kernel=3 if operation == "nor_conv_3x3" else 1)


def _residual_block(made: list[Layer], name: str, source: Port, width: int) -> Port:
    """Two 3x3 convolutions, the first of stride 2, beside an average pool and a 1x1 convolution."""
    first = _convolution(made, f"{name}.first", source, width, kernel=3, stride=2)
    second = _convolution(made, f"{name}.second", first, width, kernel=3)
    pooled = _added(made, L.average_pool(f"{name}.pool", source, kernel=2, stride=2))
    shortcut = _added(made, L.conv2d(f"{name}.shortcut", pooled, width, norm=False))
    return _added(made, L.add(f"{name}.add", second, shortcut))
