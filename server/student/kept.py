"""Finished pieces of a long learning on disk, so that a run that was killed goes on after the last one.

One safetensors file a piece: its tensors and, in the metadata, the key of what it belongs to and notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from consilience.common.files import write_bytes


def keep(path: Path, key: str, tensors: Mapping[str, Tensor], notes: Any = None) -> None:
    """Write a piece, atomically; `notes` are JSON values. Raises `StorageError`."""
    plain = {name: held.detach().cpu().contiguous() for name, held in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, {"key": key, "notes": json.dumps(notes)}))


def kept(path: Path, key: str) -> tuple[dict[str, Tensor], Any] | None:
    """Return tensors and notes of the piece at `path`; None when it is of another key, damaged or absent."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError):
        return None
    return tensors, json.loads(metadata["notes"])
