"""Sharing and slicing of weights, extraction, folding."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hardware_profiles.onnx_writer import write_onnx
from nas.interpreter import Tap
from nas.supernet import Supernet, crop_of, cropped, digest_of
from search_spaces import Architecture, CompactTransformer, Layer, MobileNet, Network, SearchSpace
from search_spaces.layers import Port, conv2d

torch.set_num_threads(1)  # beside another job, a second thread makes networks this small many times slower

SPACES = {
    "convolutions": MobileNet(
        resolutions=(8, 12),
        channels=1,
        classes=4,
        widths=(8, 16),
        width_multipliers=(0.5, 1, 1.5),
        depths=(1, 2, 3),
        kernels=(3, 5, 7),
        expansions=(1, 2, 3),
        squeeze_excite=(False, True),
        stem_width=8,
        head_width=16,
        nonlinearity="hardswish",
    ),
    "attention": CompactTransformer(
        resolutions=(8, 12),
        channels=1,
        classes=4,
        embeddings=(16, 24, 32),
        depths=(1, 2, 3),
        heads=(1, 2, 3),
        head_size=8,
        tokenizer_widths=(12,),
    ),
}


@pytest.fixture(params=sorted(SPACES), scope="module")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """All parameters and buffers at random: gains and variances around one, the rest around zero."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if name.endswith(("norm_scale", "norm_variance", ".scale")):
                tensor.copy_(0.5 + noise.abs())
            else:
                tensor.copy_(noise * (0.2 if name.endswith("weight") else 0.5))


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    made = Supernet(space, seed=1)
    randomize(made, torch.Generator().manual_seed(2))
    return made.eval()


def images(supernet: Supernet, architecture: Architecture, count: int, seed: int = 0) -> Tensor:
    shape = supernet.network(architecture).input_shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def difference(got: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Largest difference relative to the largest logit."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def slice_of(name: str, full: Tensor, shape: tuple[int, ...]) -> Tensor:
    return cropped(full, crop_of(name, tuple(full.shape), shape))


# slicing -------------------------------------------------------------------------------------------------


def test_slice_of_a_kernel_is_its_centre_and_the_leading_channels() -> None:
    full = torch.arange(6 * 4 * 7 * 7).reshape(6, 4, 7, 7).float()
    assert torch.equal(slice_of("weight", full, (6, 4, 7, 7)), full)
    assert torch.equal(slice_of("weight", full, (3, 2, 5, 5)), full[:3, :2, 1:6, 1:6])
    assert torch.equal(slice_of("weight", full, (6, 1, 3, 3)), full[:, :1, 2:5, 2:5])
    assert torch.equal(slice_of("weight", full, (1, 4, 1, 1)), full[:1, :, 3:4, 3:4])


def test_slice_of_everything_else_is_leading() -> None:
    full = torch.arange(48).reshape(8, 6).float()
    assert torch.equal(slice_of("weight", full, (5, 3)), full[:5, :3])
    assert torch.equal(slice_of("value", full, (2, 6)), full[:2])
    assert torch.equal(slice_of("bias", full[:, 0], (3,)), full[:3, 0])


@pytest.mark.parametrize("shape", [(9, 3), (5,), (5, 3, 1)])
def test_slice_larger_than_what_is_shared_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'weight' of shape .* does not fit into the shared \(8, 6\)"):
        slice_of("weight", torch.zeros(8, 6), shape)


def test_a_subnet_holds_hand_cut_slices() -> None:
    """A depthwise kernel of 3 in one of 7, half the channels, and the norm that goes with them."""
    space = SPACES["convolutions"]
    supernet = Supernet(space)
    randomize(supernet, torch.Generator().manual_seed(3))
    values = {"stage1.block0.kernel": 3, "stage1.block0.expansion": 2, "stem.width": 8, "stage1.depth": 1}
    subnet = supernet.extract(space.build(values))
    name = "stage1/block0/depthwise"
    shared, held = supernet.shared[name].tensors(), subnet.layers[name].tensors()  # type: ignore[operator]
    hidden = held["weight"].shape[0]
    assert shared["weight"].shape[2:] == (7, 7) and hidden < shared["weight"].shape[0]
    assert torch.equal(held["weight"], shared["weight"][:hidden, :, 2:5, 2:5])
    for part in ("norm_scale", "norm_shift", "norm_mean", "norm_variance"):
        assert torch.equal(held[part], shared[part][:hidden]), part


# extraction ----------------------------------------------------------------------------------------------


def test_a_subnet_computes_what_the_supernet_does(supernet: Supernet, rng: np.random.Generator) -> None:
    for number in range(100):
        architecture = supernet.space.sample(rng)
        x = images(supernet, architecture, 2, number)
        with torch.no_grad():
            expected = supernet(x, architecture)
            assert difference(supernet.extract(architecture)(x), expected) <= 1e-5, architecture


def test_a_folded_subnet_computes_the_same_without_norms(supernet: Supernet, rng: np.random.Generator) -> None:
    for number in range(10):
        architecture = supernet.space.sample(rng)
        subnet = supernet.extract(architecture)
        folded = subnet.fold()
        x = images(supernet, architecture, 2, number)
        with torch.no_grad():
            assert difference(folded(x), subnet.double()(x.double())) <= 1e-5
        assert not any("norm_mean" in name for name in folded.state_dict())
        shapes = {name: {n: a.shape for n, a in arrays.items()} for name, arrays in folded.weights().items()}
        assert shapes == {a.name: a.parameter_shapes for a in folded.network.layers if a.parameter_shapes}


def test_onnxruntime_computes_the_same(supernet: Supernet, rng: np.random.Generator) -> None:
    """Another implementation of every operation, on the folded weights."""
    for number in range(6):
        architecture = supernet.space.with_precision(supernet.space.sample(rng), "fp32")
        x = images(supernet, architecture, 4, number)
        folded = supernet.extract(architecture).fold()
        model = write_onnx(folded.network, folded.weights())
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            assert difference(session.run(None, {"input": x.numpy()})[0], supernet(x, architecture)) <= 1e-4


def test_a_subnet_shares_no_memory_with_the_supernet(supernet: Supernet) -> None:
    before = supernet.digest()
    subnet = supernet.extract(supernet.space.largest)
    with torch.no_grad():
        for tensor in subnet.state_dict().values():
            tensor.fill_(7.0)
    assert supernet.digest() == before


def test_extraction_keeps_the_mode(supernet: Supernet) -> None:
    assert not supernet.extract(supernet.space.smallest).training
    supernet.train()
    assert supernet.extract(supernet.space.smallest).training
    supernet.eval()


def test_a_forward_leaves_no_state(supernet: Supernet, rng: np.random.Generator) -> None:
    first, second = supernet.space.smallest, supernet.space.largest
    x = images(supernet, first, 3)
    before = supernet.digest()
    with torch.no_grad():
        alone = supernet(x, first)
        supernet(images(supernet, second, 3), second)
        assert torch.equal(supernet(x, first), alone)
    assert supernet.digest() == before


def test_training_touches_only_the_slices_that_ran(space: SearchSpace) -> None:
    supernet = Supernet(space).train()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    architecture = space.smallest
    supernet(images(supernet, architecture, 4), architecture).square().sum().backward()
    used = {layer.name.replace(".", "/"): layer for layer in space.lower(architecture).layers}
    for name, parameter in supernet.named_parameters():
        layer_name, part = name.removeprefix("shared.").rsplit(".", 1)
        if layer_name not in used:
            assert parameter.grad is None, name
        elif part == "norm_shift":
            channels = used[layer_name].out_shape[0]
            assert not parameter.grad[channels:].any(), name  # type: ignore[index]
    for name, buffer in supernet.named_buffers():
        layer_name = name.removeprefix("shared.").rsplit(".", 1)[0]
        ran = used[layer_name].out_shape[0] if layer_name in used else 0
        assert torch.equal(buffer[ran:], before[name][ran:]), name
        assert not ran or not torch.equal(buffer[:ran], before[name][:ran]), name


# segments ------------------------------------------------------------------------------------------------


class KeyedDrop:
    """Drops a third of the images after every layer; the mask is a function of the layer's name."""

    def read(self, layer: Layer, source: str, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(layer.name.encode()))
        kept = torch.rand(len(tensor), *[1] * (tensor.dim() - 1), generator=generator) > 1 / 3
        return tensor * kept


class GlobalNoise(KeyedDrop):
    """Noise from torch's global generator."""

    def write(self, layer: Layer, tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn_like(tensor)


def one_pass(
    supernet: Supernet, architecture: Architecture, segments: int, tap: Tap | None, bf16: bool
) -> tuple[dict[str, Tensor], int]:
    """Logits, gradients and running statistics after one pass, and how many numbers it kept for the backward pass."""
    made = copy.deepcopy(supernet).train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        logits = made(images(made, architecture, 6), architecture, tap=tap, segments=segments)
    torch.manual_seed(6)  # the backward pass must restore what it needs
    logits.float().square().mean().backward()
    found = {name: tensor.grad for name, tensor in made.named_parameters() if tensor.grad is not None}
    return {"logits": logits.detach(), **found, **dict(made.named_buffers())}, sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tap", [None, KeyedDrop(), GlobalNoise()], ids=["alone", "keyed", "global"])
def test_segments_change_nothing_but_what_is_kept(supernet: Supernet, tap: Tap | None, bf16: bool) -> None:
    architecture = supernet.space.sample(np.random.default_rng(3))
    expected, whole = one_pass(supernet, architecture, 1, tap, bf16)
    for segments in (2, 7):
        got, kept = one_pass(supernet, architecture, segments, tap, bf16)
        assert got.keys() == expected.keys()
        differ = [name for name in expected if not torch.equal(got[name], expected[name])]
        assert not differ, (segments, differ)
        assert kept < whole, segments


def test_segments_with_fused_activations_that_overwrite() -> None:
    space = MobileNet(resolutions=(8,), channels=1, classes=3, widths=(8,), depths=(2,), nonlinearity="relu6")
    supernet = Supernet(space)
    randomize(supernet, torch.Generator().manual_seed(1))
    expected, _ = one_pass(supernet, space.largest, 1, None, False)
    for segments in (4, 1000):
        got, _ = one_pass(supernet, space.largest, segments, None, False)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_segments_are_ignored_without_gradients(supernet: Supernet) -> None:
    architecture = supernet.space.largest
    x = images(supernet, architecture, 3)
    with torch.no_grad():
        assert torch.equal(supernet(x, architecture, segments=4), supernet(x, architecture))


# kernel transforms ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transforming() -> Supernet:
    made = Supernet(SPACES["convolutions"], seed=1, kernel_transforms=True)
    generator = torch.Generator().manual_seed(4)
    randomize(made, generator)
    return made.eval()


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_kernel_transforms_against_numpy(transforming: Supernet, kernel: int) -> None:
    """7 -> 5 -> 3: crop, then each channel's 25 (9) numbers times a matrix of the layer."""
    name = "stage2.block1.depthwise"
    values = {"stage2.block1.kernel": kernel, "stage2.block1.expansion": 2, "stage2.width": 8, "stage2.depth": 2}
    shared = {n: t.detach().numpy() for n, t in transforming.shared[name.replace(".", "/")].named_parameters()}
    channels = transforming.extract(transforming.space.build(values)).weights()[name]["weight"].shape[0]
    expected = shared["weight"][:channels].astype(np.float64)
    for smaller in [size for size in (5, 3) if size >= kernel]:
        cropped_kernels = expected[:, 0, 1:-1, 1:-1]
        expected = np.zeros((channels, 1, smaller, smaller))
        for channel in range(channels):
            vector = cropped_kernels[channel].reshape(-1)
            for row in range(smaller**2):
                total = sum(
                    shared[f"transform_{smaller}"][row, column] * vector[column] for column in range(len(vector))
                )
                expected[channel, 0, row // smaller, row % smaller] = total
    got = transforming.extract(transforming.space.build(values)).weights()[name]["weight"]
    assert got.shape == (channels, 1, kernel, kernel)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_subnet_computes_what_the_supernet_does_with_transforms(
    transforming: Supernet, rng: np.random.Generator
) -> None:
    for number in range(20):
        architecture = transforming.space.sample(rng)
        x = images(transforming, architecture, 2, number)
        with torch.no_grad():
            subnet = transforming.extract(architecture)
            assert difference(subnet(x), transforming(x, architecture)) <= 1e-5, architecture
            assert not any("transform" in name for name in subnet.state_dict())


def test_fresh_transforms_change_nothing(rng: np.random.Generator) -> None:
    space = SPACES["convolutions"]
    plain, transforming = Supernet(space, seed=2).eval(), Supernet(space, seed=2, kernel_transforms=True).eval()
    assert transforming.kernel_transforms and not plain.kernel_transforms
    added = transforming.state_dict().keys() - plain.state_dict().keys()
    depthwise = [name for name in plain.shared if name.endswith("depthwise")]
    assert added == {f"shared.{name}.transform_{size}" for name in depthwise for size in (5, 3)}
    for number in range(10):
        architecture = space.sample(rng)
        x = images(plain, architecture, 2, number)
        with torch.no_grad():
            assert torch.equal(transforming(x, architecture), plain(x, architecture))


def test_transforms_of_all_sizes_on_the_way_are_trained() -> None:
    supernet = Supernet(SPACES["convolutions"], kernel_transforms=True).train()
    for kernel, expected in ((7, set()), (5, {"transform_5"}), (3, {"transform_5", "transform_3"})):
        supernet.zero_grad()
        architecture = supernet.space.build({"stage1.block0.kernel": kernel})
        supernet(images(supernet, architecture, 4), architecture).square().sum().backward()
        held = dict(supernet.shared["stage1/block0/depthwise"].named_parameters())
        trained = {name for name, parameter in held.items() if parameter.grad is not None}
        assert trained == {"weight", "norm_scale", "norm_shift"} | expected
        assert all(held[name].grad.any() for name in expected)  # type: ignore[union-attr]


class Shapes(SearchSpace):
    """Only the networks with these kernels occur."""

    def __init__(self, *kernels: int) -> None:
        self._kernels = kernels
        self.classes = 2

    def occurrences(self) -> Iterator[Network]:
        for kernel in self._kernels:
            yield Network((1, 8, 8), (conv2d("only", Port("input", (1, 8, 8)), 2, kernel=kernel),))

    def lower(self, architecture: Architecture) -> Network:
        return Network((1, 8, 8), (conv2d("only", Port("input", (1, 8, 8)), 2, kernel=5),))


def test_kernels_without_a_common_centre_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'only' occurs with kernels of .*; kernel_transforms needs square ones, all"):
        Supernet(Shapes(4, 3), kernel_transforms=True)
    Supernet(Shapes(4, 3))


def test_a_kernel_that_did_not_occur_is_refused() -> None:
    supernet = Supernet(Shapes(7, 3), kernel_transforms=True)
    with pytest.raises(ValueError, match=r"'only' has a kernel of 5; the supernet has transforms for \(7, 3\)"):
        supernet(torch.zeros(2, 1, 8, 8), Architecture("none", (), ()))


# weights -------------------------------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone(space: SearchSpace) -> None:
    state = torch.get_rng_state()
    digests = [Supernet(space, seed=seed).digest() for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_activations_of_a_fresh_supernet_neither_vanish_nor_explode(space: SearchSpace) -> None:
    supernet = Supernet(space).train()
    for architecture in (space.smallest, space.largest):
        assert 1e-3 < supernet(images(supernet, architecture, 32), architecture).detach().std().item() < 30


def test_digest_changes_with_any_number() -> None:
    module = nn.Linear(3, 2)
    before = digest_of(module)
    assert digest_of(module) == before
    with torch.no_grad():
        module.bias[1] += 1e-6
    assert digest_of(module) != before
