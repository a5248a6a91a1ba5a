"""The embedded example: the bytes that were agreed on, what is in them, and a job that can be done with them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import consilience.deploy
from consilience.common.data import open_data
from consilience.common.settings import ClassLists, EmbeddedData, JobSettings
from consilience.common.settings_file import load_settings
from consilience.deploy.partition import partition

EXAMPLE = Path(consilience.deploy.__file__).parent / "example"
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    """build_fashion.py as a module; it is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("build_fashion", EXAMPLE / "build_fashion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("build_fashion", None)


def write_idx(path: Path, array: np.ndarray, *, compress: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw, 1) if compress else raw)


@pytest.fixture
def idx_folder(originals: Path, tmp_path: Path) -> Path:
    """A copy of the original files, to damage."""
    return Path(shutil.copytree(originals, tmp_path / "idx"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files of the original set as far as the example goes, with images behind that must not be chosen."""
    root = tmp_path_factory.mktemp("idx")
    folder = root / "deep"
    folder.mkdir()
    with np.load(EXAMPLE / "fashion.npz") as held:
        for split, stem in (("train", "train"), ("test", "t10k")):
            images, labels = held[f"{split}_x"], held[f"{split}_y"]
            more = np.full((20, 28, 28), 7, np.uint8), np.arange(20, dtype=np.uint8) % 10
            compress = split == "train"
            suffix = ".gz" if compress else ""
            write_idx(
                folder / f"{stem}-images-idx3-ubyte{suffix}", np.concatenate([images, more[0]]), compress=compress
            )
            write_idx(
                folder / f"{stem}-labels-idx1-ubyte{suffix}", np.concatenate([labels, more[1]]), compress=compress
            )
    return root


def test_the_file_is_the_one_whose_digest_is_written_down() -> None:
    (line,) = (EXAMPLE / "SHA256SUMS").read_text().splitlines()
    assert line == f"{hashlib.sha256((EXAMPLE / 'fashion.npz').read_bytes()).hexdigest()}  fashion.npz"


def test_the_content_is_the_one_whose_digest_is_written_down(builder: ModuleType) -> None:
    with np.load(EXAMPLE / "fashion.npz", allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    assert builder.content_digest(arrays) == builder.CONTENT_SHA256
    arrays["test_x"][0, 0, 0] ^= 1
    assert builder.content_digest(arrays) != builder.CONTENT_SHA256


@pytest.mark.parametrize(("split", "each"), [("train", 500), ("test", 100)])
def test_every_class_has_as_many_images(split: str, each: int) -> None:
    data = open_data(EmbeddedData.model_validate({"kind": "embedded", "split": split}))
    assert data.shape == (28, 28, 1)
    assert list(data.class_names) == NAMES
    assert np.bincount(data.need_labels("test")).tolist() == [each] * 10
    images = data.read()
    assert (images.shape, images.dtype) == ((10 * each, 28, 28, 1), np.uint8)
    assert 60 < images.mean() < 85  # the whole set's mean is 73: pixels, not noise or zeros
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 0.99 * len(images)


def test_training_and_test_images_are_different() -> None:
    train, test = (
        {row.tobytes() for row in open_data(EmbeddedData(kind="embedded", split=split)).read()}
        for split in ("train", "test")
    )
    assert not train & test


def test_the_file_carries_no_time_and_is_small() -> None:
    path = EXAMPLE / "fashion.npz"
    assert path.stat().st_size < 3_000_000
    with zipfile.ZipFile(path) as file:
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert file.namelist() == ["names.npy", "test_x.npy", "test_y.npy", "train_x.npy", "train_y.npy"]


def test_a_rebuild_chooses_the_same_images_and_is_reproducible(
    builder: ModuleType, idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By content, which is the guarantee; the bytes are compared between two builds here, under the same zlib."""
    out = tmp_path / "built.npz"
    assert builder.main(["--from-folder", str(idx_folder), "--out", str(out)]) == 0
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{digest}  built.npz\n"
    with np.load(out) as built, np.load(EXAMPLE / "fashion.npz") as kept:
        assert built.files == kept.files
        for name in kept.files:
            assert built[name].dtype == kept[name].dtype
            assert np.array_equal(built[name], kept[name])
    assert builder.as_npz(builder.build(idx_folder)) == out.read_bytes()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "no t10k-labels-idx1-ubyte"),
        (lambda path: path.write_bytes(b"\0\0\x0d\x01"), "no idx file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its header says (1020,)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000] + bytes(1000)), "content digest"),
    ],
    ids=["missing", "other type", "cut short", "other labels"],
)
def test_other_files_are_refused_in_one_line_and_nothing_is_written(
    damage: object, said: str, builder: ModuleType, idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    damage(idx_folder / "deep" / "t10k-labels-idx1-ubyte")
    assert builder.main(["--from-folder", str(idx_folder), "--out", str(tmp_path / "out.npz")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_a_damaged_archive_is_refused(
    builder: ModuleType, idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (idx_folder / "deep" / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    assert builder.main(["--from-folder", str(idx_folder), "--out", str(tmp_path / "out.npz")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_the_licence_of_the_images_lies_beside_them() -> None:
    licence = (EXAMPLE / "LICENSE-fashion-mnist").read_text()
    assert licence.startswith("The MIT License (MIT)\n\nCopyright (c) 2017 Zalando SE, https://tech.zalando.com\n")
    assert "The above copyright notice and this permission notice shall be included in all" in licence
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in licence


def test_the_job_makes_three_sites_of_five_and_four_classes() -> None:
    job = load_settings(EXAMPLE / "job.yaml", JobSettings)
    assert job.simulation is not None
    assert isinstance(job.simulation.partition, ClassLists)
    assert (job.simulation.data, job.simulation.test) == (
        EmbeddedData(kind="embedded", split="train"),
        EmbeddedData(kind="embedded", split="test"),
    )
    assert [teacher.architecture for teacher in job.simulation.teachers] == ["cnn3", "resnet8", "vgg6"]
    assert job.student.architecture == "resnet8"
    data = open_data(job.simulation.data)
    parts = partition(data.need_labels("test"), data.class_names, job.simulation, job.seed)
    assert len(parts.pool) == 2000
    assert parts.classes == ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (0, 6, 7, 8, 9))
    assert parts.counts.sum(axis=0).tolist() == [300] * 10
    assert parts.counts[0].tolist() == [150, 300, 300, 150, 150, 0, 0, 0, 0, 0]
