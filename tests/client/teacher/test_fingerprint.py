"""A fingerprint changes with all that decides an answer, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from consilience.client.teacher import describe_teacher, load_teacher
from consilience.common.nets import build
from consilience.common.settings import SiteSettings

Site = Callable[..., SiteSettings]
BASE = {"kind": "state_dict", "architecture": "cnn3", "path": "m.safetensors"}


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> dict[str, torch.Tensor]:
    weights = build("cnn3", classes=3, channels=1, seed=0).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "m.safetensors")
    return weights


def test_it_stays_when_nothing_that_matters_changes(site: Site, tmp_path: Path) -> None:
    first = load_teacher(site(**BASE)).fingerprint
    assert len(first) == 64
    assert load_teacher(site(**BASE)).fingerprint == first
    (tmp_path / "moved.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes())
    assert load_teacher(site(**BASE | {"path": "moved.safetensors"})).fingerprint == first
    assert load_teacher(site(seed=7, **BASE)).fingerprint == first


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("left", "middle", "up")},
        {"classes": ("middle", "left", "right")},
        {"preprocessing": {"channels": 1, "mean": (0.4,)}},
        {"preprocessing": {"channels": 1, "size": (20, 20)}},
    ],
)
def test_it_changes_with_the_settings(change: dict[str, object], site: Site) -> None:
    assert load_teacher(site(**BASE | change)).fingerprint != load_teacher(site(**BASE)).fingerprint


def test_it_changes_with_the_file(site: Site, tmp_path: Path, model: dict[str, torch.Tensor]) -> None:
    first = load_teacher(site(**BASE)).fingerprint
    model["13.bias"][0] += 1e-3
    safetensors.torch.save_file(model, tmp_path / "m.safetensors")
    assert load_teacher(site(**BASE)).fingerprint != first


def test_it_changes_with_the_kind(site: Site, tmp_path: Path) -> None:
    """The same bytes and names, read as another kind, are another teacher."""
    from consilience.client.teacher.protocol import fingerprint_of

    teacher = site(**BASE).teacher.model_dump(mode="json", exclude={"path"})
    assert fingerprint_of(teacher, "x") != fingerprint_of(teacher | {"kind": "onnx"}, "x")
    assert fingerprint_of(teacher, "x") == fingerprint_of(dict(reversed(teacher.items())), "x")


def test_strangers_read_kind_and_architecture_alone(site: Site, tmp_path: Path) -> None:
    assert describe_teacher(site(**BASE)) == ("state_dict of cnn3", None)
    for kind, extra in (
        ("onnx", {"path": "secret"}),
        ("torchscript", {"path": "secret"}),
        ("export", {"path": "secret"}),
        ("sklearn", {"path": "secret"}),
        ("callable", {"callable": "secret:name"}),
    ):
        assert describe_teacher(site(kind=kind, **extra)) == (kind, None)
