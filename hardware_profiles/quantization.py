"""The integer arithmetic of quantized networks, shared by the ONNX writer and the fake quantizer of training.

Uniform affine quantization (arXiv 1712.05877): real = scale * (integer - zero_point). Activations are uint8
and asymmetric, one scale per tensor; weights are int8 and symmetric, one scale per output channel; biases are
int32 with scale input_scale * weight_scale[channel].

Which tensor is quantized:

- A quantized layer with weights reads integers and writes integers; a float tensor (or the network's input)
  that it reads is quantized for it, by that tensor's own parameters, while float readers still see floats.
- A quantized layer without weights (add, multiply, pool) likewise; its inputs are integers already.
- Rearrangements and max pooling of integers carry the scale and zero point of what they read.
- The output of the network stays float, whoever produces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from search_spaces.layers import INPUT, Layer, Network, keeps_quantization

ACTIVATION_MAX = 255  # uint8
WEIGHT_LIMIT = 127  # int8, symmetric: -128 is not used

# Floors that keep every product of scales a normal float32 and every sane bias inside int32. A channel whose
# weights are 4096 times smaller than the largest of its layer (a dead one) gets fewer levels, not a bias that
# overflows.
SMALLEST_ACTIVATION_SCALE = 2.0**-24
SMALLEST_WEIGHT_SCALE = 2.0**-20
SMALLEST_RELATIVE_WEIGHT_SCALE = 2.0**-12

INT32_MAX = 2**31 - 1

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Affine:
    """Quantization of one activation tensor: real = scale * (integer - zero_point), integers in 0..255.

    `scale` is exactly a float32, so that no runtime rounds it again.
    """

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        """The smallest value it can hold."""
        return -self.scale * self.zero_point

    @property
    def high(self) -> float:
        """The largest value it can hold."""
        return self.scale * (ACTIVATION_MAX - self.zero_point)


def affine_of(low: float, high: float) -> Affine:
    """The parameters for values in [low, high], widened to contain 0 and nudged so that 0 is exact.

    Raises ValueError unless low <= high and both are finite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"expected a finite range with low <= high, got ({low}, {high}); observe it on real inputs")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = float(np.float32(max((high - low) / ACTIVATION_MAX, SMALLEST_ACTIVATION_SCALE)))
    return Affine(scale, min(max(round(-low / scale), 0), ACTIVATION_MAX))


def quantize_weight(weight: np.ndarray, limit: int = WEIGHT_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Integers in [-limit, limit] (int8, the shape of `weight`) and scales (float32, one per output channel).

    The output channel is the first axis. Raises ValueError for a limit outside 1..127 or weights not finite.
    """
    if not 1 <= limit <= WEIGHT_LIMIT:
        raise ValueError(f"expected a weight limit from 1 to {WEIGHT_LIMIT}, got {limit}")
    weight = np.asarray(weight, dtype=np.float32)
    if not np.isfinite(weight).all():
        raise ValueError("expected finite weights, got NaN or infinity; the training diverged")
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales = largest / np.float32(limit)
    floor = max(float(scales.max()) * SMALLEST_RELATIVE_WEIGHT_SCALE, SMALLEST_WEIGHT_SCALE)
    scales = np.maximum(scales, np.float32(floor))
    columns = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight / columns), -limit, limit).astype(np.int8), scales


def bias_scales(input_scale: float, weight_scales: np.ndarray) -> np.ndarray:
    """The scale of each channel's bias and accumulator, float32: the product, rounded once."""
    return np.float32(input_scale) * np.asarray(weight_scales, dtype=np.float32)


def quantize_bias(bias: np.ndarray, input_scale: float, weight_scales: np.ndarray) -> np.ndarray:
    """The bias in units of `input_scale * weight_scales[channel]`, int32.

    Raises ValueError where it does not fit, which takes a bias millions of times its channel's weights.
    """
    integers = np.rint(np.asarray(bias, dtype=np.float64) / bias_scales(input_scale, weight_scales))
    if not (np.abs(integers) <= INT32_MAX).all():
        channel = int(np.argmax(~(np.abs(integers) <= INT32_MAX)))
        raise ValueError(
            f"the bias of channel {channel}, {float(bias[channel]):g}, does not fit int32 in units of "
            f"{input_scale:g} * {float(weight_scales[channel]):g}; keep this layer in fp32"
        )
    return integers.astype(np.int32)


def is_integer(network: Network, tensor: str) -> bool:
    """Whether the layer that makes `tensor` writes integers: it is quantized and not the network's output."""
    layer = network.by_name.get(tensor)
    return layer is not None and layer.precision.is_quantized and layer is not network.output


def quantized_tensors(network: Network) -> tuple[str, ...]:
    """Every tensor that exists as integers, in the order of the network: its input or names of layers."""
    read_as_integers = {source for layer in network.layers if layer.precision.is_quantized for source in layer.inputs}
    names = (INPUT, *(layer.name for layer in network.layers))
    return tuple(name for name in names if name in read_as_integers or is_integer(network, name))


def source_of(network: Network, tensor: str) -> str:
    """The tensor whose scale and zero point `tensor` carries: itself, unless a quantized layer only rearranges it."""
    layer = network.by_name.get(tensor)
    while layer is not None and layer.precision.is_quantized and keeps_quantization(layer):
        tensor = layer.inputs[0]
        layer = network.by_name.get(tensor)
    return tensor


def observed_tensors(network: Network) -> tuple[str, ...]:
    """The quantized tensors that need an observed (low, high) range, in the order of the network."""
    return tuple(name for name in quantized_tensors(network) if source_of(network, name) == name)


def affines_of(network: Network, ranges: Mapping[str, Range]) -> dict[str, Affine]:
    """The parameters of every quantized tensor, from the ranges of the observed ones.

    The range of a tensor behind a relu starts at 0, and behind a relu6 ends at 6 or below: then saturation
    does the clipping. Raises ValueError naming a tensor without a range.
    """
    found: dict[str, Affine] = {}
    for name in quantized_tensors(network):
        source = source_of(network, name)
        if source not in ranges:
            raise ValueError(f"no range for the quantized tensor {source!r}; expected one for each observed tensor")
        try:
            found[name] = affine_of(*_clipped(network.by_name.get(source), ranges[source]))
        except ValueError as error:
            raise ValueError(f"tensor {source!r}: {error}") from None
    return found


def _clipped(layer: Layer | None, observed: Range) -> Range:
    low, high = observed
    if layer is not None and layer.activation in ("relu", "relu6"):
        low, high = max(low, 0.0), max(high, 0.0)
    if layer is not None and layer.activation == "relu6":
        low, high = min(low, 6.0), min(high, 6.0)
    return low, high
