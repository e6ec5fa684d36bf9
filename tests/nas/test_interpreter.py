"""Every kind of layer against torch.nn modules, numpy, or loops; what a pass keeps alive and leaves alone."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.interpreter import FUSED, OPERATIONS, Normalization, execute, execute_in_patches, segment_starts
from search_spaces import INPUT, KINDS, Layer, Network
from search_spaces import layers as L
from search_spaces.layers import Port, port
from tests.stages import random_stage

EVAL = Normalization(from_batch=False)


def run(x: Tensor, *layers: Layer, parameters: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
    held = parameters or {}
    return execute(Network(tuple(x.shape[1:]), layers), x, lambda layer: held.get(layer.name, {}), EVAL)


def source(x: Tensor) -> Port:
    return Port(INPUT, tuple(x.shape[1:]))


@pytest.fixture
def draw(rng: np.random.Generator):  # type: ignore[no-untyped-def]
    return lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def test_every_kind_has_an_operation() -> None:
    assert set(OPERATIONS) == set(KINDS)


@pytest.mark.parametrize("from_batch", [False, True])
@pytest.mark.parametrize("scheme", ["symmetric", "same"])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (5, 2, 4), (3, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
def test_convolution_with_norm(draw, kernel, stride, groups, scheme, activation, from_batch) -> None:  # type: ignore[no-untyped-def]
    x = draw(3, 4, 9, 8)
    layer = L.conv2d(
        "c", source(x), 8, kernel=kernel, stride=stride, groups=groups, activation=activation, padding=scheme
    )
    convolution = nn.Conv2d(4, 8, kernel, stride, groups=groups, bias=False)
    norm = nn.BatchNorm2d(8).train(from_batch)
    with torch.no_grad():
        norm.weight.copy_(draw(8))
        norm.bias.copy_(2 * draw(8) + 2)
        norm.running_mean.copy_(draw(8))
        norm.running_var.copy_(draw(8).abs() + 0.1)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    top, left, bottom, right = layer.padding
    if scheme == "same":
        assert layer.out_shape[1:] == (-(-9 // stride), -(-8 // stride))
    expected = norm(convolution(nn.ZeroPad2d((left, right, top, bottom))(x)))
    if activation:
        expected = expected.clamp(0, 6 if activation == "relu6" else math.inf)
    held = {
        "weight": convolution.weight,
        "norm_scale": norm.weight,
        "norm_shift": norm.bias,
        "norm_mean": mean,
        "norm_variance": variance,
    }
    untouched = x.clone()
    with torch.no_grad():
        got = execute(Network((4, 9, 8), (layer,)), x, lambda _: held, Normalization(from_batch))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close((mean, variance), (norm.running_mean, norm.running_var))
    assert torch.equal(x, untouched)


def test_convolution_without_norm_has_a_bias(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 3, 5, 5)
    module = nn.Conv2d(3, 6, 3, padding=1)
    layer = L.conv2d("c", source(x), 6, kernel=3, norm=False, activation="relu")
    held = {"c": {"weight": module.weight, "bias": module.bias}}
    torch.testing.assert_close(run(x, layer, parameters=held), module(x).relu())


@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("shape", [(7,), (4, 7)])
def test_linear(draw, shape: tuple[int, ...], activation: str) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias = draw(3, *shape), draw(5, 7), draw(5)
    got = run(x, L.linear("l", source(x), 5, activation=activation), parameters={"l": {"weight": weight, "bias": bias}})
    expected = np.einsum("...i,oi->...o", x.numpy(), weight.numpy()) + bias.numpy()
    if activation:
        expected = np.clip(expected, 0, 6 if activation == "relu6" else None)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_matmul_scales_the_product_of_two_activations(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 3, 4, 5)
    turned = L.permute("t", source(x), (0, 2, 1))
    got = run(x, turned, L.matmul("m", source(x), port(turned), scale=0.25))
    np.testing.assert_allclose(got.numpy(), 0.25 * np.einsum("bhik,bhjk->bhij", x, x), rtol=1e-5, atol=1e-5)


def test_layer_norm(draw) -> None:  # type: ignore[no-untyped-def]
    x, scale, bias = draw(2, 3, 8), draw(8), draw(8)
    held = {"n": {"scale": scale, "bias": bias}}
    got = run(x, L.layer_norm("n", source(x), epsilon=0.1), parameters=held).numpy()
    a = x.numpy()
    expected = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 0.1) * scale.numpy() + bias.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


FORMULAS = {
    "relu": lambda v: max(v, 0.0),
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "hardswish": lambda v: v * min(max(v + 3.0, 0.0), 6.0) / 6.0,
    "hardsigmoid": lambda v: min(max(v + 3.0, 0.0), 6.0) / 6.0,
    "gelu": lambda v: v * 0.5 * (1.0 + math.erf(v / math.sqrt(2.0))),
}


@pytest.mark.parametrize("function", L.FREE_ACTIVATIONS)
def test_free_activation_leaves_its_input_alone(function: str) -> None:
    x = torch.linspace(-9, 9, 181).reshape(1, -1)
    untouched = x.clone()
    got = run(x, L.activation("a", source(x), function))
    np.testing.assert_allclose(got[0], [FORMULAS[function](float(v)) for v in untouched[0]], rtol=1e-5, atol=1e-6)
    assert torch.equal(x, untouched)


def test_softmax_is_over_the_last_axis(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 3, 5)
    powers = np.exp(x.numpy().astype(np.float64))
    expected = powers / powers.sum(-1, keepdims=True)
    np.testing.assert_allclose(run(x, L.softmax("s", source(x))), expected, rtol=1e-5)


def test_parameter_broadcasts_over_the_batch(draw) -> None:  # type: ignore[no-untyped-def]
    x, value = draw(4, 3, 2), draw(3, 2)
    constant = L.parameter("p", (3, 2))
    got = run(x, constant, L.add("a", source(x), port(constant)), parameters={"p": {"value": value}})
    np.testing.assert_array_equal(got, x.numpy() + value.numpy()[None])


def test_global_average_pool(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 3, 5, 4)
    got = run(x, L.global_average_pool("p", source(x)))
    assert got.shape == (2, 3, 1, 1)
    np.testing.assert_allclose(got[..., 0, 0], x.numpy().mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_max_pool_against_a_loop(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(1, 2, 7, 6) - 5  # a zero of the padding would win
    got = run(x, L.max_pool("p", source(x), kernel=3, stride=2))
    for channel in range(2):
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                rows, columns = slice(max(0, 2 * i - 1), 2 * i + 2), slice(max(0, 2 * j - 1), 2 * j + 2)
                assert float(got[0, channel, i, j]) == float(x[0, channel, rows, columns].max())


@pytest.mark.parametrize(("kernel", "stride", "before"), [(3, 1, 1), (2, 2, 0), (3, 2, 0)])
def test_average_pool_against_a_loop_over_real_pixels(draw, kernel: int, stride: int, before: int) -> None:  # type: ignore[no-untyped-def]
    """`before`: pixels of padding above and to the left of a 6x8 map, by TensorFlow's rule."""
    x = draw(2, 3, 6, 8)
    got = run(x, L.average_pool("p", source(x), kernel=kernel, stride=stride))
    assert got.shape == (2, 3, 6 // stride, 8 // stride)
    for i in range(got.shape[2]):
        for j in range(got.shape[3]):
            rows, columns = (slice(max(0, stride * k - before), stride * k - before + kernel) for k in (i, j))
            np.testing.assert_allclose(got[:, :, i, j], x.numpy()[:, :, rows, columns].mean((2, 3)), rtol=1e-4)


def test_multiply_broadcasts_channels(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 3, 4, 4)
    pool = L.global_average_pool("p", source(x))
    got = run(x, pool, L.multiply("m", source(x), port(pool)))
    np.testing.assert_allclose(got, x.numpy() * x.numpy().mean((2, 3), keepdims=True), rtol=1e-5, atol=1e-6)


def test_reshape_and_permute(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 6, 4)
    reshaped = L.reshape("r", source(x), (2, 3, 4))
    got = run(x, reshaped, L.permute("p", port(reshaped), (2, 0, 1)))
    np.testing.assert_array_equal(got, x.numpy().reshape(2, 2, 3, 4).transpose(0, 3, 1, 2))


def residual_network(x: Tensor) -> tuple[Network, dict[str, dict[str, Tensor]]]:
    """Linear layers with a shortcut over two of them, and a layer that reads one tensor twice."""
    first = L.linear("first", source(x), 4, activation="relu")
    second = L.linear("second", port(first), 4, activation="relu")
    third = L.linear("third", port(second), 4)
    shortcut = L.add("shortcut", port(first), port(third))
    double = L.add("double", port(shortcut), port(shortcut))
    last = L.linear("last", port(double), 2)
    generator = torch.Generator().manual_seed(0)
    held = {
        layer.name: {n: torch.randn(s, generator=generator) for n, s in layer.parameter_shapes.items()}
        for layer in (first, second, third, last)
    }
    return Network((3,), (first, second, third, shortcut, double, last)), held


def test_residuals_against_numpy(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(5, 3)
    network, held = residual_network(x)

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        return value @ held[name]["weight"].numpy().T + held[name]["bias"].numpy()

    first = np.maximum(linear("first", x.numpy()), 0)
    expected = linear("last", 2 * (first + linear("third", np.maximum(linear("second", first), 0))))
    got = execute(network, x, lambda layer: held.get(layer.name, {}), EVAL)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


class Watch:
    """A tap that notes which earlier outputs are still alive when each layer has run."""

    def __init__(self) -> None:
        self.outputs: dict[str, weakref.ref[Tensor]] = {}
        self.alive: dict[str, set[str]] = {}

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        self.alive[layer.name] = {name for name, output in self.outputs.items() if output() is not None}
        self.outputs[layer.name] = weakref.ref(tensor)
        return tensor


def test_dead_tensors_are_freed_and_live_ones_kept(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(5, 3)
    network, held = residual_network(x)
    watch = Watch()
    with torch.no_grad():
        execute(network, x, lambda layer: held.get(layer.name, {}), EVAL, watch)
    assert watch.alive["third"] == {"first", "second"}
    assert watch.alive["double"] == {"shortcut"}
    assert watch.alive["last"] == {"double"}


def test_images_of_another_shape_are_refused(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(1, 3)
    network, held = residual_network(x)
    with pytest.raises(ValueError, match=r"expected images of shape \(3,\), got \(4,\); resize"):
        execute(network, draw(1, 4), lambda layer: held.get(layer.name, {}), EVAL)


# segments ------------------------------------------------------------------------------------------------


def test_a_cut_is_where_little_lives_on() -> None:
    """Ten features between the halves, a hundred and a shortcut of a hundred around them."""
    narrow = {4: 10}
    layers = [L.linear("l0", Port(INPUT, (3,)), 100)]
    for number in range(1, 9):
        layers.append(L.linear(f"l{number}", port(layers[-1]), narrow.get(number, 100)))
    assert segment_starts(Network((3,), tuple(layers)), 2) == [5]
    shortcut = L.add("add", port(layers[5]), port(layers[8]))
    assert segment_starts(Network((3,), (*layers, shortcut)), 2) == [5]
    assert segment_starts(Network((3,), tuple(layers)), 1) == []


def test_cuts_of_a_chain_are_equal_shares() -> None:
    """A norm keeps what it read and what it made; a reshape keeps nothing."""
    layers = [L.conv2d("c0", Port(INPUT, (1, 4, 4)), 1, norm=False)]
    for number in range(1, 12):
        layers.append(L.conv2d(f"c{number}", port(layers[-1]), 1, norm=number >= 8))
    network = Network((1, 4, 4), tuple(layers))  # 8 layers keep one tensor, then 4 keep two
    assert segment_starts(network, 2) == [8]
    assert segment_starts(network, 4) == [4, 8, 10]
    assert segment_starts(network, 1000) == list(range(1, 12))


def test_all_segments_but_the_last_run_twice(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(5, 3)
    network, held = residual_network(x)
    starts = segment_starts(network, 3)
    assert starts
    runs: dict[str, int] = {}

    def counted(layer: Layer) -> dict[str, Tensor]:
        runs[layer.name] = runs.get(layer.name, 0) + 1
        return {name: tensor.requires_grad_() for name, tensor in held.get(layer.name, {}).items()}

    execute(network, x, counted, EVAL, segments=3).sum().backward()
    names = [layer.name for layer in network.layers]
    assert all(runs[name] == 1 for name in names[starts[-1] :])
    assert all(runs[names[start]] == 2 for start in [0, *starts[:-1]])


@pytest.mark.parametrize("segments", [0, -1])
def test_no_segments_are_refused(draw, segments: int) -> None:  # type: ignore[no-untyped-def]
    x = draw(1, 3)
    network, held = residual_network(x)
    with pytest.raises(ValueError, match=f"segments is {segments}; expected 1"):
        execute(network, x, lambda layer: held.get(layer.name, {}), EVAL, segments=segments)


def test_relu6_is_that_of_torch_and_keeps_no_copy() -> None:
    x = torch.cat([torch.linspace(-3.0, 9.0, 1001), torch.tensor([0.0, 6.0])])
    gradients = []
    for apply in (FUSED["relu6"], torch.nn.functional.relu6):
        leaf = x.clone().requires_grad_()
        made = leaf * 1.0  # a leaf may not be changed in place
        out = apply(made)
        out.backward(torch.arange(1.0, len(x) + 1))
        gradients.append(leaf.grad)
        assert torch.equal(out, x.clamp(0.0, 6.0))
    assert torch.equal(gradients[0], gradients[1])
    saved: list[int] = []
    made = torch.randn(50, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = FUSED["relu6"](made)
    assert saved == [out.data_ptr()]


# patches ------------------------------------------------------------------------------------------------------


def random_parameters(network: Network, rng: np.random.Generator) -> dict[str, dict[str, Tensor]]:
    """Weights, and norms whose statistics, scales and shifts are all random."""
    held: dict[str, dict[str, Tensor]] = {}
    for layer in network.layers:
        shapes = dict(layer.parameter_shapes)
        if layer.norm:
            shapes |= dict.fromkeys(("norm_mean", "norm_variance", "norm_scale", "norm_shift"), shapes.pop("bias"))
        held[layer.name] = {name: torch.from_numpy(rng.normal(0.3, 1.0, shape)) for name, shape in shapes.items()}
        if layer.norm:
            held[layer.name]["norm_variance"].abs_().add_(0.1)
    return held


@pytest.mark.parametrize("patches", [2, 3, 4])
def test_patches_compute_what_the_whole_does(patches: int, rng: np.random.Generator) -> None:
    for _ in range(15):
        height, width = (int(side) for side in rng.integers(3 * patches, 23, 2))
        network = random_stage(rng, height=height, width=width, patches=patches)
        held = random_parameters(network, rng)
        x = torch.from_numpy(rng.normal(size=(2, *network.input_shape)))
        seen: list[str] = []

        def parameters_of(layer: Layer, held: dict[str, dict[str, Tensor]] = held) -> dict[str, Tensor]:
            seen.append(layer.name)  # noqa: B023
            return held[layer.name]

        patched = execute_in_patches(network, x, parameters_of)
        assert len(seen) == patches**2 * len(network.patch_stage) + 1
        whole = execute(network, x, parameters_of, EVAL)
        assert whole.abs().max() > 0.1
        torch.testing.assert_close(patched, whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))


class Requantizer:
    """Integers -128..127 out of integer sums, by a multiplier for each layer: element by element, so exactly."""

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        summed = layer.parameter_shapes["weight"][1:] if layer.has_weights else (1,)
        # about the inverse of what a sum of products of random integers deviates by, times 20
        return (tensor / (5 * math.sqrt(math.prod(summed)) if layer.has_weights else 1.7)).round().clamp(-128, 127)


@pytest.mark.parametrize("patches", [2, 3, 4])
def test_patches_on_integers_are_equal_bit_for_bit(patches: int, rng: np.random.Generator) -> None:
    distinct = []
    for _ in range(15):
        height, width = (int(side) for side in rng.integers(3 * patches, 23, 2))
        network = random_stage(rng, height=height, width=width, patches=patches)
        network = Network(network.input_shape, tuple(replace(layer, norm=False) for layer in network.patch_stage))
        held = {
            layer.name: {
                name: torch.from_numpy(rng.integers(-127, 128, shape).astype(float))
                for name, shape in layer.parameter_shapes.items()
            }
            for layer in network.layers
        }
        x = torch.from_numpy(rng.integers(-128, 128, (2, *network.input_shape)).astype(float))
        whole = execute(network, x, lambda layer: held[layer.name], EVAL, Requantizer())  # noqa: B023
        patched = execute_in_patches(network, x, lambda layer: held[layer.name], Requantizer())  # noqa: B023
        assert torch.equal(patched, whole)
        distinct.append(whole.unique().numel())
    assert np.median(distinct) > 5 and max(distinct) > 50  # else rounding would hide what differs


def test_a_network_without_patches_runs_as_ever(draw) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 4, 5, 5)
    layer = L.conv2d("layer", source(x), 3, kernel=3)
    held = {"weight": draw(3, 4, 3, 3), "bias": draw(3)}
    network = Network((4, 5, 5), (layer,))
    whole = execute(network, x, lambda layer: held, EVAL)
    assert torch.equal(execute_in_patches(network, x, lambda layer: held), whole)
