from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from consilience.common.errors import StudentError
from consilience.common.nets import build, load_model, save_model, scores
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 28, 28, 1), np.uint8)
PLAIN = Preprocessing()


@pytest.fixture
def model() -> nn.Module:
    network = build("resnet8", classes=4, channels=1, seed=0)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 1, 28, 28))  # statistics that evaluation mode then uses
    return network


def test_scores_are_the_networks_in_evaluation_mode(model: nn.Module) -> None:
    model.train()
    found = scores(model, IMAGES, PLAIN)
    assert found.shape == (23, 4)
    assert found.dtype == np.float32
    assert not model.training
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    with torch.inference_mode():
        expected = model(torch.from_numpy(preprocess(IMAGES, PLAIN)))
    assert np.allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 22, 23])
def test_slices_do_not_matter(model: nn.Module, batch_size: int) -> None:
    whole = scores(model, IMAGES, PLAIN)
    assert np.allclose(scores(model, IMAGES, PLAIN, batch_size=batch_size), whole, atol=1e-5)
    some = np.array([21, 0, 3])
    assert np.allclose(scores(model, IMAGES[some], PLAIN), whole[some], atol=1e-5)


def test_memory_maps_and_no_images(model: nn.Module, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert np.array_equal(scores(model, mapped, PLAIN), scores(model, IMAGES, PLAIN))
    assert scores(model, IMAGES[:0], PLAIN).shape == (0, 4)


def test_scores_apply_preprocessing() -> None:
    colour = build("cnn3", classes=4, channels=3, seed=0).eval()
    shaped = Preprocessing(size=(20, 20), channels=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    with torch.inference_mode():
        expected = colour(torch.from_numpy(preprocess(IMAGES, shaped)))
    assert np.allclose(scores(colour, IMAGES, shaped), expected.numpy(), atol=1e-5)


def test_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    other = build("resnet8", classes=4, channels=1, seed=1)
    load_model(path, other)
    assert np.array_equal(scores(other, IMAGES, PLAIN), scores(model, IMAGES, PLAIN))


def test_loading_another_network(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    with pytest.raises(StudentError, match=r"tensor '.*' is \(4,\); the architecture has \(5,\)"):
        load_model(path, build("resnet8", classes=5, channels=1, seed=0))
    with pytest.raises(StudentError, match="is missing"):
        load_model(path, build("resnet20", classes=4, channels=1, seed=0))
    assert isinstance(model, nn.Sequential)
    with pytest.raises(StudentError, match="the architecture has no such tensor"):
        load_model(path, model[:-1])


def test_loading_what_is_no_model(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"not a model")
    for name in ("odd", "absent"):
        with pytest.raises(StudentError, match=f"{name}: cannot be read"):
            load_model(tmp_path / name, model)
