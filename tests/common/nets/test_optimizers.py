"""Optimisers do what torch's do, bit for bit, and a process that trains does not import torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from consilience.common.nets.optimizers import plain

OWN: dict[type[torch.optim.Optimizer], dict[str, object]] = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    torch.optim.AdamW: {"lr": 0.01, "weight_decay": 0.01, "fused": True},
    torch.optim.LBFGS: {"max_iter": 5, "history_size": 3, "line_search_fn": "strong_wolfe"},
}


def learnt(kind: type[torch.optim.Optimizer], made: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    """Return weights after some steps, of which the last are taken by another optimiser that goes on from the first."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    images = torch.randn(8, 1, 8, 8)
    optimizer = made(model.parameters(), **OWN[kind])

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.state_dict()
    optimizer = made(model.parameters(), **OWN[kind])
    optimizer.load_state_dict(state)
    optimizer.step(closure)
    return [held.detach().clone() for held in model.state_dict().values()]


@pytest.mark.parametrize("kind", OWN)
def test_what_is_learnt_is_the_same_bit_for_bit(kind: type[torch.optim.Optimizer]) -> None:
    ours, theirs, again = learnt(kind, plain(kind)), learnt(kind, kind), learnt(kind, plain(kind))
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, ours, again))


TRAINS = """
import pathlib, sys
import numpy as np
from consilience.client.calibration import best_dirichlet
from consilience.common.nets import Supervised, build, default_device, train
from consilience.common.settings import Fit, Preprocessing

random = np.random.default_rng(0)
images, labels = random.integers(0, 256, (64, 8, 8, 1), np.uint8), np.arange(64) % 3
model = build("cnn3", classes=3, channels=1, seed=0)
fit = Fit(epochs=1, batch_size=16)
loss = Supervised(labels, default_device())
train(model, images, loss, fit, Preprocessing(), seed=0, folder=pathlib.Path(sys.argv[1]))
best_dirichlet(random.normal(size=(64, 3)), labels)
assert "torch" in sys.modules
assert not {"torch._dynamo", "sympy", "sklearn", "matplotlib"} & sys.modules.keys()
"""


def test_a_process_that_trains_and_calibrates_imports_no_compiler(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRAINS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
