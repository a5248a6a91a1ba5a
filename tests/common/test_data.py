"""Images from npz files and folders: read as they are, refused with the file and sample named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consilience.common.data import load_image, open_data
from consilience.common.errors import DataError
from consilience.common.preprocessing import fit_shape, preprocess, resize, with_channels
from consilience.common.settings import FolderData, NpzData, Preprocessing


def write_npz(path: Path, **arrays: np.ndarray) -> NpzData:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return NpzData(kind="npz", path=path)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)


def test_npz_with_names(tmp_path: Path, pixels: np.ndarray) -> None:
    source = write_npz(tmp_path / "d.npz", x=pixels, y=np.array([0, 1, 2, 0, 1, 2]), names=np.array(["a", "b", "c"]))
    data = open_data(source)
    assert (len(data), data.shape, data.class_names) == (6, (5, 4, 1), ("a", "b", "c"))
    assert np.array_equal(data.read([4, 0])[..., 0], pixels[[4, 0]])
    part = data.subset(np.array([5, 2]))
    assert np.array_equal(part.read()[..., 0], pixels[[5, 2]])
    assert part.labels is not None
    assert part.labels.tolist() == [2, 2]


def test_npz_without_names_numbers_the_classes(tmp_path: Path, pixels: np.ndarray) -> None:
    data = open_data(write_npz(tmp_path / "d.npz", x=pixels, y=np.array([0, 1, 0, 1, 0, 3])))
    assert data.class_names == ("0", "1", "2", "3")


def test_npz_without_labels(tmp_path: Path, pixels: np.ndarray) -> None:
    data = open_data(write_npz(tmp_path / "d.npz", x=pixels))
    assert data.labels is None
    with pytest.raises(DataError, match="no labels"):
        data.need_labels("The private data")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((1, 2, 2), np.uint8)}, ["no array 'x'", "images"]),
        ({"x": np.zeros((1, 2, 2), np.float32)}, ["float32", "uint8"]),
        ({"x": np.zeros((1, 2, 2, 4), np.uint8)}, ["(1, 2, 2, 4)"]),
        ({"x": np.zeros(4, np.uint8)}, ["(4,)"]),
        ({"x": np.zeros((2, 2, 2), np.uint8), "y": np.array([0])}, ["labels have shape (1,)", "(2,)"]),
        ({"x": np.zeros((1, 2, 2), np.uint8), "y": np.array([0.5])}, ["float64"]),
        ({"x": np.zeros((1, 2, 2), np.uint8), "y": np.array([np.nan])}, ["float64"]),
        ({"x": np.zeros((1, 2, 2), np.uint8), "y": np.array(["cat"])}, ["<U3"]),
        ({"x": np.zeros((1, 2, 2), np.uint8), "y": np.array([10**12])}, ["label 1000000000000"]),
        (
            {"x": np.zeros((2, 2, 2), np.uint8), "y": np.array([0, 7]), "names": np.array(["a", "b"])},
            ["label 7 of sample 1", "0 to 1"],
        ),
        (
            {"x": np.zeros((1, 2, 2), np.uint8), "y": np.array([-1]), "names": np.array(["a"])},
            ["label -1 of sample 0"],
        ),
        (
            {"x": np.zeros((1, 2, 2), np.uint8), "y": np.array([0]), "names": np.array(["a", "a"])},
            ["'a' is named twice"],
        ),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        open_data(write_npz(tmp_path / "d.npz", **arrays))
    for word in ["d.npz", *words]:
        assert word in str(caught.value)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    with pytest.raises(DataError, match="no such file"):
        open_data(NpzData(kind="npz", path=path))
    for content in [b"", b"junk", b"PK\x03\x04junk"]:
        path.write_bytes(content)
        with pytest.raises(DataError, match="not an npz file"):
            open_data(NpzData(kind="npz", path=path))
    with path.open("wb") as file:
        np.save(file, np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(DataError, match="not an npz file"):
        open_data(NpzData(kind="npz", path=path))
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(DataError, match="plain arrays"):
        open_data(NpzData(kind="npz", path=path))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_folder_with_a_folder_a_class(tmp_path: Path, pixels: np.ndarray) -> None:
    for i, name in enumerate(["dog/1.png", "cat/2.png", "cat/1.PNG"]):
        save(tmp_path / name, pixels[i])
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = open_data(FolderData(kind="folder", path=tmp_path, channels=1))
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    assert np.array_equal(data.read()[..., 0], pixels[[2, 1, 0]])


def test_flat_folder_is_unlabelled_and_colour_is_repeated_grey(tmp_path: Path, pixels: np.ndarray) -> None:
    save(tmp_path / "a.png", pixels[0])
    data = open_data(FolderData(kind="folder", path=tmp_path))
    assert data.labels is None
    assert data.shape == (5, 4, 3)
    assert np.array_equal(data.read()[0], np.repeat(pixels[0][..., None], 3, axis=2))


def test_images_of_two_shapes_are_refused_unless_a_size_is_set(tmp_path: Path, pixels: np.ndarray) -> None:
    save(tmp_path / "a.png", pixels[0])
    save(tmp_path / "b.png", pixels[1].T)
    data = open_data(FolderData(kind="folder", path=tmp_path, channels=1))
    with pytest.raises(DataError, match=r"b\.png: image is 5x4; the first one is 4x5"):
        data.read()
    sized = open_data(FolderData(kind="folder", path=tmp_path, channels=1, size=(3, 3)))
    assert sized.read().shape == (2, 3, 3, 1)


def test_folders_without_images_and_broken_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_data(FolderData(kind="folder", path=tmp_path / "missing"))
    with pytest.raises(DataError, match="holds no images"):
        open_data(FolderData(kind="folder", path=tmp_path))
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        open_data(FolderData(kind="folder", path=tmp_path))
    with pytest.raises(DataError, match="no such file"):
        load_image(tmp_path / "missing.png", (4, 4, 3))


def test_more_than_8_bits_are_refused_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1000]], np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has more than 8 bits a channel"):
        open_data(FolderData(kind="folder", path=tmp_path))


def test_hidden_folders_are_no_classes_and_loose_images_are_not_lost(tmp_path: Path, pixels: np.ndarray) -> None:
    save(tmp_path / "cat" / "a.png", pixels[0])
    save(tmp_path / ".checkpoints" / "a.png", pixels[0])
    assert open_data(FolderData(kind="folder", path=tmp_path)).class_names == ("cat",)
    save(tmp_path / "b.png", pixels[0])
    with pytest.raises(DataError, match=r"folders of classes \(cat\) and loose images \(b\.png\)"):
        open_data(FolderData(kind="folder", path=tmp_path))


def test_one_image_is_brought_to_the_shape(tmp_path: Path, pixels: np.ndarray) -> None:
    save(tmp_path / "a.png", pixels[0])
    assert np.array_equal(load_image(tmp_path / "a.png", (5, 4, 1))[..., 0], pixels[0])
    assert load_image(tmp_path / "a.png", (8, 8, 3)).shape == (8, 8, 3)


def test_preprocessing_is_the_formula(pixels: np.ndarray) -> None:
    images = pixels[..., None]
    settings = Preprocessing(mean=(0.3,), std=(0.2,))
    expected = (images.transpose(0, 3, 1, 2) / 255 - 0.3) / 0.2
    assert np.allclose(preprocess(images, settings), expected, atol=1e-6)
    colour = Preprocessing(channels=3, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    out = preprocess(images, colour)
    assert out.shape == (6, 3, 5, 4)
    assert np.allclose(out[:, 2], (pixels / 255 - 0.3) / 3, atol=1e-6)


def test_grey_is_luma_and_constant_images_survive_resizing() -> None:
    colour = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]], np.uint8)
    assert with_channels(colour, 1)[0, 0, :, 0].tolist() == [76, 150, 29, 255]
    flat = np.full((2, 9, 7, 3), 100, np.uint8)
    assert np.all(resize(flat, (4, 5)) == 100)
    assert resize(flat, (4, 5)).shape == (2, 4, 5, 3)
    assert fit_shape(flat, Preprocessing(size=(3, 3), channels=1)).shape == (2, 3, 3, 1)
    assert resize(flat[:0], (4, 5)).shape == (0, 4, 5, 3)
