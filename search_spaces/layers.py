"""Layers and networks: the one description that every other part reads.

A `Network` is a tuple of `Layer` records in topological order. Shapes leave out the batch: an image is
(channels, height, width), a token sequence is (tokens, features), a vector is (features,).

Each kind of layer is defined once, in `KINDS`: its output shape, its multiply-accumulates, the shapes of
its parameters and how it takes part in quantization. The functions `conv2d`, `linear`, ... build records
and derive what can be derived, so that a space never computes a shape by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from math import prod
from typing import Any, Literal, NamedTuple

from search_spaces.precision import FP32, Precision

Shape = tuple[int, ...]
Padding = tuple[int, int, int, int]  # top, left, bottom, right
Attribute = int | float | str | bool | tuple[int, ...]

INPUT = "input"  # the name of the tensor a network is fed with
PREV = "@prev"  # inside a slot: whatever the slot before produced

FUSED_ACTIVATIONS = ("", "relu", "relu6")  # the ones runtimes fuse into an integer convolution
FREE_ACTIVATIONS = ("relu", "relu6", "hardswish", "hardsigmoid", "gelu")
PADDINGS = ("symmetric", "same")  # see pad_for
PATCHABLE_KINDS = ("conv2d", "add", "activation", "pool")  # what can see a part of the map alone; pools: max only


class InvalidNetwork(ValueError):
    """Layers that do not fit together: a missing input, or a shape that differs from its producer's."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One operation with concrete shapes.

    A convolution or linear layer owns its bias, its folded batch norm (`norm`) and an activation where
    runtimes fuse one (`relu`, `relu6`). `precision` is what it computes in; layers without weights
    inherit theirs when the network is assembled (see `Kind.quantization`). `patches` is how many patches a side
    of the map is computed in, where the network starts with a patch stage (see `Network.patch_stage`).
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    in_shapes: tuple[Shape, ...]
    out_shape: Shape
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    padding: Padding = (0, 0, 0, 0)
    norm: bool = False
    activation: str = ""
    attributes: tuple[tuple[str, Attribute], ...] = ()
    precision: Precision = FP32
    patches: int = 1

    def __getitem__(self, attribute: str) -> Attribute:
        for name, value in self.attributes:
            if name == attribute:
                return value
        raise KeyError(f"layer {self.name!r} of kind {self.kind!r} has no attribute {attribute!r}")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one sample; element-wise kinds count none."""
        return KINDS[self.kind].macs(self)

    @property
    def parameter_shapes(self) -> dict[str, Shape]:
        """Parameters of the layer as shipped, its batch norm folded: name -> shape."""
        return KINDS[self.kind].parameters(self)

    @property
    def params(self) -> int:
        """Parameters as shipped: a folded batch norm counts as a bias, not as scale, shift and statistics."""
        return sum(prod(shape) for shape in self.parameter_shapes.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored parameters.

        Weights take `precision.weight_bits` each; biases four bytes (float32, or int32 when quantized); a
        quantized layer also stores one float32 scale per output channel.
        """
        shapes = self.parameter_shapes
        if not self.precision.is_quantized or "weight" not in shapes:
            return 4 * self.params
        weights = shapes["weight"]
        bits = prod(weights) * self.precision.weight_bits
        return -(-bits // 8) + 4 * (self.params - prod(weights)) + 4 * weights[0]

    @property
    def activation_bytes(self) -> int:
        """Bytes of the output tensor of one sample."""
        return -(-prod(self.out_shape) * self.precision.activation_bits // 8)

    @property
    def has_weights(self) -> bool:
        """Whether the layer has a precision of its own (a gene) rather than an inherited one."""
        return KINDS[self.kind].quantization == "weights"

    @property
    def is_depthwise(self) -> bool:
        return self.kind == "conv2d" and self.groups > 1 and self.groups == self.in_shapes[0][0] == self.out_shape[0]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of layer is.

    quantization: `weights`: has a precision of its own; `inherit`: computes on integers when all its
    inputs are quantized; `alias`: only rearranges, so it keeps its input's quantization parameters too;
    `float`: no runtime here has an integer kernel for it, so it always computes in fp32.
    """

    out_shape: Callable[[Layer], Shape]
    macs: Callable[[Layer], int]
    parameters: Callable[[Layer], dict[str, Shape]]
    quantization: Literal["weights", "inherit", "alias", "float"]


def _no_macs(layer: Layer) -> int:
    return 0


def _no_parameters(layer: Layer) -> dict[str, Shape]:
    return {}


def _same_shape(layer: Layer) -> Shape:
    return layer.in_shapes[0]


def _window_size(layer: Layer) -> tuple[int, int]:
    _, height, width = layer.in_shapes[0]
    top, left, bottom, right = layer.padding
    out_height = (height + top + bottom - layer.kernel) // layer.stride + 1
    out_width = (width + left + right - layer.kernel) // layer.stride + 1
    if out_height < 1 or out_width < 1:
        raise InvalidNetwork(
            f"layer {layer.name!r}: a {height}x{width} input is too small for kernel {layer.kernel} "
            f"with padding {layer.padding}; raise the resolution or lower the number of strides"
        )
    return out_height, out_width


def _conv_shape(layer: Layer) -> Shape:
    return (layer.out_shape[0], *_window_size(layer))


def _conv_macs(layer: Layer) -> int:
    return prod(layer.out_shape) * (layer.in_shapes[0][0] // layer.groups) * layer.kernel**2


def _conv_parameters(layer: Layer) -> dict[str, Shape]:
    out_channels = layer.out_shape[0]
    in_channels = layer.in_shapes[0][0] // layer.groups
    return {"weight": (out_channels, in_channels, layer.kernel, layer.kernel), "bias": (out_channels,)}


def _linear_shape(layer: Layer) -> Shape:
    return (*layer.in_shapes[0][:-1], layer.out_shape[-1])


def _linear_macs(layer: Layer) -> int:
    return prod(layer.in_shapes[0]) * layer.out_shape[-1]


def _linear_parameters(layer: Layer) -> dict[str, Shape]:
    return {"weight": (layer.out_shape[-1], layer.in_shapes[0][-1]), "bias": (layer.out_shape[-1],)}


def _matmul_shape(layer: Layer) -> Shape:
    a, b = layer.in_shapes
    if a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise InvalidNetwork(f"layer {layer.name!r}: cannot multiply {a} by {b}")
    return (*a[:-1], b[-1])


def _matmul_macs(layer: Layer) -> int:
    return prod(layer.out_shape) * layer.in_shapes[0][-1]


def _norm_parameters(layer: Layer) -> dict[str, Shape]:
    features = layer.out_shape[-1]
    return {"scale": (features,), "bias": (features,)}


def _pool_shape(layer: Layer) -> Shape:
    if layer["mode"] == "global_average":
        return (layer.in_shapes[0][0], 1, 1)
    return (layer.in_shapes[0][0], *_window_size(layer))


def _add_shape(layer: Layer) -> Shape:
    first, second = layer.in_shapes
    if first != second:
        raise InvalidNetwork(f"layer {layer.name!r}: cannot add {first} and {second}")
    return first


def _multiply_shape(layer: Layer) -> Shape:
    first, second = layer.in_shapes
    if len(first) != len(second) or any(b not in (a, 1) for a, b in zip(first, second, strict=True)):
        raise InvalidNetwork(f"layer {layer.name!r}: cannot multiply {first} by {second} element-wise")
    return first


def _reshape_shape(layer: Layer) -> Shape:
    if prod(layer.in_shapes[0]) != prod(layer.out_shape):
        raise InvalidNetwork(f"layer {layer.name!r}: cannot reshape {layer.in_shapes[0]} to {layer.out_shape}")
    return layer.out_shape


def _permute_shape(layer: Layer) -> Shape:
    order = layer["order"]
    shape = layer.in_shapes[0]
    if not isinstance(order, tuple) or sorted(order) != list(range(len(shape))):
        raise InvalidNetwork(f"layer {layer.name!r}: {order} does not reorder the {len(shape)} axes of {shape}")
    return tuple(shape[axis] for axis in order)


def _parameter_parameters(layer: Layer) -> dict[str, Shape]:
    return {"value": layer.out_shape}


KINDS: Mapping[str, Kind] = {
    "conv2d": Kind(_conv_shape, _conv_macs, _conv_parameters, "weights"),
    "linear": Kind(_linear_shape, _linear_macs, _linear_parameters, "weights"),
    "matmul": Kind(_matmul_shape, _matmul_macs, _no_parameters, "float"),
    "norm": Kind(_same_shape, _no_macs, _norm_parameters, "float"),
    "activation": Kind(_same_shape, _no_macs, _no_parameters, "float"),
    "softmax": Kind(_same_shape, _no_macs, _no_parameters, "float"),
    "parameter": Kind(lambda layer: layer.out_shape, _no_macs, _parameter_parameters, "float"),
    "pool": Kind(_pool_shape, _no_macs, _no_parameters, "inherit"),
    "add": Kind(_add_shape, _no_macs, _no_parameters, "inherit"),
    "multiply": Kind(_multiply_shape, _no_macs, _no_parameters, "inherit"),
    "reshape": Kind(_reshape_shape, _no_macs, _no_parameters, "alias"),
    "permute": Kind(_permute_shape, _no_macs, _no_parameters, "alias"),
}


def keeps_quantization(layer: Layer) -> bool:
    """Whether the output carries the very scale of the input: rearrangements and max pooling."""
    return KINDS[layer.kind].quantization == "alias" or (layer.kind == "pool" and layer["mode"] == "max")


class Port(NamedTuple):
    """A tensor inside a slot: who makes it, and its shape."""

    name: str
    shape: Shape


def port(layer: Layer) -> Port:
    return Port(layer.name, layer.out_shape)


@lru_cache(maxsize=2**15)  # a search lowers thousands of networks that share most of their layers
def _layer(name: str, kind: str, *sources: Port, out_shape: Shape = (), **fields: Any) -> Layer:
    """The record of one layer; its kind's rule makes the whole shape of what is known of it (`out_shape`)."""
    inputs, in_shapes = tuple(source.name for source in sources), tuple(source.shape for source in sources)
    layer = Layer(name, kind, inputs, in_shapes, out_shape, **fields)
    return replace(layer, out_shape=KINDS[kind].out_shape(layer))


def pad_for(kernel: int, stride: int, size: int, scheme: str) -> tuple[int, int]:
    """Padding before and after one axis of `size`.

    `symmetric` pads kernel // 2 on both sides (PyTorch's habit); `same` pads as TensorFlow does, which
    for stride 2 needs no explicit pad copy on microcontrollers.
    """
    if scheme == "symmetric":
        return kernel // 2, kernel // 2
    if scheme == "same":
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2
    raise ValueError(f"unknown padding scheme {scheme!r}; known: {', '.join(PADDINGS)}")


def conv2d(
    name: str,
    source: Port,
    out_channels: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    norm: bool = True,
    activation: str = "",
    padding: str = "symmetric",
    precision: Precision = FP32,
) -> Layer:
    """A convolution with bias; `groups` equal to the input channels makes it depthwise."""
    _check_fused(name, activation)
    channels, height, width = source.shape
    if min(out_channels, kernel, stride, groups) < 1:
        raise InvalidNetwork(
            f"layer {name!r}: expected 1 or more of each, got {out_channels} channels, kernel {kernel}, "
            f"stride {stride}, {groups} groups"
        )
    if channels % groups or out_channels % groups:
        raise InvalidNetwork(f"layer {name!r}: {groups} groups do not divide {channels} and {out_channels} channels")
    top, bottom = pad_for(kernel, stride, height, padding)
    left, right = pad_for(kernel, stride, width, padding)
    return _layer(
        name,
        "conv2d",
        source,
        out_shape=(out_channels,),
        kernel=kernel,
        stride=stride,
        groups=groups,
        padding=(top, left, bottom, right),
        norm=norm,
        activation=activation,
        precision=precision,
    )


def linear(name: str, source: Port, out_features: int, *, activation: str = "", precision: Precision = FP32) -> Layer:
    """A matrix product with the last axis, with bias."""
    _check_fused(name, activation)
    if out_features < 1:
        raise InvalidNetwork(f"layer {name!r}: {out_features} features; expected 1 or more")
    return _layer(name, "linear", source, out_shape=(out_features,), activation=activation, precision=precision)


def _check_fused(name: str, activation: str) -> None:
    if activation not in FUSED_ACTIVATIONS:
        raise InvalidNetwork(f"layer {name!r}: {activation!r} is not fused by runtimes; add an activation layer")


def matmul(name: str, a: Port, b: Port, *, scale: float = 1.0) -> Layer:
    """Batched matrix product of two activations, times a constant."""
    return _layer(name, "matmul", a, b, attributes=(("scale", float(scale)),))


def layer_norm(name: str, source: Port, *, epsilon: float = 1e-5) -> Layer:
    """Normalization over the last axis, with scale and bias."""
    return _layer(name, "norm", source, attributes=(("epsilon", epsilon),))


def activation(name: str, source: Port, function: str) -> Layer:
    """An activation that stands alone, since runtimes do not fuse it into integer kernels."""
    if function not in FREE_ACTIVATIONS:
        raise InvalidNetwork(f"layer {name!r}: unknown activation {function!r}; known: {', '.join(FREE_ACTIVATIONS)}")
    return _layer(name, "activation", source, activation=function)


def softmax(name: str, source: Port) -> Layer:
    """Softmax over the last axis."""
    return _layer(name, "softmax", source)


def parameter(name: str, shape: Shape) -> Layer:
    """A learned constant, such as positional embeddings."""
    return _layer(name, "parameter", out_shape=shape)


def global_average_pool(name: str, source: Port) -> Layer:
    """(C, H, W) -> (C, 1, 1)."""
    return _layer(name, "pool", source, attributes=(("mode", "global_average"),))


def max_pool(name: str, source: Port, *, kernel: int, stride: int) -> Layer:
    """Max pooling, padded by kernel // 2."""
    pad = kernel // 2
    return _layer(
        name, "pool", source, kernel=kernel, stride=stride, padding=(pad, pad, pad, pad), attributes=(("mode", "max"),)
    )


def average_pool(name: str, source: Port, *, kernel: int, stride: int) -> Layer:
    """Average pooling, padded as TensorFlow pads (a side becomes size / stride, rounded up); padding is not counted."""
    top, bottom = pad_for(kernel, stride, source.shape[1], "same")
    left, right = pad_for(kernel, stride, source.shape[2], "same")
    return _layer(
        name,
        "pool",
        source,
        kernel=kernel,
        stride=stride,
        padding=(top, left, bottom, right),
        attributes=(("mode", "average"),),
    )


def add(name: str, a: Port, b: Port) -> Layer:
    """Element-wise sum of two tensors of one shape."""
    return _layer(name, "add", a, b)


def multiply(name: str, a: Port, b: Port) -> Layer:
    """Element-wise product; an axis of length one of `b` is broadcast."""
    return _layer(name, "multiply", a, b)


def reshape(name: str, source: Port, shape: Shape) -> Layer:
    """The same numbers, in the same order, as another shape."""
    return _layer(name, "reshape", source, out_shape=shape)


def permute(name: str, source: Port, order: tuple[int, ...]) -> Layer:
    """Reorder the axes (the batch excluded): output axis i is input axis order[i]."""
    return _layer(name, "permute", source, attributes=(("order", tuple(order)),))


@dataclass(frozen=True)
class Network:
    """Layers in topological order, checked on construction; the last one is the output.

    Raises InvalidNetwork when there is no layer, a name repeats, an input is missing or a shape differs from its
    producer's.
    """

    input_shape: Shape
    layers: tuple[Layer, ...]
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidNetwork("a network needs at least one layer")
        shapes = {INPUT: self.input_shape}
        for layer in self.layers:
            if layer.name in shapes:
                raise InvalidNetwork(f"two layers are called {layer.name!r}")
            for source, expected in zip(layer.inputs, layer.in_shapes, strict=True):
                if shapes.get(source) != expected:
                    raise InvalidNetwork(
                        f"layer {layer.name!r} expects {expected} from {source!r}, got {shapes.get(source)}"
                    )
            shapes[layer.name] = layer.out_shape
        if any(layer.patches != 1 for layer in self.layers):
            _check_patch_stage(self.layers, self.patch_stage)

    @cached_property
    def patch_stage(self) -> tuple[Layer, ...]:
        """The first layers, where they run patch by patch (arXiv 2110.15352); mostly none.

        The map that the last of them makes is divided into `patches` times `patches` parts. For each in turn, all
        layers of the stage run on what it needs of their inputs; halos shared by neighbours are computed again. The
        result is that of running the layers whole, for less memory and more work.
        """
        return tuple(takewhile(lambda layer: layer.patches != 1, self.layers))

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @property
    def output(self) -> Layer:
        return self.layers[-1]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def model_bytes(self) -> int:
        """Bytes of all stored parameters; a file adds its format's own overhead."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def precisions(self) -> dict[str, str]:
        """Precision of each layer that has one of its own."""
        return {layer.name: layer.precision.name for layer in self.layers if layer.has_weights}

    @property
    def int8_macs_share(self) -> float:
        """Share of the multiply-accumulates that quantized layers do."""
        total = self.macs
        return sum(layer.macs for layer in self.layers if layer.precision.is_quantized) / total if total else 0.0


def _check_patch_stage(layers: tuple[Layer, ...], stage: tuple[Layer, ...]) -> None:
    """Raise InvalidNetwork unless the layers in patches come first, agree, and hand over the last one's map alone."""
    rest = layers[len(stage) :]
    odd = next((layer for layer in layers if layer.patches not in (1, layers[0].patches)), None)
    late = next((layer for layer in rest if layer.patches != 1), None)
    if odd or late or layers[0].patches < 1:
        wrong = odd or late or layers[0]
        raise InvalidNetwork(
            f"layer {wrong.name!r} runs in {wrong.patches} patches a side; expected the first layers of a network to "
            "run in one number of patches, and all after them in 1"
        )
    for layer in stage:
        whole = layer.kind not in PATCHABLE_KINDS or (layer.kind == "pool" and layer["mode"] != "max")
        if whole or len(layer.out_shape) != 3:
            raise InvalidNetwork(
                f"layer {layer.name!r} of kind {layer.kind} has no patches; end the patch stage before"
            )
    last = stage[-1]
    inner = {INPUT, *(layer.name for layer in stage)} - {last.name}
    if leaking := [layer.name for layer in rest if not inner.isdisjoint(layer.inputs)]:
        raise InvalidNetwork(
            f"layers {leaking} read what the patch stage does not hand over; it ends with {last.name!r}"
        )
    if unread := inner - {source for layer in stage for source in layer.inputs}:
        raise InvalidNetwork(f"nothing in the patch stage reads {sorted(unread)}; it must end with one map")
    if min(last.out_shape[1:]) < last.patches:
        raise InvalidNetwork(
            f"layer {last.name!r} makes a map of {last.out_shape[1:]}, too few for {last.patches} patches a side"
        )


def assemble(input_shape: Shape, slots: list[tuple[Layer, ...]], name: str = "") -> Network:
    """Chain the layers of the active slots: resolve `PREV`, and let layers without weights inherit a precision."""
    layers: list[Layer] = []
    previous, precision = INPUT, FP32
    for slot in slots:
        chained = chain(slot, previous, precision)
        layers += chained
        if chained:
            previous, precision = chained[-1].name, chained[-1].precision
    return Network(input_shape, tuple(layers), name)


def chain(slot: tuple[Layer, ...], previous: str, precision: Precision) -> list[Layer]:
    """The layers of a slot, fed with the tensor `previous` that was made in `precision`.

    Raises InvalidNetwork for a layer that reads anything else than that tensor and the layers before it in the slot:
    what a slot costs depends on its own choices and one precision, which is what makes costs sums over slots.
    """
    layers: list[Layer] = []
    precision_of = {previous: precision}
    for raw in slot:
        inputs, own = raw.inputs, raw.precision
        if PREV in inputs:
            inputs = tuple(previous if source == PREV else source for source in inputs)
        far = [source for source in inputs if source not in precision_of]
        if far:
            raise InvalidNetwork(f"layer {raw.name!r} reads {far[0]!r}; a slot reads {PREV!r} and its own layers")
        if KINDS[raw.kind].quantization in ("inherit", "alias"):
            own = _inherited(inputs, precision_of)
        changed = inputs is not raw.inputs or own is not raw.precision
        layers.append(replace(raw, inputs=inputs, precision=own) if changed else raw)
        precision_of[raw.name] = own
    return layers


def _inherited(inputs: tuple[str, ...], precision_of: Mapping[str, Precision]) -> Precision:
    """The one precision that all inputs share, else fp32."""
    first = precision_of[inputs[0]]
    return first if all(precision_of[source] == first for source in inputs[1:]) else FP32
