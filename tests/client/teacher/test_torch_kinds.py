"""state_dict, TorchScript and torch.export against the same network called directly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from consilience.client.teacher import load_teacher
from consilience.common.errors import SettingsError, TeacherError
from consilience.common.nets import build
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing, SiteSettings

Site = Callable[..., SiteSettings]
Blobs = tuple[np.ndarray, np.ndarray]
PREPROCESSING = {"channels": 1, "mean": (0.3,), "std": (0.2,)}


def direct(module: nn.Module, images: np.ndarray, **preprocessing: object) -> np.ndarray:
    """Log-probabilities without any of the code under test but preprocess."""
    with torch.no_grad():
        inputs = torch.from_numpy(preprocess(images, Preprocessing.model_validate(preprocessing)))
        return torch.log_softmax(module.eval()(inputs), dim=1).numpy()


def save_script(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)


def save_export(module: nn.Module, path: Path, *, fixed_batch: bool = False) -> None:
    shapes = None if fixed_batch else ({0: torch.export.Dim("n", min=1, max=4096)},)
    program = torch.export.export(module, (torch.zeros(4, 1, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path)


@pytest.mark.parametrize("kind", ["torchscript", "export"])
def test_programs_answer_like_the_network(
    kind: str, network: nn.Module, site: Site, blobs: Blobs, tmp_path: Path
) -> None:
    path = tmp_path / ("m.pt2" if kind == "export" else "m.pt")
    (save_export if kind == "export" else save_script)(network, path)
    teacher = load_teacher(site(kind=kind, path=str(path), preprocessing=PREPROCESSING))
    expected = direct(network, blobs[0], **PREPROCESSING)
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), expected, atol=1e-5)
    # One image alone: evaluation mode, and any size of batch.
    np.testing.assert_allclose(teacher.log_probs(blobs[0][7:8]), expected[7:8], atol=1e-5)
    plain = load_teacher(site(kind=kind, path=str(path)))
    assert np.abs(plain.log_probs(blobs[0]) - expected).max() > 1e-2


def test_a_program_saved_in_training_mode_is_evaluated(
    network: nn.Module, site: Site, blobs: Blobs, tmp_path: Path
) -> None:
    save_script(network.train(), tmp_path / "m.pt")
    teacher = load_teacher(site(kind="torchscript", path="m.pt"))
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), direct(network, blobs[0]), atol=1e-5)


def test_the_preprocessing_sizes_and_greys_the_images(network: nn.Module, site: Site, tmp_path: Path) -> None:
    save_script(network, tmp_path / "m.pt")
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    preprocessing = {"size": (16, 16), "channels": 1}
    teacher = load_teacher(site(kind="torchscript", path="m.pt", preprocessing=preprocessing))
    np.testing.assert_allclose(teacher.log_probs(images), direct(network, images, **preprocessing), atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_state_dict_answers_like_its_network(
    suffix: str, channels: int, site: Site, blobs: Blobs, tmp_path: Path
) -> None:
    module = build("cnn3", classes=3, channels=channels, seed=4)
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save(module.state_dict(), path)
    else:
        safetensors.torch.save_file(module.state_dict(), path)
    # Channels left open: the file says what the network takes.
    images = np.repeat(blobs[0], channels, axis=-1)
    teacher = load_teacher(site(kind="state_dict", architecture="cnn3", path=str(path), preprocessing={}))
    assert teacher.classes == ("left", "middle", "right")
    np.testing.assert_allclose(teacher.log_probs(images), direct(module, images), atol=1e-5)


def test_read_only_images_are_scored_in_silence(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    """The pool is memory-mapped; torch warns about read-only arrays, and warnings are errors here."""
    torch.save(build("cnn3", classes=3, channels=1, seed=4).state_dict(), tmp_path / "m.pt")
    images = blobs[0].copy()
    images.flags.writeable = False
    teacher = load_teacher(site(kind="state_dict", architecture="cnn3", path="m.pt"))
    assert teacher.log_probs(images).shape == (60, 3)


def test_a_state_dict_of_another_network_is_refused(site: Site, tmp_path: Path) -> None:
    torch.save(build("cnn3", classes=4, channels=1, seed=0).state_dict(), tmp_path / "m.pt")
    with pytest.raises(TeacherError, match=r"m\.pt: tensor '13.bias' is \(4,\); cnn3 has \(3,\)"):
        load_teacher(site(kind="state_dict", architecture="cnn3", path="m.pt"))
    with pytest.raises(TeacherError, match=r"m\.pt: tensor .* is .*; resnet8 has "):
        load_teacher(site(kind="state_dict", architecture="resnet8", path="m.pt"))
    with pytest.raises(SettingsError, match="'cnn33' is unknown"):
        load_teacher(site(kind="state_dict", architecture="cnn33", path="m.pt"))


def test_a_whole_checkpoint_is_no_state_dict(site: Site, tmp_path: Path) -> None:
    torch.save({"model": {}, "epoch": 3}, tmp_path / "m.pt")
    with pytest.raises(TeacherError, match="holds dict, not tensors by name") as caught:
        load_teacher(site(kind="state_dict", architecture="cnn3", path="m.pt"))
    assert "model.state_dict() alone" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "name"),
    [("state_dict", "m.pt"), ("state_dict", "m.safetensors"), ("torchscript", "m.pt"), ("export", "m.pt2")],
)
def test_missing_and_damaged_files(kind: str, name: str, site: Site, tmp_path: Path) -> None:
    extra = {"architecture": "cnn3"} if kind == "state_dict" else {}
    with pytest.raises(TeacherError, match=rf"{name}: no such file"):
        load_teacher(site(kind=kind, path=name, **extra))
    for content in (b"", b"PK\x03\x04 cut off", b"no model at all" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TeacherError, match=rf"{name}: not a "):
            load_teacher(site(kind=kind, path=name, **extra))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(TeacherError, match=rf"{name}: cannot be read"):
        load_teacher(site(kind=kind, path=name, **extra))


def test_outputs_may_be_probabilities(network: nn.Module, site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save_script(nn.Sequential(network, nn.Softmax(dim=1)), tmp_path / "p.pt")
    teacher = load_teacher(site(kind="torchscript", path="p.pt", outputs="probabilities"))
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), direct(network, blobs[0]), atol=1e-4)
    save_script(network, tmp_path / "l.pt")
    with pytest.raises(TeacherError, match="probabilities"):
        load_teacher(site(kind="torchscript", path="l.pt", outputs="probabilities")).log_probs(blobs[0])


def test_a_program_for_one_size_of_batch_says_so(network: nn.Module, site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save_export(network, tmp_path / "m.pt2", fixed_batch=True)
    teacher = load_teacher(site(kind="export", path="m.pt2"))
    assert teacher.log_probs(blobs[0][:4]).shape == (4, 3)
    with pytest.raises(TeacherError, match=r"failed on 5 images .*shape\[0\] to be equal to 4"):
        teacher.log_probs(blobs[0][:5])


def test_images_the_network_cannot_take(network: nn.Module, site: Site, tmp_path: Path) -> None:
    save_script(network, tmp_path / "m.pt")
    teacher = load_teacher(site(kind="torchscript", path="m.pt", preprocessing={}))
    with pytest.raises(TeacherError, match=r"failed on 2 images of shape \(16, 16, 3\)") as caught:
        teacher.log_probs(np.zeros((2, 16, 16, 3), np.uint8))
    assert "preprocessing.channels" in caught.value.hint


class TwoOutputs(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


def test_a_network_with_two_outputs_is_refused(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    save_script(TwoOutputs(), tmp_path / "m.pt")
    with pytest.raises(TeacherError, match="gives tuple; expected one tensor"):
        load_teacher(site(kind="torchscript", path="m.pt")).log_probs(blobs[0])


class Named(nn.Module):
    """Parameters with the names of an archive's own fields."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.arange(3.0))
        self.metadata = nn.Parameter(torch.ones(3))
        self.register_buffer("device", torch.tensor([1.0, 0.0, 2.0]))
        self.head = nn.Linear(256, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device: torch.Tensor = self.device  # type: ignore[assignment]
        logits: torch.Tensor = self.head(images.flatten(1)) * self.metadata + self.token + device
        return logits


def test_an_exported_networks_names_are_its_own(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    module = Named()
    save_export(module, tmp_path / "m.pt2")
    teacher = load_teacher(site(kind="export", path="m.pt2"))
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), direct(module, blobs[0]), atol=1e-5)
