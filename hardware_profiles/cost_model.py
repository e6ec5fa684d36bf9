"""Latency as a sum over layers: additive features of a network, and a model with one coefficient a feature.

A feature is `family.precision.quantity`. The family is what a runtime has a kernel for (`pointwise`,
`depthwise`, `average_pool`, `hardswish`, ...), the precision is the layer's own, and the quantities are

    count         layers of that family: the fixed price of starting a kernel
    macs          multiply-accumulates, of the families that have any
    bytes         activations read and written
    weight_bytes  stored parameters read, of the families that have any

Models of GPUs have two more, that a fit which does not ask for them never sees (`shape_features`):

    direct_macs   of the macs of a family `conv`, those that no fast algorithm takes (`has_fast_algorithm`), which
                  cost that much more each
    reduction     products in one output element: a thread sums them one after the other, however few the outputs

Kernels of CPUs compute a block of channels at once, as many as a vector register holds, in layouts of their own. A
model with a `channel_block` has four more (`block_features`):

    padded_macs     of a convolution, were its channels filled up to whole blocks
    narrow_count    convolutions with fewer channels than a block, in or out: mostly filling, or read in another layout
    unfused_count   float adds of what was made in integers: the convolution before cannot add it itself
    unfused_bytes   what these read and write

A layer of a patch stage counts with what all patches together compute, unclipped (`hardware_profiles.patches`): its
kernel is started, and its parameters are read, once a patch.

A tensor that is made in one precision and read in another adds a `quantize` or a `dequantize`, once a
tensor and not once a reader; the image arrives in float. Summing kernels is the table method of FBNet
(arXiv 1812.03443), with the table replaced by a line through each family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from hardware_profiles.patches import computed_positions, executed_layer_macs, moved_elements
from search_spaces import INPUT, Layer, Network
from search_spaces.layers import FREE_ACTIVATIONS

FREE_KINDS = ("parameter",)  # constants: read where they are stored
QUANTITIES = ("count", "macs", "bytes", "weight_bytes")
SHAPE_QUANTITIES = ("direct_macs", "reduction")
BLOCK_QUANTITIES = ("padded_macs", "narrow_count", "unfused_count", "unfused_bytes")
WINOGRAD_CHANNELS = 16  # the fewest, in and out, for which ncnn's Vulkan convolution uses Winograd's algorithm
FAMILIES = (
    "conv",
    "pointwise",
    "depthwise",
    "grouped",
    "linear",
    "matmul",
    "norm",
    "softmax",
    "average_pool",
    "max_pool",
    "add",
    "multiply",
    "reshape",
    "permute",
    "quantize",
    "dequantize",
    *FREE_ACTIVATIONS,
)


class UnsupportedLayer(LookupError):
    """A network has layers of a family and precision that the cost model was never fitted on."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted latency of one forward pass of one sample, in milliseconds.

    `low_ms` and `high_ms` bound the 90 % interval; both are None where the error of the model is not known.
    """

    mean_ms: float
    low_ms: float | None
    high_ms: float | None
    origin: Literal["predicted", "simulated"] = "predicted"


def predicted(mean_ms: float, relative_error: float | None) -> Prediction:
    """A prediction whose interval is `relative_error` of the mean to either side."""
    if relative_error is None:
        return Prediction(mean_ms, None, None)
    return Prediction(mean_ms, max(mean_ms * (1 - relative_error), 0.0), mean_ms * (1 + relative_error))


@dataclass(frozen=True, slots=True)
class Conversion:
    """A copy of the tensor `source` in another precision: `quantize` to integers or `dequantize` to float.

    `reader` is the index of the first layer that needs it.
    """

    reader: int
    source: str
    family: str
    elements: int


def family_of(layer: Layer) -> str:
    """The name of the kernel that runs the layer: its kind, told apart where runtimes have different kernels."""
    kind = layer.kind
    if kind == "conv2d":
        if layer.is_depthwise:
            return "depthwise"
        if layer.groups > 1:
            return "grouped"
        return "pointwise" if layer.kernel == 1 else "conv"
    if kind == "pool":
        return "max_pool" if layer["mode"] == "max" else "average_pool"
    return layer.activation if kind == "activation" else kind


def conversions(network: Network) -> Iterator[Conversion]:
    """The copies that mixed precision needs, in the order of their first readers; the image arrives in float.

    An integer layer that ends the network writes floats itself, as the exported models do.
    """
    return conversions_of(network.layers, {INPUT: False})


def conversions_of(layers: Sequence[Layer], given: Mapping[str, bool]) -> Iterator[Conversion]:
    """The same for a part of a network, `given` the tensors it is fed with and whether they are integers."""
    integer = dict(given)
    copied: set[str] = set()
    for index, layer in enumerate(layers):
        wanted = layer.precision.is_quantized
        for source, shape in zip(layer.inputs, layer.in_shapes, strict=True):
            if integer[source] != wanted and source not in copied:
                copied.add(source)
                yield Conversion(index, source, "quantize" if wanted else "dequantize", prod(shape))
        integer[layer.name] = wanted


def features(network: Network, channel_block: int = 0) -> dict[str, float]:
    """Additive features of a network: `family.precision.quantity` -> total; with `block_features` for a block."""
    return features_of(network.layers, {INPUT: False}, computed_positions(network), channel_block)


def features_of(
    layers: Sequence[Layer],
    given: Mapping[str, bool],
    positions: Mapping[str, int] | None = None,
    channel_block: int = 0,
) -> dict[str, float]:
    """The same for a part of a network, `given` the tensors it is fed with and whether they are integers.

    `positions` are those of `patches.computed_positions`, which a part with layers of a patch stage needs.
    """
    positions = positions or {}
    totals = block_features(layers, given, positions, channel_block) if channel_block else {}
    for layer in layers:
        if layer.kind not in FREE_KINDS:
            precision, runs = layer.precision, layer.patches**2
            macs = executed_layer_macs(layer, positions)
            moved_bytes = moved_elements(layer, positions) * precision.activation_bits / 8
            weight_bytes = runs * layer.weight_bytes
            accumulate(totals, f"{family_of(layer)}.{precision.name}", macs, moved_bytes, weight_bytes, count=runs)
    for copy in conversions_of(layers, given):
        reader = layers[copy.reader]
        if reader.patches > 1:
            channels = reader.in_shapes[reader.inputs.index(copy.source)][0]
            copy = replace(copy, elements=channels * positions[copy.source])
        accumulate(totals, f"{copy.family}.int8", 0, copy.elements * 5, 0)  # four bytes on one side, one on the other
    return totals


def accumulate(
    totals: dict[str, float], prefix: str, macs: float, moved_bytes: float, weight_bytes: float, count: float = 1.0
) -> None:
    """Add one kernel, or `count` of them, to the features in place; `prefix` is `family.precision`."""
    amounts = (("count", count), ("macs", macs), ("bytes", moved_bytes), ("weight_bytes", weight_bytes))
    for quantity, amount in amounts:
        if amount:
            key = f"{prefix}.{quantity}"
            totals[key] = totals.get(key, 0.0) + amount


def block_features(
    layers: Sequence[Layer], given: Mapping[str, bool], positions: Mapping[str, int], channel_block: int
) -> dict[str, float]:
    """What else the time of a CPU kernel depends on: `family.precision.quantity` of `BLOCK_QUANTITIES` -> total.

    onnxruntime lays channels out in blocks of a vector register's length (16 floats with AVX-512, 8 with AVX2), fills
    the last one up, and reads fewer than one block as they are, which turns what came before back into a plain layout.
    Into a float convolution it fuses the add that follows, unless that waits for a tensor to be converted. These four
    were chosen out of a dozen on one machine with AVX-512, where they halved the error (`host_cpu*.json`).
    """
    integer = dict(given)
    totals: dict[str, float] = {}

    def count(prefix: str, **amounts: float) -> None:
        for quantity, amount in amounts.items():
            if amount:
                totals[f"{prefix}.{quantity}"] = totals.get(f"{prefix}.{quantity}", 0.0) + amount

    for layer in layers:
        integer[layer.name] = layer.precision.is_quantized
        prefix, runs = f"{family_of(layer)}.{layer.precision.name}", layer.patches**2
        if layer.kind == "conv2d":
            channels = (layer.in_shapes[0][0] // layer.groups, layer.out_shape[0])
            blocked = channels[1:] if layer.is_depthwise else channels
            filled = prod(-(-count // channel_block) * channel_block for count in blocked)
            macs = executed_layer_macs(layer, positions) // prod(blocked) * filled
            count(prefix, padded_macs=macs, narrow_count=runs * (min(blocked) < channel_block))
        elif layer.kind == "add" and not integer[layer.name] and any(integer[source] for source in layer.inputs):
            count(prefix, unfused_count=runs, unfused_bytes=4 * moved_elements(layer, positions))
    return totals


def shape_features(layers: Sequence[Layer]) -> dict[str, float]:
    """What else the time of a GPU kernel depends on: `family.precision.quantity` of `SHAPE_QUANTITIES` -> total."""
    totals: dict[str, float] = {}
    for layer in layers:
        if layer.macs:
            family, channels = family_of(layer), (layer.in_shapes[0][0], layer.out_shape[0])
            direct = family == "conv" and not has_fast_algorithm(layer.kernel, layer.stride, channels)
            accumulate_shape(totals, f"{family}.{layer.precision.name}", layer.macs, prod(layer.out_shape), direct)
    return totals


def has_fast_algorithm(kernel: int, stride: int, channels: tuple[int, int]) -> bool:
    """Whether a dense convolution can be done with fewer products than MACs (Winograd's, arXiv 1509.09308)."""
    return kernel == 3 and stride == 1 and min(channels) >= WINOGRAD_CHANNELS


def accumulate_shape(totals: dict[str, float], prefix: str, macs: float, outputs: int, direct: bool) -> None:
    """Add the shape of one kernel with MACs to the features in place; `prefix` is `family.precision`."""
    for quantity, amount in (("reduction", macs / outputs), ("direct_macs", macs if direct else 0.0)):
        if amount:
            key = f"{prefix}.{quantity}"
            totals[key] = totals.get(key, 0.0) + amount


@dataclass(frozen=True)
class AdditiveModel:
    """latency_ms = constant_ms + sum of coefficient * feature.

    A coefficient of zero says that the family was there and cost nothing; a family and precision without
    any coefficient was never seen, and a network that has it is refused.

    `channel_block` is how many channels its kernels compute at once; 0 where no coefficient is of `BLOCK_QUANTITIES`.
    """

    coefficients: Mapping[str, float]
    constant_ms: float = 0.0
    channel_block: int = 0

    @cached_property
    def supported(self) -> frozenset[str]:
        """`family.precision` of everything the model was fitted on."""
        return frozenset(name.rpartition(".")[0] for name in self.coefficients)

    @cached_property
    def prices_shapes(self) -> bool:
        """Whether any coefficient is of `SHAPE_QUANTITIES`."""
        return any(name.rpartition(".")[2] in SHAPE_QUANTITIES for name in self.coefficients)

    def unsupported_layers(self, network: Network) -> tuple[str, ...]:
        """Names of the layers, and `quantize TENSOR` for the conversions, that the model knows no cost of."""
        return self._unsupported(network.layers, {INPUT: False})

    def _unsupported(self, part: Sequence[Layer], given: Mapping[str, bool]) -> tuple[str, ...]:
        layers = [
            layer.name
            for layer in part
            if layer.kind not in FREE_KINDS and f"{family_of(layer)}.{layer.precision.name}" not in self.supported
        ]
        copies = [
            f"{copy.family} {copy.source}"
            for copy in conversions_of(part, given)
            if f"{copy.family}.int8" not in self.supported
        ]
        return (*layers, *copies)

    def latency_ms(self, network: Network) -> float:
        """Milliseconds of one forward pass; raises UnsupportedLayer naming what the model was not fitted on."""
        return self.constant_ms + self.layers_ms(network.layers, {INPUT: False}, computed_positions(network))

    def layers_ms(
        self, layers: Sequence[Layer], given: Mapping[str, bool], positions: Mapping[str, int] | None = None
    ) -> float:
        """The same for a part of a network, without the constant; `given` and `positions` as in `features_of`."""
        total = 0.0
        amounts = features_of(layers, given, positions, self.channel_block)
        amounts |= shape_features(layers) if self.prices_shapes else {}
        for name, amount in amounts.items():
            coefficient = self.coefficients.get(name)
            if coefficient is not None:
                total += coefficient * amount
            elif name.rpartition(".")[0] not in self.supported:
                raise UnsupportedLayer(self._refusal(layers, given))
        return total

    def _refusal(self, part: Sequence[Layer], given: Mapping[str, bool]) -> str:
        layers = self._unsupported(part, given)
        shown = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        return f"no measurement covers {shown}; this model knows {', '.join(sorted(self.supported))}"
