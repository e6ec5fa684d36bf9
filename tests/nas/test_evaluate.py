"""Norm statistics over all images, and accuracy counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nas.data import Data, from_arrays
from nas.evaluate import accuracy, calibration_images, recalibrate, resolution_of
from nas.supernet import Subnet, Supernet
from search_spaces import CompactTransformer, MobileNet

torch.set_num_threads(1)

SPACE = MobileNet(
    resolutions=(8,), channels=1, classes=3, widths=(8,), depths=(1,), kernels=(3,), expansions=(1,), stem_width=8,
    head_width=8, squeeze_excite=(False,), width_multipliers=(1,),
)  # fmt: skip


@pytest.fixture
def subnet() -> Subnet:
    return Supernet(SPACE, seed=4).extract(SPACE.smallest)


@pytest.fixture
def data(rng: np.random.Generator) -> Data:
    """In the order of its classes, which differ in brightness."""
    labels = np.repeat(np.arange(3), 40)
    x = (rng.integers(0, 80, (120, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
    return from_arrays(x, labels, calibration=60)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1


def test_the_first_norm_gets_mean_and_variance_over_all_images(subnet: Subnet) -> None:
    x = images(50)
    batches = [x[:32], x[32:48], x[48:]]  # unequal, the last one tiny
    before = {name: tensor.clone() for name, tensor in subnet.named_parameters()}
    assert recalibrate(subnet, iter(batches)) is subnet and not subnet.training
    stem = subnet.layers["stem"].tensors()  # type: ignore[operator]
    with torch.no_grad():
        layer = subnet.network.layers[0]
        computed = torch.nn.functional.conv2d(x, stem["weight"], None, layer.stride, layer.padding[0]).double()
    np.testing.assert_allclose(stem["norm_mean"], computed.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    # within a batch torch divides by n - 1, which for the two last images matters little
    np.testing.assert_allclose(stem["norm_variance"], computed.var((0, 2, 3)), rtol=2e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subnet.named_parameters())


def test_one_batch_normalizes_every_layer(subnet: Subnet) -> None:
    """Then the statistics are those of the very batch: what runs in evaluation is what runs in training."""
    x = images(64)
    recalibrate(subnet, [x])
    with torch.no_grad():
        evaluated = subnet(x)
        trained = subnet.train()(x)
    torch.testing.assert_close(evaluated, trained, rtol=1e-2, atol=1e-3)  # n against n - 1 in the variance


def test_old_statistics_do_not_matter(subnet: Subnet) -> None:
    other = subnet.with_weights(lambda _, parameters: parameters, None)
    with torch.no_grad():
        for _, buffer in other.named_buffers():
            buffer.fill_(9.0)
    recalibrate(subnet, [images(20)])
    recalibrate(other, [images(20)])
    for (name, a), (_, b) in zip(subnet.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_network_without_norms_is_left_alone() -> None:
    space = CompactTransformer(resolutions=(8,), channels=1, classes=3, embeddings=(16,), depths=(1,), head_size=8)
    supernet = Supernet(space)
    subnet = recalibrate(supernet.extract(space.smallest), [images(4)])
    assert all(torch.equal(a, b) for a, b in zip(
        subnet.parameters(), supernet.extract(space.smallest).parameters(), strict=True
    ))  # fmt: skip


def test_no_images(subnet: Subnet) -> None:
    with pytest.raises(ValueError, match="no images to recalibrate with; expected at least one batch"):
        recalibrate(subnet, [])


def test_calibration_images_are_all_of_the_split_and_each_batch_of_all_classes(data: Data, subnet: Subnet) -> None:
    assert resolution_of(subnet) == 8
    batches = calibration_images(data, subnet, 16)
    again = calibration_images(data, subnet, 16)
    assert [len(batch) for batch in batches] == [15] * 4
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    expected = data.prepare(next(data["calibration"].batches(100))[0], 8)
    assert sorted(x.numpy().tobytes() for x in torch.cat(batches)) == sorted(x.numpy().tobytes() for x in expected)
    for batch in batches:
        brightness = (batch.mean((1, 2, 3)) * data.std[0] + data.mean[0]) * 255
        assert len({int(value // 80) for value in brightness}) == 3


def test_accuracy_counts_the_images_that_are_right(data: Data, subnet: Subnet) -> None:
    recalibrate(subnet, calibration_images(data, subnet))
    right = total = 0
    pixels, labels = next(data["val_front"].batches(1000))
    for image, label in zip(pixels, labels, strict=True):
        x = ((image.float() / 255 - data.mean[0]) / data.std[0])[None]
        with torch.no_grad():
            right += int(np.argmax(subnet(x).numpy()[0])) == int(label)
        total += 1
    assert accuracy(subnet, data, "val_front", batch_size=5) == pytest.approx(right / total, abs=1e-12)
    assert total == len(data["val_front"])
