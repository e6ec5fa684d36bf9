"""The once-for-all supernet and the subnets cut from it.

The supernet holds, for each layer name of the space, the parameters of its largest occurrence. A smaller
occurrence uses the leading channels (features, positions) and the centre of the kernel, so the weights of
nested architectures are nested (arXiv 1908.09791, 2309.00255). Nothing is ever "active": which architecture
runs is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod, sqrt
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.interpreter import NORM_EPSILON, Normalization, Parameters, Tap, execute, execute_in_patches
from search_spaces import Architecture, Layer, Network, SearchSpace

Shape = tuple[int, ...]
Crop = tuple[int, ...]  # as torch pads: from the last axis to the first, before and after it, negative

STATISTICS = ("norm_mean", "norm_variance")


def trainable_shapes(layer: Layer) -> dict[str, Shape]:
    """Shapes of what a layer trains: a folded batch norm is unfolded into scale and shift, in place of the bias."""
    shapes = dict(layer.parameter_shapes)
    if layer.norm:
        shapes["norm_scale"] = shapes["norm_shift"] = shapes.pop("bias")
    return shapes


def crop_of(name: str, full: Shape, shape: Shape) -> Crop | None:
    """What an occurrence of `shape` leaves out of a shared parameter of shape `full`; None where it uses all.

    It uses the leading entries along every axis; of the two kernel axes of a convolution weight, the centre.
    Raises ValueError when the occurrence is larger than what is shared.
    """
    if full == shape:
        return None
    if len(full) != len(shape) or any(want > have for want, have in zip(shape, full, strict=True)):
        raise ValueError(f"parameter {name!r} of shape {shape} does not fit into the shared {full}")
    crop: list[int] = []
    for axis in reversed(range(len(shape))):
        surplus = full[axis] - shape[axis]
        before = surplus // 2 if name == "weight" and len(shape) == 4 and axis >= 2 else 0
        crop += [-before, before - surplus]
    return tuple(crop)


def cropped(full: Tensor, crop: Crop | None) -> Tensor:
    """The part of a shared tensor that an occurrence uses: a view of what has one axis, so that statistics can be
    updated, and else contiguous, without which the backward pass of a convolution takes longer on a CPU."""
    if crop is None:
        return full
    return full[: crop[1]] if len(crop) == 2 else F.pad(full, crop)


class LayerParameters(nn.Module):
    """Parameters and norm statistics of one layer, by name.

    Args:
        tensors: kept as they are, not copied; those called norm_mean and norm_variance become buffers.
    """

    norm_mean: Tensor  # these two only where the layer has a norm
    norm_variance: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():  # registering them one by one takes an eighth of an extraction
            if name in STATISTICS:
                self._buffers[name] = tensor
            else:
                self._parameters[name] = nn.Parameter(tensor)
        self.names = tuple(tensors)

    def tensors(self) -> dict[str, Tensor]:
        held = self._parameters | self._buffers  # an attribute of a module costs as much as a small layer
        return {name: held[name] for name in self.names}  # type: ignore[misc]


def _key(layer_name: str) -> str:
    return layer_name.replace(".", "/")  # torch keeps dots for nesting


def _initial(shapes: Mapping[str, Shape], has_norm: bool) -> LayerParameters:
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if has_norm:
        tensors["norm_mean"] = torch.zeros(shapes["norm_shift"])
        tensors["norm_variance"] = torch.ones(shapes["norm_shift"])
    return LayerParameters(tensors)


def _initialize(parameters: LayerParameters, layer: Layer, generator: torch.Generator) -> None:
    """He initialization for convolutions (fan out), a truncated normal for the rest."""
    with torch.no_grad():
        for name, tensor in parameters.named_parameters():
            if name == "weight" and layer.kind == "conv2d":
                fan_out = tensor.shape[0] * prod(tensor.shape[2:]) / layer.groups
                tensor.normal_(0.0, sqrt(2.0 / fan_out), generator=generator)
            elif name in ("weight", "value"):
                deviation = 0.02 if name == "value" else sqrt(1.0 / tensor.shape[-1])
                nn.init.trunc_normal_(tensor, std=deviation, generator=generator)
            elif name in ("norm_scale", "scale"):
                tensor.fill_(1.0)


@dataclass(frozen=True, slots=True)
class _Lowered:
    """The network of an architecture, and for each layer with parameters what it uses of the shared ones."""

    network: Network
    crops: Mapping[str, tuple[tuple[str, Crop | None], ...]]


class Supernet(nn.Module):
    """All networks of a space in one set of weights.

    Args:
        space: what can be built; it fixes input channels and classes.
        seed: of the initial weights.
        kernel_transforms: whether the kernel of a smaller convolution is not just the centre of a larger one but,
            from each size to the next smaller one that the layer occurs with, a learned matrix times that centre
            (arXiv 1908.09791). The matrix of size k, `transform_k` of shape (k*k, k*k), is shared by all channels
            of the layer and starts as the identity.

    Raises ValueError when `kernel_transforms` meets kernels that are not square, or sizes without a common centre.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, kernel_transforms: bool = False) -> None:
        super().__init__()
        self.space = space
        self.kernel_transforms = kernel_transforms
        largest: dict[str, Layer] = {}
        shapes: dict[str, dict[str, Shape]] = {}
        kernels: dict[str, set[Shape]] = {}
        for network in space.occurrences():
            for layer in network.layers:
                wanted = trainable_shapes(layer)
                if not wanted:
                    continue
                largest.setdefault(layer.name, layer)
                held = shapes.setdefault(layer.name, wanted)
                shapes[layer.name] = {
                    name: tuple(max(a, b) for a, b in zip(held[name], wanted[name], strict=True)) for name in wanted
                }
                if layer.kind == "conv2d":
                    kernels.setdefault(layer.name, set()).add(wanted["weight"][2:])
        self.shared = nn.ModuleDict()
        self._kernels: dict[str, tuple[int, ...]] = {}  # sizes, descending, of the layers that have transforms
        generator = torch.Generator().manual_seed(seed)
        for name, layer in largest.items():
            parameters = _initial(shapes[name], layer.norm)
            _initialize(parameters, layer, generator)
            if kernel_transforms and len(kernels.get(name, ())) > 1:
                self._kernels[name] = _descending(name, kernels[name])
                for size in self._kernels[name][1:]:
                    parameters.register_parameter(f"transform_{size}", nn.Parameter(torch.eye(size * size)))
            self.shared[_key(name)] = parameters
        self._lowered: dict[Architecture, _Lowered] = {}

    def network(self, architecture: Architecture) -> Network:
        """`space.lower`, remembered: training lowers the same few architectures again and again."""
        return self._lower(architecture).network

    def _lower(self, architecture: Architecture) -> _Lowered:
        if architecture not in self._lowered:
            if len(self._lowered) >= 1024:
                self._lowered.clear()
            network = self.space.lower(architecture)
            crops = {layer.name: found for layer in network.layers if (found := self._crops(layer))}
            self._lowered[architecture] = _Lowered(network, crops)
        return self._lowered[architecture]

    def _crops(self, layer: Layer) -> tuple[tuple[str, Crop | None], ...]:
        wanted = trainable_shapes(layer)
        if layer.norm:
            wanted |= dict.fromkeys(STATISTICS, wanted["norm_shift"])
        held = self._shared(layer.name).tensors() if wanted else {}
        return tuple((name, crop_of(name, tuple(held[name].shape), shape)) for name, shape in wanted.items())

    def _shared(self, layer_name: str) -> LayerParameters:
        return cast(LayerParameters, self.shared[_key(layer_name)])

    def forward(self, x: Tensor, architecture: Architecture, *, tap: Tap | None = None, segments: int = 1) -> Tensor:
        """Logits (batch, classes) of one architecture for images at its resolution.

        In training mode batch norms use the batch; in evaluation mode the running statistics, which are an
        average over architectures: recalibrate an extracted subnet before trusting its accuracy.

        `tap` sees, and may replace, what flows between layers. With `segments` above 1 less is kept for the
        backward pass, which computes the rest again (see `nas.interpreter.execute`).
        """
        lowered = self._lower(architecture)
        parameters_of = partial(self._parameters_of, lowered)
        return execute(lowered.network, x, parameters_of, Normalization(self.training), tap, segments)

    def _parameters_of(self, lowered: _Lowered, layer: Layer) -> Parameters:
        crops = lowered.crops.get(layer.name)
        if crops is None:
            return {}
        shared = self._shared(layer.name)
        held = shared.tensors()
        used = {name: cropped(held[name], crop) for name, crop in crops}
        if layer.name in self._kernels:
            used["weight"] = self._through_transforms(layer, shared)
        return used

    def _through_transforms(self, layer: Layer, shared: LayerParameters) -> Tensor:
        out_channels, in_channels, size, _ = layer.parameter_shapes["weight"]
        sizes = self._kernels[layer.name]
        if size not in sizes:
            raise ValueError(f"layer {layer.name!r} has a kernel of {size}; the supernet has transforms for {sizes}")
        weight = cast(Tensor, shared.weight)[:out_channels, :in_channels]
        for smaller in sizes[1 : sizes.index(size) + 1]:
            weight = transformed(weight, cast(Tensor, getattr(shared, f"transform_{smaller}")))
        return weight

    def extract(self, architecture: Architecture) -> Subnet:
        """A network of its own, with copies of the weights the architecture uses."""
        lowered = self._lower(architecture)
        with torch.no_grad():  # they are copied: noting how they came about takes a tenth of the time
            parameters = {a.name: self._parameters_of(lowered, a) for a in lowered.network.layers}
        return Subnet(lowered.network, parameters).train(self.training)

    def digest(self) -> str:
        """SHA-256 of all weights and statistics: the key of whatever was computed from them."""
        return digest_of(self)


def _descending(name: str, kernels: set[Shape]) -> tuple[int, ...]:
    """The sizes of a layer's kernel, largest first."""
    sizes = sorted((height for height, _ in kernels), reverse=True)
    if any(height != width or (sizes[0] - height) % 2 for height, width in kernels):
        expected = "kernel_transforms needs square ones, all even or all odd"
        raise ValueError(f"layer {name!r} occurs with kernels of {sorted(kernels)}; {expected}")
    return tuple(sizes)


def transformed(weight: Tensor, matrix: Tensor) -> Tensor:
    """A weight (out, in / groups, k, k): the matrix (k*k, k*k) times the centre of each kernel of a larger weight."""
    size = isqrt(len(matrix))
    start = (weight.shape[-1] - size) // 2
    centre = weight[:, :, start : start + size, start : start + size]
    return F.linear(centre.reshape(-1, size * size), matrix).reshape(centre.shape)


def digest_of(module: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of a module's state."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().numpy()
        sha.update(f"{name}{array.shape}{array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


class Subnet(nn.Module):
    """One network with weights of its own; `tap` (observer, fake quantizer) sees what flows through it."""

    def __init__(self, network: Network, parameters: Mapping[str, Parameters], tap: Tap | None = None) -> None:
        super().__init__()
        self.network = network
        self.tap = tap
        self.layers = nn.ModuleDict()
        for name, tensors in parameters.items():
            if not tensors:
                continue
            self.layers[_key(name)] = LayerParameters({part: _copy(tensor) for part, tensor in tensors.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) for images (batch, *network.input_shape)."""
        return self.run(x, Normalization(self.training))

    def run(self, x: Tensor, normalization: Normalization) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # CPU convolutions and norms run up to four times faster
        return execute(self.network, x, self._parameters_of, normalization, self.tap)

    def in_patches(self, x: Tensor) -> Tensor:
        """The logits, the first layers run patch by patch where the network says so, norms from their statistics."""
        x = x.contiguous(memory_format=torch.channels_last)
        return execute_in_patches(self.network, x, self._parameters_of, self.tap)

    def _parameters_of(self, layer: Layer) -> Parameters:
        key = _key(layer.name)
        return cast(LayerParameters, self.layers[key]).tensors() if key in self.layers else {}

    def fold(self) -> Subnet:
        """The same function with every batch norm folded into the weights before it."""
        folded = {layer.name: _fold(self._parameters_of(layer)) for layer in self.network.layers}
        return Subnet(self.network, folded).eval()

    def weights(self) -> dict[str, dict[str, np.ndarray]]:
        """Parameters by layer and name, as float32 arrays in the shapes of `Layer.parameter_shapes` (once folded)."""
        return {
            layer.name: {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}
            for layer in self.network.layers
            if (tensors := self._parameters_of(layer))
        }

    def with_weights(self, change: Callable[[Layer, Parameters], Parameters], tap: Tap | None) -> Subnet:
        """A copy whose parameters went through `change`."""
        changed = {layer.name: change(layer, self._parameters_of(layer)) for layer in self.network.layers}
        return Subnet(self.network, changed, tap).train(self.training)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _fold(parameters: Parameters) -> Parameters:
    if "norm_scale" not in parameters:
        return parameters
    gain = parameters["norm_scale"] / torch.sqrt(parameters["norm_variance"] + NORM_EPSILON)
    return {
        "weight": parameters["weight"] * gain.reshape(-1, *([1] * (parameters["weight"].dim() - 1))),
        "bias": parameters["norm_shift"] - parameters["norm_mean"] * gain,
    }
