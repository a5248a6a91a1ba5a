"""Which arithmetic a training uses: float32, or bfloat16 inside the network where that pays.

Lives here: the decision, by measurement. Does not live here: autocast (loop) and inference, which is always float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from consilience.common.errors import StorageError
from consilience.common.files import read_json, write_json
from consilience.common.settings import Fit

WORTH = 1.3
"""bf16 must be this much faster: below, its coarser rounding buys too little."""
MIN_STEPS = 200
"""A training of fewer steps is not worth the eight that the measurement takes."""
ROUNDS = 3


def decide(
    fit: Fit, device: torch.device, steps: int, step: Callable[[bool], None], folder: Path | None, key: str
) -> bool:
    """Return whether a training of `steps` steps runs in bf16.

    `step(bf16)` does one step on a copy of the network. The decision is kept in `folder`/precision.json under the
    training's `key`, so that a resumed training goes on as it began.
    """
    path = folder / "precision.json" if folder is not None else None
    kept = _read(path, key)
    if kept is not None:
        return kept

    def waited(bf16: bool) -> None:
        step(bf16)
        if device.type == "cuda":  # a step is over when the GPU is done, not when it has been told
            torch.cuda.synchronize(device)

    decision: dict[str, Any] = {"key": key, "precision": "f32"}
    possible = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if fit.precision == "auto" and possible and steps >= MIN_STEPS:
        f32, bf16 = measure(waited)
        decision |= {"f32_step_seconds": f32, "bf16_step_seconds": bf16}
        decision["precision"] = "bf16" if f32 >= WORTH * bf16 else "f32"
    if path is not None:
        write_json(path, decision)
    return bool(decision["precision"] == "bf16")


def measure(step: Callable[[bool], None]) -> tuple[float, float]:
    """Return the seconds of a step in f32 and in bf16: in turn, the best of a few, after one each to warm up."""
    best = [float("inf"), float("inf")]
    for round_ in range(ROUNDS + 1):
        for bf16 in (False, True):
            began = time.perf_counter()
            step(bf16)
            if round_:
                best[bf16] = min(best[bf16], time.perf_counter() - began)
    return best[0], best[1]


def _read(path: Path | None, key: str) -> bool | None:
    """Return the kept decision, None where there is none for this training."""
    try:
        held = read_json(path) if path is not None and path.exists() else None
    except StorageError:
        return None  # damaged: measured again
    if not isinstance(held, dict) or held.get("key") != key:
        return None
    return bool(held.get("precision") == "bf16")
