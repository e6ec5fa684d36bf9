"""What a subnet is worth: norm recalibration and accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nas.data import Data
from nas.interpreter import Normalization
from nas.supernet import Subnet


def resolution_of(subnet: Subnet) -> int:
    return subnet.network.input_shape[1]


def recalibrate(subnet: Subnet, batches: Iterable[Tensor]) -> Subnet:
    """Set the norm statistics of a subnet, in place, to their average over batches of images; returns it.

    Statistics shared by many architectures fit none of them (arXiv 1903.05134); the images should come from
    the training set. Weights do not change.
    """
    with torch.no_grad():
        for count, x in enumerate(batches, start=1):
            subnet.run(x, Normalization(from_batch=True, momentum=1.0 / count))
    return subnet.eval()


def calibration_images(data: Data, subnet: Subnet, batch_size: int = 256) -> list[Tensor]:
    """The calibration split at the resolution of a subnet."""
    return [x for x, _ in data.batches("calibration", resolution_of(subnet), batch_size)]


def accuracy(subnet: Subnet, data: Data, split: str, *, batch_size: int = 256) -> float:
    """Top-1 accuracy on a split, in 0..1. Recalibrate the subnet first."""
    device = next(subnet.parameters()).device
    correct = 0
    with torch.inference_mode():
        for x, labels in data.batches(split, resolution_of(subnet), batch_size):
            correct += int((subnet(x.to(device)).argmax(dim=1).cpu() == labels).sum())
    return correct / len(data[split])
