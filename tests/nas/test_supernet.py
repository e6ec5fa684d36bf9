"""Sharing and slicing of weights, extraction, folding."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hardware_profiles.onnx_writer import write_onnx
from nas.supernet import Supernet, digest_of, slice_of
from search_spaces import Architecture, CompactTransformer, MobileNet, SearchSpace

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
