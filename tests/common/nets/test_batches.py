from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from consilience.common.data import from_arrays
from consilience.common.errors import StudentError
from consilience.common.nets.batches import Pixels, Windows
from consilience.common.pool import Pool, PoolImages
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 20, 16, 3), np.uint8)
IDS = torch.tensor([4, 0, 0, 2])


def windows(down: list[int], right: list[int], mirror: list[bool]) -> Windows:
    return Windows(torch.tensor(down), torch.tensor(right), torch.tensor(mirror))


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        Preprocessing(channels=1, size=(18, 18), mean=(0.3,), std=(0.2,)),
    ],
)
def test_without_windows_a_batch_is_what_preprocessing_gives(preprocessing: Preprocessing) -> None:
    batch = Pixels(IMAGES, preprocessing, CPU).batch(IDS, None)
    assert torch.equal(batch, torch.from_numpy(preprocess(IMAGES, preprocessing)[IDS.numpy()]))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def every(held: Pixels) -> NDArray[np.float32]:
    """What `held` gives for every image, without preprocessing."""
    return (held.batch(torch.arange(len(held)), None).permute(0, 2, 3, 1) * 255).numpy()


RAW = Preprocessing(mean=(0.0,), std=(1.0,))


def test_many_images_are_copied_in_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("consilience.common.nets.batches._CHUNK", 2)
    np.save(tmp_path / "images.npy", IMAGES)
    held = Pixels(np.load(tmp_path / "images.npy", mmap_mode="r"), RAW, CPU)
    assert np.array_equal(every(held).round(), IMAGES)


def test_an_array_is_copied() -> None:
    images = IMAGES.copy()
    held = Pixels(images, RAW, CPU)
    images[:] = 0
    assert np.array_equal(every(held).round(), IMAGES)


@pytest.mark.parametrize("size", [None, (18, 18)])
@pytest.mark.parametrize("some", [False, True])
def test_images_on_the_disk_give_the_same_batches_as_an_array(
    size: tuple[int, int] | None, some: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.common.pool.SHARD_BYTES", 3 * IMAGES[0].size)
    monkeypatch.setattr("consilience.common.files.Resident.MOST", 1)
    pool = Pool.build(from_arrays(IMAGES, None, (), where="test"), tmp_path / "pool")
    samples = np.arange(len(IMAGES))[::-2] if some else None
    images, array = PoolImages(pool, samples), IMAGES if samples is None else IMAGES[samples]
    assert (images.shape, images.ndim, images.dtype) == (array.shape, array.ndim, array.dtype)
    assert np.array_equal(images[1:3], array[1:3])
    chosen = Preprocessing(size=size)
    ours, theirs = Pixels(images, chosen, CPU), Pixels(array, chosen, CPU)
    assert (len(ours), ours.shape) == (len(theirs), theirs.shape)
    ids = torch.tensor([2, 0, 1, 0])
    cut = windows([2, -1, 0, -2], [-2, 1, 2, 0], [False, True, False, True])
    assert torch.equal(ours.batch(ids, None), theirs.batch(ids, None))
    assert torch.equal(ours.batch(ids, cut), theirs.batch(ids, cut))


def test_cut_is_a_crop_of_the_reflected_image() -> None:
    down, right, mirror = [2, -1, 0, -2], [-2, 1, 2, 0], [False, True, False, True]
    cut = Pixels(IMAGES, Preprocessing(), CPU).cut(IDS, windows(down, right, mirror)).numpy()
    for row, image in enumerate(IDS.tolist()):
        padded = np.pad(IMAGES[image], ((2, 2), (2, 2), (0, 0)), mode="reflect")
        expected = padded[2 + down[row] :, 2 + right[row] :][:20, :16]
        assert np.array_equal(cut[row], expected[:, ::-1] if mirror[row] else expected)


def test_still_windows_change_nothing() -> None:
    still = windows([0] * 4, [0] * 4, [False] * 4)
    assert np.array_equal(Pixels(IMAGES, Preprocessing(), CPU).cut(IDS, still).numpy(), IMAGES[IDS.numpy()])


def test_drawn_windows_reach_an_eighth_of_the_size() -> None:
    drawn = Windows.draw(2_000, (32, 17), torch.Generator().manual_seed(0), flip=True)
    assert set(drawn.down.tolist()) == set(range(-4, 5))
    assert set(drawn.right.tolist()) == {-2, -1, 0, 1, 2}
    assert 0.45 < drawn.mirror.float().mean() < 0.55
    assert not Windows.draw(2_000, (32, 17), torch.Generator().manual_seed(0), flip=False).mirror.any()


def test_other_arrays_are_refused() -> None:
    wrongs: list[Any] = [IMAGES.astype(np.float32), IMAGES[..., 0]]
    for wrong in wrongs:
        with pytest.raises(StudentError, match=r"allowed: \(n, H, W, C\) uint8"):
            Pixels(wrong, Preprocessing(), CPU)
