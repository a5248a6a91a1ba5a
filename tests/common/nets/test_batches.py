from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.common.errors import StudentError
from consilience.common.nets.batches import Pixels, Windows
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


def test_many_images_are_copied_in_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("consilience.common.nets.batches._CHUNK", 2)
    np.save(tmp_path / "images.npy", IMAGES)
    held = Pixels(np.load(tmp_path / "images.npy", mmap_mode="r"), Preprocessing(), CPU).pixels
    assert np.array_equal(held.numpy(), IMAGES)


def test_the_cache_is_a_copy() -> None:
    images = IMAGES.copy()
    held = Pixels(images, Preprocessing(), CPU).pixels
    images[:] = 0
    assert np.array_equal(held.numpy(), IMAGES)


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
