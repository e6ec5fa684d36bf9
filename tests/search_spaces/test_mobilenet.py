"""MobileNet against torch modules written here by hand from the papers' description, and its refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import MobileNet, Network
from search_spaces.mobilenet import round_width

Plan = Mapping[str, object]


class Convolution(nn.Conv2d):
    """As deployed: batch norm folded into the bias. `same` pads as TensorFlow does."""

    def __init__(self, given: int, made: int, kernel: int = 1, stride: int = 1, groups: int = 1, same: bool = False):
        super().__init__(given, made, kernel, stride, 0 if same else kernel // 2, groups=groups)
        self.same = same

    def forward(self, image: Tensor) -> Tensor:
        if self.same:
            side, kernel, stride = image.shape[-1], self.kernel_size[0], self.stride[0]
            total = max(0, (ceil(side / stride) - 1) * stride + kernel - side)
            before, after = total // 2, total - total // 2
            image = nn.functional.pad(image, (before, after, before, after))
        return super().forward(image)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)
        squeezed += 8 if squeezed < 0.9 * channels / 4 else 0
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        pooled = image.mean((2, 3), keepdim=True)
        return image * nn.functional.hardsigmoid(self.expand(self.reduce(pooled).relu()))


class Block(nn.Module):
    def __init__(self, given: int, made: int, hidden: int, plan: Plan, name: str, stride: int, shortcut: bool) -> None:
        super().__init__()
        same = plan["padding"] == "same"
        body: list[nn.Module] = []
        if plan[f"{name}.expansion"] != 1:
            body += [Convolution(given, hidden), nn.Hardswish()]
        kernel = int(str(plan[f"{name}.kernel"]))
        body += [Convolution(hidden, hidden, kernel, stride, hidden, same), nn.Hardswish()]
        if plan[f"{name}.squeeze_excite"]:
            body.append(SqueezeExcite(hidden))
        self.body, self.shortcut = nn.Sequential(*body, Convolution(hidden, made)), shortcut

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image) + image if self.shortcut else self.body(image)


def reference(plan: Plan, channels: int, classes: int, stem_stride: int, strides: Sequence[int]) -> nn.Module:
    """The network of a plan (values by choice name) whose widths times expansions are multiples of 8."""
    width = int(str(plan["stem.width"]))
    modules: list[nn.Module] = [Convolution(channels, width, 3, stem_stride, same=plan["padding"] == "same")]
    for stage, stride in enumerate(strides, start=1):
        made = int(str(plan[f"stage{stage}.width"]))
        for index in range(int(str(plan[f"stage{stage}.depth"]))):
            name = f"stage{stage}.block{index}"
            hidden = width * int(str(plan[f"{name}.expansion"]))
            modules.append(Block(width, made, hidden, plan, name, 1 if index else stride, shortcut=index > 0))
            width = made
    head = int(str(plan["head.width"]))
    modules += [Convolution(width, head), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, classes)]
    return nn.Sequential(*modules)


def check_against(module: nn.Module, network: Network) -> None:
    shapes = sorted(tuple(parameter.shape) for parameter in module.parameters())
    assert sorted(shape for layer in network.layers for shape in layer.parameter_shapes.values()) == shapes
    assert network.params == sum(parameter.numel() for parameter in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(torch.zeros(1, *network.input_shape))
    assert network.macs == counter.get_total_flops() / 2
    assert network.output.out_shape == tuple(out.shape[1:])


@pytest.mark.parametrize(
    ("resolutions", "channels", "classes", "stem_stride", "strides", "padding", "nonlinearity"),
    [
        ((8,), 1, 10, 1, (1, 2), "symmetric", "relu6"),
        ((24, 33), 3, 5, 1, (2, 2), "symmetric", "hardswish"),
        ((32, 45), 2, 100, 2, (1, 2), "same", "relu"),
        ((64, 96, 224), 3, 7, 2, (2, 2), "same", "hardswish"),
    ],
)
def test_parameters_and_macs_are_those_of_torch_modules(
    resolutions: tuple[int, ...],
    channels: int,
    classes: int,
    stem_stride: int,
    strides: tuple[int, int],
    padding: str,
    nonlinearity: str,
    rng: np.random.Generator,
) -> None:
    space = MobileNet(
        resolutions=resolutions,
        channels=channels,
        classes=classes,
        widths=(16, 24),
        width_multipliers=(0.5, 1.0, 2.0),
        depths=(1, 2, 3),
        kernels=(3, 5, 7),
        expansions=(1, 3, 6),
        squeeze_excite=(False, True),
        strides=strides,
        stem_stride=stem_stride,
        head_width=32,
        padding=padding,
        nonlinearity=nonlinearity,
    )
    for architecture in (space.smallest, space.largest, *(space.sample(rng) for _ in range(4))):
        plan = {**architecture.values, "padding": padding}
        check_against(reference(plan, channels, classes, stem_stride, strides), space.lower(architecture))


def test_a_block_layer_by_layer() -> None:
    space = MobileNet(
        resolutions=(16,), widths=(16,), width_multipliers=(1,), depths=(2,), kernels=(3,), expansions=(1, 2),
        squeeze_excite=(False, True), nonlinearity="hardswish", strides=(2,),
    )  # fmt: skip
    text = "stage1.block0.squeeze_excite=True,stage1.block1.expansion=2,stage1.block1.project.precision=int8"
    network = space.lower(space.parse(text))
    assert [(layer.name, layer.kind, layer.out_shape) for layer in network.layers] == [
        ("stem", "conv2d", (16, 16, 16)),
        ("stem.activation", "activation", (16, 16, 16)),
        ("stage1.block0.depthwise", "conv2d", (16, 8, 8)),
        ("stage1.block0.depthwise.activation", "activation", (16, 8, 8)),
        ("stage1.block0.squeeze_excite.pool", "pool", (16, 1, 1)),
        ("stage1.block0.squeeze_excite.reduce", "conv2d", (8, 1, 1)),
        ("stage1.block0.squeeze_excite.expand", "conv2d", (16, 1, 1)),
        ("stage1.block0.squeeze_excite.expand.activation", "activation", (16, 1, 1)),
        ("stage1.block0.squeeze_excite.scale", "multiply", (16, 8, 8)),
        ("stage1.block0.project", "conv2d", (16, 8, 8)),
        ("stage1.block1.expand", "conv2d", (32, 8, 8)),
        ("stage1.block1.expand.activation", "activation", (32, 8, 8)),
        ("stage1.block1.depthwise", "conv2d", (32, 8, 8)),
        ("stage1.block1.depthwise.activation", "activation", (32, 8, 8)),
        ("stage1.block1.project", "conv2d", (16, 8, 8)),
        ("stage1.block1.add", "add", (16, 8, 8)),
        ("head", "conv2d", (128, 8, 8)),
        ("head.activation", "activation", (128, 8, 8)),
        ("pool", "pool", (128, 1, 1)),
        ("flatten", "reshape", (128,)),
        ("classifier", "linear", (10,)),
    ]
    assert network.by_name["stage1.block1.add"].inputs == ("stage1.block1.project", "stage1.block0.project")
    assert [name for name, precision in network.precisions.items() if precision == "int8"] == ["stage1.block1.project"]
    normed = {layer.name for layer in network.layers if layer.norm}
    assert "stem" in normed and "classifier" not in normed and "stage1.block0.squeeze_excite.reduce" not in normed


def test_relu_is_fused_and_hardswish_is_not() -> None:
    fused = MobileNet(nonlinearity="relu6")
    layers = fused.lower(fused.largest).layers
    assert not [layer for layer in layers if layer.kind == "activation"]
    assert {layer.activation for layer in layers if layer.kind == "conv2d"} == {"relu6", ""}
    assert {layer.name.split(".")[-1] for layer in layers if layer.kind == "conv2d" and not layer.activation} == {
        "project"
    }


@pytest.mark.parametrize(
    ("width", "divisor", "expected"),
    [(3, 8, 8), (12, 8, 16), (11.9, 8, 16), (20, 8, 24), (18, 8, 24), (17.7, 8, 16), (24, 8, 24), (5.4, 1, 5)],
)
def test_round_width_by_hand(width: float, divisor: int, expected: int) -> None:
    assert round_width(width, divisor) == expected


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [(8, [1, 2, 1, 1]), (28, [1, 2, 2, 2]), (32, [1, 2, 2, 2]), (16, [1, 2, 2, 1]), (64, [1, 2, 2, 2])],
)
def test_default_strides_keep_four_pixels(resolution: int, expected: list[int]) -> None:
    space = MobileNet(resolutions=(resolution,))
    assert space.settings["strides"] == expected
    assert space.lower(space.largest).by_name["head"].out_shape[1] >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolutions": (4, 32)}, "resolutions = 4: expected a number from 8 to 224"),
        ({"resolutions": (256,)}, "resolutions = 256: expected a number from 8 to 224"),
        ({"resolutions": ()}, r"resolutions = \[\]: expected at least one option"),
        ({"resolutions": 32}, "resolutions = 32: expected a list"),
        ({"resolutions": (32, 32)}, "expected no option twice"),
        ({"resolutions": ("32",)}, "resolutions = '32': expected a number"),
        ({"resolutions": (8,), "strides": (2, 2, 2, 2)}, "expected at least 16 pixels, the product of the strides"),
        ({"channels": 0}, "channels = 0: expected a number of at least 1"),
        ({"classes": 1}, "classes = 1: expected a number of at least 2"),
        ({"classes": True}, "classes = True: expected a number"),
        ({"widths": ()}, "widths = .*expected at least one stage"),
        ({"widths": (16.5,)}, "widths = 16.5: expected a whole number"),
        ({"width_multipliers": (0, 1)}, "width_multipliers = 0"),
        ({"depths": (0, 1)}, "depths = 0: expected a number of at least 1"),
        ({"kernels": (3, 4)}, r"kernels = \[3, 4\]: expected odd sizes"),
        ({"expansions": (0.5,)}, "expansions = 0.5: expected a number of at least 1"),
        ({"expansions": (2, 2.2)}, "expected options that differ once 8 channels times each are rounded to 8s"),
        ({"expansions": (float("nan"),)}, "expansions = nan: expected a number"),
        ({"squeeze_excite": (0, 1)}, "squeeze_excite = .*expected true or false each"),
        ({"squeeze_excite": ()}, "squeeze_excite = .*at least one option"),
        ({"precisions": ("fp32", "int7")}, "precisions = 'int7': expected one of fp32, int8"),
        ({"precisions": "int8"}, "precisions = 'int8': expected a list"),
        ({"strides": (1, 2)}, r"strides = \[1, 2\]: expected 4, one for each stage"),
        ({"strides": (1, 2, 3, 1)}, "strides = 3: expected a number from 1 to 2"),
        ({"stem_stride": 0}, "stem_stride = 0"),
        ({"stem_width": 0}, "stem_width = 0"),
        ({"head_width": -1}, "head_width = -1"),
        ({"divisor": 0}, "divisor = 0"),
        ({"nonlinearity": "swish"}, "nonlinearity = 'swish': expected one of relu, relu6, hardswish"),
        ({"padding": "valid"}, "padding = 'valid': expected one of symmetric, same"),
    ],
)
def test_settings_no_network_can_take(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        MobileNet(**settings)  # type: ignore[arg-type]
    assert str(refusal.value).startswith("space mobilenet: ")


# depth and expansion coupled


COMPOFA = MobileNet(
    resolutions=(32,), widths=(16, 24, 40, 80, 96), width_multipliers=(1,), depths=(2, 3, 4), kernels=(3,),
    expansions=(3, 4, 6), precisions=("fp32",), coupled=True,
)  # fmt: skip


def test_the_coupled_space_of_compofa_has_243_networks() -> None:
    assert COMPOFA.size == 3**5
    networks = [COMPOFA.lower(architecture) for architecture in COMPOFA.all()]
    assert len({network.layers for network in networks}) == len(networks) == 243
    assert not [choice for choice in COMPOFA.choices if choice.role == "expand"]


def test_a_coupled_expansion_is_that_of_the_depth() -> None:
    widths = {"stem": 16, **{f"stage{i}": width for i, width in enumerate((16, 24, 40, 80, 96), start=1)}}
    architecture = COMPOFA.parse("stage1.depth=2,stage2.depth=3,stage3.depth=4,stage4.depth=2,stage5.depth=4")
    layers = COMPOFA.lower(architecture).by_name
    for stage, (depth, expansion) in enumerate(((2, 3), (3, 4), (4, 6), (2, 3), (4, 6)), start=1):
        for block in range(4):
            layer = layers.get(f"stage{stage}.block{block}.expand")
            assert (layer is None) == (block >= depth)
            if layer is not None:
                place = f"stage{stage}" if block else (f"stage{stage - 1}" if stage > 1 else "stem")
                assert layer.out_shape[0] == round_width(widths[place] * expansion, 8)


def test_coupled_and_free_spaces_share_networks() -> None:
    plain: dict[str, object] = {"depths": (1, 2), "expansions": (1, 3), "widths": (8, 16), "precisions": ("int8",)}
    coupled, free = MobileNet(**plain, coupled=True), MobileNet(**plain)  # type: ignore[arg-type]
    for architecture in list(coupled.all())[::37]:
        values = dict(architecture.values)
        for stage in (1, 2):
            for block in range(2):
                values[f"stage{stage}.block{block}.expansion"] = 3 if values[f"stage{stage}.depth"] == 2 else 1
        assert coupled.lower(architecture) == free.lower(free.build(values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (1, 2, 3), "expansions": (2, 4)}, r"expansions = \[2, 4\]: expected 3, one for each depth"),
        ({"depths": (1, 2), "expansions": (4, 2)}, r"expansions = \[4, 2\]: expected more where depths = \[1, 2\] has"),
        ({"depths": (1, 2), "expansions": (2, 2)}, "expansions = .*no option twice"),
        ({"depths": (1, 1), "expansions": (2, 4)}, "depths = .*no option twice"),
        ({"coupled": 1}, "coupled = 1: expected true or false"),
    ],
)
def test_couplings_that_make_no_space(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNet(**{"coupled": True, **settings})  # type: ignore[arg-type]


def test_coupled_lists_may_come_in_any_common_order() -> None:
    assert MobileNet(depths=(3, 1), expansions=(6, 2), coupled=True).name == (
        MobileNet(depths=(1, 3), expansions=(2, 6), coupled=True).name
    )
    assert "coupled" not in MobileNet().settings


# patches

PATCHED = MobileNet(
    resolutions=(32, 48), widths=(8, 16, 24), width_multipliers=(1,), depths=(1, 2), kernels=(3,), expansions=(1, 2),
    precisions=("int8",), strides=(1, 2, 2), patches=(1, 2, 4), patch_stages=(1, 3),
)  # fmt: skip


def test_patches_run_up_to_the_first_block_of_a_stage() -> None:
    one_block = ["stem", "stage1.block0.depthwise", "stage1.block0.project"]
    three = [*one_block, "stage2.block0.depthwise", "stage2.block0.project", "stage2.block1.depthwise",
             "stage2.block1.project", "stage2.block1.add", "stage3.block0.depthwise",
             "stage3.block0.project"]  # fmt: skip
    for text, patches, names in (
        ("patches=1,stage2.depth=2,stage3.depth=2", 1, []),
        ("patches=2,patch_stages=1,stage2.depth=2,stage3.depth=2", 2, one_block),
        ("patches=4,patch_stages=3,stage2.depth=2,stage3.depth=2", 4, three),
    ):
        network = PATCHED.lower(PATCHED.parse(text))
        assert [layer.name for layer in network.patch_stage] == names
        assert all(layer.patches == patches for layer in network.patch_stage)
        whole = PATCHED.lower(PATCHED.unpatched(PATCHED.parse(text)))
        assert not whole.patch_stage
        assert (whole.macs, whole.params) == (network.macs, network.params)


def test_where_patches_end_is_no_choice_without_patches() -> None:
    assert PATCHED.parse("patches=1,patch_stages=3") == PATCHED.parse("patches=1")
    assert PATCHED.parse("patches=2,patch_stages=3") != PATCHED.parse("patches=2")
    assert {choice.role for choice in PATCHED.choices} >= {"patches", "patch_stages"}
    plain = MobileNet(**{k: v for k, v in PATCHED.settings.items() if not k.startswith("patch")})  # type: ignore[arg-type]
    assert PATCHED.size == 5 * plain.size
    assert PATCHED.undeployed(PATCHED.parse("patches=4,patch_stages=3,stage1.depth=2")) == PATCHED.parse(
        "stage1.depth=2"
    )
    assert PATCHED.largest["patches"] == 1  # training sees no patches
    always = MobileNet(patches=(2,), patch_stages=(1, 2))
    assert always.parse("patch_stages=2") != always.smallest


def test_a_space_without_patches_is_the_one_it_was() -> None:
    space = MobileNet()
    assert space.name == "mobilenet-3a60b517"  # what runs made before there were patches are filed under
    assert not [name for name in (*space.settings, *(c.name for c in space.choices)) if "patch" in name]


def test_by_default_patches_end_wherever_there_is_a_pixel_for_each() -> None:
    space = MobileNet(resolutions=(16, 32), strides=(1, 2, 2, 2), patches=(1, 4))
    assert space.settings["patch_stages"] == [1, 2, 3]  # maps of 16, 8, 4 and 2 pixels a side


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patches": (0, 2)}, "patches = 0: expected a number of at least 1"),
        ({"patch_stages": (1,)}, r"patch_stages = \(1,\): expected none, as patches = \[1\] runs every layer whole"),
        ({"patches": (2,), "patch_stages": (5,)}, r"patch_stages = \[5\]: expected stages, from 1, whose map has 2 "),
        ({"patches": (8,), "patch_stages": (1, 4)}, r"whose map has 8 pixels a side, .*: \[1, 2, 3\]"),
        ({"patches": (64,)}, r"patches = \[64\]: expected at most 32, the pixels a side of the first stage's map"),
        ({"patches": (1, 2), "squeeze_excite": (False, True)}, r"squeeze_excite = .*: expected false alone"),
    ],
)
def test_patches_that_make_no_space(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNet(**settings)  # type: ignore[arg-type]
