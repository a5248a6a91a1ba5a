"""Labelled or unlabelled images from where a settings file says they are, read in batches.

Lives here: npz files, image folders, torchvision's data set classes and the embedded sample, behind one small
class. Does not live here: the pool (common/pool) and what becomes of the pixels (common/preprocessing).
"""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from consilience.common.errors import DataError, MissingExtraError
from consilience.common.preprocessing import Images, resize
from consilience.common.settings import DataSource, EmbeddedData, FolderData, NpzData, TorchvisionData

MOST_CLASSES = 1_000_000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


@dataclass(frozen=True)
class ImageData:
    """Images of one shape, with one label each, any number of labels each, or none at all.

    `shape` is (H, W, C); `labels` (n,) int64 or None; `many` (n, L) int8 or None: 1 where a label applies, 0 where it
    does not, -1 where that is not known; `class_names` name the labels (empty without labels); `read(ids)` returns
    (len(ids), H, W, C) uint8 for any integer ids.
    """

    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    length: int
    reader: Callable[[NDArray[np.int64]], Images]
    many: NDArray[np.int8] | None = None

    def __len__(self) -> int:
        return self.length

    def read(self, ids: Sequence[int] | NDArray[np.int64] | slice = slice(None)) -> Images:
        """Return the images with these ids, (len(ids), H, W, C) uint8. Raises `DataError`."""
        wanted = np.arange(self.length)[ids] if isinstance(ids, slice) else np.asarray(ids, np.int64)
        return self.reader(wanted)

    def need_labels(self, what: str) -> NDArray[np.int64]:
        """Return the labels; raises `DataError` saying that `what` needs them when there are none, or several."""
        if self.many is not None:
            raise DataError(
                f"{what} has any number of labels an image, (n, {self.many.shape[1]}); one label an image is needed",
                hint="Give one whole number an image, or take a multi-label teacher (teacher.labels: multi)",
            )
        if self.labels is None:
            raise DataError(f"{what} has images but no labels", hint="Name the array or the folders of classes")
        return self.labels

    def need_many(self, what: str) -> NDArray[np.int8]:
        """Return (n, L) int8 labels as in `many`; raises `DataError` saying that `what` needs them."""
        if self.many is None:
            held = "no labels" if self.labels is None else "one label an image"
            raise DataError(
                f"{what} has {held}; labels of shape (n, number of labels) are needed, 1 where one applies, else 0",
                hint="Give such labels, or take a single-label teacher (teacher.labels: single)",
            )
        return self.many

    def subset(self, ids: NDArray[np.int64]) -> ImageData:
        """Return the images with these ids, read only when asked for."""
        labels = None if self.labels is None else self.labels[ids]
        many = None if self.many is None else self.many[ids]
        return ImageData(self.shape, labels, self.class_names, len(ids), lambda wanted: self.reader(ids[wanted]), many)


def open_data(source: DataSource) -> ImageData:
    """Open what a settings file names. Raises `DataError` or `MissingExtraError`."""
    if isinstance(source, NpzData):
        return _open_npz(source)
    if isinstance(source, FolderData):
        return _open_folder(source)
    if isinstance(source, TorchvisionData):
        return _open_torchvision(source)
    return _open_embedded(source)


def from_arrays(
    images: NDArray[Any], labels: NDArray[Any] | None, class_names: Sequence[str], *, where: str
) -> ImageData:
    """Check arrays and wrap them. `where` names their origin in errors. Raises `DataError`."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise DataError(
            f"{where}: images have shape {images.shape} and type {images.dtype}; "
            "allowed: (n, H, W), (n, H, W, 1) or (n, H, W, 3) uint8",
            hint="Convert the images",
        )
    checked = many = None
    if labels is not None and labels.ndim == 2:
        many = check_many(labels, len(images), class_names, where)
    elif labels is not None:
        checked = _check_labels(labels, len(images), class_names, where)
    names = () if labels is None else tuple(class_names)
    height, width, channels = images.shape[1:]
    return ImageData((height, width, channels), checked, names, len(images), lambda ids: images[ids], many)


def check_many(labels: NDArray[Any], n: int, names: Sequence[str], where: str) -> NDArray[np.int8]:
    """Return (n, L) int8 labels of `n` images, one column for each of `names`: 1 applies, 0 does not, -1 not known.

    Whole numbers, truth values, or numbers of which NaN is not known. Raises `DataError`.
    """
    if labels.shape != (n, len(names)) or labels.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: labels have shape {labels.shape} and type {labels.dtype}; allowed: ({n}, {len(names)}) numbers, "
            f"one column for each of {len(names)} names",
            hint="Give a 0 or a 1 for each image and label, or one whole number an image",
        )
    known = np.where(np.isnan(labels), -1, labels) if labels.dtype.kind == "f" else labels
    wrong = np.argwhere(~np.isin(known, (-1, 0, 1)))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            f"{where}: label {known[row, column]} of sample {row}, {names[column]!r}; allowed: 1 where it applies, 0 "
            "where it does not, -1 or NaN where that is not known",
            hint="Correct the labels",
        )
    _need_once(names, where)
    return known.astype(np.int8)


def _check_labels(labels: NDArray[Any], n: int, names: Sequence[str], where: str) -> NDArray[np.int64]:
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where}: labels have shape {labels.shape} and type {labels.dtype}; allowed: ({n},) integers",
            hint="Give one whole number an image",
        )
    checked = labels.astype(np.int64)
    wrong = np.flatnonzero((checked < 0) | (checked >= len(names)))
    if len(wrong):
        raise DataError(
            f"{where}: label {checked[wrong[0]]} of sample {wrong[0]} is out of range; "
            f"allowed: 0 to {len(names) - 1} for {len(names)} class names",
            hint="Correct the labels or the names",
        )
    _need_once(names, where)
    return checked


def _need_once(names: Sequence[str], where: str) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"{where}: class {twice!r} is named twice", hint="Give every class its own name")


def _open_npz(source: NpzData) -> ImageData:
    where = str(source.path)
    try:
        with source.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            held = {key: file[key] for key in (source.images, source.labels, source.names) if key and key in file.files}
            present = file.files
    except FileNotFoundError:
        raise DataError(f"{where}: no such file", hint="Correct the path") from None
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{where}: not an npz file of plain arrays", hint="Save it with numpy.savez, without object arrays"
        ) from error
    if source.images not in held:
        raise DataError(
            f"{where}: has no array {source.images!r}; there are: {', '.join(present)}",
            hint="Name the array in the field images",
        )
    labels = held.get(source.labels) if source.labels else None
    if labels is None:
        return from_arrays(held[source.images], None, (), where=where)
    if source.names and source.names in held:
        names = [str(name) for name in held[source.names]]
    else:
        names = _numbered(labels, where)
    return from_arrays(held[source.images], labels, names, where=where)


def _numbered(labels: NDArray[Any], where: str) -> list[str]:
    """Return names for classes that have only numbers. Raises `DataError` for labels that cannot be class numbers."""
    if labels.ndim == 2:
        return [str(i) for i in range(labels.shape[1])]
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels have type {labels.dtype}; allowed: integers", hint="Number the classes")
    most = int(labels.max(initial=-1))
    if most >= MOST_CLASSES:
        raise DataError(
            f"{where}: label {most} is out of range; allowed: below {MOST_CLASSES:,}", hint="Number classes from 0"
        )
    return [str(i) for i in range(most + 1)]


def _open_folder(source: FolderData) -> ImageData:
    root = source.path
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", hint="Correct the path")
    classes = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    loose = [child.name for child in sorted(root.iterdir()) if child.suffix.lower() in IMAGE_SUFFIXES]
    if classes and loose:
        raise DataError(
            f"{root}: holds folders of classes ({classes[0]}) and loose images ({loose[0]})",
            hint="Move the loose images into the folder of their class, or all images into one folder",
        )
    if classes:
        found = [(path, k) for k, name in enumerate(classes) for path in _image_files(root / name)]
        labels = np.array([k for _, k in found], np.int64)
        files = [path for path, _ in found]
    else:
        files, labels = _image_files(root), None
    if not files:
        raise DataError(
            f"{root}: holds no images; allowed suffixes: {', '.join(IMAGE_SUFFIXES)}", hint="Correct the path"
        )
    size = source.size or _decode(files[0], source.channels).shape[:2]

    def read(ids: NDArray[np.int64]) -> Images:
        out = np.empty((len(ids), *size, source.channels), np.uint8)
        for row, i in enumerate(ids):
            image = _decode(files[i], source.channels)
            if source.size:
                image = resize(image[None], source.size)[0]
            if image.shape != out.shape[1:]:
                raise DataError(
                    f"{files[i]}: image is {image.shape[1]}x{image.shape[0]}; the first one is {size[1]}x{size[0]}",
                    hint="Set size: [height, width] to resize all images alike",
                )
            out[row] = image
        return out

    return ImageData((*size, source.channels), labels, tuple(classes), len(files), read)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _decode(path: Path, channels: int) -> Images:
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path}: has more than 8 bits a channel (mode {picture.mode}); allowed: 8",
                    hint="Convert the images to 8 bits a channel, with a window that suits them",
                )
            return _as_array(picture, channels)
    except DataError:
        raise
    except Exception as error:  # a decoder fails in many ways on a file that is no image
        raise DataError(f"{path}: cannot be read as an image", hint="Remove or replace the file") from error


def load_image(path: Path, shape: tuple[int, int, int]) -> Images:
    """Decode one image file and bring it to `shape` (H, W, C). Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint="Correct the path")
    image: Images = resize(_decode(path, shape[2])[None], shape[:2])[0]
    return image


def _open_torchvision(source: TorchvisionData) -> ImageData:
    try:
        vision = importlib.import_module("consilience.common.nets.vision")
        data = vision.open_dataset(source.dataset, source.root, dict(source.options))
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"torchvision data {source.dataset!r} needs the module {error.name}",
            hint="pip install 'consilience[vision]'",
        ) from error
    first = _as_array(data[0][0], source.channels)
    size = source.size or first.shape[:2]

    def read(ids: NDArray[np.int64]) -> Images:
        rows = [resize(_as_array(data[int(i)][0], source.channels)[None], size)[0] for i in ids]
        return np.stack(rows) if rows else np.empty((0, *size, source.channels), np.uint8)

    targets = getattr(data, "targets", getattr(data, "labels", None))
    if targets is None:
        targets = [data[i][1] for i in range(len(data))]
    labels = np.asarray(targets)
    names = list(getattr(data, "classes", ())) or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    checked = _check_labels(labels, len(data), names, f"torchvision {source.dataset}")
    return ImageData((*size, source.channels), checked, tuple(map(str, names)), len(data), read)


def _as_array(picture: Any, channels: int) -> Images:
    image: Images = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
    return image[..., None] if channels == 1 else image


def _open_embedded(source: EmbeddedData) -> ImageData:
    name = "consilience.deploy/example/fashion.npz"
    file = resources.files("consilience") / "deploy" / "example" / "fashion.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
        images, labels = held[f"{source.split}_x"], held[f"{source.split}_y"]
        return from_arrays(images, labels, [str(n) for n in held["names"]], where=name)
