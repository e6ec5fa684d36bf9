"""Drop path, feature memory and gradient noise: what they touch, what they leave, and their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nas.interpreter import Normalization, execute
from nas.regularize import (
    DropPath,
    FeatureTap,
    Taps,
    add_gradient_noise,
    drop_path_rate_at,
    last_map,
    residual_branches,
)
from nas.supernet import Supernet
from search_spaces import INPUT, CompactTransformer, Layer, MobileNet, Network, SearchSpace
from search_spaces import layers as L
from search_spaces.layers import Port, port

EVAL = Normalization(from_batch=False)


def mobilenet(nonlinearity: str = "relu6") -> SearchSpace:
    return MobileNet(
        resolutions=[8],
        widths=[8, 16],
        strides=[1, 2],
        depths=[1, 3],
        stem_width=8,
        head_width=16,
        nonlinearity=nonlinearity,
        precisions=["fp32"],
    )


def transformer() -> SearchSpace:
    return CompactTransformer(
        resolutions=[8], embeddings=[16], depths=[1, 2], heads=[1, 2], head_size=8, precisions=["fp32"]
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=generator(1))


class Recorder:
    """A tap that only looks."""

    def __init__(self) -> None:
        self.read_by: dict[tuple[str, str], Tensor] = {}
        self.written: dict[str, Tensor] = {}

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        self.read_by[layer.name, source] = tensor.clone()
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        self.written[layer.name] = tensor.clone()
        return tensor


# drop path ---------------------------------------------------------------------------------------------


def test_the_branches_of_a_mobilenet_are_its_projections() -> None:
    space = mobilenet()
    expected = {
        f"stage{stage}.block{block}.add": f"stage{stage}.block{block}.project" for stage in (1, 2) for block in (1, 2)
    }
    assert residual_branches(space.lower(space.largest)) == expected
    assert residual_branches(space.lower(space.smallest)) == {}


def test_the_branches_of_a_transformer_are_attention_and_mlp_but_not_positions() -> None:
    space = transformer()
    assert residual_branches(space.lower(space.largest)) == {
        "block0.attention.add": "block0.attention.out",
        "block0.mlp.add": "block0.mlp.reduce",
        "block1.attention.add": "block1.attention.out",
        "block1.mlp.add": "block1.mlp.reduce",
    }


def test_the_branch_is_the_longer_chain_wherever_it_stands() -> None:
    source = Port(INPUT, (4, 6, 6))
    first = L.conv2d("first", source, 4, kernel=3)
    second = L.conv2d("second", port(first), 4, kernel=3)
    projection = L.conv2d("projection", source, 4)
    joined = L.add("joined", port(second), port(projection))
    doubled = L.add("doubled", port(joined), port(joined))
    whole = L.add("whole", source, port(doubled))
    network = Network((4, 6, 6), (first, second, projection, joined, doubled, whole))
    assert residual_branches(network) == {"joined": "second", "whole": "doubled"}
    first_of_equals = Network((4, 6, 6), (first, projection, L.add("sum", port(projection), port(first))))
    assert residual_branches(first_of_equals) == {"sum": "projection"}


@pytest.mark.parametrize("make", [mobilenet, transformer])
def test_only_branches_are_dropped_and_survivors_grow(make) -> None:  # type: ignore[no-untyped-def]
    space = make()
    supernet, network = Supernet(space, seed=0), space.lower(space.largest)
    before, after = Recorder(), Recorder()
    drop = DropPath(network, 0.4, generator())
    supernet(images(40), space.largest, tap=Taps([before, drop, after]))
    masks = []
    for (layer, source), seen in before.read_by.items():
        changed = after.read_by[layer, source]
        block, is_add = layer.removesuffix(".add"), layer.endswith(".add")
        if not is_add or source not in (f"{block}.project", f"{block}.out", f"{block}.reduce"):
            assert torch.equal(seen, changed), (layer, source)
            continue
        kept = changed.flatten(1).abs().sum(1) > 0
        masks.append(tuple(kept.tolist()))
        shape = (-1, *([1] * (seen.dim() - 1)))
        torch.testing.assert_close(changed, seen * kept.reshape(shape) / 0.6)
    assert len(masks) == len(set(masks)) == 4  # each branch has a mask of its own
    assert all(any(mask) and not all(mask) for mask in masks)


def test_rate_zero_is_no_tap_at_all() -> None:
    space = mobilenet()
    supernet, state = Supernet(space, seed=0), generator()
    x, before = images(5), state.get_state()
    recorder = Recorder()
    tap = Taps([DropPath(space.lower(space.largest), 0.0, state), recorder])
    supernet.eval()
    assert torch.equal(supernet(x, space.largest, tap=tap), supernet(x, space.largest))
    assert torch.equal(state.get_state(), before)
    tensor = torch.ones(2, 3)
    layer = next(layer for layer in space.lower(space.largest).layers if layer.kind == "add")
    assert DropPath(space.lower(space.largest), 0.0, state).read(layer, layer.inputs[0], tensor) is tensor


def test_a_pass_whose_images_keep_every_branch_is_scaled_only() -> None:
    """At a rate of 1e-9 nothing is dropped in a small batch, and the output is that without a tap."""
    space = transformer()
    supernet = Supernet(space, seed=0).eval()
    x, drop = images(6), DropPath(space.lower(space.largest), 1e-9, generator())
    torch.testing.assert_close(supernet(x, space.largest, tap=drop), supernet(x, space.largest))


def one_branch() -> tuple[Network, Layer]:
    source = Port(INPUT, (3, 2))
    branch = L.linear("branch", source, 2)
    joined = L.add("joined", source, port(branch))
    return Network((3, 2), (branch, joined)), joined


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_the_share_dropped_and_the_mean(rate: float) -> None:
    network, joined = one_branch()
    count = 20_000
    out = DropPath(network, rate, generator(3)).read(joined, "branch", torch.full((count, 3, 2), 2.0))
    kept = out[:, 0, 0] > 0
    assert torch.equal(kept.reshape(-1, 1, 1).expand_as(out), out > 0)  # an image is kept whole
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - rate)) < 4 * deviation
    assert abs(float(out.mean()) - 2.0) < 4 * 2.0 * deviation / (1 - rate)


def test_masks_follow_the_generator() -> None:
    network, joined = one_branch()
    x = torch.ones(64, 3, 2)
    first, again, other = (DropPath(network, 0.5, generator(s)).read(joined, "branch", x) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert DropPath(network, 0.5, generator()).read(joined, "branch", x.bfloat16()).dtype == torch.bfloat16


def test_computing_activations_again_sees_the_same_masks() -> None:
    network, _ = one_branch()
    gradients = []
    for recompute in (False, True):
        weight = torch.tensor([[0.5, -1.0], [2.0, 0.3]], requires_grad=True)
        drop = DropPath(network, 0.5, generator(2))
        parameters = {"branch": {"weight": weight, "bias": torch.zeros(2)}}

        def run(x: Tensor, drop: DropPath = drop, held: dict[str, dict[str, Tensor]] = parameters) -> Tensor:
            return execute(network, x, lambda layer: held.get(layer.name, {}), EVAL, drop) ** 2

        x = torch.randn(30, 3, 2, generator=generator(4))
        out = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        out.sum().backward()
        gradients.append(weight.grad)
    assert gradients[0] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_gradients_through_drop_path_by_finite_differences() -> None:
    network, joined = one_branch()
    x = torch.randn(8, 3, 2, generator=generator(), dtype=torch.float64).requires_grad_()
    drop = DropPath(network, 0.5, generator(2))
    assert torch.autograd.gradcheck(lambda t: drop.read(joined, "branch", t), (x,))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_that_leave_nothing_are_refused(rate: float) -> None:
    network, _ = one_branch()
    with pytest.raises(ValueError, match="expected from 0 to below 1"):
        DropPath(network, rate, generator())


def test_the_schedule_is_linear() -> None:
    assert [drop_path_rate_at(step, 5, 0.2) for step in range(5)] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rate_at(0, 1, 0.2) == 0.0


# features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "layer"),
    [(mobilenet(), "head"), (mobilenet("hardswish"), "head.activation"), (transformer(), "norm")],
    ids=["mobilenet", "mobilenet-hardswish", "transformer"],
)
def test_the_last_map_before_pooling(space: SearchSpace, layer: str) -> None:
    for architecture in (space.smallest, space.largest):
        network = space.lower(architecture)
        tap, recorder = FeatureTap(network), Recorder()
        assert tap.layer == last_map(network) == layer
        with pytest.raises(RuntimeError, match=f"layer '{layer}' has made nothing yet"):
            _ = tap.features
        logits = Supernet(space, seed=0)(images(3), architecture, tap=Taps([tap, recorder]))
        assert torch.equal(tap.features, recorder.written[layer])
        assert tap.features.shape == (3, *network.by_name[layer].out_shape)
        assert not tap.features.requires_grad
        assert logits.requires_grad


def test_maps_that_the_output_does_not_see_do_not_count() -> None:
    source = Port(INPUT, (4, 6, 6))
    used = L.conv2d("used", source, 4)
    pooled = L.global_average_pool("pooled", port(used))
    dead = L.conv2d("dead", source, 4)
    flat = L.reshape("flat", port(pooled), (4,))
    assert last_map(Network((4, 6, 6), (used, pooled, dead, flat))) == "used"
    with pytest.raises(ValueError, match="expected a network with a map"):
        last_map(Network((4,), (L.linear("only", Port(INPUT, (4,)), 2),)))


def test_taps_apply_in_order() -> None:
    class Scale:
        def __init__(self, factor: float, shift: float) -> None:
            self.factor, self.shift = factor, shift

        def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
            return tensor * self.factor

        def write(self, layer: Layer, tensor: Tensor) -> Tensor:
            return tensor + self.shift if layer.name == "joined" else tensor * self.factor

    _, joined = one_branch()
    branch = L.linear("branch", Port(INPUT, (3, 2)), 2)
    both = Taps([Scale(2.0, 1.0), Scale(3.0, 10.0)])
    assert both.read(joined, "branch", torch.tensor(1.0)) == 6.0
    assert both.write(joined, torch.tensor(1.0)) == 12.0
    assert both.write(branch, torch.tensor(1.0)) == 6.0


# gradient noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "eta"), [(0, 0.3), (9, 0.3), (999, 0.01)])
def test_gradient_noise(step: int, eta: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(200, 200))
    parameter.grad = torch.full((200, 200), 1.5)
    without = torch.nn.Parameter(torch.zeros(3))
    held = parameter.grad
    add_gradient_noise([without, parameter], step, eta, generator(7))
    assert without.grad is None
    assert parameter.grad is held
    assert torch.count_nonzero(parameter) == 0
    noise = (held - 1.5).double()
    variance = eta * (1 + step) ** -0.55
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 * (variance / count) ** 0.5
    assert float(noise.square().mean()) == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)
    inside = float((noise.abs() < variance**0.5).double().mean())
    assert inside == pytest.approx(0.6827, abs=4 * 0.466 / count**0.5)  # a normal: 68.27 % within one deviation


def test_gradient_noise_follows_the_generator() -> None:
    drawn = []
    for seed in (1, 1, 2):
        parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.zeros(5)
        add_gradient_noise(parameters, 3, 0.1, generator(seed))
        drawn.append(np.stack([np.asarray(parameter.grad) for parameter in parameters]))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0][0], drawn[0][1])
