"""Builds fashion.npz, the sample of Fashion-MNIST that comes with Consilience, from the Debian package of the set.

    python deploy/example/build_fashion.py [--from-folder DIR] [--out FILE]

Lives here: choosing the images (the first 500 training and 100 test images of each class, in file order) and
writing them so that the same input gives the same file, bit for bit. Does not live here: reading the file
(common/data.py).

Two digests are checked. CONTENT_SHA256, over the arrays themselves, is the guarantee: it holds whatever wrote the
file. The file's own SHA-256 in SHA256SUMS pins the committed bytes; another zlib may compress the same arrays into
other bytes, so a rebuild on another machine is compared by content.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKAGE = "dataset-fashion-mnist"
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PER_CLASS = {"train": 500, "test": 100}
STEMS = {"train": "train", "test": "t10k"}
CONTENT_SHA256 = "5cd411b3c653e8350e0d97d02a48888e0b8b572c1422814fed0a8de921cec42e"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time a zip entry can carry: the time of building must not change the file."""

Arrays = dict[str, NDArray[Any]]


def build(folder: Path) -> Arrays:
    """Choose the sample from the four idx files (.gz or not) anywhere below `folder`.

    Returns train_x (5000, 28, 28) uint8, train_y (5000,) uint8, test_x (1000, 28, 28), test_y (1000,) and
    names (10,) str. Raises `ValueError` when a file is missing or is no idx file.
    """
    arrays: Arrays = {}
    for split, count in PER_CLASS.items():
        images = _read_idx(_find(folder, f"{STEMS[split]}-images-idx3-ubyte"))
        labels = _read_idx(_find(folder, f"{STEMS[split]}-labels-idx1-ubyte"))
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == k)[:count] for k in range(len(NAMES))]))
        arrays[f"{split}_x"], arrays[f"{split}_y"] = images[chosen], labels[chosen]
    arrays["names"] = np.array(NAMES)
    return arrays


def content_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over every array's name, shape and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        values = "\n".join(map(str, array)).encode() if array.dtype.kind == "U" else array.tobytes()
        digest.update(f"{name} {array.dtype.kind} {array.shape} {len(values)}\n".encode())
        digest.update(values)
    return digest.hexdigest()


def as_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the arrays as a compressed npz file that depends on nothing but them and the zlib in use."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # "Unix" everywhere, so that the platform leaves no trace
            entry.external_attr = 0o644 << 16
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), version=(1, 0), allow_pickle=False)
            file.writestr(entry, member.getvalue(), compresslevel=9)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Build the file and print its SHA-256; returns the exit code, 1 with one line on stderr when that fails."""
    parser = argparse.ArgumentParser(description="Build the embedded sample of Fashion-MNIST.")
    parser.add_argument("--from-folder", type=Path, metavar="DIR", help="idx files that are there; nothing is fetched")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path(__file__).with_name("fashion.npz"))
    options = parser.parse_args(arguments)
    try:
        if options.from_folder:
            arrays = build(options.from_folder)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _fetch(Path(folder))
                arrays = build(Path(folder))
    except ValueError as error:
        print(f"build_fashion: {error}", file=sys.stderr)
        return 1
    content = content_digest(arrays)
    if content != CONTENT_SHA256:
        print(f"build_fashion: content digest {content}; expected {CONTENT_SHA256}: other images", file=sys.stderr)
        return 1
    data = as_npz(arrays)
    options.out.write_bytes(data)
    print(f"{hashlib.sha256(data).hexdigest()}  {options.out.name}")
    return 0


def _fetch(folder: Path) -> None:
    """Unpack the Debian package into `folder`; nothing is installed."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ValueError(f"needs {tool}; on another system, unpack the idx files and give --from-folder")
    # apt's sandbox user must be able to write the download.
    folder.chmod(0o755)
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE], folder, "run `apt-get update` first")
    packages = sorted(folder.glob("*.deb"))
    if len(packages) != 1:
        raise ValueError(f"apt-get download left {len(packages)} packages, not one")
    _run(["dpkg", "-x", packages[0].name, "."], folder, "the download may be damaged")


def _run(command: list[str], folder: Path, hint: str) -> None:
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}; {hint}")


def _find(folder: Path, stem: str) -> Path:
    found = sorted(path for path in folder.rglob(f"{stem}*") if path.name in (stem, f"{stem}.gz"))
    if not found:
        raise ValueError(f"no {stem} or {stem}.gz below {folder}")
    return found[0]


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Return an idx file of unsigned bytes as an array: magic 0 0 8 ndim, then big-endian lengths, then values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(int(length) for length in np.frombuffer(raw[4:start], ">u4"))
    values = np.frombuffer(raw, np.uint8, offset=start)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {values.size} values; its header says {shape}")
    return values.reshape(shape)


if __name__ == "__main__":
    raise SystemExit(main())
