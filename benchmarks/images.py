"""Labelled images for benchmarks of whole jobs: read, given away each once, and written where jobs look for them."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from consilience.common.data import ImageData, open_data
from consilience.common.pool import Pool
from consilience.common.settings import EmbeddedData, NpzData
from harness import add_seeds

Images, Labels = NDArray[np.uint8], NDArray[np.int64]


class Source:
    """Labelled images that are given away, each once, class by class in a random order."""

    def __init__(self, images: Images, labels: Labels, random: np.random.Generator) -> None:
        self.images, self.labels = images if images.ndim == 4 else images[..., None], labels
        self._left = {int(c): list(random.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)}

    def take(self, classes: Sequence[int], count: int) -> tuple[Images, Labels]:
        """Return about `count` images, evenly of `classes`; as many as there are left."""
        each = [self._left[c] for c in classes]
        chosen = [held.pop() for held in each for _ in range(min(count // len(classes), len(held)))]
        return self.images[chosen], self.labels[chosen]


def read(name: str, split: str, folders: Sequence[Path]) -> tuple[Images, Labels, list[str]]:
    """Read NAME-SPLIT.npz (x, y, names) from the first folder that has it."""
    if name == "embedded":
        data = open_data(EmbeddedData(kind="embedded", split="train" if split == "train" else "test"))
        return data.read(), data.need_labels(name), list(data.class_names)
    for folder in folders:
        if (folder / f"{name}-{split}.npz").exists():
            with np.load(folder / f"{name}-{split}.npz") as held:
                images = held["x"] if "x" in held else _jpegs(held)
                return images, held["y"].astype(np.int64), [str(n) for n in held["names"]]
    sys.exit(f"{name}-{split}.npz is in none of: {', '.join(map(str, folders))}. Name its folder with --data")


def _jpegs(held: Any) -> Images:
    """Decode JPEG files of one size: a header that all share, and the rest of image i at data[offsets[i]:]."""
    header, data, offsets = held["header"].tobytes(), held["data"].tobytes(), held["offsets"]
    files = (io.BytesIO(header + data[start:end]) for start, end in itertools.pairwise(offsets))
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def joined(parts: Any) -> tuple[Images, Labels]:
    """Return the parts as one."""
    held = list(parts)
    return np.concatenate([images for images, _ in held]), np.concatenate([labels for _, labels in held])


def shuffled(part: tuple[Images, Labels], random: np.random.Generator) -> tuple[Images, Labels]:
    """Return the same in a random order."""
    order = random.permutation(len(part[0]))
    return part[0][order], part[1][order]


def save(path: Path, part: tuple[Images, Labels], names: list[str]) -> NpzData:
    """Write images with labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=part[0], y=part[1], names=np.array(names))
    return NpzData(kind="npz", path=path)


def write_pools(home: Path, pool: tuple[Images, Labels], test: tuple[Images, Labels], names: list[str]) -> None:
    """Write HOME/pool and pool-labels.npy, HOME/test-pool and test.npz, unless the pools are there."""
    for folder, images in (("pool", pool[0]), ("test-pool", test[0])):
        if not (home / folder).exists():
            held = ImageData(images.shape[1:], None, (), len(images), lambda ids, images=images: images[ids])  # type: ignore[misc]
            Pool.build(held, home / folder)
    np.save(home / "pool-labels.npy", pool[1])
    save(home / "test.npz", test, names)


def folders_of(arguments: argparse.Namespace) -> list[Path]:
    """Return where NAME-SPLIT.npz files may lie: the folders of --data, then the cache."""
    cache = Path(os.environ.get("CONSILIENCE_DATA", Path.home() / ".cache" / "consilience-data"))
    return [*(arguments.data or []), cache]


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that reads images, under several seeds."""
    parser.add_argument("--data", type=Path, action="append", metavar="FOLDER", help="where NAME-SPLIT.npz files lie")
    add_seeds(parser)


def spread(values: Sequence[float | None], scale: float = 100.0) -> str:
    """Return mean and standard deviation."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known) if len(known) > 1 else 0.0:.1f}"


def difference(values: Sequence[float]) -> str:
    """Return the mean of paired differences in points, with its 95 % interval."""
    held = [100 * value for value in values]
    if len(held) < 2:
        return f"{held[0]:+.1f}"
    half = float(stats.t.ppf(0.975, len(held) - 1)) * statistics.stdev(held) / len(held) ** 0.5
    middle = statistics.mean(held)
    return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"
