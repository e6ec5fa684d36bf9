"""Random changes to training images: mirrors, crops, erased boxes and blends of two images.

Erasing, mixup and cutmix are kornia's (the extra `augment`), imported when one of them is on. All randomness
comes from the generator that is passed: the same generator state gives the same images on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

ERASED_SHARE = (0.02, 0.4)  # of the image, and height over width of the erased box: arXiv 1708.04896
ERASED_RATIO = (0.3, 1 / 0.3)


class MissingKornia(ImportError):
    """An augmentation is asked for whose library is not installed; says how to install it."""


@dataclass(frozen=True)
class Augmentation:
    """Which random changes training images go through; everything is off by default.

    flip: mirror half of the images.
    crop_padding: pixels of reflected border from which random crops are taken.
    erasing: probability, for each image, that a random box becomes noise (arXiv 1708.04896).
    mixup: parameter of the symmetric Beta distribution of each image's share in a blend of two (arXiv 1710.09412).
    cutmix: the same of the share that a pasted box of another image takes (arXiv 1905.04899). With mixup and
        cutmix both on, one of them is drawn for each batch.
    """

    flip: bool = False
    crop_padding: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        self._check("crop_padding", self.crop_padding >= 0, "0 or more pixels")
        self._check("erasing", 0 <= self.erasing <= 1, "a probability from 0 to 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            self._check(name, value >= 0 and math.isfinite(value), "a Beta parameter above 0, or 0 for none")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"train.{name} = {getattr(self, name)}; expected {expected}")

    def check_library(self) -> None:
        """Raise MissingKornia where something is on that needs it and it is not installed."""
        if self.erasing or self.mixup or self.cutmix:
            _kornia()


def augment(
    pixels: Tensor, labels: Tensor, settings: Augmentation, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images and targets of a batch after the random changes that `settings` asks for.

    Args:
        pixels: uint8 (n, channels, side, side), on any device.
        labels: int64 (n,).
        classes: how many there are.
        generator: on the CPU; everything random is drawn from it.

    Returns the images, uint8, or float32 still in 0..255 where mixup blended them; and the labels as they came
    or, where mixup or cutmix is on, float32 (n, classes) with rows that sum to 1. Raises MissingKornia.
    """
    pixels = flip_and_crop(pixels, flip=settings.flip, crop_padding=settings.crop_padding, generator=generator)
    if settings.erasing:
        pixels = _erase(pixels, settings.erasing, generator)
    if not settings.mixup and not settings.cutmix:
        return pixels, labels
    use_mixup = settings.mixup > 0
    if settings.mixup and settings.cutmix:
        use_mixup = bool(torch.rand((), generator=generator) < 0.5)
    if use_mixup:
        pixels, partners, share = _mixup(pixels, settings.mixup, generator)
    else:
        pixels, partners, share = _cutmix(pixels, settings.cutmix, generator)
    partners, share = partners.to(labels.device), share.to(labels.device)[:, None]
    own, other = F.one_hot(labels, classes).float(), F.one_hot(labels[partners], classes).float()
    return pixels, own * (1 - share) + other * share


def flip_and_crop(pixels: Tensor, *, flip: bool, crop_padding: int, generator: torch.Generator) -> Tensor:
    """Random mirror images and random crops of reflect-padded images, drawn for each image by a CPU generator."""
    count, _, height, width = pixels.shape
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(pixels.device)
        pixels = torch.where(mirrored.reshape(-1, 1, 1, 1), pixels.flip(3), pixels)
    if crop_padding:
        pad = min(crop_padding, height - 1, width - 1)
        padded = F.pad(pixels.float(), (pad, pad, pad, pad), mode="reflect").to(pixels.dtype)
        offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
        rows = (offsets[0][:, None] + torch.arange(height)).to(pixels.device)
        columns = (offsets[1][:, None] + torch.arange(width)).to(pixels.device)
        image = torch.arange(count, device=pixels.device)[:, None, None]
        pixels = padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return pixels


def _erase(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Noise in a random box of each image with that probability; kornia's fill is one value, so it draws the boxes."""
    count, _, height, width = pixels.shape
    erasing = _kornia().RandomErasing(ERASED_SHARE, ERASED_RATIO, value=1.0, p=probability)
    with _seeded(generator):
        boxes = erasing(torch.zeros(count, 1, height, width)) > 0
    words = torch.randint(-(2**63), 2**63 - 1, (-(-pixels.numel() // 8),), generator=generator)  # 8 bytes at once
    noise = words.view(torch.uint8)[: pixels.numel()].reshape(pixels.shape)
    return torch.where(boxes.to(pixels.device), noise.to(pixels.device), pixels)


def _mixup(pixels: Tensor, beta: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """float32 blends of the images with others, which these are (n,), and their shares (n,)."""
    count = len(pixels)
    mixing = _kornia().RandomMixUpV2(data_keys=["input", "class"])
    with _seeded(generator):
        drawn = mixing.forward_parameters(pixels.shape)
        # kornia's own shares are uniform
        drawn["mixup_lambdas"] = torch.distributions.Beta(beta, beta).sample((count,))
        mixed, pairs = mixing(pixels.float(), torch.arange(count), params=drawn)
    return mixed, pairs[:, 1].long(), pairs[:, 2]


def _cutmix(pixels: Tensor, beta: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a box of others pasted in, which these are (n,), and the boxes' shares of the area (n,).

    kornia works on a plane whose every pixel holds the number of its image: the images themselves stay uint8
    and on their device.
    """
    count, _, height, width = pixels.shape
    mixing = _kornia().RandomCutMixV2(beta=beta, data_keys=["input", "class"], use_correct_lambda=True)
    numbers = torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1)
    with _seeded(generator):
        sources, pairs = mixing(numbers.repeat(1, 1, height, width), torch.arange(count))
    partners, pasted = pairs[0, :, 1].long(), (sources != numbers).to(pixels.device)
    mixed = torch.where(pasted, pixels[partners.to(pixels.device)], pixels)
    return mixed, partners, 1 - pairs[0, :, 2]  # kornia's is the share that is left


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """torch's global CPU generator, which kornia draws from, seeded from `generator`; put back afterwards."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs, too
        yield


def _kornia() -> ModuleType:
    try:
        import kornia.augmentation
    except ImportError as error:
        raise MissingKornia(
            f"train.erasing, train.mixup and train.cutmix need kornia ({error}); install it with "
            "`pip install 'fitnest[augment]'` or set them to 0"
        ) from None
    return kornia.augmentation
