"""Data sets: arrays in memory, an .npz file, or a folder of images that is streamed.

Whatever the source, a data set is five splits (train, calibration, val_search, val_front, test) of uint8
images with integer labels. calibration is a fixed part of train, for norm statistics and quantization
ranges; val_search is what a search sees, val_front what its front is measured with, both taken out of the
training images by seed; test is only read at export.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nas import coreset as coresets

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS = "digits"  # a name, not a path
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "calibration", "val_search", "val_front", "test")
RESIZING = "bilinear, antialiased, half-pixel centres, over the whole image"


class BadData(ValueError):
    """Data that cannot be trained on; the message says what was got and what was expected."""


class Images(Protocol):
    """Images by index, as (n, channels, side, side) uint8 tensors, wherever they are kept."""

    channels: int
    side: int

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """One uint8 tensor (len(batch), channels, side, side) for each array of indices, in order."""

    def digest(self) -> str:
        """Changes when the images do."""


class ArrayImages:
    """Images held in memory: uint8 (n, channels, side, side)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = torch.from_numpy(pixels)
        self.channels, self.side = pixels.shape[1], pixels.shape[2]

    def __len__(self) -> int:
        return len(self._pixels)

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for batch in batches:
            yield self._pixels[torch.from_numpy(batch)]

    def digest(self) -> str:
        return hashlib.sha256(self._pixels.numpy().data).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """An image file; whatever Pillow raises for a damaged one while it is open becomes BadData naming it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadData(f"{path} is not a readable image ({error}); remove or replace it") from None


def _is_grey(path: Path) -> bool:
    with _opened(path) as image:
        return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def _read_image(path: Path, channels: int, side: int) -> np.ndarray:
    """uint8 (channels, side, side) of an image file, the whole image resized, whatever its proportions."""
    from PIL import Image

    with _opened(path) as image:
        if image.mode.startswith("I;16"):  # Pillow clips these to 0..255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("L" if channels == 1 else "RGB").resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8).reshape(side, side, channels).transpose(2, 0, 1)


class _ImageBatches(torch.utils.data.Dataset["Tensor | str"]):
    """One item a batch: its images, or the text of a BadData, since errors leave a worker process disfigured."""

    def __init__(self, images: FolderImages, batches: Sequence[np.ndarray]) -> None:
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | str:
        images = self.images
        try:
            read = [_read_image(images.paths[i], images.channels, images.side) for i in self.batches[index]]
        except BadData as error:
            return str(error)
        return torch.from_numpy(np.stack(read))


class FolderImages:
    """Images in files, decoded and resized by worker processes as they are needed."""

    def __init__(self, paths: Sequence[Path], channels: int, side: int, workers: int) -> None:
        self.paths, self.channels, self.side, self.workers = tuple(paths), channels, side, workers

    def __len__(self) -> int:
        return len(self.paths)

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(
            _ImageBatches(self, batches),
            batch_size=None,
            num_workers=min(self.workers, len(batches)) if len(batches) > 1 else 0,
            generator=torch.Generator().manual_seed(0),  # or the loader draws a seed from the global state
        )
        for item in loader:
            if isinstance(item, str):
                raise BadData(item)
            yield item

    def digest(self) -> str:
        """Of names and sizes of the files: reading them all would take as long as an epoch."""
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

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8, labels) of all images in order, in even batches of at most `batch_size`."""
        return self.at(np.array_split(np.arange(len(self)), max(1, -(-len(self) // batch_size))))

    def at(self, positions: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8, labels) of the images at each array of positions in this split."""
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
        """Network inputs (n, channels, resolution, resolution), float32, of pixels (n, channels, side, side).

        The pixels, uint8 or float32 in 0..255, stay as they are.
        """
        x = pixels / 255.0
        if resolution != pixels.shape[-1]:
            x = F.interpolate(x, size=(resolution, resolution), mode="bilinear", antialias=True, align_corners=False)
        mean = torch.tensor(self.mean, device=x.device).reshape(1, -1, 1, 1)
        std = torch.tensor(self.std, device=x.device).reshape(1, -1, 1, 1)
        return x.sub_(mean).div_(std)

    def batches(self, split: str, resolution: int, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """(network inputs, labels) of a split, in order."""
        for pixels, labels in self.splits[split].batches(batch_size):
            yield self.prepare(pixels, resolution), labels


@dataclass(frozen=True)
class _Sizes:
    """How many images the splits take; see `load_data`."""

    val_search: int | float
    val_front: int | float
    calibration: int
    test: float
    train_share: float
    coreset: str

    def __post_init__(self) -> None:
        try:
            coresets.check(self.train_share, self.coreset)
        except ValueError as error:
            raise BadData(str(error)) from None

    def __str__(self) -> str:
        return ", ".join(f"{name} = {size}" for name, size in vars(self).items())


# loading -------------------------------------------------------------------------------------------------


def load_data(
    source: str | Path,
    *,
    val_search: int | float = 0.1,
    val_front: int | float = 0.1,
    calibration: int = 512,
    test: float = 0.2,
    train_share: float = 1.0,
    coreset: str = "random",
    side: int | None = None,
    workers: int = 2,
    seed: int = 0,
) -> Data:
    """The data set called `source`: `digits`, the path of an .npz file, or of a folder of images.

    Args:
        source: `digits` (scikit-learn's, 8x8 grey); an .npz with x_train, y_train and, if it has them, x_test,
            y_test, classes; or a folder with one folder of images a class, or train/ and test/ of such folders.
        val_search, val_front: images taken out of the training set; a share below 1, or a number.
        calibration: training images whose activations set norm statistics and quantization ranges; 2 or more, since
            one image has no variance.
        test: share of the images held out for testing where the source has no test set.
        train_share: share of the training images, of each class, that are left once the other splits are taken, to
            keep: a proxy that is cheaper to train on.
        coreset: how those are chosen: `random`, or `dataset_quantization`, in every bin from typical to
            unusual images alike; see `nas.coreset`.
        side: side to which the images of a folder are resized when read; by default that of the first, at most 224.
        workers: processes that decode the images of a folder; 0 decodes them in this one.
        seed: of the splits.

    Raises BadData, saying what was got and expected.
    """
    sizes = _Sizes(val_search, val_front, calibration, test, train_share, coreset)
    if str(source) == DIGITS:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
        return _from_arrays(pixels, digits.target, None, None, sizes, seed, "digits")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, sizes, side, workers, seed)
    if not path.exists():
        raise BadData(f"no data at {str(path)!r}: expected 'digits', an .npz file or a folder of images")
    return _from_npz(path, sizes, seed)


def _from_npz(path: Path, sizes: _Sizes, seed: int) -> Data:
    arrays = _read_npz(path, ("x_train", "y_train", "x_test", "y_test", "classes"))
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise BadData(f"{path} has only one of x_test and y_test; expected both or none")
    held_out = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
    classes = [str(name) for name in np.atleast_1d(arrays["classes"])] if "classes" in arrays else None
    return _from_arrays(arrays["x_train"], arrays["y_train"], held_out, classes, sizes, seed, path.stem)


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz file that are called so; x_train and y_train must be."""
    try:
        with path.open("rb") as stream:  # numpy leaves a damaged file open
            opened = np.load(stream, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise BadData(f"{path} holds a single array; expected an .npz with x_train and y_train")
            missing = [name for name in ("x_train", "y_train") if name not in opened.files]
            if missing:
                raise BadData(f"{path} lacks {', '.join(missing)}; it holds {', '.join(opened.files) or 'nothing'}")
            return {name: opened[name] for name in names if name in opened.files}
    except BadData:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise BadData(f"{path} is not a readable .npz file of plain arrays; write one with numpy.savez") from None


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
    train_share: float = 1.0,
    coreset: str = "random",
    seed: int = 0,
    name: str = "arrays",
) -> Data:
    """A data set from arrays: images (n, side, side[, channels]), uint8 or float in 0..1, and labels (n,).

    `held_out` is a test set of the same form; without it a share `test` of the images is held out. The other
    arguments are those of `load_data`.
    The images are copied. Raises BadData, saying what was got and expected.
    """
    sizes = _Sizes(val_search, val_front, calibration, test, train_share, coreset)
    return _from_arrays(x, y, held_out, classes, sizes, seed, name)


def _from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray] | None,
    classes: Sequence[str] | None,
    sizes: _Sizes,
    seed: int,
    name: str,
) -> Data:
    images, labels = _checked(x, y, "training")
    sources, tests = [images], np.empty(0, dtype=np.int64)
    if held_out is not None:
        test_images, test_labels = _checked(*held_out, "test")
        if test_images.shape[1:] != images.shape[1:]:
            raise BadData(f"training images are {images.shape[1:]}, test images {test_images.shape[1:]}")
        tests = np.arange(len(images), len(images) + len(test_images))
        sources, labels = [images, test_images], np.concatenate([labels, test_labels])
    return _assemble(name, ArrayImages(_as_pixels(sources)), labels, tests, classes, sizes, seed)


def _checked(x: np.ndarray, y: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, not converted yet, as (n, side, side, channels), and their labels as int64."""
    x, y = np.asarray(x), np.asarray(y).reshape(-1)
    if x.ndim not in (3, 4):
        raise BadData(f"{which} images have shape {x.shape}; expected (n, side, side) or (n, side, side, channels)")
    if not x.size:
        raise BadData(f"{which} images have shape {x.shape}; expected at least one image")
    if x.shape[1] != x.shape[2]:
        raise BadData(f"{which} images are {x.shape[1]}x{x.shape[2]}; expected square ones, channels last")
    if len(x) != len(y):
        raise BadData(f"{len(x)} images but {len(y)} labels in the {which} set; expected as many labels as images")
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating):
            raise BadData(f"{which} images are {x.dtype}; expected uint8, or floats from 0 to 1")
        low, high = x.min(), x.max()
        if not (low >= 0 and high <= 1):  # NaN included
            raise BadData(f"{which} images are {x.dtype} from {low:g} to {high:g}; expected 0 to 1, or uint8")
    if not np.issubdtype(y.dtype, np.integer):
        raise BadData(f"{which} labels are {y.dtype}; expected integers from 0")
    if y.min() < 0:
        raise BadData(f"{which} labels go down to {y.min()}; expected integers from 0")
    return (x if x.ndim == 4 else x[..., None]), y.astype(np.int64)


def _as_pixels(sources: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (n, channels, side, side) of all sources, a slice at a time: no other copy of the images is made."""
    _, side, _, channels = sources[0].shape
    pixels = np.empty((sum(map(len, sources)), channels, side, side), dtype=np.uint8)
    end = 0
    for source in sources:
        for part in np.array_split(source, -(-len(source) // 1024)):
            start, end = end, end + len(part)
            scaled = part if part.dtype == np.uint8 else np.round(part * 255.0)
            pixels[start:end] = scaled.transpose(0, 3, 1, 2)
    return pixels


def _from_folder(path: Path, sizes: _Sizes, side: int | None, workers: int, seed: int) -> Data:
    """One folder of images a class, or train/ and test/ of such; grey where the first image of every class is."""
    is_split = (path / "train").is_dir() and bool(_class_names(path / "train"))
    train_root = path / "train" if is_split else path
    names = _class_names(train_root)
    found = _image_files(train_root, names)
    empty = [name for name in names if not found[name]]
    if empty or not names:
        lacking = f"{train_root / empty[0]}" if empty else f"{train_root}"
        raise BadData(f"{lacking} has no images; expected one folder of images a class, and no other folder")
    held_out: dict[str, list[Path]] = {}
    if is_split and (path / "test").is_dir():
        unknown = sorted(set(_class_names(path / "test")) - set(names))
        if unknown:
            raise BadData(
                f"{path / 'test' / unknown[0]} is a class without training images; expected the classes of {train_root}"
            )
        held_out = _image_files(path / "test", names)
        if not any(held_out.values()):
            raise BadData(f"{path / 'test'} has no images; add some, or remove it to hold out a share of the others")
    paths = [file for files in (*found.values(), *held_out.values()) for file in files]
    counts = [len(files) for files in (*found.values(), *held_out.values())]
    labels = np.repeat(np.arange(len(counts)) % len(names), counts)
    tests = np.arange(sum(map(len, found.values())), len(paths))
    channels = 1 if all(_is_grey(files[0]) for files in found.values()) else 3
    if side is None:
        with _opened(paths[0]) as first:
            side = min(*first.size, 224)
    if side < 1:
        raise BadData(f"images resized to a side of {side} pixels; expected 1 or more")
    return _assemble(path.name, FolderImages(paths, channels, side, workers), labels, tests, names, sizes, seed)


def _class_names(root: Path) -> list[str]:
    return sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _image_files(root: Path, classes: Sequence[str]) -> dict[str, list[Path]]:
    """Image files of each class, those in folders of its folder too; hidden ones are not the user's images."""

    def is_image(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        return file.suffix.lower() in IMAGE_SUFFIXES and not hidden and file.is_file()

    return {name: sorted(filter(is_image, (root / name).rglob("*"))) for name in classes}


def _assemble(
    name: str,
    images: ArrayImages | FolderImages,
    labels: np.ndarray,
    tests: np.ndarray,
    classes: Sequence[str] | None,
    sizes: _Sizes,
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
    if classes is None and len(present) < count:
        first = int(np.argmax(present != np.arange(len(present)))) if present[-1] >= len(present) else len(present)
        raise BadData(
            f"labels go up to {count - 1} but no training image has label {first}; "
            "number the classes from 0 without gaps, or name them all"
        )
    classes = tuple(classes) if classes is not None else tuple(str(i) for i in range(count))
    rng = np.random.default_rng(seed)
    if not len(tests):
        tests, rest = _draw("test", rest, labels, sizes, rng)
    val_search, rest = _draw("val_search", rest, labels, sizes, rng)
    val_front, rest = _draw("val_front", rest, labels, sizes, rng)
    if sizes.calibration < 2:
        raise BadData(f"calibration = {sizes.calibration}; expected a number of images, 2 or more")
    if sizes.train_share < 1:
        rest = rest[_coreset(images, rest, labels[rest], sizes, rng)]
    calibration = np.sort(rng.permutation(rest)[: int(sizes.calibration)])
    chosen = dict(zip(SPLITS, (rest, calibration, val_search, val_front, tests), strict=True))
    for split, indices in chosen.items():
        if not len(indices):
            raise BadData(f"the {split} split is empty: {len(labels)} images are too few for {sizes}")
    splits = {split: Split(images, indices, torch.from_numpy(labels[indices])) for split, indices in chosen.items()}
    mean, std = _pixel_statistics(splits["train"], rng)
    sha = hashlib.sha256(images.digest().encode())
    for split in SPLITS:
        sha.update(chosen[split].tobytes() + labels[chosen[split]].tobytes())
    return Data(name, classes, images.channels, images.side, mean, std, splits, sha.hexdigest())


def _coreset(
    images: ArrayImages | FolderImages,
    indices: np.ndarray,
    labels: np.ndarray,
    sizes: _Sizes,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sorted positions in `indices` of the share of the training images that is kept."""
    if sizes.coreset == "random":
        return coresets.select_randomly(labels, sizes.train_share, rng)
    if isinstance(images, FolderImages):  # decoded small
        images = FolderImages(images.paths, images.channels, min(images.side, coresets.THUMBNAIL_SIDE), images.workers)
    features = coresets.pixel_features(images.stream(np.array_split(indices, -(-len(indices) // 256))))
    return coresets.select(features, labels, sizes.train_share, rng)


def _draw(
    split: str, indices: np.ndarray, labels: np.ndarray, sizes: _Sizes, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(drawn, left): about the split's size (a share below 1, or a number), the same share of each class."""
    size: int | float = getattr(sizes, split)
    share = float(size) if size < 1 else size / len(indices)
    if not 0 < share < 1:
        expected = f"a share between 0 and 1, or a number below {len(indices)}"
        raise BadData(f"{split} = {size}: cannot take so many of {len(indices)} images; expected {expected}")
    drawn = []
    for label in np.unique(labels[indices]):
        members = rng.permutation(indices[labels[indices] == label])
        count = min(max(1, round(share * len(members))), len(members) - 1)  # one stays behind
        drawn.append(members[:count])
    taken = np.sort(np.concatenate(drawn))
    return taken, np.setdiff1d(indices, taken)


def _pixel_statistics(split: Split, rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations over at most 2,000 training images, in 0..1."""
    sample = np.sort(rng.permutation(len(split))[:2000])
    total = square = torch.zeros(1, dtype=torch.float64)
    pixels_seen = 0
    for pixels, _ in split.at(np.array_split(sample, max(1, len(sample) // 250))):
        scaled = pixels.double() / 255.0
        total = total + scaled.sum(dim=(0, 2, 3))
        square = square + scaled.square().sum(dim=(0, 2, 3))
        pixels_seen += scaled.shape[0] * scaled.shape[2] * scaled.shape[3]
    mean = total / pixels_seen
    std = (square / pixels_seen - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
