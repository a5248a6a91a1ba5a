"""A site whose teacher is a small network, or a callable with features, and a pool of noise, for tests of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import nn

from consilience.common.data import from_arrays
from consilience.common.nets import build
from consilience.common.pool import Pool
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings

CLASSES = ("cat", "dog", "cow")
SIZE = 50
PREPROCESSING = {"size": [16, 16], "channels": 1, "mean": [0.5], "std": [0.25]}
CALLABLE = '''"""A teacher that is no torch network, with features."""
import numpy as np


class Model:
    gives = {}

    def __call__(self, images):
        return np.full((len(images), 3), 1 / 3)

    def features(self, images):
        maps = np.concatenate([images, 2 * images, -images], axis=1)
        return {"maps": maps, "means": maps.mean(axis=(2, 3)), **self.gives}


model = Model()


def plain(images):
    return np.full((len(images), 3), 1 / 3)
'''


def network(architecture: str = "cnn3", seed: int = 1) -> nn.Module:
    """A network whose batch normalisation has seen something, in evaluation mode."""
    made = build(architecture, classes=3, channels=1, seed=seed)
    with torch.no_grad():
        made(torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    return made.eval()


def fed(pool: Pool) -> torch.Tensor:
    """What the network is fed for all of the pool."""
    images = torch.from_numpy(np.array(pool.read(0, len(pool)))).permute(0, 3, 1, 2).float()
    return (images / 255 - 0.5) / 0.25


def make_pool(folder: Path, size: int = SIZE, seed: int = 0) -> Pool:
    """Build a pool of grey noise in `folder`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, 16, 16, 1), np.uint8)
    return Pool.build(from_arrays(pixels, None, (), where="test"), folder)


def make_settings(
    folder: Path, taps: dict[str, Any] | None = None, *, model: nn.Module | None = None, **changes: Any
) -> SiteSettings:
    """Write and read site.yaml in `folder` for a state_dict teacher; `taps` is policy.features.taps.

    `changes`: fields of site.yaml; `features`: other fields of policy.features; `architecture`: of the network.
    """
    architecture = changes.pop("architecture", "cnn3")
    folder.mkdir(parents=True, exist_ok=True)
    weights = network(architecture) if model is None else model
    safetensors.torch.save_file(weights.state_dict(), folder / "weights.safetensors")
    features = {"taps": taps or {}, **changes.pop("features", {})}
    raw = {
        "name": "site-1",
        "teacher": {
            "kind": "state_dict",
            "architecture": architecture,
            "path": "weights.safetensors",
            "classes": list(CLASSES),
            "preprocessing": PREPROCESSING,
        },
        "calibration": "off",
        "pools": ["pool"],
        "batch_size": 16,
        "policy": {"features": features, **changes.pop("policy", {})},
        **changes,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(raw))
    return load_settings(folder / "site.yaml", SiteSettings)


def hosted(name: str) -> dict[str, Any]:
    """Settings of a teacher from the module that `CALLABLE` is, under the name feature_model."""
    return {
        "kind": "callable",
        "callable": f"feature_model:{name}",
        "classes": list(CLASSES),
        "preprocessing": PREPROCESSING,
    }
