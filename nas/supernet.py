"""The once-for-all supernet and the subnets cut from it.

The supernet holds, for each layer name of the space, the parameters of its largest occurrence. A smaller
occurrence uses the leading channels (features, positions) and the centre of the kernel, so the weights of
nested architectures are nested (arXiv 1908.09791, 2309.00255). Nothing is ever "active": which architecture
runs is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor, nn

from nas.interpreter import NORM_EPSILON, Normalization, Parameters, Tap, execute
from search_spaces import Architecture, Layer, Network, SearchSpace

Shape = tuple[int, ...]

STATISTICS = ("norm_mean", "norm_variance")


def trainable_shapes(layer: Layer) -> dict[str, Shape]:
    """Shapes of what a layer trains: a folded batch norm is unfolded into scale and shift, in place of the bias."""
    shapes = dict(layer.parameter_shapes)
    if layer.norm:
        shapes["norm_scale"] = shapes["norm_shift"] = shapes.pop("bias")
    return shapes


def slice_of(name: str, full: Tensor, shape: Shape) -> Tensor:
    """The part of a shared parameter that an occurrence of `shape` uses.

    Leading entries along every axis; for the two kernel axes of a convolution weight, the centre.
    Raises ValueError when the occurrence is larger than what is shared.
    """
    if tuple(full.shape) == shape:
        return full
    if len(full.shape) != len(shape) or any(want > have for want, have in zip(shape, full.shape, strict=True)):
        raise ValueError(f"parameter {name!r} of shape {shape} does not fit into the shared {tuple(full.shape)}")
    starts = [0] * len(shape)
    if name == "weight" and len(shape) == 4:
        starts[2:] = [(full.shape[axis] - shape[axis]) // 2 for axis in (2, 3)]
    return full[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


class LayerParameters(nn.Module):
    """Parameters and norm statistics of one layer, by name."""

    norm_mean: Tensor  # these two only where the layer has a norm
    norm_variance: Tensor

    def __init__(self, shapes: Mapping[str, Shape], has_norm: bool) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        if has_norm:
            self.register_buffer("norm_mean", torch.zeros(shapes["norm_shift"]))
            self.register_buffer("norm_variance", torch.ones(shapes["norm_shift"]))
        self.names = (*shapes, *(STATISTICS if has_norm else ()))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


def _key(layer_name: str) -> str:
    return layer_name.replace(".", "/")  # torch keeps dots for nesting


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


class Supernet(nn.Module):
    """All networks of a space in one set of weights.

    Args:
        space: what can be built; it fixes input channels and classes.
        seed: of the initial weights.
    """

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        super().__init__()
        self.space = space
        largest: dict[str, Layer] = {}
        shapes: dict[str, dict[str, Shape]] = {}
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
        self.shared = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for name, layer in largest.items():
            parameters = LayerParameters(shapes[name], layer.norm)
            _initialize(parameters, layer, generator)
            self.shared[_key(name)] = parameters
        self._networks: dict[Architecture, Network] = {}

    def network(self, architecture: Architecture) -> Network:
        """`space.lower`, remembered: training lowers the same few architectures again and again."""
        if architecture not in self._networks:
            if len(self._networks) >= 1024:
                self._networks.clear()
            self._networks[architecture] = self.space.lower(architecture)
        return self._networks[architecture]

    def forward(self, x: Tensor, architecture: Architecture) -> Tensor:
        """Logits (batch, classes) of one architecture for images at its resolution.

        In training mode batch norms use the batch; in evaluation mode the running statistics, which are an
        average over architectures: recalibrate an extracted subnet before trusting its accuracy.
        """
        return execute(self.network(architecture), x, self._parameters_of, Normalization(self.training))

    def _parameters_of(self, layer: Layer) -> Parameters:
        key = _key(layer.name)
        if key not in self.shared:
            return {}
        held = self.shared[key].tensors()  # type: ignore[operator]
        wanted = trainable_shapes(layer)
        if layer.norm:
            wanted |= dict.fromkeys(STATISTICS, wanted["norm_shift"])
        return {name: slice_of(name, held[name], shape) for name, shape in wanted.items()}

    def extract(self, architecture: Architecture) -> Subnet:
        """A network of its own, with copies of the weights the architecture uses."""
        network = self.network(architecture)
        subnet = Subnet(network, {layer.name: self._parameters_of(layer) for layer in network.layers})
        return subnet.train(self.training)

    def digest(self) -> str:
        """SHA-256 of all weights and statistics: the key of whatever was computed from them."""
        return digest_of(self)


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
            held = LayerParameters(
                {key: tuple(tensor.shape) for key, tensor in tensors.items() if key not in STATISTICS},
                has_norm="norm_mean" in tensors,
            ).to(next(iter(tensors.values())).device)
            with torch.no_grad():
                for key, tensor in tensors.items():
                    getattr(held, key).copy_(tensor)
            self.layers[_key(name)] = held

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) for images (batch, *network.input_shape)."""
        return self.run(x, Normalization(self.training))

    def run(self, x: Tensor, normalization: Normalization) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # CPU convolutions and norms run up to four times faster
        return execute(self.network, x, self._parameters_of, normalization, self.tap)

    def _parameters_of(self, layer: Layer) -> Parameters:
        key = _key(layer.name)
        return self.layers[key].tensors() if key in self.layers else {}  # type: ignore[operator]

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


def _fold(parameters: Parameters) -> Parameters:
    if "norm_scale" not in parameters:
        return parameters
    gain = parameters["norm_scale"] / torch.sqrt(parameters["norm_variance"] + NORM_EPSILON)
    return {
        "weight": parameters["weight"] * gain.reshape(-1, *([1] * (parameters["weight"].dim() - 1))),
        "bias": parameters["norm_shift"] - parameters["norm_mean"] * gain,
    }
