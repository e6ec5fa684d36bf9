"""Data sets: arrays in memory, an .npz file, or a folder of images that is streamed.

Whatever the source, a data set is five splits (train, calibration, val_search, val_front, test) of uint8
images with integer labels. calibration is a fixed part of train, for norm statistics and quantization
ranges; val_search is what a search sees, val_front what its front is measured with, both taken out of the
training images by seed; test is only read at export.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "calibration", "val_search", "val_front", "test")
RESIZING = "bilinear, antialiased, half-pixel centres, over the whole image"


class BadData(ValueError):
    """Data that cannot be trained on; the message says what was got and what was expected."""


class Images(Protocol):
    """Images by index: (n, channels, side, side) uint8 tensors, never all in memory at once."""

    channels: int
    side: int

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """One uint8 tensor (len(batch), channels, side, side) for each array of indices, in order."""

    def digest(self) -> str:
        """Changes when the images do."""


class ArrayImages:
    """Images held in memory: uint8 (n, height, width[, channels])."""

    def __init__(self, pixels: np.ndarray) -> None:
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        self._pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        self.channels, self.side = int(self._pixels.shape[1]), int(self._pixels.shape[2])

    def __len__(self) -> int:
        return len(self._pixels)

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for batch in batches:
            yield self._pixels[torch.from_numpy(batch)]

    def digest(self) -> str:
        return hashlib.sha256(self._pixels.numpy().tobytes()).hexdigest()


class _ImageFiles(torch.utils.data.Dataset[Tensor]):
    def __init__(self, paths: Sequence[Path], channels: int, side: int) -> None:
        self.paths, self.channels, self.side = paths, channels, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("L" if self.channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise BadData(f"{path} is not a readable image ({error}); remove or replace it") from None
        image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8).reshape(self.side, self.side, self.channels)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class FolderImages:
    """Images in files, decoded and resized by worker processes as they are needed."""

    def __init__(self, paths: Sequence[Path], channels: int, side: int, workers: int) -> None:
        self.paths, self.channels, self.side, self.workers = tuple(paths), channels, side, workers

    def __len__(self) -> int:
        return len(self.paths)

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(
            _ImageFiles(self.paths, self.channels, self.side),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(self.workers, len(batches)) if len(batches) > 1 else 0,
            generator=torch.Generator().manual_seed(0),  # its workers draw nothing; this keeps the global state untouched
        )
        yield from loader

    def digest(self) -> str:
        described = "\n".join(f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in self.paths)
        return hashlib.sha256(f"{self.side} {self.channels}\n{described}".encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Some images of a data set, with their labels."""

    images: Images
    indices: np.ndarray  # (n,) int64, into images
    labels: Tensor  # (n,) int64

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int, positions: Sequence[np.ndarray] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8, labels) in order, or at the given arrays of positions."""
        if positions is None:
            positions = np.array_split(np.arange(len(self)), max(1, -(-len(self) // batch_size)))
        streamed = self.images.stream([self.indices[batch] for batch in positions])
        for batch, pixels in zip(positions, streamed, strict=True):
            yield pixels, self.labels[torch.from_numpy(batch)]


@dataclass(frozen=True)
class Data:
    """A data set, ready for training: splits, class names and how pixels become network inputs."""

    name: str
    classes: tuple[str, ...]
    channels: int
    side: int
    mean: tuple[float, ...]  # of each channel, over pixels in 0..1
    std: tuple[float, ...]
    splits: dict[str, Split]
    key: str  # digest of images, labels and splits

    def __getitem__(self, split: str) -> Split:
        return self.splits[split]

    def prepare(self, pixels: Tensor, resolution: int) -> Tensor:
        """Network inputs (n, channels, resolution, resolution), float32, of uint8 pixels (n, channels, side, side)."""
        x = pixels.float().div_(255.0)
        if resolution != pixels.shape[-1]:
            x = F.interpolate(x, size=(resolution, resolution), mode="bilinear", antialias=True, align_corners=False)
        mean = torch.tensor(self.mean, device=x.device).reshape(1, -1, 1, 1)
        std = torch.tensor(self.std, device=x.device).reshape(1, -1, 1, 1)
        return x.sub_(mean).div_(std)

    def batches(self, split: str, resolution: int, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """(network inputs, labels) of a split, in order."""
        for pixels, labels in self.splits[split].batches(batch_size):
            yield self.prepare(pixels, resolution), labels


def augment(pixels: Tensor, *, flip: bool, crop_padding: int, generator: torch.Generator) -> Tensor:
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


# loading -------------------------------------------------------------------------------------------------


def load_data(
    source: str | Path,
    *,
    val_search: int | float = 0.1,
    val_front: int | float = 0.1,
    calibration: int = 512,
    test: float = 0.2,
    side: int | None = None,
    workers: int = 2,
    seed: int = 0,
) -> Data:
    """The data set called `source`: `digits`, the path of an .npz file, or of a folder of images.

    Args:
        source: `digits` (scikit-learn's, 8x8 grey); an .npz with x_train, y_train and, if it has them, x_test,
            y_test, classes; or a folder with one folder of images a class, or train/ and test/ of such folders.
        val_search, val_front: images taken out of the training set; a share below 1, or a number.
        calibration: training images whose activations set norm statistics and quantization ranges.
        test: share of the images held out for testing where the source has no test set.
        side: side to which the images of a folder are resized when read; by default that of the first, at most 224.
        workers: processes that decode the images of a folder.
        seed: of the splits.

    Raises BadData, saying what was got and expected.
    """
    sizes = {"val_search": val_search, "val_front": val_front, "calibration": calibration}
    if str(source) == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
        return from_arrays(pixels, digits.target, test=test, seed=seed, name="digits", **sizes)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, sizes, test, side, workers, seed)
    if not path.exists():
        raise BadData(f"no data at {str(path)!r}: expected 'digits', an .npz file or a folder of images")
    return _from_npz(path, sizes, test, seed)


def _from_npz(path: Path, sizes: dict[str, int | float], test: float, seed: int) -> Data:
    try:
        opened = np.load(path, allow_pickle=False)
        arrays = {name: opened[name] for name in opened.files} if isinstance(opened, np.lib.npyio.NpzFile) else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BadData(f"{path} is not an .npz file ({error}); write one with numpy.savez") from None
    if arrays is None:
        raise BadData(f"{path} holds a single array; expected an .npz with x_train and y_train")
    missing = [name for name in ("x_train", "y_train") if name not in arrays]
    if missing:
        raise BadData(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise BadData(f"{path} has only one of x_test and y_test; expected both or none")
    held_out = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
    classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    return from_arrays(
        arrays["x_train"],
        arrays["y_train"],
        held_out,
        classes=classes,
        test=test,
        seed=seed,
        name=path.stem,
        **sizes,
    )


def from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    classes: Sequence[str] | None = None,
    val_search: int | float = 0.1,
    val_front: int | float = 0.1,
    calibration: int = 512,
    test: float = 0.2,
    seed: int = 0,
    name: str = "arrays",
) -> Data:
    """A data set from arrays: images (n, side, side[, channels]), uint8 or float in 0..1, and labels (n,).

    `held_out` is a test set of the same form; without it a share `test` of the images is held out.
    """
    pixels, labels = _checked(x, y, "the training")
    tests = np.empty(0, dtype=np.int64)
    if held_out is not None:
        test_pixels, test_labels = _checked(*held_out, "the test")
        if test_pixels.shape[1:] != pixels.shape[1:]:
            raise BadData(f"training images are {pixels.shape[1:]}, test images {test_pixels.shape[1:]}")
        tests = np.arange(len(pixels), len(pixels) + len(test_pixels))
        pixels, labels = np.concatenate([pixels, test_pixels]), np.concatenate([labels, test_labels])
    sizes = {"val_search": val_search, "val_front": val_front, "calibration": calibration}
    return _assemble(name, ArrayImages(pixels), labels, tests, classes, sizes, test, seed)


def _checked(x: np.ndarray, y: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x), np.asarray(y).reshape(-1)
    if x.ndim not in (3, 4):
        raise BadData(f"{which} images have shape {x.shape}; expected (n, side, side) or (n, side, side, channels)")
    if x.shape[1] != x.shape[2]:
        raise BadData(f"{which} images are {x.shape[1]}x{x.shape[2]}; expected square ones")
    if len(x) != len(y):
        raise BadData(f"{len(x)} images but {len(y)} labels in {which} set; expected as many labels as images")
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating) or not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise BadData(f"{which} images are {x.dtype}; expected uint8, or finite floats from 0 to 1")
        x = np.round(x * 255.0).astype(np.uint8)
    if not np.issubdtype(y.dtype, np.integer):
        raise BadData(f"{which} labels are {y.dtype}; expected integers from 0")
    if len(y) and y.min() < 0:
        raise BadData(f"{which} labels go down to {y.min()}; expected integers from 0")
    return x, y.astype(np.int64)


def _from_folder(
    path: Path, sizes: dict[str, int | float], test: float, side: int | None, workers: int, seed: int
) -> Data:
    from PIL import Image, UnidentifiedImageError

    train_root = path / "train" if (path / "train").is_dir() else path
    test_root = path / "test" if (path / "test").is_dir() and train_root != path else None
    names = sorted(folder.name for folder in train_root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    paths, labels = _image_files(train_root, names)
    if not paths:
        raise BadData(f"{train_root} has no images; expected one folder of images a class")
    tests = np.empty(0, dtype=np.int64)
    if test_root is not None:
        more, more_labels = _image_files(test_root, names)
        tests = np.arange(len(paths), len(paths) + len(more))
        paths, labels = paths + more, labels + more_labels
    try:
        with Image.open(paths[0]) as first:
            channels = 1 if first.mode in ("1", "L", "I;16") else 3
            side = side or min(*first.size, 224)
    except (OSError, UnidentifiedImageError) as error:
        raise BadData(f"{paths[0]} is not a readable image ({error}); remove or replace it") from None
    images = FolderImages(paths, channels, side, workers)
    return _assemble(path.name, images, np.asarray(labels), tests, names, sizes, test, seed)


def _image_files(root: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).glob("**/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _assemble(
    name: str,
    images: ArrayImages | FolderImages,
    labels: np.ndarray,
    tests: np.ndarray,
    classes: Sequence[str] | None,
    sizes: dict[str, int | float],
    test: float,
    seed: int,
) -> Data:
    """Draw the splits, name the classes and measure the pixels."""
    rest = np.setdiff1d(np.arange(len(labels)), tests)
    present = np.unique(labels[rest])
    if len(present) < 2:
        raise BadData(f"all {len(rest)} training labels are the same class; expected at least two classes")
    count = int(labels.max()) + 1
    if classes is not None and len(classes) < count:
        raise BadData(f"labels go up to {count - 1} but only {len(classes)} classes are named")
    classes = tuple(classes) if classes is not None else tuple(str(i) for i in range(count))
    rng = np.random.default_rng(seed)
    if not len(tests):
        tests, rest = _draw(rest, labels, test, rng)
    val_search, rest = _draw(rest, labels, sizes["val_search"], rng)
    val_front, rest = _draw(rest, labels, sizes["val_front"], rng)
    calibration = np.sort(rng.permutation(rest)[: int(sizes["calibration"])])
    chosen = dict(zip(SPLITS, (rest, calibration, val_search, val_front, tests), strict=True))
    for split, indices in chosen.items():
        if not len(indices):
            raise BadData(f"the {split} split is empty: {len(labels)} images are too few for splits of {sizes}")
    splits = {split: Split(images, indices, torch.from_numpy(labels[indices])) for split, indices in chosen.items()}
    mean, std = _pixel_statistics(splits["train"], rng)
    sha = hashlib.sha256(images.digest().encode())
    for split in SPLITS:
        sha.update(chosen[split].tobytes() + labels[chosen[split]].tobytes())
    return Data(name, classes, images.channels, images.side, mean, std, splits, sha.hexdigest())


def _draw(
    indices: np.ndarray, labels: np.ndarray, size: int | float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(drawn, left): about `size` (a share below 1, or a number), the same share of each class."""
    share = float(size) if size < 1 else size / len(indices)
    if not 0 < share < 1:
        raise BadData(f"cannot take {size} of {len(indices)} images; expected a share between 0 and 1 or fewer images")
    drawn = []
    for label in np.unique(labels[indices]):
        members = rng.permutation(indices[labels[indices] == label])
        drawn.append(members[: max(1, round(share * len(members)))] if len(members) > 1 else members[:0])
    taken = np.sort(np.concatenate(drawn))
    return taken, np.setdiff1d(indices, taken)


def _pixel_statistics(split: Split, rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations over at most 2,000 training images, in 0..1."""
    sample = np.sort(rng.permutation(len(split))[:2000])
    total = square = torch.zeros(1, dtype=torch.float64)
    pixels_seen = 0
    for pixels, _ in split.batches(250, np.array_split(sample, max(1, len(sample) // 250))):
        scaled = pixels.double() / 255.0
        total = total + scaled.sum(dim=(0, 2, 3))
        square = square + scaled.square().sum(dim=(0, 2, 3))
        pixels_seen += scaled.shape[0] * scaled.shape[2] * scaled.shape[3]
    mean = total / pixels_seen
    std = (square / pixels_seen - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
