"""Data sets: every bad input in one line, splits, pixel statistics, coresets, folders that are streamed."""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nas.coreset import CORESETS
from nas.data import SPLITS, BadData, Data, FolderImages, from_arrays, load_data

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python warns from 3.12 on


def arrays(rng: np.random.Generator, count: int = 120, classes: int = 3, channels: int = 3) -> dict[str, np.ndarray]:
    return {
        "x_train": rng.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8),
        "y_train": np.arange(count) % classes,
    }


def indices(data: Data, split: str) -> set[int]:
    return set(data[split].indices.tolist())


# bad input -----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "at least one image"),
    "no pixels": ({"x_train": np.zeros((120, 0, 0), np.uint8)}, "at least one image"),
    "not square": ({"x_train": np.zeros((120, 8, 9), np.uint8)}, "8x9; expected square"),
    "channels first": ({"x_train": np.zeros((120, 3, 8, 8), np.uint8)}, "3x8; expected square ones, channels last"),
    "flat": ({"x_train": np.zeros((120, 64), np.uint8)}, r"shape \(120, 64\); expected \(n, side, side\)"),
    "labels missing": ({"y_train": np.arange(119) % 3}, "120 images but 119 labels"),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[np.arange(120) % 3]}, "120 images but 360 labels"),
    "one class": ({"y_train": np.zeros(120, int)}, "same class; expected at least two"),
    "float labels": ({"y_train": np.arange(120) % 3.0}, "labels are float64; expected integers"),
    "text labels": ({"y_train": np.array(["a", "b", "c"] * 40)}, "labels are <U1; expected integers"),
    "negative labels": ({"y_train": np.arange(120) % 3 - 1}, "labels go down to -1"),
    "labels from 1": ({"y_train": np.arange(120) % 3 + 1}, "no training image has label 0"),
    "a gap in the labels": ({"y_train": np.arange(120) % 3 * 2}, "go up to 4 but no training image has label 1"),
    "enormous labels": ({"y_train": np.arange(120) % 3 * 10**15}, "no training image has label 1"),
    "names missing": ({"classes": np.array(["a", "b"])}, "go up to 2 but only 2 classes"),
    "one name": ({"classes": np.array("a")}, "go up to 2 but only 1 classes"),
    "integers": ({"x_train": np.zeros((120, 8, 8), np.int32)}, "images are int32; expected uint8"),
    "floats to 255": ({"x_train": np.full((120, 8, 8), 255.0)}, "float64 from 255 to 255; expected 0 to 1"),
    "negative floats": ({"x_train": np.full((120, 8, 8), -0.1, np.float32)}, "float32 from -0.1"),
    "not a number": ({"x_train": np.full((120, 8, 8), np.nan)}, "from nan to nan"),
    "infinite": ({"x_train": np.full((120, 8, 8), np.inf)}, "to inf"),
    "test without labels": ({"x_test": np.zeros((9, 8, 8, 3), np.uint8)}, "only one of x_test and y_test"),
    "test of another size": (
        {"x_test": np.zeros((9, 9, 9, 3), np.uint8), "y_test": np.zeros(9, int)},
        r"training images are \(8, 8, 3\), test images \(9, 9, 3\)",
    ),
    "empty test": ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, "test images have shape"),
    "test of another class": (
        {"x_test": np.zeros((9, 8, 8, 3), np.uint8), "y_test": np.full(9, 3)},
        "no training image has label 3",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arrays_in_one_line(
    tmp_path: Path, rng: np.random.Generator, changed: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **{**arrays(rng), **changed})
    with pytest.raises(BadData, match=message) as caught:
        load_data(path)
    assert "\n" not in str(caught.value)


def not_a_zip(path: Path) -> None:
    path.write_bytes(b"PK but not a zip")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def single_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def pickled(path: Path) -> None:
    objects = np.array([{}, {}], dtype=object)
    np.savez(path, x_train=objects, y_train=np.zeros(2, int), allow_pickle=True)


def without_labels(path: Path) -> None:
    np.savez(path, x_train=np.zeros((3, 8, 8), np.uint8), extra=np.zeros(1))


def without_arrays(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


def damaged_inside(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    np.savez_compressed(path, x_train=noise, y_train=np.arange(120) % 3)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    np.savez(path, x_train=np.zeros((120, 8, 8), np.uint8), y_train=np.arange(120) % 3)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (not_a_zip, "not a readable .npz file"),
        (empty, "not a readable .npz file"),
        (single_array, "holds a single array; expected an .npz"),
        (pickled, "not a readable .npz file of plain arrays"),
        (without_labels, "lacks y_train; it holds x_train, extra"),
        (without_arrays, "lacks x_train, y_train; it holds nothing|not a readable .npz"),
        (damaged_inside, "not a readable .npz file"),
        (cut_short, "not a readable .npz file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_are_no_data(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(BadData, match=message) as caught:
        load_data(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"no data at .*none\.npz'.*expected 'digits', an \.npz file or a folder"):
        load_data(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"val_search": 0}, "val_search = 0: cannot take so many of 96 images; expected a share between 0 and 1, or a"),
        ({"val_search": -3}, "val_search = -3: cannot take"),
        ({"val_front": 1000}, "val_front = 1000: cannot take so many of 87 images; .* or a number below 87"),
        ({"test": float("nan")}, "test = nan: cannot take so many of 120 images"),
        ({"calibration": 0}, "calibration = 0; expected a number of images, 2 or more"),
        ({"calibration": 1}, "calibration = 1; expected a number of images, 2 or more"),
        ({"calibration": -5}, "calibration = -5; expected"),
        ({"train_share": 0}, "train_share = 0; expected a share above 0, up to 1"),
        ({"train_share": 1.5}, r"train_share = 1\.5; expected"),
        ({"train_share": float("nan")}, "train_share = nan; expected"),
        ({"coreset": "greedy"}, "coreset = 'greedy'; expected one of random, dataset_quantization"),
    ],
)
def test_bad_sizes(rng: np.random.Generator, sizes: dict[str, Any], message: str) -> None:
    held = arrays(rng)
    with pytest.raises(BadData, match=message):
        from_arrays(held["x_train"], held["y_train"], **sizes)


def test_too_few_images_for_the_splits(rng: np.random.Generator) -> None:
    with pytest.raises(BadData, match=r"split is empty: 3 images are too few for val_search = 0\.1"):
        from_arrays(rng.integers(0, 256, (3, 8, 8), dtype=np.uint8), np.array([0, 1, 0]))


# splits --------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_stratified_and_fixed_by_the_seed(rng: np.random.Generator) -> None:
    held = arrays(rng, 600)
    data, again, other = (from_arrays(held["x_train"], held["y_train"], calibration=40, seed=s) for s in (3, 3, 4))
    parts = [indices(data, split) for split in ("train", "val_search", "val_front", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 600
    assert len(data["calibration"]) == 40 and indices(data, "calibration") < indices(data, "train")
    assert [len(part) for part in parts[1:]] == [48, 42, 120]  # 0.1 of 480, 0.1 of 432 rounded a class, 0.2 of 600
    for split in SPLITS:
        assert np.array_equal(data[split].indices, again[split].indices), split
        assert not np.array_equal(data[split].indices, other[split].indices), split
        np.testing.assert_array_equal(data[split].labels, held["y_train"][data[split].indices])
        if split != "calibration":
            assert np.ptp(np.bincount(data[split].labels)) <= 1, split
    assert data.key == again.key != other.key


def test_a_given_test_set_is_the_test_split(tmp_path: Path, rng: np.random.Generator) -> None:
    tests = {"x_test": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), "y_test": np.arange(20) % 3}
    held = arrays(rng) | tests
    np.savez(tmp_path / "data.npz", **held, classes=np.array(["ant", "bee", "cat"]))
    data = load_data(tmp_path / "data.npz", val_search=12, val_front=9, calibration=10**6)
    assert data.classes == ("ant", "bee", "cat") and data.name == "data"
    pixels, labels = next(data["test"].batches(20))
    np.testing.assert_array_equal(pixels.numpy().transpose(0, 2, 3, 1), tests["x_test"])
    np.testing.assert_array_equal(labels, tests["y_test"])
    assert [len(data[split]) for split in SPLITS] == [99, 99, 12, 9, 20]
    seen = torch.cat([pixels for split in ("train", "val_search", "val_front") for pixels, _ in data[split].batches(7)])
    expected = sorted(image.tobytes() for image in held["x_train"].transpose(0, 3, 1, 2))
    assert sorted(image.numpy().tobytes() for image in seen) == expected


def test_a_class_of_one_image_stays_in_train(rng: np.random.Generator) -> None:
    held = arrays(rng, 61)
    held["y_train"][60] = 3
    data = from_arrays(held["x_train"], held["y_train"])
    assert 60 in indices(data, "train") and data.classes == ("0", "1", "2", "3")


def test_no_class_is_taken_out_of_train_whole(rng: np.random.Generator) -> None:
    labels = np.array([0] * 4 + [1] * 100)
    data = from_arrays(rng.integers(0, 256, (104, 8, 8), dtype=np.uint8), labels, test=0.9, calibration=2)
    assert data["test"].labels.tolist().count(0) == 3
    assert data["train"].labels.tolist().count(0) == 1


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_become_the_nearest_bytes(rng: np.random.Generator, kind: type) -> None:
    x = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    same = from_arrays((x / 255.0).astype(kind), np.arange(40) % 2)
    assert same.key == from_arrays(x, np.arange(40) % 2).key


def test_arrays_are_copied(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    x.flags.writeable = False  # torch warns where memory that must not be written is shared
    data = from_arrays(x, np.arange(40) % 2)
    before = next(data["train"].batches(50))[0].clone()
    x.flags.writeable = True
    x[:] = 0
    assert torch.equal(next(data["train"].batches(50))[0], before)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_mean_and_deviation_against_numpy(rng: np.random.Generator, channels: int) -> None:
    x = rng.integers(0, 256, (300, 8, 8, channels), dtype=np.uint8)
    x[..., 0] //= 2
    data = from_arrays(x, np.arange(300) % 3)
    train = x[data["train"].indices] / 255.0
    np.testing.assert_allclose(data.mean, train.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(data.std, train.std((0, 1, 2)), rtol=1e-9)
    inputs = torch.cat([x for x, _ in data.batches("train", 8, 64)])
    np.testing.assert_allclose(inputs.mean((0, 2, 3)), np.zeros(channels), atol=1e-5)
    np.testing.assert_allclose(inputs.std((0, 2, 3), correction=0), np.ones(channels), atol=1e-5)


def test_prepare_at_another_resolution_is_pillow_s_antialiased_bilinear(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (20, 16, 16), dtype=np.uint8)
    data = from_arrays(x, np.arange(20) % 2)
    for side in (8, 11, 24):
        got = data.prepare(torch.from_numpy(x[:4, None].copy()), side) * data.std[0] + data.mean[0]
        for image, expected in zip(got, x[:4], strict=True):
            resized = Image.fromarray(expected).resize((side, side), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(image[0] * 255, np.asarray(resized, dtype=float), atol=1.01)  # Pillow rounds


def test_prepare_leaves_its_images_alone_and_takes_blended_ones(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (20, 8, 8), dtype=np.uint8)
    data = from_arrays(x, np.arange(20) % 2)
    bytes_, floats = torch.from_numpy(x[:, None].copy()), torch.from_numpy(x[:, None].astype(np.float32))
    for side in (8, 5):
        first, second, again = data.prepare(bytes_, side), data.prepare(floats, side), data.prepare(floats, side)
        assert torch.equal(first, second) and torch.equal(second, again)
    np.testing.assert_array_equal(floats[:, 0], x)


def test_digits() -> None:
    data = load_data("digits")
    assert (data.channels, data.side, len(data.classes)) == (1, 8, 10)
    assert sum(len(data[split]) for split in ("train", "val_search", "val_front", "test")) == 1797


def test_cifar10(data_folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "cifar10.npz"
    subprocess.run([sys.executable, data_folder / "load.py", "cifar10", path], check=True, capture_output=True)
    data = load_data(path, val_search=1000, val_front=2000)
    assert [len(data[split]) for split in SPLITS] == [47000, 512, 1000, 2000, 10000]
    assert (data.channels, data.side, len(data.classes)) == (3, 32, 10)


test_cifar10 = pytest.mark.slow(test_cifar10)


# coresets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coreset", CORESETS)
def test_a_share_of_the_training_images_of_every_class(rng: np.random.Generator, coreset: str) -> None:
    x, y = rng.integers(0, 256, (600, 8, 8, 3), dtype=np.uint8), np.repeat([0, 1, 2], [300, 200, 100])
    whole = from_arrays(x, y, calibration=40)
    part, again = (from_arrays(x, y, calibration=40, train_share=0.3, coreset=coreset) for _ in range(2))
    for split in ("val_search", "val_front", "test"):
        assert np.array_equal(part[split].indices, whole[split].indices), split
    assert indices(part, "calibration") < indices(part, "train") < indices(whole, "train")
    assert len(part["calibration"]) == 40
    expected = [round(0.3 * size) for size in np.bincount(whole["train"].labels)]
    assert np.bincount(part["train"].labels).tolist() == expected
    assert part.key == again.key != whole.key
    np.testing.assert_allclose(part.mean, (x[part["train"].indices] / 255.0).mean((0, 1, 2)), rtol=1e-9)


def test_the_way_of_choosing_changes_the_key_and_the_whole_set_does_not(rng: np.random.Generator) -> None:
    held = arrays(rng)
    chosen = [{"train_share": 0.5}, {"train_share": 0.5, "coreset": "dataset_quantization"}, {"train_share": 0.4}, {}]
    keys = [from_arrays(held["x_train"], held["y_train"], **how).key for how in chosen]
    assert len(set(keys)) == 4
    assert from_arrays(held["x_train"], held["y_train"], coreset="dataset_quantization").key == keys[-1]


def test_a_class_of_one_image_stays_in_the_coreset(rng: np.random.Generator) -> None:
    labels = np.array([0] * 60 + [1])
    for coreset in CORESETS:
        x = rng.integers(0, 256, (61, 8, 8), dtype=np.uint8)
        data = from_arrays(x, labels, train_share=0.1, coreset=coreset, calibration=2)
        assert 60 in indices(data, "train")


def test_dataset_quantization_keeps_the_share_of_unusual_images_where_random_draws_do_not(
    rng: np.random.Generator,
) -> None:
    """A fifth of the images lies far out, so in the last bins, of each of which the same share is drawn."""
    labels, unusual = np.arange(600) % 2, rng.random(600) < 0.2
    contrast = np.where(unusual, 40, 8)[:, None, None]
    x = (128 + contrast * rng.normal(size=(600, 8, 8))).clip(0, 255).astype(np.uint8)

    def share(coreset: str, seed: int, train_share: float) -> float:
        data = from_arrays(x, labels, test=0.1, seed=seed, train_share=train_share, coreset=coreset)
        return float(unusual[data["train"].indices].mean())

    spread = {
        coreset: np.std([share(coreset, seed, 0.1) - share(coreset, seed, 1.0) for seed in range(40)])
        for coreset in CORESETS
    }
    assert spread["dataset_quantization"] < 0.6 * spread["random"]  # 0.02 and 0.06


# folders -------------------------------------------------------------------------------------------------


def paint(path: Path, value: int, *, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16") else (value, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 15 images whose red says which they are."""
    root = tmp_path / "pictures"
    for number in range(15):
        paint(root / "ant" / f"{number:02}.png", number)
        paint(root / "bee" / f"{number:02}.png", 100 + number)
    return root


def reds(data: Data, split: str) -> list[int]:
    return [int(image[0, 0, 0]) for pixels, _ in data[split].batches(4) for image in pixels]


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_streamed_in_order(folder: Path, workers: int) -> None:
    data = load_data(folder, workers=workers, calibration=6)
    assert (data.classes, data.channels, data.side, data.name) == (("ant", "bee"), 3, 12, "pictures")
    seen = [red for split in ("train", "val_search", "val_front", "test") for red in reds(data, split)]
    assert sorted(seen) == [*range(15), *range(100, 115)]
    for split in SPLITS:
        assert [int(red >= 100) for red in reds(data, split)] == data[split].labels.tolist()
    picked = [np.array([15, 0]), np.array([5]), np.array([14, 14, 2])]  # of both classes
    train = reds(data, "train")
    got = [[int(image[0, 0, 0]) for image in pixels] for pixels, _ in data["train"].at(picked)]
    assert got == [[train[i] for i in batch] for batch in picked]
    labels = [labels.tolist() for _, labels in data["train"].at(picked)]
    assert labels == [[int(train[i] >= 100) for i in batch] for batch in picked]


def test_only_the_images_asked_for_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(folder, workers=0, val_search=4, val_front=4, calibration=4)
    opened = []
    real = Image.open

    def spy(path: Path, *rest: Any) -> Any:
        opened.append(path)
        return real(path, *rest)

    monkeypatch.setattr(Image, "open", spy)
    next(data["train"].at([np.array([0, 1, 2]), np.array([3])]))
    assert len(opened) == 3


def test_a_coreset_of_a_folder_reads_each_training_image_once_and_small(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []
    real = FolderImages.stream

    def spy(self: FolderImages, batches: Any) -> Any:
        seen.append((self.side, sorted(int(i) for batch in batches for i in batch)))
        return real(self, batches)

    monkeypatch.setattr(FolderImages, "stream", spy)
    settings: dict[str, Any] = {"workers": 0, "val_search": 4, "val_front": 4, "calibration": 4}
    whole = load_data(folder, **settings)
    seen.clear()
    data = load_data(folder, train_share=0.5, coreset="dataset_quantization", **settings)
    assert seen[0] == (8, whole["train"].indices.tolist())
    assert [side for side, _ in seen[1:]] == [12]  # pixel statistics, of the images that are kept
    kept = np.bincount(data["train"].labels)
    assert kept.tolist() == [round(size / 2) for size in np.bincount(whole["train"].labels)]
    assert next(data["train"].batches(4))[0].shape[2:] == (12, 12)


@FORKS
def test_streaming_leaves_global_random_states_alone(folder: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    data = load_data(folder, workers=2)
    list(data["train"].batches(4))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "bomb"])
def test_a_damaged_image_is_named_in_one_line(folder: Path, workers: int, damage: str) -> None:
    data = load_data(folder, workers=workers)
    victim = folder / "bee" / "07.png"
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(victim)
    content = {
        "cut": victim.read_bytes()[:-200],
        "text": b"not an image",
        "empty": b"",
        "bomb": victim.read_bytes()[:16] + b"\x00\x0f\xff\xff" * 2 + victim.read_bytes()[24:],  # 1M x 1M pixels
    }
    victim.write_bytes(content[damage])
    with pytest.raises(BadData, match=r"^\S*07\.png is not a readable image \(.*\); remove or replace it$"):
        for split in ("train", "val_search", "val_front", "test"):
            list(data[split].batches(4))


def test_a_damaged_first_image(folder: Path) -> None:
    (folder / "bee" / "00.png").write_bytes(b"")
    with pytest.raises(BadData, match=r"00\.png is not a readable image"):
        load_data(folder)


def test_grey_and_colour(tmp_path: Path) -> None:
    for number in range(8):
        paint(tmp_path / "grey" / f"{number}.png", 30 * number, mode="L")
        paint(tmp_path / "deep" / f"{number}.png", 30 * number * 256 + 77, mode="I;16")
    data = load_data(tmp_path, workers=0)
    assert data.channels == 1
    seen = [red for split in ("train", "val_search", "val_front", "test") for red in reds(data, split)]
    assert sorted(seen) == sorted([*range(0, 240, 30)] * 2)
    paint(tmp_path / "zebra" / "0.jpg", 50)
    assert load_data(tmp_path, workers=0).channels == 3


def test_images_of_any_shape_are_resized_whole(tmp_path: Path) -> None:
    for number in range(8):
        paint(tmp_path / "wide" / f"{number}.png", 10, size=(40 + number, 20))
        paint(tmp_path / "tall" / f"{number}.png", 20, size=(300, 250))
    data = load_data(tmp_path, workers=0)
    assert data.side == 224  # of tall/0.png, whose sides are longer
    assert {tuple(pixels.shape[1:]) for pixels, _ in data["train"].batches(3)} == {(3, 224, 224)}
    assert load_data(tmp_path, workers=0, side=10)["train"].images.side == 10
    with pytest.raises(BadData, match="side of -1 pixels; expected 1 or more"):
        load_data(tmp_path, side=-1)
    halves = Image.new("L", (40, 20))
    halves.paste(255, (20, 0, 40, 20))
    halves.convert("RGB").save(tmp_path / "wide" / "0.png")
    position = next(i for i, p in enumerate(data["train"].images.paths) if p.name == "0.png" and "wide" in str(p))  # type: ignore[attr-defined]
    image = next(iter(load_data(tmp_path, workers=0, side=8)["train"].images.stream([np.array([position])])))[0, 0]
    assert image[:, :3].max() == 0 and image[:, 5:].min() == 255


def test_nested_hidden_and_stray_files(folder: Path) -> None:
    plain = load_data(folder, workers=0)
    (folder / "notes.txt").write_text("stray")
    (folder / "bee" / "notes.txt").write_text("stray")
    (folder / "bee" / "._00.png").write_bytes(b"left by another system")
    (folder / "bee" / "folder.png").mkdir()
    (folder / ".cache").mkdir()
    paint(folder / "bee" / ".thumbnails" / "0.png", 3)
    assert load_data(folder, workers=0).key == plain.key
    paint(folder / "bee" / "more" / "deep" / "99.PNG", 199)
    nested = load_data(folder, workers=0)
    assert sum(len(nested[split]) for split in ("train", "val_search", "val_front", "test")) == 31


def test_train_and_test_folders(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    folder.rename(tmp_path / "train")
    root.mkdir()
    (tmp_path / "train").rename(root / "train")
    drawn = load_data(root, workers=0)
    assert len(drawn["test"]) == 6
    (root / "test").mkdir()
    with pytest.raises(BadData, match=r"test has no images; add some, or remove it"):
        load_data(root)
    for number in range(4):
        paint(root / "test" / "bee" / f"{number}.png", 200 + number)
    data = load_data(root, workers=0)
    assert reds(data, "test") == [200, 201, 202, 203] and data["test"].labels.tolist() == [1] * 4
    assert sorted(r for split in ("train", "val_search", "val_front") for r in reds(data, split))[-1] == 114
    paint(root / "test" / "cow" / "0.png", 0)
    with pytest.raises(BadData, match=r"test/cow is a class without training images"):
        load_data(root)


def test_a_class_may_be_called_train(folder: Path) -> None:
    for number in range(10):
        paint(folder / "train" / f"{number}.png", 220)
    assert load_data(folder, workers=0).classes == ("ant", "bee", "train")


def test_folders_without_images(tmp_path: Path, folder: Path) -> None:
    (folder / "cow").mkdir()
    with pytest.raises(BadData, match=r"pictures/cow has no images; expected one folder of images a class"):
        load_data(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BadData, match=r"nothing has no images; expected one folder"):
        load_data(tmp_path / "nothing")
    with pytest.raises(BadData, match="same class"):
        (folder / "cow").rmdir()
        for path in (folder / "bee").iterdir():
            path.unlink()
        (folder / "bee").rmdir()
        load_data(folder)


def test_key_follows_the_files(folder: Path) -> None:
    before = load_data(folder, workers=0).key
    assert load_data(folder, workers=0).key == before
    assert load_data(folder, workers=0, side=9).key != before
    (folder / "ant" / "00.png").rename(folder / "ant" / "first.png")
    assert load_data(folder, workers=0).key != before


def test_messages_hold_no_line_break(folder: Path) -> None:
    (folder / "cow").mkdir()
    with pytest.raises(BadData) as caught:
        load_data(folder)
    assert not re.search(r"[\r\n]", str(caught.value))
