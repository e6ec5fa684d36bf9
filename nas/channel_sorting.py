"""Reorders the channels of a supernet so that the most important come first.

Smaller networks take the leading channels, so which channels lead decides what they inherit. Once-for-all sorts
the expanded channels of each block by the L1 norm of the weights that read them before it trains smaller widths
(arXiv 1908.09791); here the same is done to every elastic width of any space, found from its layers.

Two axes are tied where a network forces one order on both: the rows that make a channel, the norm and the depthwise
filter it goes through, both sides of an addition, the columns that read it. Ties are collected over all occurrences
of the layers, so that permuting a whole group changes no network that uses all of its channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nas.supernet import STATISTICS, Supernet
from search_spaces import INPUT, Layer, Network, SearchSpace
from search_spaces.layers import Shape

Axis = tuple[str, int]  # an axis of what a layer puts out, or of the input image; the batch is not counted
FIXED: Axis = ("", 0)  # tied to it is whatever must keep its order


@dataclass(frozen=True)
class Member:
    """An axis of a shared parameter or statistic; `reads` where its entries weigh channels made elsewhere."""

    layer: str
    parameter: str
    axis: int
    reads: bool = False

    @property
    def name(self) -> str:
        """As in `Supernet.state_dict()` and `Supernet.named_parameters()`."""
        return f"shared.{self.layer.replace('.', '/')}.{self.parameter}"


@dataclass(frozen=True)
class Group:
    """Axes that must share one order, and the lengths they have in `space.occurrences()`, ascending."""

    members: tuple[Member, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.sizes[-1]


@dataclass(frozen=True)
class Reordering:
    """The new order of a group: position i takes what was at order[i]; int64, shape (group.size,)."""

    group: Group
    order: Tensor


def sort_channels(supernet: Supernet) -> list[Reordering]:
    """Sort every elastic width in place, most important first, and return what was done.

    The function of the largest network stays, up to the order of sums. Apply `permute` with the result to
    whatever else holds a value for each weight: momentum, averages of weights.
    """
    state = supernet.state_dict()
    reorderings = [Reordering(group, importance_order(group, state)) for group in channel_plan(supernet.space)]
    permute(state, reorderings)
    return reorderings


def importance(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of all weights that read each channel; float64, shape (group.size,)."""
    norms = []
    for member in group.members:
        if member.reads:
            weight = _checked(group, member, tensors[member.name])
            norms.append(weight.detach().double().abs().transpose(0, member.axis).flatten(1).sum(1))
    return torch.stack(norms).sum(0)


def importance_order(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Channels by falling importance; equally important ones keep their order."""
    return torch.argsort(importance(group, tensors), descending=True, stable=True)


def permute(tensors: Mapping[str, Tensor], reorderings: Sequence[Reordering]) -> None:
    """Reorder in place the tensors that have the names and shapes of the supernet's parameters.

    Names that are missing are passed over: an optimizer holds nothing for statistics, nor for weights that were
    never trained. Raises LookupError when tensors were given and none has a name of the plan, ValueError for a
    tensor of another size.
    """
    known = False
    with torch.no_grad():
        for reordering in reorderings:
            for member in reordering.group.members:
                if member.name in tensors:
                    known = True
                    tensor = _checked(reordering.group, member, tensors[member.name])
                    tensor.copy_(tensor.index_select(member.axis, reordering.order.to(tensor.device)))
    if tensors and reorderings and not known:
        raise LookupError(f"no tensor has the name of a parameter of the supernet; got {next(iter(tensors))!r}, ...")


def _checked(group: Group, member: Member, tensor: Tensor) -> Tensor:
    if tensor.dim() <= member.axis or tensor.shape[member.axis] != group.size:
        raise ValueError(
            f"{member.name}: expected {group.size} channels on axis {member.axis}, got shape {tuple(tensor.shape)}"
        )
    return tensor


def channel_plan(space: SearchSpace) -> tuple[Group, ...]:
    """The groups of channels whose number is elastic and whose order is free.

    Left alone are groups whose axes differ in their largest size (an expansion of 1 ties the channels that enter a
    block to its expanded ones), and groups that no weight reads.
    """
    ties = _Ties()
    sizes: dict[Member, set[int]] = {}
    for network in space.occurrences():
        for left, right in _ties_of(network):
            ties.tie(left, right)
        for layer in network.layers:
            for member, axis, size in _members(layer):
                ties.tie(member, axis)
                sizes.setdefault(member, set()).add(size)
    fixed = ties.root(FIXED)
    grouped: dict[Hashable, list[Member]] = {}
    for member in sizes:
        grouped.setdefault(ties.root(member), []).append(member)
    plan = []
    for root, members in grouped.items():
        seen = sorted(set.union(*(sizes[member] for member in members)))
        agree = all(max(sizes[member]) == seen[-1] for member in members)
        if root != fixed and agree and len(seen) > 1 and any(member.reads for member in members):
            plan.append(Group(tuple(members), tuple(seen)))
    return tuple(plan)


@dataclass
class _Ties:
    """Union-find over axes and members."""

    _parent: dict[Hashable, Hashable] = field(default_factory=dict)

    def root(self, node: Hashable) -> Hashable:
        parent = self._parent
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent.setdefault(above, above)  # halves the path
            node = above
        return node

    def tie(self, left: Hashable, right: Hashable) -> None:
        self._parent[self.root(left)] = self.root(right)


def _ties_of(network: Network) -> Iterator[tuple[Axis, Axis]]:
    for axis in (*_axes(INPUT, network.input_shape), *_axes(network.output.name, network.output.out_shape)):
        yield axis, FIXED
    for layer in network.layers:
        inputs = [_axes(name, shape) for name, shape in zip(layer.inputs, layer.in_shapes, strict=True)]
        yield from _layer_ties(layer, inputs, _axes(layer.name, layer.out_shape))


def _axes(name: str, shape: Shape) -> list[Axis]:
    return [(name, axis) for axis in range(len(shape))]


def _layer_ties(layer: Layer, inputs: Sequence[list[Axis]], out: list[Axis]) -> Iterator[tuple[Axis, Axis]]:
    """What one layer ties; an axis that it neither ties nor fixes may take any order."""
    match layer.kind:
        case "activation" | "softmax" | "norm" | "add":
            for source in inputs:
                yield from zip(source, out, strict=True)
        case "multiply":
            for source, shape in zip(inputs, layer.in_shapes, strict=True):
                yield from (pair for i, pair in enumerate(zip(source, out, strict=True)) if shape[i] > 1)
        case "pool" | "conv2d":
            channels = (inputs[0][0], out[0])
            yield from _fixed(inputs[0][1:] + out[1:])
            if layer.kind == "pool" or layer.is_depthwise:
                yield channels
            elif layer.groups > 1:
                yield from _fixed(channels)
        case "linear":
            yield from zip(inputs[0][:-1], out[:-1], strict=True)
        case "matmul":
            left, right = inputs
            yield from zip(left[:-1], out[:-1], strict=True)
            yield from zip(right[:-2], out[:-2], strict=True)
            yield from ((left[-1], right[-2]), (right[-1], out[-1]))
        case "permute":
            order = layer["order"]
            assert isinstance(order, tuple)
            yield from ((out[i], inputs[0][axis]) for i, axis in enumerate(order))
        case "reshape":
            yield from _reshape_ties(layer, inputs[0], out)
        case "parameter":
            pass
        case _:  # a kind this file does not know may mix what it likes
            yield from _fixed([*(axis for source in inputs for axis in source), *out])


def _reshape_ties(layer: Layer, source: list[Axis], out: list[Axis]) -> Iterator[tuple[Axis, Axis]]:
    """The leading axes that both shapes share, axes of length one left out, stay as they are; the rest is mixed."""
    before = [(axis, size) for axis, size in zip(source, layer.in_shapes[0], strict=True) if size > 1]
    after = [(axis, size) for axis, size in zip(out, layer.out_shape, strict=True) if size > 1]
    while before and after and before[0][1] == after[0][1]:
        yield before.pop(0)[0], after.pop(0)[0]
    yield from _fixed([axis for axis, _ in before + after])


def _fixed(axes: Iterable[Axis]) -> Iterator[tuple[Axis, Axis]]:
    return ((axis, FIXED) for axis in axes)


def _members(layer: Layer) -> Iterator[tuple[Member, Axis, int]]:
    """The axes of the layer's shared tensors: which axis of a tensor of the network each follows, and its length."""
    out, shape = _axes(layer.name, layer.out_shape), layer.out_shape
    match layer.kind:
        case "conv2d" | "linear":
            channel = 0 if layer.kind == "conv2d" else -1
            for parameter in ("weight", *(("norm_scale", "norm_shift", *STATISTICS) if layer.norm else ("bias",))):
                yield Member(layer.name, parameter, 0), out[channel], shape[channel]
            if layer.groups == 1:
                source = _axes(layer.inputs[0], layer.in_shapes[0])
                yield Member(layer.name, "weight", 1, reads=True), source[channel], layer.in_shapes[0][channel]
        case "norm":
            for parameter in ("scale", "bias"):
                yield Member(layer.name, parameter, 0), out[-1], shape[-1]
        case "parameter":
            yield from ((Member(layer.name, "value", axis), out[axis], shape[axis]) for axis in range(len(shape)))
