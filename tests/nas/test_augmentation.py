"""Augmentation: crops and mirrors by enumeration, blends against their labels, randomness that stays inside."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from nas.augmentation import Augmentation, MissingKornia, augment, flip_and_crop

KORNIA = [Augmentation(erasing=0.7), Augmentation(mixup=0.8), Augmentation(cutmix=1.0)]
ALL = Augmentation(flip=True, crop_padding=2, erasing=0.5, mixup=0.4, cutmix=1.0)


def images(count: int, channels: int = 3, side: int = 12) -> Tensor:
    return torch.randint(
        0, 256, (count, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def run(settings: Augmentation, pixels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every image its own class: the targets then say what it was blended from."""
    pytest.importorskip("kornia")
    generator = torch.Generator().manual_seed(seed)
    return augment(pixels, torch.arange(len(pixels)), settings, len(pixels), generator)


# mirrors and crops ---------------------------------------------------------------------------------------


def crops(image: np.ndarray, pad: int) -> set[bytes]:
    """Every crop of a (channels, side, side) image padded by reflection."""
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    side = image.shape[1]
    steps = range(2 * pad + 1)
    return {padded[:, i : i + side, j : j + side].tobytes() for i in steps for j in steps}


@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmented_image_is_a_crop_of_its_own_image_or_its_mirror(channels: int) -> None:
    pixels = images(200, channels, 6)
    untouched = pixels.clone()
    labels = torch.arange(200)
    got, targets = augment(
        pixels, labels, Augmentation(flip=True, crop_padding=2), 200, torch.Generator().manual_seed(0)
    )
    assert got.shape == pixels.shape and got.dtype == torch.uint8 and torch.equal(pixels, untouched)
    assert targets is labels
    mirrored, offsets = 0, set()
    for before, after in zip(pixels.numpy(), got.numpy(), strict=True):
        straight, mirror = crops(before, 2), crops(before[:, :, ::-1], 2)
        assert after.tobytes() in straight | mirror
        mirrored += after.tobytes() in mirror
        taken = before if after.tobytes() in straight else before[:, :, ::-1]
        padded = np.pad(taken, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        offsets |= {
            (i, j) for i in range(5) for j in range(5) if np.array_equal(padded[:, i : i + 6, j : j + 6], after)
        }
    assert 70 < mirrored < 130
    assert len(offsets) == 25  # every offset occurs


def test_flip_or_crop_alone() -> None:
    pixels = images(50, 1, 6)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(flip_and_crop(pixels, flip=False, crop_padding=0, generator=generator), pixels)
    flipped = flip_and_crop(pixels, flip=True, crop_padding=0, generator=generator)
    for before, after in zip(pixels, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(2))
    cropped = flip_and_crop(pixels, flip=False, crop_padding=9, generator=generator)
    for before, after in zip(pixels, cropped, strict=True):
        assert after.numpy().tobytes() in crops(before.numpy(), 5)  # reflection reaches no further


# erasing -------------------------------------------------------------------------------------------------


def box(changed: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the smallest rectangle around what is true."""
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_erasing_puts_noise_in_one_box_of_the_asked_share_of_images() -> None:
    side = 32
    pixels = torch.full((600, 3, side, side), 7, dtype=torch.uint8)
    got, targets = run(Augmentation(erasing=0.3), pixels)
    assert got.dtype == torch.uint8 and torch.equal(targets, torch.arange(600))
    changed = (got != 7).any(1).numpy()
    erased = np.flatnonzero(changed.any((1, 2)))
    assert stats.binomtest(len(erased), 600, 0.3).pvalue > 1e-3
    shares, ratios, noise = [], [], []
    for number in erased:
        top, left, height, width = box(changed[number])
        inside = got[number, :, top : top + height, left : left + width]
        noise.append(inside.numpy().ravel())
        assert (inside == 7).float().mean() < 0.2  # the rectangle is full
        shares.append(height * width / side**2)
        ratios.append(height / width)
    # at most 0.4 of the area and a ratio of 10/3, up to a half pixel of rounding at each side
    assert min(shares) > 0 and 0.35 < max(shares) < 0.45
    assert 0.2 < min(ratios) < 0.4 and 2.5 < max(ratios) < 5
    histogram = np.bincount(np.concatenate(noise), minlength=256)
    assert stats.chisquare(histogram).pvalue > 1e-3
    first, second, third = got[erased[0]].numpy()
    assert not np.array_equal(first, second) and not np.array_equal(second, third)


@pytest.mark.parametrize(("probability", "erased"), [(0.0, 0), (1.0, 40)])
def test_never_and_always_erasing(probability: float, erased: int) -> None:
    pixels = images(40, 3, 11)  # whose size is no multiple of 8 bytes
    got, _ = run(Augmentation(erasing=probability), pixels)
    assert int((got != pixels).flatten(1).any(1).sum()) == erased


# mixup and cutmix ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 12])
def test_mixup_blends_the_images_that_its_targets_name(side: int) -> None:
    pixels = images(40, 3, side)
    got, targets = run(Augmentation(mixup=0.8), pixels)
    assert got.dtype == targets.dtype == torch.float32
    np.testing.assert_allclose(targets.sum(1), np.ones(40), atol=1e-6)
    assert int((targets > 0).sum(1).max()) == 2
    expected = np.einsum("nm,mchw->nchw", targets.double().numpy(), pixels.double().numpy())
    np.testing.assert_allclose(got, expected, atol=1e-3)
    partners = [int((row - torch.eye(40)[i] * row).argmax()) for i, row in enumerate(targets) if row[i] < 1]
    assert len(set(partners)) == len(partners) > 30  # a permutation


@pytest.mark.parametrize("side", [8, 12])
def test_cutmix_pastes_boxes_of_the_images_that_its_targets_name(side: int) -> None:
    pixels = images(60, 3, side)
    got, targets = run(Augmentation(cutmix=1.0), pixels)
    assert got.dtype == torch.uint8 and targets.dtype == torch.float32
    np.testing.assert_allclose(targets.sum(1), np.ones(60), atol=1e-6)
    pasted = 0
    for number, (image, row) in enumerate(zip(got, targets, strict=True)):
        others = row.clone()
        others[number] = 0.0
        changed = (image != pixels[number]).any(0).numpy()
        if not others.any():
            assert not changed.any()
            continue
        partner = int(others.argmax())
        top, left, height, width = box(changed)
        held = (slice(None), slice(top, top + height), slice(left, left + width))
        assert torch.equal(image[held], pixels[partner][held])
        assert float(others[partner]) == pytest.approx(height * width / side**2, abs=1e-6)
        rest = image.clone()
        rest[held] = pixels[number][held]
        assert torch.equal(rest, pixels[number])
        pasted += 1
    assert pasted > 40


@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_the_shares_are_beta_distributed(rng: np.random.Generator, beta: float) -> None:
    side = 40
    pixels = torch.zeros((800, 1, side, side), dtype=torch.uint8)
    shares = rng.beta(beta, beta, 100_000)
    whole_pixels = np.floor(np.sqrt(shares) * side) ** 2  # in a box with that share of the area
    for settings, expected in (
        (Augmentation(mixup=beta), shares * side**2),
        (Augmentation(cutmix=beta), whole_pixels),
    ):
        others = side**2 * (1 - run(settings, pixels)[1].diagonal().double().numpy())
        others = np.round(others) if settings.cutmix else others
        assert stats.ks_2samp(others, expected).pvalue > 1e-3, settings


def test_with_both_one_is_drawn_for_each_batch() -> None:
    kinds = [run(Augmentation(mixup=1.0, cutmix=1.0), images(4), seed)[0].dtype for seed in range(60)]
    assert 15 < kinds.count(torch.float32) < 45 and set(kinds) == {torch.float32, torch.uint8}


def test_images_of_one_class_keep_their_class() -> None:
    pytest.importorskip("kornia")
    labels = torch.full((9,), 2)
    for settings in KORNIA[1:]:
        targets = augment(images(9), labels, settings, 4, torch.Generator().manual_seed(0))[1]
        np.testing.assert_allclose(targets, np.tile([0, 0, 1, 0], (9, 1)), atol=1e-6)


@pytest.mark.parametrize("settings", [*KORNIA, ALL], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches(settings: Augmentation, count: int) -> None:
    for seed in range(5):
        pixels, targets = run(settings, images(count, 1, 5), seed)
        assert pixels.shape == (count, 1, 5, 5)
        assert float(pixels.min()) >= 0 and float(pixels.max()) <= 255
        assert len(targets) == count


# randomness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*KORNIA, ALL], ids=str)
def test_the_result_is_a_function_of_the_generator_alone(settings: Augmentation) -> None:
    pixels = images(16)
    untouched = pixels.clone()
    torch.manual_seed(1)
    first = run(settings, pixels, 5)
    torch.manual_seed(2)
    again, other = run(settings, pixels, 5), run(settings, pixels, 6)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].dtype != other[0].dtype or not torch.equal(first[0], other[0])
    assert torch.equal(pixels, untouched)
    generator = torch.Generator().manual_seed(5)
    one, two = (augment(pixels, torch.arange(16), settings, 16, generator)[0] for _ in range(2))
    assert one.dtype != two.dtype or not torch.equal(one, two)  # the generator moves on


@pytest.mark.parametrize("settings", [*KORNIA, ALL], ids=str)
def test_global_random_states_stay(settings: Augmentation) -> None:
    def states() -> tuple[list[int], list[int], object]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = states()
    run(settings, images(16))
    assert states() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [*KORNIA, ALL], ids=str)
def test_a_gpu_gets_the_same_images(settings: Augmentation) -> None:
    pixels = images(16)
    before = torch.cuda.get_rng_state()
    expected = run(settings, pixels)
    generator = torch.Generator().manual_seed(0)
    for labels in (torch.arange(16), torch.arange(16, device="cuda")):
        got = augment(pixels.cuda(), labels, settings, 16, generator.manual_seed(0))
        assert got[0].is_cuda and got[1].device == labels.device
        torch.testing.assert_close(got[0].cpu(), expected[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(got[1].cpu(), expected[1])
    assert torch.equal(torch.cuda.get_rng_state(), before)


# settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_padding": -1}, "train.crop_padding = -1; expected 0 or more pixels"),
        ({"erasing": 1.5}, "train.erasing = 1.5; expected a probability from 0 to 1"),
        ({"erasing": -0.1}, "train.erasing = -0.1; expected"),
        ({"mixup": -1.0}, "train.mixup = -1.0; expected a Beta parameter above 0, or 0 for none"),
        ({"mixup": float("nan")}, "train.mixup = nan; expected"),
        ({"cutmix": float("inf")}, "train.cutmix = inf; expected"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**values)


@pytest.mark.parametrize("settings", KORNIA, ids=str)
def test_without_kornia_the_error_says_what_to_install(settings: Augmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    generator = torch.Generator().manual_seed(0)
    plain = augment(images(2), torch.arange(2), Augmentation(flip=True), 2, generator)
    assert plain[0].dtype == torch.uint8
    with pytest.raises(MissingKornia, match=r"pip install 'fitnest\[augment\]'") as caught:
        augment(images(2), torch.arange(2), settings, 2, generator)
    assert "\n" not in str(caught.value)


def test_kornia_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys, torch, nas.augmentation as a\n"
        "x = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)\n"
        "a.augment(x, torch.arange(2), a.Augmentation(flip=True, crop_padding=1), 2, torch.Generator())\n"
        "assert not {'kornia', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
