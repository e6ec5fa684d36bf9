"""Peak SRAM and flash of a network, computed exactly from its layers.

A tensor lives from the step that makes it to the last step that reads it. The peak is the largest sum of
the tensors that live at one step, the one being made included: what a planner needs that may put every
tensor anywhere and loses nothing to fragmentation. Stored parameters are read from flash and take no SRAM;
a reshape is a view and takes none either.

The network's input is counted in the precision of its readers and the output in its own: a device with
integer layers only is fed integers. A tensor read in another precision than it was made in lives twice,
as the copies of `cost_model.conversions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hardware_profiles.cost_model import conversions
from search_spaces import INPUT, Layer, Network

LIVENESS = "liveness"
INPLACE_DEPTHWISE = "inplace_depthwise"
PLANNERS = (LIVENESS, INPLACE_DEPTHWISE)
ELEMENTWISE = ("add", "multiply", "activation")


class UnknownPlanner(LookupError):
    """A memory planner that is not one of `PLANNERS`."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Something that runs: the buffers it reads, and the one it writes ("" for a view or a constant)."""

    layer: Layer | None  # None: a conversion
    reads: tuple[str, ...]
    writes: str
    bytes: int


def peak_sram_bytes(network: Network, planner: str = LIVENESS) -> int:
    """The most bytes of activations that live at one time, for one sample.

    Planners:
        liveness: every layer writes to memory of its own.
        inplace_depthwise: a depthwise convolution whose input is not needed afterwards overwrites it channel
            by channel and needs one output channel more (MCUNet, arXiv 2007.10319, section 3.2); an
            element-wise layer overwrites an input of the size of its output that is not needed afterwards.

    Raises UnknownPlanner for any other name.
    """
    if planner not in PLANNERS:
        raise UnknownPlanner(f"unknown memory planner {planner!r}; known: {', '.join(PLANNERS)}")
    steps = _steps(network)
    last_read = {buffer: index for index, step in enumerate(steps) for buffer in step.reads}
    live = {INPUT: _input_bytes(network)}
    peak = total = live[INPUT]
    for index, step in enumerate(steps):
        dying = [buffer for buffer in set(step.reads) if last_read[buffer] == index]
        need = step.bytes
        if planner == INPLACE_DEPTHWISE and step.layer is not None:
            need = _extra_bytes(step.layer, step.bytes, [live[buffer] for buffer in dying])
        peak = max(peak, total + need)
        if step.writes:
            live[step.writes] = step.bytes
            total += step.bytes
            if step.writes not in last_read:  # the output of the network, or a tensor that nobody reads
                dying.append(step.writes)
        total -= sum(live.pop(buffer) for buffer in dying)
    return peak


def flash_bytes(network: Network, overhead_bytes: int = 0) -> int:
    """Bytes of the stored parameters, plus what a runtime adds for its code."""
    return network.model_bytes + overhead_bytes


def _extra_bytes(layer: Layer, out_bytes: int, dying_bytes: list[int]) -> int:
    """What a layer needs besides the tensors that live already, when it may overwrite a dying input."""
    if layer.is_depthwise and dying_bytes:
        channel = -(-out_bytes // layer.out_shape[0])
        return max(out_bytes - dying_bytes[0], 0) + channel
    if layer.kind in ELEMENTWISE and out_bytes in dying_bytes:
        return 0
    return out_bytes


def _input_bytes(network: Network) -> int:
    readers = [layer for layer in network.layers if INPUT in layer.inputs]
    bits = 32 if any(not layer.precision.is_quantized for layer in readers) else readers[0].precision.activation_bits
    return -(-prod(network.input_shape) * bits // 8)


def _steps(network: Network) -> list[_Step]:
    """What runs, in order, with the conversions in between."""
    copies: dict[int, list[str]] = {}
    sizes: dict[str, int] = {}
    float_input = any(INPUT in layer.inputs and not layer.precision.is_quantized for layer in network.layers)
    for copy in conversions(network):
        if copy.source != INPUT or float_input:
            copies.setdefault(copy.reader, []).append(copy.source)
            sizes[copy.source] = copy.elements * (1 if copy.family == "quantize" else 4)
    quantized = {layer.name: layer.precision.is_quantized for layer in network.layers} | {INPUT: not float_input}
    buffer_of = {INPUT: INPUT}
    copied: dict[str, str] = {}
    steps: list[_Step] = []
    for index, layer in enumerate(network.layers):
        for source in copies.get(index, ()):
            copied[source] = f"{source} converted"
            steps.append(_Step(None, _held((buffer_of[source],)), copied[source], sizes[source]))
        wanted = layer.precision.is_quantized
        reads = _held(tuple(buffer_of[s] if quantized[s] == wanted else copied[s] for s in layer.inputs))
        if layer.kind in ("reshape", "parameter"):
            buffer_of[layer.name] = reads[0] if reads else ""
            steps.append(_Step(layer, reads, "", 0))
        else:
            buffer_of[layer.name] = layer.name
            steps.append(_Step(layer, reads, layer.name, layer.activation_bytes))
    return steps


def _held(buffers: tuple[str, ...]) -> tuple[str, ...]:
    """Without the constants, which are in no buffer."""
    return tuple(buffer for buffer in buffers if buffer)
