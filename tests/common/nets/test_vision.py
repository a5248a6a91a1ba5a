from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from consilience.common.data import open_data
from consilience.common.errors import DataError, SettingsError
from consilience.common.nets import vision
from consilience.common.settings import TorchvisionData


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Two tiny splits in MNIST's own file format: image i is grey level i, of class i % 10."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 12), ("t10k", 4)):
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return tmp_path


def test_data_set_by_name(mnist: Path) -> None:
    data = open_data(TorchvisionData(kind="torchvision", dataset="MNIST", root=mnist, channels=1))
    assert len(data) == 12
    assert data.shape == (28, 28, 1)
    assert data.need_labels("test").tolist() == [*range(10), 0, 1]
    assert data.class_names[3] == "3 - three"
    assert (data.read([11, 2]) == np.array([11, 2])[:, None, None, None]).all()


def test_options_reach_the_class(mnist: Path) -> None:
    assert len(vision.open_dataset("MNIST", mnist, {"train": False})) == 4


def test_a_class_without_root() -> None:
    data = vision.open_dataset("FakeData", Path("unused"), {"size": 3, "num_classes": 2})
    assert len(data) == 3
    assert data[0][0].size == (224, 224)


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MNIST is not there.*nothing is downloaded"):
        vision.open_dataset("MNIST", tmp_path / "no", {"download": True})
    assert not (tmp_path / "no").exists() or not list((tmp_path / "no").rglob("*ubyte*"))


@pytest.mark.parametrize("name", ["MNISTY", "vision", "__doc__"])
def test_unknown_class(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' is unknown; allowed: .*CIFAR10"):
        vision.open_dataset(name, tmp_path, {})


def test_unknown_option(mnist: Path) -> None:
    with pytest.raises(SettingsError, match=r"no option 'training'; allowed: .*train"):
        vision.open_dataset("MNIST", mnist, {"training": True})


def test_refused_option(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'STL10' refuses its options"):
        vision.open_dataset("STL10", tmp_path, {"split": "half"})


def test_only_classifiers_are_offered() -> None:
    names = vision.model_names()
    assert {"resnet18", "vit_b_16"} <= set(names)
    assert "fcn_resnet50" not in names
