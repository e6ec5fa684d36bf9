"""Static quantization of a subnet: observed ranges, fake quantization, the same integers as the exported model.

The arithmetic (scales, zero points, integer weights and biases) is `hardware_profiles.quantization`, which
the ONNX writer follows too; here it only runs in torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hardware_profiles.quantization import (
    ACTIVATION_MAX,
    Affine,
    Range,
    affines_of,
    bias_scales,
    is_integer,
    observed_tensors,
    quantize_bias,
    quantize_weight,
)
from nas.interpreter import Parameters
from nas.supernet import Subnet
from search_spaces import INPUT, Layer, Network, keeps_quantization


class _Observer:
    """A tap that remembers the smallest and largest value of some tensors."""

    def __init__(self, observed: Collection[str]) -> None:
        self._observed = frozenset(observed)
        self.ranges: dict[str, Range] = {}

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        if source == INPUT:
            self._see(INPUT, tensor)
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        self._see(layer.name, tensor)
        return tensor

    def _see(self, name: str, tensor: Tensor) -> None:
        if name in self._observed:
            low, high = (float(value) for value in tensor.aminmax())
            known = self.ranges.get(name, (low, high))
            self.ranges[name] = (min(known[0], low), max(known[1], high))


class _FakeQuantizer:
    """A tap that rounds every quantized tensor to the integers it will have when deployed."""

    def __init__(self, network: Network, affines: Mapping[str, Affine]) -> None:
        self._network = network
        self._affines = affines

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        if layer.precision.is_quantized and not is_integer(self._network, source):
            return self._round(source, tensor)
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        if is_integer(self._network, layer.name) and not keeps_quantization(layer):
            return self._round(layer.name, tensor)
        return tensor

    def _round(self, name: str, tensor: Tensor) -> Tensor:
        affine = self._affines[name]
        low, high = -affine.zero_point, ACTIVATION_MAX - affine.zero_point
        # what torch.fake_quantize_per_tensor_affine computes, eight times faster on a CPU
        return (tensor / affine.scale).round_().clamp_(low, high).mul_(affine.scale)


@dataclass(frozen=True)
class Quantized:
    """A folded subnet and its ranges (what the ONNX writer needs), and the subnet that computes like the export."""

    folded: Subnet
    ranges: dict[str, Range]
    simulated: Subnet


def quantize(
    subnet: Subnet, images: Iterable[Tensor], weight_limit: int, *, ranges: dict[str, Range] | None = None
) -> Quantized:
    """Quantize the layers of a recalibrated subnet that its architecture codes as quantized.

    Args:
        subnet: with norm statistics set; it is not changed.
        images: batches at the network's resolution, of training images; their smallest and largest
            activations become the ranges (arXiv 1712.05877).
        weight_limit: largest weight integer, 127, or 63 where pairs of products saturate.
        ranges: those known of the same network in floats and these images. Where one lacks, all tensors are observed
            and added, so that no other choice of precisions needs the images again.

    A network without quantized layers comes back folded, with no ranges.
    """
    folded = subnet.fold()
    network = folded.network
    observed, known = observed_tensors(network), {} if ranges is None else ranges
    if any(name not in known for name in observed):
        observer = _Observer(observed if ranges is None else (INPUT, *network.by_name))
        folded.tap = observer
        with torch.inference_mode():
            for batch in images:
                folded(batch)
        folded.tap = None
        known.update(observer.ranges)
    found = {name: known[name] for name in observed if name in known}
    affines = affines_of(network, found)

    def rounded(layer: Layer, parameters: Parameters) -> Parameters:
        if not (layer.has_weights and layer.precision.is_quantized):
            return parameters
        weight = parameters["weight"].detach().cpu().numpy()
        integers, scales = quantize_weight(weight, weight_limit)
        input_scale = affines[layer.inputs[0]].scale
        bias = quantize_bias(parameters["bias"].detach().cpu().numpy(), input_scale, scales)
        columns = scales.reshape(-1, *[1] * (weight.ndim - 1))
        return {
            "weight": torch.from_numpy(integers.astype(np.float32) * columns),
            "bias": torch.from_numpy(bias.astype(np.float32) * bias_scales(input_scale, scales)),
        }

    simulated = folded.with_weights(rounded, _FakeQuantizer(network, affines) if affines else None)
    simulated.to(next(folded.parameters()).device)
    return Quantized(folded, found, simulated.eval())
