from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.nets import Supervised, build, precision, train
from consilience.common.settings import Fit, Preprocessing

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]
CPU = torch.device("cpu")
AUTO = Fit.model_validate({"epochs": 2, "batch_size": 32, "learning_rate": 0.05})
F32 = AUTO.model_copy(update={"precision": "f32"})


def no_step(bf16: bool) -> None:
    raise AssertionError("nothing was to be measured")


@pytest.fixture
def short_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for trainings of any length."""
    monkeypatch.setattr(precision, "MIN_STEPS", 1)


@pytest.mark.parametrize(("f32", "bf16", "chosen"), [(1.31, 1.0, "bf16"), (1.29, 1.0, "f32"), (1.0, 3.0, "f32")])
def test_decision_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, f32: float, bf16: float, chosen: str
) -> None:
    monkeypatch.setattr(precision, "measure", lambda step: (f32, bf16))
    assert precision.decide(AUTO, CPU, 1_000, no_step, tmp_path, "k") == (chosen == "bf16")
    assert json.loads((tmp_path / "precision.json").read_text()) == {
        "key": "k",
        "precision": chosen,
        "f32_step_seconds": f32,
        "bf16_step_seconds": bf16,
    }
    monkeypatch.setattr(precision, "measure", no_step)
    assert precision.decide(AUTO, CPU, 1_000, no_step, tmp_path, "k") == (chosen == "bf16")


def test_decision_of_another_training_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure", lambda step: (2.0, 1.0))
    assert precision.decide(AUTO, CPU, 1_000, no_step, tmp_path, "k")
    monkeypatch.setattr(precision, "measure", lambda step: (1.0, 1.0))
    assert not precision.decide(AUTO, CPU, 1_000, no_step, tmp_path, "other")
    (tmp_path / "precision.json").write_text("{")
    assert not precision.decide(AUTO, CPU, 1_000, no_step, tmp_path, "k")


def test_nothing_is_measured_without_need(tmp_path: Path) -> None:
    assert not precision.decide(F32, CPU, 1_000, no_step, None, "k")
    assert not precision.decide(AUTO, CPU, precision.MIN_STEPS - 1, no_step, None, "k")


def test_measurement_takes_turns_and_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[bool] = []
    clock = [0.0]
    lasts = iter([100, 100, 3, 7, 2, 9, 4, 8])

    def step(bf16: bool) -> None:
        turns.append(bf16)
        clock[0] += next(lasts)

    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    assert precision.measure(step) == (2, 7)
    assert turns == [False, True] * 4


def network() -> nn.Module:
    return build("cnn3", classes=3, channels=1, seed=0)


@pytest.mark.usefixtures("short_too")
def test_measuring_leaves_no_trace(stripes: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = stripes
    monkeypatch.setattr(precision, "WORTH", float("inf"))
    measured, plain = network(), network()
    for model, fit in ((measured, AUTO), (plain, F32)):
        train(model, images, Supervised(labels, CPU), fit, Preprocessing(), seed=0, folder=None, device=CPU)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], tensor), name


@pytest.mark.usefixtures("short_too")
def test_bf16_is_inside_the_network_only_and_kept_on_resuming(
    stripes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    images, labels = stripes
    supervised = Supervised(labels, CPU)
    inside: list[torch.dtype] = []

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        return supervised(logits, ids)

    def interrupt(record: EpochRecord) -> None:
        raise InterruptedError

    def run(folder: Path, *, stop: bool = False) -> nn.Module:
        model = network()
        convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        convolution.register_forward_hook(lambda module, _, out: inside.append(out.dtype) if module.training else None)
        on_epoch = interrupt if stop else None
        train(model, images, loss, AUTO, Preprocessing(), seed=0, folder=folder, on_epoch=on_epoch, device=CPU)
        return model

    monkeypatch.setattr(precision, "measure", lambda step: (2.0, 1.0))
    undisturbed = run(tmp_path / "one")
    with pytest.raises(InterruptedError):
        run(tmp_path / "two", stop=True)
    monkeypatch.setattr(precision, "measure", no_step)
    resumed = run(tmp_path / "two")
    assert set(inside) == {torch.bfloat16}
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
