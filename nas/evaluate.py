"""What a subnet is worth: norm recalibration and accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nas.data import Data, Split
from nas.interpreter import Normalization
from nas.supernet import LayerParameters, Subnet


def resolution_of(subnet: Subnet) -> int:
    return subnet.network.input_shape[1]


def recalibrate(subnet: Subnet, batches: Iterable[Tensor]) -> Subnet:
    """Set the norm statistics of a subnet, in place, to mean and variance over all the images; returns it.

    Statistics shared by many architectures fit none of them (arXiv 1903.05134); the images should come from
    the training set, in random order, since a norm sees what the norms before it made of its own batch.
    Weights do not change. Raises ValueError when there is no image.
    """
    norms = _norms(subnet)
    means = [torch.zeros_like(norm.norm_mean, dtype=torch.float64) for norm in norms]
    squares = [torch.zeros_like(mean) for mean in means]
    seen = 0
    with torch.no_grad():
        for x in batches:
            subnet.run(x, Normalization(from_batch=True, momentum=1.0))
            seen += len(x)
            for norm, mean, square in zip(norms, means, squares, strict=True):
                mean += len(x) * norm.norm_mean
                square += len(x) * (norm.norm_variance + norm.norm_mean.double().square())
        if not seen:
            raise ValueError("no images to recalibrate with; expected at least one batch")
        for norm, mean, square in zip(norms, means, squares, strict=True):
            norm.norm_mean.copy_(mean / seen)
            norm.norm_variance.copy_((square / seen - (mean / seen).square()).clamp_min(0.0))
    return subnet.eval()


def _norms(subnet: Subnet) -> list[LayerParameters]:
    return [held for held in subnet.modules() if isinstance(held, LayerParameters) and "norm_mean" in held.names]


def statistics_of(subnet: Subnet) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance (channels,) of each norm, as copies."""
    return [(norm.norm_mean.clone(), norm.norm_variance.clone()) for norm in _norms(subnet)]


def with_statistics(subnet: Subnet, statistics: Iterable[tuple[Tensor, Tensor]]) -> Subnet:
    """Set what `statistics_of` gave of a subnet of the same layers, in place; returns the subnet."""
    for norm, (mean, variance) in zip(_norms(subnet), statistics, strict=True):
        norm.norm_mean.copy_(mean)
        norm.norm_variance.copy_(variance)
    return subnet.eval()


def calibration_images(data: Data, subnet: Subnet, batch_size: int = 256) -> list[Tensor]:
    """The calibration split at the resolution of a subnet, in the order of `calibration_order`."""
    split = data["calibration"]
    positions = np.array_split(calibration_order(split), -(-len(split) // batch_size))
    return [data.prepare(pixels, resolution_of(subnet)) for pixels, _ in split.at(positions)]


def calibration_order(split: Split) -> np.ndarray:
    """One fixed random order: that of a data set may be the order of its classes."""
    return np.random.default_rng(0).permutation(len(split))


def accuracy(subnet: Subnet, data: Data, split: str, *, batch_size: int = 64) -> float:
    """Top-1 accuracy on a split, in 0..1. Recalibrate the subnet first."""
    images = len(data[split])
    return count_correct(subnet, data, split, 0, images, batch_size=batch_size) / images


def count_correct(subnet: Subnet, data: Data, split: str, start: int, end: int, *, batch_size: int = 64) -> int:
    """How many of the images of a split from place `start` to `end` are classified right, in an order of its own."""
    device = next(subnet.parameters()).device
    order = calibration_order(data[split])[start:end]
    correct = 0
    with torch.inference_mode():
        for pixels, labels in data[split].at(np.array_split(order, -(-len(order) // batch_size))):
            x = data.prepare(pixels, resolution_of(subnet))
            correct += int((subnet(x.to(device)).argmax(dim=1).cpu() == torch.as_tensor(labels)).sum())
    return correct
