"""Coresets: bins against explicit sums over pairs, shares of classes and bins, features of thumbnails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nas.coreset import graph_cut_bins, pixel_features, select, select_randomly


def bins_by_pairs(points: np.ndarray, bins: int) -> list[list[int]]:
    """The definition: every sum over pairs of points, anew for each choice."""

    def distances(x: int, others: list[int]) -> float:
        return float(sum(((points[x] - points[p]) ** 2).sum() for p in others))

    left = list(range(len(points)))
    filled = []
    for number in range(bins):
        size = len(points) // bins + (number < len(points) % bins)
        held: list[int] = []
        for _ in range(size):
            gains = [distances(x, held) - distances(x, left) for x in left]
            held.append(left.pop(int(np.argmax(gains))))
        filled.append(held)
    return filled


@pytest.mark.parametrize("bins", [1, 3, 4, 10])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_bins_are_those_of_explicit_sums_over_pairs(bins: int, shift: float) -> None:
    points = np.random.default_rng(7).normal(size=(30, 5)) * [3, 2, 1, 1, 0.2] + shift
    got, expected = graph_cut_bins(points, bins), bins_by_pairs(points, bins)
    assert len(got) == bins
    for mine, theirs in zip(got[:-1], expected[:-1], strict=True):
        assert mine.tolist() == theirs  # in the order in which they were chosen
    assert sorted(got[-1]) == sorted(expected[-1])


def test_bins_share_out_all_points() -> None:
    points = np.random.default_rng(0).normal(size=(103, 4))
    bins = graph_cut_bins(points)
    assert sorted(np.concatenate(bins)) == list(range(103))
    assert [len(held) for held in bins] == [11, 11, 11, 10, 10, 10, 10, 10, 10, 10]
    centre = [np.linalg.norm(points[held] - points.mean(0), axis=1).mean() for held in bins]
    assert centre[0] < 0.7 * centre[-1]  # from the typical to the outliers


@pytest.mark.parametrize("count", [1, 2, 9])
def test_fewer_points_than_bins_and_equal_points(count: int) -> None:
    for points in (np.random.default_rng(0).normal(size=(count, 3)), np.ones((count, 3))):
        assert sorted(np.concatenate(graph_cut_bins(points))) == list(range(count))


@pytest.mark.parametrize("share", [0.01, 0.2, 0.37, 0.95, 1.0])
def test_classes_and_bins_keep_their_shares(share: float) -> None:
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat([0, 1, 5], [200, 57, 1]))
    features = rng.normal(size=(258, 6))
    for got in (select(features, labels, share, rng), select_randomly(labels, share, rng)):
        assert got.dtype == np.int64 and np.array_equal(got, np.unique(got))
        for label, size in ((0, 200), (1, 57), (5, 1)):
            assert (labels[got] == label).sum() == max(1, round(share * size))
    members = np.flatnonzero(labels == 0)
    chosen = set(select(features, labels, share, rng).tolist())
    for held in graph_cut_bins(features[members]):
        drawn = len(chosen & set(members[held].tolist()))
        assert abs(drawn - share * len(held)) < 1


def test_selections_differ_by_seed_and_take_every_image_alike() -> None:
    features, labels = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 2
    taken = np.zeros(60)
    for seed in range(400):
        got = select(features, labels, 0.25, np.random.default_rng(seed))
        assert np.array_equal(got, select(features, labels, 0.25, np.random.default_rng(seed)))
        taken[got] += 1
    assert abs(taken / 400 - 8 / 30).max() < 0.1  # 4.5 deviations; 7.5 of 30 is 8


def thumbnails(images: np.ndarray, side: int) -> np.ndarray:
    """Means of whole blocks, by a loop."""
    count, channels, height, _ = images.shape
    block = height // side
    small = np.empty((count, channels, side, side))
    for i in range(side):
        for j in range(side):
            small[:, :, i, j] = images[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block].mean((2, 3))
    return small.reshape(count, -1)


@pytest.mark.parametrize(("channels", "side", "expected"), [(1, 24, 64), (3, 16, 40), (1, 4, 16)])
def test_features_keep_the_distances_between_standardised_thumbnails(channels: int, side: int, expected: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40 if channels == 3 else 90, channels, side, side))
    images = images.astype(np.uint8)
    images[:, :, 0, :] = 9  # pixels without any deviation
    features = pixel_features(torch.from_numpy(part) for part in np.array_split(images, 3))
    assert features.shape == (len(images), expected) and features.dtype == np.float64
    small = thumbnails(images, min(side, 8))
    small = (small - small.mean(0)) / np.where(small.std(0) > 0, small.std(0), 1)
    ours, theirs = (np.linalg.norm(x[:, None] - x[None], axis=2) for x in (features, small))
    np.testing.assert_allclose(ours, theirs, atol=0.05)  # all components are kept here; rounded to 1/256


def test_features_are_the_directions_of_largest_variance() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 3, 8, 8), dtype=np.uint8)
    features = pixel_features([torch.from_numpy(images)])
    pixels = images.reshape(300, -1).astype(float)
    standardised = (pixels - pixels.mean(0)) / pixels.std(0)
    variances = np.linalg.svd(standardised, compute_uv=False)[:64] ** 2 / 300
    np.testing.assert_allclose(features.var(0), variances, rtol=0.01)
    assert np.array_equal(features * 256, np.round(features * 256))
