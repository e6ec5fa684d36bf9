"""Fake quantization against integers computed by numpy, and against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from hardware_profiles.machine import int8_weight_limit
from hardware_profiles.onnx_writer import write_onnx
from nas.evaluate import recalibrate
from nas.quantize import Quantized, quantize
from nas.supernet import Subnet, Supernet
from search_spaces import INPUT, INT8, CompactTransformer, MobileNet, Network, SearchSpace
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

torch.set_num_threads(1)


def small_network() -> Network:
    """Convolutions, a residual, pooling and a classifier, all int8."""
    first = L.conv2d("first", Port(INPUT, (2, 6, 6)), 4, kernel=3, norm=False, activation="relu6", precision=INT8)
    depthwise = L.conv2d("depthwise", port(first), 4, kernel=3, stride=2, groups=4, norm=False, precision=INT8)
    mixed = L.conv2d("mixed", port(depthwise), 4, norm=False, activation="relu", precision=INT8)
    added = L.add("added", port(mixed), port(depthwise))
    pooled = L.global_average_pool("pooled", port(added))
    flat = L.reshape("flat", port(pooled), (4,))
    last = L.linear("last", port(flat), 3, precision=INT8)
    return assemble((2, 6, 6), [(first, depthwise, mixed, added, pooled, flat, last)])


@pytest.fixture
def subnet(rng: np.random.Generator) -> Subnet:
    network = small_network()
    held = {
        layer.name: {
            name: torch.from_numpy(rng.normal(0, 0.5, shape).astype(np.float32))
            for name, shape in layer.parameter_shapes.items()
        }
        for layer in network.layers
        if layer.parameter_shapes
    }
    return Subnet(network, held).eval()


@pytest.fixture
def x(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0.3, 1.0, (40, 2, 6, 6)).astype(np.float32))


# a simulation of its own ---------------------------------------------------------------------------------


def convolve(x: np.ndarray, weight: np.ndarray, stride: int, padding: int, groups: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    out_channels, in_channels, kernel, _ = weight.shape
    side = (x.shape[2] - kernel) // stride + 1
    out = np.zeros((len(x), out_channels, side, side), dtype=x.dtype)
    for channel in range(out_channels):
        start = channel // (out_channels // groups) * in_channels
        for i in range(side):
            for j in range(side):
                window = x[:, start : start + in_channels, i * stride : i * stride + kernel, :]
                window = window[..., j * stride : j * stride + kernel]
                out[:, channel, i, j] = (window * weight[channel]).sum((1, 2, 3))
    return out


CONVOLUTIONS = {"first": (1, 1, 1, 6.0), "depthwise": (2, 1, 4, None), "mixed": (1, 0, 1, np.inf)}


def floats(weights: dict[str, dict[str, np.ndarray]], x: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor of the small network, in float64."""

    def convolution(name: str, value: np.ndarray) -> np.ndarray:
        stride, padding, groups, top = CONVOLUTIONS[name]
        out = convolve(value, weights[name]["weight"].astype(float), stride, padding, groups)
        out += weights[name]["bias"][:, None, None]
        return out if top is None else np.clip(out, 0, top)

    found = {INPUT: x.astype(float)}
    found["first"] = convolution("first", found[INPUT])
    found["depthwise"] = convolution("depthwise", found["first"])
    found["mixed"] = convolution("mixed", found["depthwise"])
    found["added"] = found["mixed"] + found["depthwise"]
    found["pooled"] = found["added"].mean((2, 3))
    return found


class Integers:
    """A tensor as an integer runtime holds it: uint8, and what its integers mean."""

    def __init__(self, values: np.ndarray, low: float, high: float) -> None:
        low, high = min(low, 0.0), max(high, 0.0)
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)
        self.q = np.clip(np.rint(values / self.scale) + self.zero, 0, 255).astype(np.int64)

    @property
    def centred(self) -> np.ndarray:
        return self.q - self.zero

    @property
    def real(self) -> np.ndarray:
        return self.scale * self.centred


def integer_logits(
    weights: dict[str, dict[str, np.ndarray]], x: np.ndarray, limit: int
) -> tuple[np.ndarray, dict[str, Integers]]:
    """Logits by integer arithmetic, ranges from the very images; and the integers on the way."""
    seen = {name: (value.min(), value.max()) for name, value in floats(weights, x).items()}

    def parameters(name: str, source: Integers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weight, bias = weights[name]["weight"].astype(float), weights[name]["bias"].astype(float)
        scales = np.abs(weight).reshape(len(weight), -1).max(1) / limit
        rounded = np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int64)
        assert np.abs(rounded).max() == limit
        return rounded, np.rint(bias / (source.scale * scales)).astype(np.int64), source.scale * scales

    def convolution(name: str, source: Integers) -> Integers:
        stride, padding, groups, top = CONVOLUTIONS[name]
        weight, bias, scales = parameters(name, source)
        sums = convolve(source.centred, weight, stride, padding, groups) + bias[:, None, None]
        real = sums * scales[:, None, None]
        return Integers(real if top is None else np.clip(real, 0, top), *seen[name])

    held = {INPUT: Integers(x.astype(float), *seen[INPUT])}
    held["first"] = convolution("first", held[INPUT])
    held["depthwise"] = convolution("depthwise", held["first"])
    held["mixed"] = convolution("mixed", held["depthwise"])
    held["added"] = Integers(held["mixed"].real + held["depthwise"].real, *seen["added"])
    held["pooled"] = Integers(held["added"].real.mean((2, 3)), *seen["pooled"])
    weight, bias, scales = parameters("last", held["pooled"])
    return (held["pooled"].centred @ weight.T + bias) * scales, held


def test_ranges_are_the_extremes_of_what_flows(subnet: Subnet, x: torch.Tensor) -> None:
    quantized = quantize(subnet, x.split(7), 127)
    expected = floats(subnet.weights(), x.numpy())
    assert set(quantized.ranges) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(quantized.ranges[name], (values.min(), values.max()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [127, 63])
def test_fake_quantization_computes_what_integers_do(subnet: Subnet, x: torch.Tensor, limit: int) -> None:
    quantized = quantize(subnet, [x], limit)
    expected, held = integer_logits(subnet.weights(), x.numpy(), limit)
    seen: dict[str, torch.Tensor] = {}
    tap = quantized.simulated.tap
    assert tap is not None

    class Recorder:
        read = staticmethod(tap.read)

        @staticmethod
        def write(layer: L.Layer, tensor: torch.Tensor) -> torch.Tensor:
            seen[layer.name] = tap.write(layer, tensor)
            return seen[layer.name]

    quantized.simulated.tap = Recorder()
    with torch.no_grad():
        got = quantized.simulated(x).numpy()
    for name in ("first", "depthwise", "mixed", "added"):
        steps = np.abs(seen[name].numpy() - held[name].real) / held[name].scale
        assert steps.max() < 2.01 and (steps > 0.5).mean() < 0.01, name  # a tie may fall either way
    same = np.abs(got - expected).max(1) < 1e-4 * np.abs(expected).max()
    assert same.mean() > 0.8
    np.testing.assert_allclose(got, expected, atol=0.03 * np.abs(expected).max())
    with torch.no_grad():
        error = np.abs(got - subnet(x).numpy()).max()
    assert error > 1e-4  # rounding is really simulated


def test_logits_are_not_rounded_and_the_input_is(subnet: Subnet, x: torch.Tensor) -> None:
    simulated = quantize(subnet, [x], 127).simulated
    flat = {}

    class Recorder:
        @staticmethod
        def read(layer: L.Layer, source: str, tensor: torch.Tensor) -> torch.Tensor:
            flat[layer.name, source] = tap.read(layer, source, tensor)
            return flat[layer.name, source]

        write = staticmethod(lambda layer, tensor: tap.write(layer, tensor))

    tap, simulated.tap = simulated.tap, Recorder()
    with torch.no_grad():
        got = simulated(x)
    last = simulated.layers["last"].tensors()  # type: ignore[operator]
    torch.testing.assert_close(got, flat["last", "flat"] @ last["weight"].T + last["bias"])
    assert len(flat["first", INPUT].unique()) <= 256 < len(x.unique())


def test_the_subnet_is_not_changed(subnet: Subnet, x: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in subnet.state_dict().items()}
    quantized = quantize(subnet, [x], 127)
    assert subnet.tap is None and quantized.folded.tap is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in subnet.state_dict().items())
    with torch.no_grad():
        assert torch.equal(quantized.folded(x), subnet(x))


def test_no_images(subnet: Subnet) -> None:
    with pytest.raises(ValueError, match="no range for the quantized tensor 'input'"):
        quantize(subnet, [], 127)


# whole families ------------------------------------------------------------------------------------------

SPACES = {
    "convolutions": MobileNet(
        resolutions=(8, 12), channels=1, classes=4, widths=(8, 16), width_multipliers=(1, 1.5), depths=(1, 2),
        kernels=(3, 5), expansions=(1, 2), squeeze_excite=(False, True), stem_width=8, head_width=16,
        nonlinearity="hardswish",
    ),
    "relu6": MobileNet(
        resolutions=(8,), channels=1, classes=4, widths=(8, 16), width_multipliers=(1,), depths=(1, 2),
        kernels=(3, 5), expansions=(1, 2), stem_width=8, head_width=16, nonlinearity="relu6", padding="same",
    ),
    "attention": CompactTransformer(
        resolutions=(8, 12), channels=1, classes=4, embeddings=(16, 24), depths=(1, 2), heads=(1, 2), head_size=8,
    ),
}  # fmt: skip


def deployed(space: SearchSpace, rng: np.random.Generator, precision: str | None) -> tuple[Quantized, torch.Tensor]:
    """A random architecture of random weights, quantized as deployed, and 200 images."""
    supernet = Supernet(space, seed=int(rng.integers(1000)))
    with torch.no_grad():
        for name, parameter in supernet.named_parameters():
            if not name.endswith("weight"):
                parameter.add_(torch.from_numpy(rng.normal(0, 0.1, parameter.shape).astype(np.float32)))
    architecture = space.sample(rng)
    if precision:
        architecture = space.with_precision(architecture, precision)
    subnet = supernet.extract(architecture)
    x = torch.from_numpy(rng.normal(size=(200, *subnet.network.input_shape)).astype(np.float32))
    return quantize(recalibrate(subnet, [x]), x.split(64), int8_weight_limit()), x


def by_onnxruntime(quantized: Quantized, x: torch.Tensor) -> np.ndarray:
    model = write_onnx(
        quantized.folded.network, quantized.folded.weights(), quantized.ranges, weight_limit=int8_weight_limit()
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


@pytest.mark.parametrize("precision", ["int8", None], ids=["int8", "mixed"])
@pytest.mark.parametrize("family", sorted(SPACES))
def test_onnxruntime_agrees(family: str, precision: str | None, rng: np.random.Generator) -> None:
    agreed: list[float] = []
    differences: list[float] = []
    for _ in range(8):
        quantized, x = deployed(SPACES[family], rng, precision)
        got = by_onnxruntime(quantized, x)
        with torch.no_grad():
            expected = quantized.simulated(x).numpy()
        usual = expected.mean(0)  # weights at random favour one class: without that, all classes win
        agreed.append(float(((got - usual).argmax(1) == (expected - usual).argmax(1)).mean()))
        differences.append(float(np.abs(got - expected).max() / np.abs(expected).max()))
    print(f"{family} {precision or 'mixed'}: agreement {min(agreed):.3f} at worst, difference {max(differences):.4f}")
    assert np.mean(agreed) >= 0.99
    assert np.median(differences) <= 0.02 and max(differences) <= 0.1


@pytest.mark.parametrize("family", sorted(SPACES))
def test_a_float_network_comes_back_folded(family: str, rng: np.random.Generator) -> None:
    quantized, x = deployed(SPACES[family], rng, "fp32")
    assert quantized.ranges == {} and quantized.simulated.tap is None
    with torch.no_grad():
        assert torch.equal(quantized.simulated(x), quantized.folded(x))


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_the_simulated_integers_are_those_of_patches(padding: str, rng: np.random.Generator) -> None:
    """In double precision the order of additions moves no sum to another integer."""
    space = MobileNet(
        resolutions=(21, 24), depths=(1, 2), kernels=(3, 5), widths=(8, 16), precisions=("int8",), padding=padding,
        patches=(2, 3, 4), patch_stages=(1, 2),
    )  # fmt: skip
    supernet = Supernet(space, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in (*supernet.named_parameters(), *supernet.named_buffers()):
            if "norm" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    for _ in range(6):
        subnet = supernet.extract(space.sample(rng))
        x = torch.randn(4, *subnet.network.input_shape, generator=generator)
        simulated = quantize(subnet, [x], 127).simulated.double()
        with torch.inference_mode():
            whole, patched = simulated(x.double()), simulated.in_patches(x.double())
        assert whole.std() > 0
        torch.testing.assert_close(patched, whole, rtol=1e-12, atol=1e-12 * float(whole.abs().max()))
