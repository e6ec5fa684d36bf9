"""MobileNetV2/V3 spaces: stages of inverted residual blocks (arXiv 1801.04381, 1905.02244).

    stem (3x3) -> stage1 -> ... -> stageN -> head (1x1) -> global average pool -> classifier

Elastic: input resolution; width of stem, stages and head; depth of each stage; kernel, expansion and
squeeze-excite of each block; precision of each convolution and of the classifier; in how many patches the first
layers run, and which those are (arXiv 2110.15352). Blocks are shared by
position: a shallower stage is the first blocks of a deeper one. The first block of a stage has no shortcut,
whatever its widths, so that a weight always sees the same kind of block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from search_spaces import layers as L
from search_spaces.family import (
    LARGEST_RESOLUTION,
    SMALLEST_RESOLUTION,
    SettingReader,
    deeper_than,
    in_patches,
    precision_choice,
    square_input,
)
from search_spaces.layers import INPUT, PREV, Layer, Port, port
from search_spaces.precision import precision_of
from search_spaces.space import RESTRICT, Choice, Condition, SearchSpace, Slot, Value, Values

NONLINEARITIES = ("relu", "relu6", "hardswish")
WIDTH_MULTIPLIERS = (0.5, 0.75, 1.0)
PATCHES, PATCH_STAGES = "patches", "patch_stages"  # the choices, where there is more than one option


def round_width(width: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `width`, at least `divisor` and never below 90 % of it."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


@dataclass(frozen=True, slots=True)
class _Block:
    """What a block's slot must know besides the values it reads."""

    name: str
    stage: str
    previous: str  # the place whose width feeds the stage
    index: int
    stride: int
    reduction: int  # resolution / reduction is the input size of the stage
    nonlinearity: str
    padding: str
    divisor: int
    coupled: tuple[tuple[int, int | float], ...]  # (depth of the stage, expansion); empty where each block chooses
    number: int  # of the stage, from 1

    def patches(self, values: Values) -> int:
        """Patches a side that it runs in: the patch stage ends with the first block of one of the stages."""
        last = int(values.get(PATCH_STAGES, 0))
        return int(values[PATCHES]) if self.number < last or (self.number == last and self.index == 0) else 1

    def expansion(self, values: Values) -> Value:
        if self.coupled:
            return dict(self.coupled)[int(values[f"{self.stage}.depth"])]
        return values[f"{self.name}.expansion"]


def _size(resolution: Value, reduction: int) -> int:
    return -(-int(resolution) // reduction)


def _conv(
    name: str,
    source: Port,
    width: int,
    values: Values,
    nonlinearity: str,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    padding: str = "symmetric",
    norm: bool = True,
) -> tuple[list[Layer], Port]:
    """A convolution with its activation: fused where runtimes fuse it, else a layer of its own."""
    fused = nonlinearity if nonlinearity in L.FUSED_ACTIVATIONS else ""
    made = [
        L.conv2d(
            name,
            source,
            width,
            kernel=kernel,
            stride=stride,
            groups=groups,
            norm=norm,
            activation=fused,
            padding=padding,
            precision=precision_of(str(values[f"{name}.precision"])),
        )
    ]
    if nonlinearity != fused:
        made.append(L.activation(f"{name}.activation", port(made[-1]), nonlinearity))
    return made, port(made[-1])


def _squeeze_excite(name: str, source: Port, values: Values, divisor: int) -> tuple[list[Layer], Port]:
    """Channel attention: pool, reduce to a quarter, expand, scale (arXiv 1709.01507; hard sigmoid as in V3)."""
    channels = source.shape[0]
    pool = L.global_average_pool(f"{name}.pool", source)
    reduce, reduced = _conv(
        f"{name}.reduce", port(pool), round_width(channels / 4, divisor), values, "relu", norm=False
    )
    expand, expanded = _conv(f"{name}.expand", reduced, channels, values, "hardsigmoid", norm=False)
    scale = L.multiply(f"{name}.scale", source, expanded)
    return [pool, *reduce, *expand, scale], port(scale)


def _lower_block(block: _Block, values: Values) -> tuple[Layer, ...]:
    if int(values[f"{block.stage}.depth"]) <= block.index:
        return ()
    width = int(values[f"{block.stage}.width"])
    in_width = width if block.index else int(values[f"{block.previous}.width"])
    size = _size(values["resolution"], block.reduction * (1 if block.index == 0 else block.stride))
    stride = 1 if block.index else block.stride
    source = tensor = Port(PREV, (in_width, size, size))
    expansion = block.expansion(values)
    hidden = in_width if expansion == 1 else round_width(in_width * float(expansion), block.divisor)
    made: list[Layer] = []
    if expansion != 1:
        expand, tensor = _conv(f"{block.name}.expand", tensor, hidden, values, block.nonlinearity)
        made += expand
    depthwise, tensor = _conv(
        f"{block.name}.depthwise",
        tensor,
        hidden,
        values,
        block.nonlinearity,
        kernel=int(values[f"{block.name}.kernel"]),
        stride=stride,
        groups=hidden,
        padding=block.padding,
    )
    made += depthwise
    if values[f"{block.name}.squeeze_excite"]:
        excite, tensor = _squeeze_excite(f"{block.name}.squeeze_excite", tensor, values, block.divisor)
        made += excite
    project, tensor = _conv(f"{block.name}.project", tensor, width, values, "")
    made += project
    if block.index:
        made.append(L.add(f"{block.name}.add", tensor, source))
    return in_patches(made, block.patches(values))


def _lower_stem(channels: int, stride: int, nonlinearity: str, padding: str, values: Values) -> tuple[Layer, ...]:
    resolution = int(values["resolution"])
    source = Port(INPUT, (channels, resolution, resolution))
    made, _ = _conv(
        "stem", source, int(values["stem.width"]), values, nonlinearity, kernel=3, stride=stride, padding=padding
    )
    return in_patches(made, int(values.get(PATCHES, 1)))


def _lower_head(classes: int, last: str, reduction: int, nonlinearity: str, values: Values) -> tuple[Layer, ...]:
    size = _size(values["resolution"], reduction)
    source = Port(PREV, (int(values[f"{last}.width"]), size, size))
    head, tensor = _conv("head", source, int(values["head.width"]), values, nonlinearity)
    pool = L.global_average_pool("pool", tensor)
    flat = L.reshape("flatten", port(pool), (tensor.shape[0],))
    classifier = L.linear(
        "classifier", port(flat), classes, precision=precision_of(str(values["classifier.precision"]))
    )
    return (*head, pool, flat, classifier)


class MobileNet(SearchSpace):
    """Inverted-residual networks for square images of 8 to 224 pixels.

    Args:
        resolutions: input sides, in pixels.
        channels: channels of the input image.
        classes: number of classes.
        widths: width of each stage at multiplier 1, in channels.
        width_multipliers: options for the width of stem, stages and head; rounded to `divisor` channels.
        depths: options for the number of blocks of each stage.
        kernels: options for the depthwise kernel of each block (odd).
        expansions: options for the expansion of each block; 1 leaves the expanding convolution out.
        coupled: tie the expansion of all blocks of a stage to its depth: depths[i] goes with expansions[i]
            (CompOFA, arXiv 2104.12642), so that no block chooses its expansion.
        squeeze_excite: options for squeeze-excite in each block.
        precisions: options for the precision of each layer with weights.
        strides: stride of each stage, 1 or 2; by default as many 2s as keep the last map at 4 pixels or more.
        stem_width: width of the stem at multiplier 1.
        stem_stride: stride of the stem; by default 1 below 64 pixels, else 2.
        head_width: width of the last 1x1 convolution at multiplier 1.
        nonlinearity: relu, relu6 or hardswish.
        padding: `symmetric`, or `same` (TensorFlow's, which microcontrollers need not copy for).
        divisor: widths are multiples of it.
        patches: options for the patches a side that the first layers run in, for devices that can
            (`Network.patch_stage`); 1 runs them whole. Not with squeeze-excite, which sees the whole map.
        patch_stages: options for where those layers end: with the first block of this stage, counted from 1, which is
            the one with the stride. By default every stage that makes as many pixels a side as there are patches.

    Raises ValueError, saying which argument, for values no network can take.
    """

    def __init__(
        self,
        resolutions: Sequence[int] = (32,),
        channels: int = 3,
        classes: int = 10,
        widths: Sequence[int] = (16, 24, 40, 80),
        width_multipliers: Sequence[float] = WIDTH_MULTIPLIERS,
        depths: Sequence[int] = (1, 2, 3),
        kernels: Sequence[int] = (3, 5),
        expansions: Sequence[float] = (2, 4),
        squeeze_excite: Sequence[bool] = (False,),
        precisions: Sequence[str] = ("fp32", "int8"),
        strides: Sequence[int] | None = None,
        stem_width: int = 16,
        stem_stride: int | None = None,
        head_width: int = 128,
        nonlinearity: str = "relu6",
        padding: str = "symmetric",
        divisor: int = 8,
        coupled: bool = False,
        patches: Sequence[int] = (1,),
        patch_stages: Sequence[int] | None = None,
    ) -> None:
        read = SettingReader("mobilenet")
        resolutions = read.whole_options("resolutions", resolutions, SMALLEST_RESOLUTION, LARGEST_RESOLUTION)
        channels, classes = read.whole("channels", channels), read.whole("classes", classes, 2)
        widths = read.wholes("widths", widths)
        width_multipliers = read.number_options("width_multipliers", width_multipliers, 0.01)
        pairs = _coupled(read, depths, expansions) if read.flag("coupled", coupled) else ()
        depths = read.whole_options("depths", depths)
        kernels = read.whole_options("kernels", kernels)
        expansions = read.number_options("expansions", expansions, 1)
        excitations = read.flag_options("squeeze_excite", squeeze_excite)
        precisions = read.precisions("precisions", precisions)
        smallest = resolutions[0]
        stem_stride = read.whole(
            "stem_stride", (1 if smallest < 64 else 2) if stem_stride is None else stem_stride, 1, 2
        )
        if strides is None:
            strides = _default_strides(smallest, stem_stride, len(widths))
        strides = read.wholes("strides", strides, 1, 2)
        stem_width, head_width = read.whole("stem_width", stem_width), read.whole("head_width", head_width)
        nonlinearity = read.one_of("nonlinearity", nonlinearity, NONLINEARITIES)
        padding = read.one_of("padding", padding, L.PADDINGS)
        divisor = read.whole("divisor", divisor)
        if not widths:
            read.refuse("widths", list(widths), "at least one stage")
        if any(kernel % 2 == 0 for kernel in kernels):
            read.refuse("kernels", list(kernels), "odd sizes")
        if len(strides) != len(widths):
            read.refuse("strides", list(strides), f"{len(widths)}, one for each stage")
        total_stride = stem_stride * prod(strides)
        if smallest < total_stride:
            read.refuse("resolutions", list(resolutions), f"at least {total_stride} pixels, the product of the strides")

        patches = read.whole_options("patches", patches)
        sides = [_size(smallest, stem_stride * prod(strides[:count])) for count in range(1, len(strides) + 1)]
        schedule = _patch_choices(read, patches, patch_stages, sides)
        if schedule and True in excitations:
            read.refuse("squeeze_excite", list(excitations), "false alone, where patches do not see the whole map")

        def width(place: str, base: int) -> Choice:
            options = sorted({round_width(base * multiplier, divisor) for multiplier in width_multipliers})
            for option in options if place != "head" else ():
                hidden = [round_width(option * expansion, divisor) for expansion in expansions if expansion != 1]
                if len(set(hidden)) != len(hidden):
                    expected = f"options that differ once {option} channels times each are rounded to {divisor}s"
                    read.refuse("expansions", list(expansions), expected)
            return Choice(f"{place}.width", tuple(options), "width")

        choices = [Choice("resolution", resolutions, "resolution"), *schedule, width("stem", stem_width)]
        choices.append(precision_choice("stem", precisions))
        slots = [
            Slot(
                "stem",
                ("resolution", "stem.width", "stem.precision", *(choice.name for choice in schedule[:1])),
                partial(_lower_stem, channels, stem_stride, nonlinearity, padding),
            )
        ]
        reduction, previous = stem_stride, "stem"
        for number, (base, stride) in enumerate(zip(widths, strides, strict=True), start=1):
            stage = f"stage{number}"
            choices += [width(stage, base), Choice(f"{stage}.depth", depths, "depth")]
            for index in range(depths[-1]):
                name = f"{stage}.block{index}"
                block = _Block(
                    name, stage, previous, index, stride, reduction, nonlinearity, padding, divisor, pairs, number
                )
                own = _block_choices(block, depths, kernels, expansions, excitations, precisions)
                choices += own
                shared = ["resolution", f"{stage}.width", f"{stage}.depth"]
                shared += [] if index else [f"{previous}.width"]
                if schedule and (number, index) <= (int(schedule[1].options[-1]), 0):
                    shared += [PATCHES, PATCH_STAGES]
                slots.append(Slot(name, (*shared, *(c.name for c in own)), partial(_lower_block, block)))
            reduction, previous = reduction * stride, stage
        choices.append(width("head", head_width))
        choices += [precision_choice("head", precisions), precision_choice("classifier", precisions)]
        slots.append(
            Slot(
                "head",
                ("resolution", f"{previous}.width", "head.width", "head.precision", "classifier.precision"),
                partial(_lower_head, classes, previous, reduction, nonlinearity),
            )
        )
        settings: dict[str, object] = {
            "resolutions": list(resolutions),
            "channels": channels,
            "classes": classes,
            "widths": list(widths),
            "width_multipliers": list(width_multipliers),
            "depths": list(depths),
            "kernels": list(kernels),
            "expansions": list(expansions),
            "squeeze_excite": list(excitations),
            "precisions": list(precisions),
            "strides": list(strides),
            "stem_width": stem_width,
            "stem_stride": stem_stride,
            "head_width": head_width,
            "nonlinearity": nonlinearity,
            "padding": padding,
            "divisor": divisor,
        }
        if coupled:  # left out otherwise, so that spaces keep the names they had
            settings["coupled"] = True
        if schedule:  # likewise
            settings |= {choice.name: list(choice.options) for choice in schedule}
        super().__init__("mobilenet", settings, choices, slots, square_input(channels), classes)

    @classmethod
    def placed(
        cls, settings: Mapping[str, object], *, resolution: int, width: float, precisions: Sequence[str]
    ) -> dict[str, object]:
        """The settings for one input side, with the width multipliers times `width`; see `SearchSpace.placed`."""
        read = SettingReader("mobilenet")
        _refuse_restrict(read, settings)
        if "resolutions" in settings:
            read.refuse("resolutions", settings["resolutions"], f"none, where the input side is set to {resolution}")
        given = settings.get("width_multipliers", WIDTH_MULTIPLIERS)
        multipliers = [
            round(multiplier * width, 6) for multiplier in read.number_options("width_multipliers", given, 0)
        ]
        return {
            **settings,
            "resolutions": [resolution],
            "width_multipliers": multipliers,
            "precisions": list(precisions),
        }

    @classmethod
    def scaled(
        cls, settings: Mapping[str, object], *, resolution: float, depth: float, width: float
    ) -> dict[str, object]:
        """Complete settings, scaled; stem and head keep their widths, as in TinyNets (arXiv 2010.14819).

        Sides and depths are rounded, at least one block and one pixel of the last map; where two depths become one,
        the deeper one's coupled expansion stays. Widths are multiples of the divisor.
        """
        read = SettingReader("mobilenet")
        _refuse_restrict(read, settings)
        strides, stem_stride = (
            read.wholes("strides", settings["strides"]),
            read.whole("stem_stride", settings["stem_stride"]),
        )
        smallest = max(SMALLEST_RESOLUTION, stem_stride * prod(strides))
        sides = {
            max(smallest, _rounded(side * resolution)) for side in read.wholes("resolutions", settings["resolutions"])
        }
        divisor = read.whole("divisor", settings["divisor"])
        depths = [max(1, _rounded(blocks * depth)) for blocks in read.wholes("depths", settings["depths"])]
        scaled = {
            **settings,
            "resolutions": sorted(sides),
            "depths": sorted(set(depths)),
            "widths": [round_width(base * width, divisor) for base in read.wholes("widths", settings["widths"])],
        }
        if settings.get("coupled"):
            expansions = read.numbers("expansions", settings["expansions"], 1)
            scaled["expansions"] = list(dict(zip(depths, expansions, strict=True)).values())
        return scaled


def _refuse_restrict(read: SettingReader, settings: Mapping[str, object]) -> None:
    """The options that it keeps are not those of a space of other widths, depths and input sides."""
    if settings.get(RESTRICT):
        read.refuse(RESTRICT, settings[RESTRICT], "none, where the space is scaled; restrict what comes out of it")


def _rounded(value: float) -> int:
    return int(value + 0.5)


def _patch_choices(
    read: SettingReader, patches: tuple[int, ...], stages: object, sides: Sequence[int]
) -> tuple[Choice, ...]:
    """How many patches a side, and the stage whose first block they end with; no choices where nothing is patched.

    sides: of the map that each stage makes, at the smallest resolution.
    """
    able = [number for number, side in enumerate(sides, start=1) if side >= patches[-1]]
    expected = f"stages, from 1, whose map has {patches[-1]} pixels a side, one for each patch: {able}"
    if patches == (1,):
        if stages is not None:
            read.refuse("patch_stages", stages, "none, as patches = [1] runs every layer whole")
        return ()
    if not able:
        read.refuse("patches", list(patches), f"at most {max(sides)}, the pixels a side of the first stage's map")
    chosen = read.whole_options("patch_stages", able if stages is None else stages)
    if not set(chosen) <= set(able):
        read.refuse("patch_stages", list(chosen), expected)
    several = tuple(option for option in patches if option > 1)
    when: tuple[Condition, ...] = () if several == patches else ((PATCHES, several),)
    return Choice(PATCHES, patches, "patches"), Choice(PATCH_STAGES, chosen, "patch_stages", when)


def _coupled(read: SettingReader, depths: object, expansions: object) -> tuple[tuple[int, int | float], ...]:
    """(depth, expansion) at each place of the two lists, both rising."""
    deep, wide = read.wholes("depths", depths), read.numbers("expansions", expansions, 1)
    if len(deep) != len(wide):
        read.refuse("expansions", list(wide), f"{len(deep)}, one for each depth, as they are coupled")
    pairs = sorted(zip(deep, wide, strict=True))
    if [expansion for _, expansion in pairs] != sorted(wide):
        read.refuse("expansions", list(wide), f"more where depths = {list(deep)} has more, as they are coupled")
    return tuple(pairs)


def _when_expanded(
    block: _Block, depths: tuple[int, ...], expansions: tuple[int | float, ...]
) -> tuple[Condition, ...] | None:
    """When the block has its expanding convolution; None where it never has."""
    depth = f"{block.stage}.depth"
    if block.coupled:
        grown = tuple(option for option, expansion in block.coupled if option > block.index and expansion != 1)
        when: tuple[Condition, ...] = () if grown == depths else ((depth, grown),)
        return when if grown else None
    growing: Condition = (f"{block.name}.expansion", tuple(expansion for expansion in expansions if expansion != 1))
    return (*deeper_than(block.index, depth, depths), growing) if growing[1] else None


def _block_choices(
    block: _Block,
    depths: tuple[int, ...],
    kernels: tuple[int, ...],
    expansions: tuple[int | float, ...],
    squeeze_excite: tuple[bool, ...],
    precisions: tuple[str, ...],
) -> list[Choice]:
    name = block.name
    when = deeper_than(block.index, f"{block.stage}.depth", depths)
    excited: Condition = (f"{name}.squeeze_excite", (True,))
    expanded = _when_expanded(block, depths, expansions)
    choices = [Choice(f"{name}.kernel", kernels, "kernel", when)]
    if not block.coupled:
        choices.append(Choice(f"{name}.expansion", expansions, "expand", when))
    choices += [
        Choice(f"{name}.squeeze_excite", squeeze_excite, "operator", when),
        precision_choice(f"{name}.depthwise", precisions, *when),
        precision_choice(f"{name}.project", precisions, *when),
    ]
    if expanded is not None:
        choices.append(precision_choice(f"{name}.expand", precisions, *expanded))
    if True in squeeze_excite:
        for part in ("reduce", "expand"):
            choices.append(precision_choice(f"{name}.squeeze_excite.{part}", precisions, *when, excited))
    return choices


def _default_strides(resolution: int, stem_stride: int, stages: int) -> tuple[int, ...]:
    """Stride 2 from the second stage on, while the map stays at 4 pixels or more."""
    strides: list[int] = []
    size = -(-resolution // stem_stride)
    for stage in range(stages):
        stride = 2 if stage > 0 and -(-size // 2) >= 4 else 1
        size = -(-size // stride)
        strides.append(stride)
    return tuple(strides)
