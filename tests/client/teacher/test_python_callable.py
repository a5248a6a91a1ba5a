from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from consilience.client.teacher import load_teacher
from consilience.common.errors import TeacherError
from consilience.common.installed import version_of
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing, SiteSettings

Site = Callable[..., SiteSettings]
Blobs = tuple[np.ndarray, np.ndarray]

SOURCE = """
import numpy as np

NUMBER = 3

def good(x):
    assert x.dtype == np.float32 and x.ndim == 4
    return np.stack([x[:, 0, :, 0:6].mean((1, 2)), x[:, 0, :, 6:11].mean((1, 2)), x[:, 0, :, 11:].mean((1, 2))], 1) \\
        / np.stack([x[:, 0, :, 0:6].mean((1, 2)), x[:, 0, :, 6:11].mean((1, 2)), x[:, 0, :, 11:].mean((1, 2))], 1) \\
        .sum(1, keepdims=True)

def nans(x):
    return np.full((len(x), 3), np.nan)

def wide(x):
    return np.full((len(x), 4), 0.25)

def unnormalised(x):
    return np.full((len(x), 3), 0.5)

def raising(x):
    raise KeyError("no such patient")

def torchy(x):
    import torch
    return torch.softmax(torch.from_numpy(x).mean((2, 3)).expand(-1, 3), 1)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable module of the site's own."""
    folder = tmp_path / "installed"
    (folder / "site_own").mkdir(parents=True)
    (folder / "site_own" / "__init__.py").touch()
    path = folder / "site_own" / "model.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(folder)
    yield path
    for name in ("site_own", "site_own.model", "site_own.broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("module")
def test_a_callable_gets_preprocessed_batches(site: Site, blobs: Blobs) -> None:
    preprocessing = {"channels": 1, "mean": (-0.1,), "std": (0.7,)}
    teacher = load_teacher(site(kind="callable", callable="site_own.model:good", preprocessing=preprocessing))
    x = preprocess(blobs[0], Preprocessing.model_validate(preprocessing))
    expected = np.log(sys.modules["site_own.model"].good(x))
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), expected, atol=1e-6)
    assert np.mean(teacher.log_probs(blobs[0]).argmax(1) == blobs[1]) > 0.9
    torchy = load_teacher(site(kind="callable", callable="site_own.model:torchy"))
    np.testing.assert_allclose(torchy.log_probs(blobs[0]), np.log(1 / 3), atol=1e-6)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nans", "score nan in row 0 of the batch, column 0; expected finite scores"),
        ("wide", r"shape \(60, 4\) for 60 images; expected \(60, 3\)"),
        ("unnormalised", r"probabilities in row 0 of the batch sum to 1\.5; expected 1 within 0\.001"),
        ("raising", r"failed on 60 images of shape \(16, 16, 1\): KeyError: 'no such patient'"),
    ],
)
def test_what_a_callable_gives_is_checked(name: str, message: str, site: Site, blobs: Blobs) -> None:
    teacher = load_teacher(site(kind="callable", callable=f"site_own.model:{name}"))
    with pytest.raises(TeacherError, match=message) as caught:
        teacher.log_probs(blobs[0])
    assert caught.value.message.startswith(f"site_own.model:{name}: ")


def test_a_callable_that_is_not_there(site: Site, module: Path) -> None:
    with pytest.raises(TeacherError, match=r"site_own\.nowhere cannot be imported: ModuleNotFoundError") as caught:
        load_teacher(site(kind="callable", callable="site_own.nowhere:good"))
    assert "Install it" in caught.value.hint
    with pytest.raises(TeacherError, match=r"site_own\.model has no such name; expected a callable 'bad'"):
        load_teacher(site(kind="callable", callable="site_own.model:bad"))
    with pytest.raises(TeacherError, match="has an object of type int; expected a callable 'NUMBER'"):
        load_teacher(site(kind="callable", callable="site_own.model:NUMBER"))
    (module.parent / "broken.py").write_text("raise RuntimeError('no licence')")
    with pytest.raises(TeacherError, match=r"cannot be imported: RuntimeError: no licence"):
        load_teacher(site(kind="callable", callable="site_own.broken:good"))


def test_the_fingerprint_of_a_callable_without_a_package_is_its_source(site: Site, module: Path) -> None:
    settings = site(kind="callable", callable="site_own.model:good")
    first = load_teacher(settings).fingerprint
    assert load_teacher(settings).fingerprint == first
    assert load_teacher(site(kind="callable", callable="site_own.model:nans")).fingerprint != first
    module.write_text(SOURCE + "\n# changed\n")
    assert load_teacher(settings).fingerprint != first


def test_the_version_of_a_packages_callable_is_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.special

    assert version_of(scipy.special) == f"scipy {metadata.version('scipy')}"
    monkeypatch.setattr(metadata, "version", lambda name: "99.0")
    assert version_of(scipy.special) == "scipy 99.0"
