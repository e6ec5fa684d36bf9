"""Sorting of channels: against a block done by hand, and by what no permutation may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.channel_sorting import Group, Member, Reordering, channel_plan, importance, permute, sort_channels
from nas.supernet import Supernet
from search_spaces import INPUT, Architecture, Choice, CompactTransformer, Layer, MobileNet, SearchSpace, Slot
from search_spaces import layers as L
from search_spaces.layers import Port, port

torch.set_num_threads(1)  # beside another job, a second thread makes networks this small many times slower

SMALL_NETS = partial(
    MobileNet,
    resolutions=(8, 12),
    channels=2,
    classes=4,
    widths=(8, 12),
    width_multipliers=(0.5, 0.75, 1),
    depths=(1, 2, 3),
    kernels=(3, 5),
    stem_width=8,
    head_width=16,
    precisions=("fp32",),
    divisor=2,
)
SPACES: dict[str, SearchSpace] = {
    "squeeze_excite": SMALL_NETS(squeeze_excite=(True,), expansions=(2, 3), nonlinearity="hardswish"),
    "optional_squeeze_excite": SMALL_NETS(squeeze_excite=(False, True), expansions=(1.5, 2, 4)),
    "fixed_expansion_of_one": SMALL_NETS(expansions=(1,)),
    "optional_expansion_of_one": SMALL_NETS(expansions=(1, 2)),
    "only_expansions": SMALL_NETS(width_multipliers=(1,), expansions=(3, 4, 6), kernels=(7,)),
    "coupled": SMALL_NETS(squeeze_excite=(True,), expansions=(2, 3, 4), coupled=True),
    "attention": CompactTransformer(
        resolutions=(8, 12),
        channels=2,
        classes=4,
        embeddings=(8, 12, 16),
        depths=(1, 2, 3),
        heads=(1, 2),
        head_size=4,
        mlp_ratios=(1, 2),
        tokenizer_widths=(6,),
        precisions=("fp32",),
    ),
}


@pytest.fixture(params=sorted(SPACES), scope="module")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def random_supernet(space: SearchSpace, seed: int = 0, **options: bool) -> Supernet:
    """Weights, norms and statistics at random, in float64; some channels matter far more than others."""
    net = Supernet(space, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("norm_scale", "norm_variance", ".scale")):
                tensor.copy_(0.5 + noise.abs())
            elif name.endswith("weight"):
                spread = torch.rand(tensor.shape[1], generator=generator, dtype=torch.float64) + 0.1
                shape = [1, -1, *[1] * (tensor.dim() - 2)]
                tensor.copy_(noise * spread.reshape(shape) / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.5 * noise)
    return net.eval()


def images(space: SearchSpace, architecture: Architecture, count: int = 3) -> Tensor:
    shape = space.lower(architecture).input_shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def outputs(net: Supernet, architecture: Architecture) -> Tensor:
    return net(images(net.space, architecture), architecture)


def wide(space: SearchSpace, rng: np.random.Generator, count: int) -> list[Architecture]:
    """Architectures at random, but as wide as any."""
    found = []
    for _ in range(count):
        drawn, largest = space.sample(rng).values, space.largest.values
        roles = ("width", "expand", "depth" if space.settings.get("coupled") else "")
        widths = {c.name: largest[c.name] for c in space.choices if c.role in roles}
        found.append(space.build({**drawn, **widths}))
    return found


def test_sorting_keeps_the_function_of_the_widest_networks(space: SearchSpace, rng: np.random.Generator) -> None:
    net = random_supernet(space)
    widest = [space.largest, *wide(space, rng, 12)]
    before = [outputs(net, architecture) for architecture in widest]
    digest, smallest = net.digest(), outputs(net, space.smallest)
    done = sort_channels(net)
    assert net.digest() != digest or not done
    for architecture, expected in zip(widest, before, strict=True):
        torch.testing.assert_close(outputs(net, architecture), expected, rtol=1e-9, atol=1e-9)
    if done:  # otherwise nothing was sorted and this test shows nothing
        assert (outputs(net, space.smallest) - smallest).abs().max() > 1e-3


def test_sorting_in_float32_keeps_the_largest_network_to_1e_5(space: SearchSpace) -> None:
    net = random_supernet(space).float()
    x = images(space, space.largest).float()
    with torch.no_grad():
        before = net(x, space.largest)
        sort_channels(net)
        torch.testing.assert_close(net(x, space.largest), before, rtol=1e-5, atol=1e-5)


def test_sorting_keeps_the_function_of_transformed_kernels(rng: np.random.Generator) -> None:
    space = SPACES["squeeze_excite"]
    net = random_supernet(space, kernel_transforms=True)
    assert any("transform" in name for name, _ in net.named_parameters())
    widest = [space.largest, *wide(space, rng, 6)]
    before = [outputs(net, architecture) for architecture in widest]
    assert sort_channels(net)
    for architecture, expected in zip(widest, before, strict=True):
        torch.testing.assert_close(outputs(net, architecture), expected, rtol=1e-9, atol=1e-9)


def test_the_kept_share_of_importance_never_falls(space: SearchSpace) -> None:
    net = random_supernet(space)
    plan = channel_plan(space)
    before = [importance(group, net.state_dict()).cumsum(0) for group in plan]
    sort_channels(net)
    rose = []
    for group, kept_before in zip(plan, before, strict=True):
        kept = importance(group, net.state_dict()).cumsum(0)
        assert (kept >= kept_before * (1 - 1e-12)).all()
        torch.testing.assert_close(kept[-1], kept_before[-1])
        rose.append(bool((kept > kept_before * 1.05).any()))
    assert any(rose) or not plan


def test_sorting_twice_changes_nothing_more(space: SearchSpace) -> None:
    net = random_supernet(space)
    sort_channels(net)
    digest = net.digest()
    assert all(torch.equal(done.order, torch.arange(done.group.size)) for done in sort_channels(net))
    assert net.digest() == digest


def length_of(layer: Layer, member: Member) -> int:
    shapes = layer.parameter_shapes
    return shapes[member.parameter if member.parameter in shapes else "bias"][member.axis]


def test_groups_hold_all_that_is_tied_anywhere_in_the_space(space: SearchSpace, rng: np.random.Generator) -> None:
    """Any order that only moves channels between those that all of the networks at hand have, or have not, changes
    none of them: so no tie is missing, even one that the planner could only see in some other network."""
    net = random_supernet(space)
    sample = [space.sample(rng) for _ in range(25)]
    generator = torch.Generator().manual_seed(2)
    reorderings = []
    for group in channel_plan(space):
        lengths = {0, group.size}
        for architecture in sample:
            layers = space.lower(architecture).by_name
            lengths |= {length_of(layers[m.layer], m) for m in group.members if m.layer in layers}
        bands = [low + torch.randperm(high - low, generator=generator) for low, high in pairwise(sorted(lengths))]
        reorderings.append(Reordering(group, torch.cat(bands)))
    before = [outputs(net, architecture) for architecture in sample]
    permute(net.state_dict(), reorderings)
    for architecture, expected in zip(sample, before, strict=True):
        torch.testing.assert_close(outputs(net, architecture), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["squeeze_excite", "attention"])
def test_every_member_counts(name: str) -> None:
    """Leaving any one axis out of its group shows in the outputs, so the tests above would see a plan that does."""
    space = SPACES[name]
    rotated = {group: torch.arange(group.size).roll(1) for group in channel_plan(space)}
    given = random_supernet(space)
    expected = outputs(given, space.largest)
    for group, order in rotated.items():
        kinds = {(m.parameter, m.axis, space.lower(space.largest).by_name[m.layer].kind): m for m in group.members}
        for left_out in kinds.values():  # one of each kind of member; all of them would take long
            net = copy.deepcopy(given)
            partial_group = Group(tuple(m for m in group.members if m != left_out), group.sizes)
            permute(net.state_dict(), [Reordering(partial_group, order)])
            assert (outputs(net, space.largest) - expected).abs().max() > 1e-6, left_out


# one inverted-residual block, by hand -----------------------------------------------------------------


def test_a_block_sorted_by_hand() -> None:
    space = MobileNet(
        resolutions=(8,),
        channels=2,
        classes=3,
        widths=(6,),
        width_multipliers=(1,),
        depths=(1,),
        kernels=(3, 5),
        expansions=(2, 4),
        squeeze_excite=(False, True),
        stem_width=4,
        head_width=8,
        precisions=("fp32",),
        divisor=2,
    )
    net = random_supernet(space, seed=1)
    old = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    done = sort_channels(net)

    block = "shared.stage1/block0/"
    project, reduce = old[f"{block}project.weight"], old[f"{block}squeeze_excite/reduce.weight"]
    assert project.shape == (6, 16, 1, 1) and reduce.shape == (4, 16, 1, 1)
    norms = [sum(abs(project[row, c, 0, 0]) for row in range(6)) for c in range(16)]
    norms = [norms[c] + sum(abs(reduce[row, c, 0, 0]) for row in range(4)) for c in range(16)]
    hidden = sorted(range(16), key=lambda c: -norms[c])
    grow = old[f"{block}squeeze_excite/expand.weight"]
    assert grow.shape == (16, 4, 1, 1)
    squeezed = sorted(range(4), key=lambda c: -sum(abs(grow[row, c, 0, 0]) for row in range(16)))
    assert hidden != list(range(16)) and squeezed != list(range(4))
    assert sorted(tuple(d.order.tolist()) for d in done) == sorted([tuple(hidden), tuple(squeezed)])

    expected = dict(old)
    normed = ("weight", "norm_scale", "norm_shift", "norm_mean", "norm_variance")
    for name in [f"{block}expand.{part}" for part in normed] + [f"{block}depthwise.{part}" for part in normed]:
        expected[name] = old[name][hidden]
    expected[f"{block}project.weight"] = project[:, hidden]
    expected[f"{block}squeeze_excite/reduce.weight"] = reduce[squeezed][:, hidden]
    expected[f"{block}squeeze_excite/reduce.bias"] = old[f"{block}squeeze_excite/reduce.bias"][squeezed]
    expected[f"{block}squeeze_excite/expand.weight"] = grow[hidden][:, squeezed]
    expected[f"{block}squeeze_excite/expand.bias"] = old[f"{block}squeeze_excite/expand.bias"][hidden]
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)


def test_equally_important_channels_keep_their_order() -> None:
    net = Supernet(SPACES["only_expansions"])
    nn.init.ones_(net.get_parameter("shared.stage1/block0/project.weight"))
    done = sort_channels(net)
    readers = {next(m.name for m in d.group.members if m.reads): d.order for d in done}
    order = readers["shared.stage1/block0/project.weight"]
    assert torch.equal(order, torch.arange(len(order)))


# what is sorted, and what is not ----------------------------------------------------------------------


def grouped(space: SearchSpace) -> list[set[str]]:
    return [{f"{m.layer}.{m.parameter}.{m.axis}" for m in group.members} for group in channel_plan(space)]


def test_what_is_sorted_in_a_space_of_elastic_expansions() -> None:
    groups = channel_plan(SPACES["only_expansions"])
    named = {next(m.layer for m in group.members) for group in groups}
    assert named == {f"stage{stage}.block{block}.expand" for stage in (1, 2) for block in range(3)}
    assert all(len(group.members) == 11 for group in groups)  # 2 x (weight, norm, statistics), and what reads them
    assert [group.sizes for group in groups] == [(24, 32, 48)] * 4 + [(36, 48, 72)] * 2


def test_images_classes_heads_and_positions_keep_their_order(space: SearchSpace) -> None:
    groups = grouped(space)
    first = space.lower(space.largest).layers[0].name
    for name in (f"{first}.weight.1", "classifier.weight.0", "classifier.bias.0"):
        assert not any(name in group for group in groups)
    for part in ("attention.query.weight.0", "attention.out.weight.1", "positions.value.0"):
        assert not any(name.endswith(part) for group in groups for name in group)


def test_an_optional_expansion_of_one_leaves_the_tied_widths_alone() -> None:
    groups = grouped(SPACES["optional_expansion_of_one"])
    assert len(groups) == 1 and "head.weight.0" in groups[0]


def test_nothing_to_sort_where_no_width_is_elastic() -> None:
    space = SMALL_NETS(width_multipliers=(1,), expansions=(2,))
    net = Supernet(space)
    digest = net.digest()
    assert sort_channels(net) == [] and net.digest() == digest


def chain(*makers: Callable[[Port, int], Sequence[Layer]]) -> SearchSpace:
    """A space of 4 or 8 channels: convolution, the layers given, convolution, pool, classifier."""

    def build(values: dict[str, int]) -> tuple[Layer, ...]:
        width = values["width"]
        made = [L.conv2d("first", Port(INPUT, (3, 6, 6)), width)]
        for make in makers:
            made += make(port(made[-1]), width)
        made += [L.conv2d("last", port(made[-1]), width)]
        made += [L.global_average_pool("pool", port(made[-1]))]
        made += [L.reshape("flatten", port(made[-1]), (width,))]
        return (*made, L.linear("classifier", port(made[-1]), 3))

    slot = Slot("all", ("width",), build)  # type: ignore[arg-type]
    return SearchSpace("chain", {}, [Choice("width", (4, 8), "width")], [slot], lambda values: (3, 6, 6), 3)


LAST = {f"last.{part}.0" for part in ("weight", "norm_scale", "norm_shift", "norm_mean", "norm_variance")}
FIRST = {name.replace("last", "first") for name in LAST}


@pytest.mark.parametrize(
    ("maker", "free"),
    [
        (lambda x, n: [L.max_pool("max", x, kernel=3, stride=1)], True),
        (lambda x, n: [L.multiply("square", x, x)], True),
        (lambda x, n: [L.conv2d("map", x, 1), L.multiply("gated", x, Port("map", (1, 6, 6)))], True),
        (lambda x, n: [L.permute("a", x, (1, 2, 0)), L.permute("b", Port("a", (6, 6, n)), (2, 0, 1))], True),
        (lambda x, n: [L.reshape("a", x, (n, 36)), L.reshape("b", Port("a", (n, 36)), (n, 6, 6))], True),
        (lambda x, n: [L.reshape("a", x, (n // 2, 2, 36)), L.reshape("b", Port("a", (n // 2, 2, 36)), x.shape)], False),
        (lambda x, n: [L.conv2d("grouped", x, n, groups=2)], False),
        (lambda x, n: [L.conv2d("twice", x, 2 * n, groups=n)], False),
    ],
    ids=[
        "pool",
        "multiply",
        "one map for all",
        "permute",
        "keeping reshape",
        "splitting reshape",
        "groups",
        "depth multiplier",
    ],
)
def test_kinds_that_keep_the_order_free(
    maker: Callable[[Port, int], Sequence[Layer]], free: bool, rng: np.random.Generator
) -> None:
    space = chain(maker)
    groups = grouped(space)
    assert LAST | {"classifier.weight.1"} in groups
    assert any(FIRST | {"last.weight.1"} <= group for group in groups) == free and len(groups) == 1 + free
    net = random_supernet(space)
    before = outputs(net, space.largest)
    sort_channels(net)
    torch.testing.assert_close(outputs(net, space.largest), before, rtol=1e-9, atol=1e-9)


def test_a_linear_layer_reads_the_axis_that_was_moved_last() -> None:
    def mixing(x: Port, n: int) -> list[Layer]:
        made = [L.permute("to", x, (1, 2, 0))]
        made += [L.linear("mix", port(made[-1]), n)]
        return [*made, L.permute("back", port(made[-1]), (2, 0, 1))]

    groups = grouped(chain(mixing))
    assert len(groups) == 3 and FIRST | {"mix.weight.1"} in groups
    assert {"mix.weight.0", "mix.bias.0", "last.weight.1"} in groups


@pytest.mark.parametrize(("optional", "free"), [((), True), (("stem",), False), (("classifier",), False)])
def test_channels_that_are_the_image_or_the_classes_in_some_network_stay(optional: tuple[str, ...], free: bool) -> None:
    """Where the network starts without its stem the depthwise filters belong to the image's channels, and where it
    ends without its classifier to the classes, however many there are elsewhere."""

    def build(values: dict[str, int]) -> tuple[Layer, ...]:
        made: list[Layer] = []
        source, width = Port(INPUT, (3, 6, 6)), values["width"] if values.get("classifier", True) else 3
        if values.get("stem", True):
            made += [L.conv2d("stem", source, width)]
            source = port(made[-1])
        made += [L.conv2d("depthwise", source, source.shape[0], groups=source.shape[0])]
        made += [L.global_average_pool("pool", port(made[-1]))]
        made += [L.reshape("flatten", port(made[-1]), (source.shape[0],))]
        return (*made, L.linear("classifier", port(made[-1]), 3)) if values.get("classifier", True) else tuple(made)

    choices = [Choice("width", (2, 3), "width"), *(Choice(name, (False, True), "operator") for name in optional)]
    slot = Slot("all", tuple(choice.name for choice in choices), build)  # type: ignore[arg-type]
    space = SearchSpace("loose", {}, choices, [slot], lambda values: (3, 6, 6), 3)
    assert len(channel_plan(space)) == free


# what else holds a value for each weight --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_goes_on_as_if_nothing_had_been_moved(kind: str) -> None:
    """Steps, sort, steps gives the largest network that steps alone give, if the optimizer's state moves along."""
    space = SPACES["squeeze_excite"]
    x, labels = images(space, space.largest, 8), torch.arange(8) % 4

    given = random_supernet(space).train()

    def trained(sort: bool, move_state: bool = True) -> Tensor:
        net = copy.deepcopy(given)
        if kind == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(net.parameters(), 0.01)
        for step in range(6):
            if sort and step == 3:
                done = sort_channels(net)
                for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if move_state else ():
                    held = {name: optimizer.state[p].get(key) for name, p in net.named_parameters()}
                    permute({name: tensor for name, tensor in held.items() if tensor is not None}, done)
            optimizer.zero_grad()
            F.cross_entropy(net(x, space.largest), labels).backward()
            optimizer.step()
        return outputs(net.eval(), space.largest)

    plain = trained(sort=False)
    torch.testing.assert_close(trained(sort=True), plain, rtol=1e-7, atol=1e-7)
    assert (trained(sort=True, move_state=False) - plain).abs().max() > 1e-4


def test_tensors_that_are_not_the_supernets_are_refused() -> None:
    net = random_supernet(SPACES["only_expansions"])
    done = sort_channels(net)
    permute({}, done)  # an optimizer before its first step
    with pytest.raises(LookupError, match=r"module\.shared"):
        permute({f"module.{name}": tensor for name, tensor in net.state_dict().items()}, done)
    name = "shared.stage1/block0/project.weight"
    with pytest.raises(ValueError, match="expected 48 channels on axis 1"):
        permute({name: torch.zeros(8, 47, 1, 1)}, done)
