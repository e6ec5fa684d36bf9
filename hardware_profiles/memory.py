"""Peak SRAM and flash of a network, computed exactly from its layers.

A tensor lives from the step that makes it to the last step that reads it. The peak is the largest sum of
the tensors that live at one step, the one being made included: what a planner needs that may put every
tensor anywhere and loses nothing to fragmentation. Stored parameters are read from flash and take no SRAM;
a reshape is a view and takes none either.

The network's input is counted in the precision of its readers and the output in its own: a device with
integer layers only is fed integers. A tensor read in another precision than it was made in lives twice,
as the copies of `cost_model.conversions`.

Where a network starts with a patch stage, its tensors are those of one patch (`patches.patch_sides`), and the image
is read patch by patch from where it is kept, outside of the SRAM (MCUNetV2, arXiv 2110.15352). The map that the stage
makes is held whole meanwhile:

    peak = max(peak within one patch + the map that the stage makes, peak of the layers after it)
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from hardware_profiles.cost_model import conversions_of
from hardware_profiles.patches import patch_sides
from search_spaces import INPUT, Layer, Network, Precision
from search_spaces.layers import Shape, pad_for

LIVENESS = "liveness"
INPLACE_DEPTHWISE = "inplace_depthwise"
INPLACE_RESIDUAL = "inplace_residual"
TFLM_GREEDY = "tflm_greedy"
PLANNERS = (LIVENESS, INPLACE_DEPTHWISE, INPLACE_RESIDUAL, TFLM_GREEDY)
ELEMENTWISE = ("add", "multiply", "activation")
NEVER, UNLESS_SAME, ALWAYS = "never", "unless_same", "always"
EXPLICIT_PADDINGS = (NEVER, UNLESS_SAME, ALWAYS)
TFLM_ALIGNMENT_BYTES = 16  # of every buffer in the arena of TensorFlow Lite Micro


SCALE_BYTES = 4  # a float32


class UnknownStorage(LookupError):
    """A form of storage that is not one of `STORAGES`."""


class UnknownPlanner(LookupError):
    """A memory planner that is not one of `PLANNERS`."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor in memory: its size, and the first and last step at which it must be there."""

    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Step:
    """Something that runs: the buffers it reads, and the one it writes ("" for a view or a constant)."""

    layer: Layer | None  # None: a conversion or a padding
    reads: tuple[str, ...]
    writes: str
    bytes: int


def peak_sram_bytes(network: Network, planner: str = LIVENESS, *, explicit_padding: str = NEVER) -> int:
    """The most bytes of activations that live at one time, for one sample.

    Planners:
        liveness: every layer writes to memory of its own.
        inplace_depthwise: a depthwise convolution whose input is not needed afterwards overwrites it channel
            by channel and needs one output channel more (MCUNet, arXiv 2007.10319, section 3.2); an
            element-wise layer overwrites an input of the size of its output that is not needed afterwards.
        inplace_residual: besides, a convolution whose result is only added to a tensor that is not needed
            afterwards adds to that one as it goes. So MCUNetV2 counts (arXiv 2110.15352); TinyEngine's own
            scheduler gives the convolution a buffer, as `inplace_depthwise` does.
        tflm_greedy: what the buffers of `liveness`, and one for the result of each reshape, take in the arena of
            TensorFlow Lite Micro (`greedy_arena_bytes`).

    Where the runtime pads by an operator of its own, whose result is a buffer (`explicit_padding`):
        never: its kernels pad.
        unless_same: they know TensorFlow's `same` only; so models are converted from PyTorch to TFLite today.
        always: every padding, as older converters wrote it.

    Raises UnknownPlanner for any other planner, ValueError for any other padding.
    """
    _check(planner, explicit_padding)
    is_float = any(INPUT in layer.inputs and not layer.precision.is_quantized for layer in network.layers)
    steps = _steps(
        network.layers,
        INPUT,
        network.input_shape,
        is_float,
        patch_sides(network),
        views=planner != TFLM_GREEDY,
        explicit_padding=explicit_padding,
    )
    stage = network.patch_stage
    rest = [step for made in steps[len(stage) :] for step in made]
    if not stage:
        return _peak(planner, INPUT, _input_bytes(network), rest)
    within = _peak(planner, INPUT, _input_bytes(network), [step for made in steps[: len(stage)] for step in made])
    whole_map = stage[-1].activation_bytes
    return max(within + whole_map, _peak(planner, stage[-1].name, whole_map, rest))


def part_peak_bytes(
    layers: Sequence[Layer], source: str, fed_with: Precision, planner: str, *, explicit_padding: str = NEVER
) -> int:
    """The most bytes that live while a part of a network runs, which reads one tensor besides its own.

    A network whose parts each read what the part before made, and nothing else, needs the largest of theirs. For
    `tflm_greedy` that is a lower bound (every buffer as large as it is in the arena): fragmentation may add to it.

    Args:
        layers: without a patch stage; none need no memory.
        source: the name of the tensor that they are fed with, `INPUT` for the network's own.
        fed_with: the precision that tensor was made in; the network's input is in that of its readers.

    Raises as `peak_sram_bytes`.
    """
    _check(planner, explicit_padding)
    readers = [layer for layer in layers if source in layer.inputs]
    if not readers:
        return 0
    shape = readers[0].in_shapes[readers[0].inputs.index(source)]
    is_float = not fed_with.is_quantized
    bits = fed_with.activation_bits
    if source == INPUT:
        is_float = any(not layer.precision.is_quantized for layer in readers)
        bits = 32 if is_float else readers[0].precision.activation_bits
    views = planner != TFLM_GREEDY
    made = _steps(layers, source, shape, is_float, {}, views=views, explicit_padding=explicit_padding)
    steps = [step for each in made for step in each]
    if planner == TFLM_GREEDY:
        return _peak(LIVENESS, source, _aligned(_bytes(shape, bits, None)), [_in_arena(step) for step in steps])
    return _peak(planner, source, _bytes(shape, bits, None), steps)


def _in_arena(step: _Step) -> _Step:
    return replace(step, bytes=_aligned(step.bytes))


def _check(planner: str, explicit_padding: str) -> None:
    if planner not in PLANNERS:
        raise UnknownPlanner(f"unknown memory planner {planner!r}; known: {', '.join(PLANNERS)}")
    if explicit_padding not in EXPLICIT_PADDINGS:
        raise ValueError(f"explicit_padding = {explicit_padding!r}: expected one of {', '.join(EXPLICIT_PADDINGS)}")


def _peak(planner: str, start: str, start_bytes: int, steps: Sequence[_Step]) -> int:
    """The peak of `steps` where the buffer `start` is there before them."""
    if planner == TFLM_GREEDY:
        return greedy_arena_bytes(_buffers(start, start_bytes, steps))
    if planner == INPLACE_RESIDUAL:
        steps = _with_residuals_in_place(steps)
    last_read = _last_reads(steps)
    live = {start: start_bytes}
    peak = total = start_bytes
    for index, step in enumerate(steps):
        dying = [buffer for buffer in set(step.reads) if last_read[buffer] == index]
        need = step.bytes
        if planner != LIVENESS and step.layer is not None:
            need = _extra_bytes(step.layer, step.bytes, [live[buffer] for buffer in dying])
        peak = max(peak, total + need)
        if step.writes:
            live[step.writes] = step.bytes
            total += step.bytes
            if step.writes not in last_read:  # the output of the network, or a tensor that nobody reads
                dying.append(step.writes)
        total -= sum(live.pop(buffer) for buffer in dying)
    return peak


def _with_residuals_in_place(steps: Sequence[_Step]) -> list[_Step]:
    """The steps, where a convolution and the addition right after it are one if nothing else reads the former."""
    last_read = _last_reads(steps)
    merged: list[_Step] = []
    for index, step in enumerate(steps):
        before = merged[-1] if merged else step
        adds = step.layer is not None and step.layer.kind == "add" and before.writes in step.reads
        if adds and before.layer is not None and before.layer.kind == "conv2d" and last_read[before.writes] == index:
            other = tuple(buffer for buffer in step.reads if buffer != before.writes)
            merged[-1] = _Step(step.layer, (*before.reads, *other), step.writes, step.bytes)
        else:
            merged.append(step)
    return merged


def greedy_arena_bytes(buffers: Sequence[Buffer]) -> int:
    """The size of the arena into which TensorFlow Lite Micro's greedy planner puts `buffers`.

    Largest first (of equal ones the later of `buffers` first), each goes to the lowest offset at which it overlaps
    no buffer placed before that lives at a step at which it does too. All offsets and sizes are multiples of 16.
    """
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first step, last step; by offset
    for index in sorted(range(len(buffers)), key=lambda i: (-_aligned(buffers[i].bytes), -i)):
        wanted = buffers[index]
        size, offset = _aligned(wanted.bytes), 0
        for start, end, first, last in placed:
            if first <= wanted.last and wanted.first <= last:
                if start - offset >= size:
                    break
                offset = max(offset, end)
        insort(placed, (offset, offset + size, wanted.first, wanted.last))
    return max((end for _, end, _, _ in placed), default=0)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // TFLM_ALIGNMENT_BYTES) * TFLM_ALIGNMENT_BYTES


def _buffers(start: str, start_bytes: int, steps: Sequence[_Step]) -> list[Buffer]:
    """The buffers of `steps` in the order in which they are made; `start` is there from step 0, before the first."""
    last_read = _last_reads(steps)
    made = [Buffer(start_bytes, 0, last_read.get(start, -1) + 1)]
    for index, step in enumerate(steps):
        if step.writes:
            made.append(Buffer(step.bytes, index + 1, last_read.get(step.writes, index) + 1))
    return made


def _last_reads(steps: Sequence[_Step]) -> dict[str, int]:
    return {buffer: index for index, step in enumerate(steps) for buffer in step.reads}


@dataclass(frozen=True, slots=True)
class Storage:
    """What a runtime keeps of a network beside weights, int32 biases and activations.

    In flash: quantization parameters of each output channel of the quantized layers of the kinds `per_channel`, and the
    description of each layer (operator, tensors, names). In SRAM, from loading on: what its kernels and its interpreter
    prepare for each such channel and each layer, and what it holds of itself.
    """

    per_channel: tuple[str, ...]
    flash_channel_bytes: int
    flash_layer_bytes: int = 0
    sram_channel_bytes: int = 0
    sram_layer_bytes: int = 0
    sram_fixed_bytes: int = 0


# c_arrays: constants in generated code (TinyEngine): a float32 scale a channel; layers are calls, a part of the code.
# tflite: a .tflite file in an interpreter (TensorFlow Lite Micro). A channel's weights and bias have a float32 scale
# and an int64 zero point each in the file, and an int32 multiplier and shift in SRAM: fits to the networks measured on
# an STM32H743 find 24.3 and 8.02 bytes. The other numbers are those fits' (experiments/benchmarks/mcu_memory.py).
# A linear layer has one scale in the MLPerf Tiny files.
STORAGES: Mapping[str, Storage] = {
    "c_arrays": Storage(("conv2d", "linear"), 4),
    "tflite": Storage(("conv2d",), 24, 737, 8, 257, 9057),
}


def storage_of(name: str) -> Storage:
    """Raises UnknownStorage naming the known ones."""
    if name not in STORAGES:
        raise UnknownStorage(f"unknown storage {name!r}; known: {', '.join(STORAGES)}")
    return STORAGES[name]


def flash_bytes(network: Network, overhead_bytes: int = 0, storage: str = "c_arrays") -> int:
    """Bytes of the stored network, plus what a runtime adds for its code; raises UnknownStorage."""
    return part_flash_bytes(network.layers, storage) + overhead_bytes


def part_flash_bytes(layers: Sequence[Layer], storage: str) -> int:
    """What layers take of that; a network takes the sum of its parts. Raises UnknownStorage."""
    kept = storage_of(storage)
    own_scales = SCALE_BYTES * _quantized_channels(layers, ("conv2d", "linear"))  # which `weight_bytes` has
    described = _quantized_channels(layers, kept.per_channel) * kept.flash_channel_bytes
    described += _operators(layers) * kept.flash_layer_bytes
    return sum(layer.weight_bytes for layer in layers) - own_scales + described


def persistent_sram_bytes(network: Network, storage: str = "c_arrays") -> int:
    """Bytes of SRAM that a runtime keeps besides the activations; raises UnknownStorage."""
    return part_persistent_sram_bytes(network.layers, storage) + storage_of(storage).sram_fixed_bytes


def part_persistent_sram_bytes(layers: Sequence[Layer], storage: str) -> int:
    """What it keeps for layers; a network takes the sum of its parts. Raises UnknownStorage."""
    kept = storage_of(storage)
    per_channel = _quantized_channels(layers, kept.per_channel) * kept.sram_channel_bytes
    return per_channel + _operators(layers) * kept.sram_layer_bytes


def quantized_channels(network: Network, kinds: Sequence[str]) -> int:
    """Output channels of all layers of these kinds that have integer weights."""
    return _quantized_channels(network.layers, kinds)


def _quantized_channels(layers: Sequence[Layer], kinds: Sequence[str]) -> int:
    quantized = (layer for layer in layers if layer.kind in kinds and layer.precision.is_quantized)
    return sum(layer.parameter_shapes["bias"][0] for layer in quantized)


def _operators(layers: Sequence[Layer]) -> int:
    return sum(layer.kind != "parameter" for layer in layers)


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
    return _bytes(network.input_shape, bits, patch_sides(network).get(INPUT))


def _bytes(shape: Shape, bits: int, sides: tuple[int, int] | None) -> int:
    """Bytes of a tensor, or of one patch of it where `sides` says how large those are."""
    elements = shape[0] * prod(sides) if sides else prod(shape)
    return -(-elements * bits // 8)


def _steps(
    layers: Sequence[Layer],
    source: str,
    shape: Shape,
    is_float: bool,
    sides: Mapping[str, tuple[int, int]],
    *,
    views: bool,
    explicit_padding: str,
) -> list[list[_Step]]:
    """What runs for each layer, in order: the conversions and the padding that it needs, and itself.

    The layers are fed with the tensor `source` of this shape, in float or in integers; `sides` are `patch_sides`.
    """
    shapes = {source: shape} | {layer.name: layer.out_shape for layer in layers}
    copies: dict[int, list[str]] = {}
    sizes: dict[str, int] = {}
    for copy in conversions_of(layers, {source: not is_float}):
        copies.setdefault(copy.reader, []).append(copy.source)
        patch = sides.get(copy.source) if layers[copy.reader].patches > 1 else None
        sizes[copy.source] = _bytes(shapes[copy.source], 8 if copy.family == "quantize" else 32, patch)
    quantized = {layer.name: layer.precision.is_quantized for layer in layers} | {source: not is_float}
    buffer_of = {source: source}
    copied: dict[str, str] = {}
    steps: list[list[_Step]] = []
    for index, layer in enumerate(layers):
        made: list[_Step] = []
        for tensor in copies.get(index, ()):
            copied[tensor] = f"{tensor} converted"
            made.append(_Step(None, _held((buffer_of[tensor],)), copied[tensor], sizes[tensor]))
        wanted = layer.precision.is_quantized
        reads = _held(tuple(buffer_of[s] if quantized[s] == wanted else copied[s] for s in layer.inputs))
        if layer.patches == 1 and pads_explicitly(layer, explicit_padding):
            padded = f"{layer.name} padded"
            made.append(_Step(None, reads, padded, _bytes(_padded_shape(layer), layer.precision.activation_bits, None)))
            reads = (padded,)
        if layer.kind == "parameter" or (layer.kind == "reshape" and views):
            buffer_of[layer.name] = reads[0] if reads else ""
            made.append(_Step(layer, reads, "", 0))
        else:
            buffer_of[layer.name] = layer.name
            bits = layer.precision.activation_bits
            made.append(_Step(layer, reads, layer.name, _bytes(layer.out_shape, bits, sides.get(layer.name))))
        steps.append(made)
    return steps


def pads_explicitly(layer: Layer, explicit_padding: str) -> bool:
    """Whether the runtime pads the layer's input by an operator of its own (`peak_sram_bytes`)."""
    if explicit_padding == NEVER or not any(layer.padding):
        return False
    if explicit_padding == ALWAYS:
        return True
    _, height, width = layer.in_shapes[0]
    top, bottom = pad_for(layer.kernel, layer.stride, height, "same")
    left, right = pad_for(layer.kernel, layer.stride, width, "same")
    return layer.padding != (top, left, bottom, right)


def _padded_shape(layer: Layer) -> Shape:
    channels, height, width = layer.in_shapes[0]
    top, left, bottom, right = layer.padding
    return (channels, height + top + bottom, width + left + right)


def _held(buffers: tuple[str, ...]) -> tuple[str, ...]:
    """Without the constants, which are in no buffer."""
    return tuple(buffer for buffer in buffers if buffer)
