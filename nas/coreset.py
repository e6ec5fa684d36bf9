"""Coresets: a small part of the training images that stands for all of them, for cheap proxies.

Dataset quantization (arXiv 2308.10524) without its patch dropping: each class is split into bins of decreasing
typicality, and the same share is drawn from every bin.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch.nn.functional as F
from torch import Tensor

CORESETS = ("random", "dataset_quantization")
THUMBNAIL_SIDE = 8
LARGEST_FEATURES = 64
_GRID = 256.0


def check(share: float, coreset: str) -> None:
    """Raise ValueError where no coreset can be drawn so."""
    if not 0 < share <= 1:
        raise ValueError(f"train_share = {share}; expected a share above 0, up to 1 for all training images")
    if coreset not in CORESETS:
        raise ValueError(f"coreset = {coreset!r}; expected one of {', '.join(CORESETS)}")


def select(
    features: np.ndarray, labels: np.ndarray, share: float, rng: np.random.Generator, bins: int = 10
) -> np.ndarray:
    """Sorted positions (int64) of `share` of the images of each class, at least one, drawn evenly from its bins.

    Args:
        features: (n, d); see `pixel_features`.
        labels: (n,) integers.
        share: above 0, up to 1.
        rng: of the draw from the bins; the bins themselves are not random.
        bins: how many each class is split into.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.concatenate([rng.permutation(held) for held in graph_cut_bins(features[members], bins)])
        count = _count(len(members), share)
        evenly = ((np.arange(count) + rng.random()) * (len(members) / count)).astype(np.int64)
        chosen.append(members[order[np.minimum(evenly, len(members) - 1)]])  # the minimum guards a rounding up
    return np.sort(np.concatenate(chosen))


def select_randomly(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions (int64) of `share` of the images of each class, at least one, drawn at random."""
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([rng.permutation(held)[: _count(len(held), share)] for held in members]))


def _count(size: int, share: float) -> int:
    return max(1, round(share * size))


def graph_cut_bins(features: np.ndarray, bins: int = 10) -> list[np.ndarray]:
    """Positions (int64) of the points (n, d) in `bins` bins of equal size, give or take one, greedily filled.

    The next point of a bin S, among the points R that are in no bin yet, is the x with the largest
    sum over S of |p - x|^2 - sum over R of |p - x|^2: unlike those in its bin, like those that are left. Early
    bins hold typical points, late ones the outliers. Since

        sum over R of |p - x|^2 = |R| |x|^2 - 2 x . (sum over R of p) + (a constant of x),

    the gains at the start of a bin take one pass over the points; and since a point y that is chosen leaves R
    for S, each gain then grows by 2 |y - x|^2 = 2 |x|^2 - 4 x . y + (a constant of x), another pass. So a point
    costs O(n d), and there is never a matrix of distances. Of equal gains the first point's wins.
    """
    left = np.arange(len(features))
    filled = []
    for size in [len(part) for part in np.array_split(left, bins)][:-1]:
        points = np.asarray(features[left], dtype=np.float64)
        squares = np.einsum("nd,nd->n", points, points)
        gains = 2.0 * (points @ points.sum(axis=0)) - len(points) * squares
        squares *= 2.0
        chosen = np.empty(size, dtype=np.int64)
        for step in range(size):
            chosen[step] = best = int(np.argmax(gains))
            gains += squares
            gains -= points @ (4.0 * points[best])
            gains[best] = -np.inf
        filled.append(left[chosen])
        left = np.delete(left, chosen)
    return [*filled, left]


def pixel_features(images: Iterable[Tensor]) -> np.ndarray:
    """float64 (n, at most 64) of batches of uint8 images (n, channels, side, side): what they look like from afar.

    Principal components of standardised pixels, averaged to at most 8x8; no network, trained or to be trained,
    is needed (the paper takes features of one that was pretrained). They are rounded to 1/256 of a pixel's
    deviation, so that last bits, in which machines differ, seldom change what is chosen; components of nearly equal
    variance, which one machine may turn into each other and another not, still can.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    pixels = np.concatenate([_thumbnails(batch) for batch in images])
    standardised = StandardScaler().fit_transform(pixels)
    components = min(LARGEST_FEATURES, *standardised.shape)
    return np.round(PCA(components, svd_solver="full").fit_transform(standardised) * _GRID) / _GRID


def _thumbnails(pixels: Tensor) -> np.ndarray:
    """float64 (n, channels * side * side) with a side of at most 8; means of whole numbers, exact everywhere."""
    side = min(THUMBNAIL_SIDE, pixels.shape[-1])
    return F.adaptive_avg_pool2d(pixels.double(), side).flatten(1).numpy()
