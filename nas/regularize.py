"""What a training pass adds to the network and its gradients: dropped branches, gradient noise, remembered features.

Drop path and feature memory are taps (see `nas.interpreter.Tap`), so the network itself knows nothing of them.
Randomness comes from CPU generators, so it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nas.interpreter import Tap
from search_spaces import INPUT, Layer, Network

NOISE_DECAY = 0.55  # of the variance of gradient noise over steps (arXiv 1511.06807)


class Taps:
    """Several taps as one; each sees what the one before it made."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = tuple(taps)

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        for tap in self.taps:
            tensor = tap.read(layer, source, tensor)
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        for tap in self.taps:
            tensor = tap.write(layer, tensor)
        return tensor


class DropPath:
    """Drops residual branches, image by image, in one pass of one network (arXiv 1603.09382, 1707.07012).

    Where a layer adds a branch to a shortcut, the branch is zeroed for an image with probability `rate` and divided
    by 1 - rate for the others, so its mean stays. The shortcut is never touched. Make one for each pass: a mask is
    drawn once for each addition and kept, since a pass that computes activations again must see the same one.

    Args:
        network: that the pass runs.
        rate: from 0 (nothing happens) to below 1.
        generator: on the CPU; masks are moved to the tensor's device.

    Raises ValueError for another rate.
    """

    def __init__(self, network: Network, rate: float, generator: torch.Generator) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate {rate}; expected from 0 to below 1")
        self.branches = residual_branches(network) if rate else {}
        self._rate, self._generator = rate, generator
        self._masks: dict[str, Tensor] = {}

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        if self.branches.get(layer.name) != source:
            return tensor
        if layer.name not in self._masks:
            kept = torch.rand(len(tensor), generator=self._generator) >= self._rate
            self._masks[layer.name] = kept / (1 - self._rate)
        mask = self._masks[layer.name].to(tensor.device, tensor.dtype)
        return tensor * mask.reshape(-1, *([1] * (tensor.dim() - 1)))

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        return tensor


def residual_branches(network: Network) -> dict[str, str]:
    """For each addition of a shortcut and a branch, by layer name, the input that is the branch.

    The branch is the input with the longer chain of layers behind it (of equals the one made last): a shortcut that
    is itself a layer, such as a projection, is found even where it comes last. An addition of a learned constant
    (position embeddings) or of a tensor to itself has no branch.
    """
    branches = {}
    depth = {INPUT: (0, -1)}  # length of the longest chain, then position
    kinds = {layer.name: layer.kind for layer in network.layers}
    for position, layer in enumerate(network.layers):
        depth[layer.name] = (1 + max((depth[source][0] for source in layer.inputs), default=-1), position)
        sources = set(layer.inputs)
        if layer.kind == "add" and len(sources) == 2 and all(kinds.get(s) != "parameter" for s in sources):
            branches[layer.name] = max(sources, key=depth.__getitem__)
    return branches


def drop_path_rate_at(step: int, steps: int, final_rate: float) -> float:
    """ScheduledDropPath (arXiv 1707.07012): linear from 0 at the first step to `final_rate` at the last."""
    return final_rate * step / max(1, steps - 1)


class FeatureTap:
    """Remembers, without its gradient, the last map that the output of `network` is computed from: see `last_map`.

    Raises ValueError for a network that has no map.
    """

    def __init__(self, network: Network) -> None:
        self.layer = last_map(network)
        self._features: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """What the layer made last, (batch, *out_shape), detached. Raises RuntimeError before a pass was run."""
        if self._features is None:
            raise RuntimeError(f"layer {self.layer!r} has made nothing yet; run the network with this tap first")
        return self._features

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        if layer.name == self.layer:
            self._features = tensor.detach()
        return tensor


def last_map(network: Network) -> str:
    """The last layer whose output has two axes longer than 1 (channels and pixels, tokens and features) and
    reaches the output of the network: the tensor before everything is pooled into one vector.

    Raises ValueError when there is none.
    """
    wanted = {network.output.name}
    for layer in reversed(network.layers):
        if layer.name in wanted:
            if sum(size > 1 for size in layer.out_shape) > 1:
                return layer.name
            wanted.update(layer.inputs)
    raise ValueError("expected a network with a map of features, got one whose layers all make a single vector")


def add_gradient_noise(parameters: Iterable[Tensor], step: int, eta: float, generator: torch.Generator) -> None:
    """Add N(0, eta / (1 + step)^0.55) to every gradient there is, in place (arXiv 1511.06807).

    The noise is drawn on the CPU in the order of `parameters`; one without a gradient draws none.
    """
    deviation = (eta / (1 + step) ** NOISE_DECAY) ** 0.5
    for parameter in parameters:
        if parameter.grad is not None:
            noise = deviation * torch.randn(parameter.grad.shape, generator=generator)
            parameter.grad.add_(noise.to(parameter.grad.device, parameter.grad.dtype))
