"""Multi-label images composed of single objects: several of one data set on one canvas, labels say which are there.

A canvas is a grid of cells, each as large as an object; each cell stays empty or holds one object, shifted a little at
random. The labels are the classes that are on the canvas and, with `attributes`, what is so of the canvas as a whole.
Which object stands where follows from the seed alone.

    python benchmarks/composed.py composed-train.npz --images 4000
    python benchmarks/composed.py composed-test.npz --images 1000 --split test --seed 1

The files are what a job's `simulation.data` and `simulation.test` take, with `teachers: [{..., labels: multi}]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from images import Images, Labels, read
from numpy.typing import NDArray

ATTRIBUTES = ("crowded", "several alike", "left heavier", "top heavier")
"""`crowded`: more than half of the cells hold an object; `several alike`: two objects of one class; `left heavier`,
`top heavier`: more objects in the left, or the upper, half than in the other."""


def compose(
    images: Images,
    labels: Labels,
    names: Sequence[str],
    count: int,
    seed: int,
    *,
    grid: tuple[int, int] = (2, 2),
    most: int | None = None,
    shift: int = 2,
    attributes: bool = False,
) -> tuple[Images, NDArray[np.int8], list[str]]:
    """Return `count` canvases (count, rows * H, columns * W, C) uint8, their labels (count, L) int8, and L names.

    `images` (n, H, W, C) uint8 with `labels` (n,) numbers into `names`. `grid`: rows and columns of cells; a canvas has
    one to `most` objects, by default one a cell at most, and each number is as likely as the others; an object is moved
    by up to `shift` pixels, and what leaves its cell is cut off. With `attributes`, `ATTRIBUTES` are labels too.
    """
    rows, columns = grid
    cells = rows * columns
    most = cells if most is None else most
    if not 1 <= most <= cells:
        raise ValueError(f"most is {most}; allowed: 1 to {cells}, the cells of the grid")
    random = np.random.default_rng(seed)
    height, width, channels = images.shape[1:]
    canvases = np.zeros((count, rows * height, columns * width, channels), np.uint8)
    told = np.zeros((count, len(names) + len(ATTRIBUTES) * attributes), np.int8)
    for canvas, own in zip(canvases, told, strict=True):
        places = random.permutation(cells)[: random.integers(1, most + 1)]
        chosen = random.integers(0, len(images), len(places))
        for place, which in zip(places, chosen, strict=True):
            row, column = divmod(int(place), columns)
            cell = canvas[row * height : (row + 1) * height, column * width : (column + 1) * width]
            cell[:] = _moved(images[which], *random.integers(-shift, shift + 1, 2))
        own[labels[chosen]] = 1
        if attributes:
            across, down = places % columns, places // columns
            own[len(names) :] = (
                2 * len(places) > cells,
                len(set(labels[chosen].tolist())) < len(chosen),
                np.sum(2 * across + 1 < columns) > np.sum(2 * across + 1 > columns),
                np.sum(2 * down + 1 < rows) > np.sum(2 * down + 1 > rows),
            )
    return canvases, told, [*names, *ATTRIBUTES * attributes]


def _moved(image: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """Return an image (H, W, C) moved by so many pixels; what enters is black."""
    out = np.zeros_like(image)
    height, width = image.shape[:2]
    out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return out


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the .npz file to write")
    parser.add_argument("--source", default="embedded", help="embedded, or the NAME of NAME-SPLIT.npz (x, y, names)")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--data", type=Path, action="append", default=[], help="a folder with such files")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--grid", type=int, nargs=2, default=(2, 2), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--most", type=int, help="objects on a canvas at most; by default one a cell")
    parser.add_argument("--attributes", action="store_true", help="labels that say how the canvas is laid out")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    images, labels, names = read(asked.source, asked.split, asked.data)
    images = images if images.ndim == 4 else images[..., None]
    grid = (asked.grid[0], asked.grid[1])
    canvases, told, all_names = compose(
        images, labels, names, asked.images, asked.seed, grid=grid, most=asked.most, attributes=asked.attributes
    )
    np.savez_compressed(asked.file, x=canvases, y=told, names=np.array(all_names, np.str_))
    print(f"{asked.file}: {len(canvases):,} canvases of {canvases.shape[1:]}, {told.mean(axis=0).round(3).tolist()}")


if __name__ == "__main__":
    main()
