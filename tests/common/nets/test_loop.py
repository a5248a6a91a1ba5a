from __future__ import annotations

import copy
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.errors import StudentError
from consilience.common.nets import Parted, Supervised, build, scores, train
from consilience.common.nets.loop import one_cycle, sgd
from consilience.common.settings import Fit, Preprocessing

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]
CPU = torch.device("cpu")
PLAIN = Preprocessing()


def fit_of(**fields: Any) -> Fit:
    return Fit.model_validate({"epochs": 4, "batch_size": 32, "learning_rate": 0.05, "precision": "f32", **fields})


FIT = fit_of()


class Interrupted(Exception):
    pass


def small() -> nn.Module:
    """A network whose training draws from torch's global generator."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *head)


def fitted(stripes: Labelled, folder: Path | None = None, fit: Fit = FIT, **options: Any) -> nn.Module:
    images, labels = stripes
    model = small()
    options = {"seed": 3, "loss": Supervised(labels, CPU), "preprocessing": PLAIN, **options}
    train(model, images, fit=fit, folder=folder, device=CPU, **options)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_learns_what_is_easy(stripes: Labelled) -> None:
    images, labels = stripes
    model = build("cnn3", classes=3, channels=1, seed=0)
    fit = fit_of(epochs=15, batch_size=16, precision="auto")
    records = train(model, images, Supervised(labels, CPU), fit, PLAIN, seed=0, folder=None)
    assert [record.epoch for record in records] == [*range(15)]
    assert records[-1].loss < 0.3 * records[0].loss
    assert (scores(model, images, PLAIN).argmax(axis=1) == labels).mean() > 0.95
    assert not model.training
    assert json.loads(json.dumps(asdict(records[0])))["seconds"] > 0


def test_same_seed_same_weights(stripes: Labelled) -> None:
    torch.manual_seed(1)
    first = fitted(stripes)
    state = torch.random.get_rng_state()
    again = fitted(stripes, on_epoch=lambda _: torch.rand(1))
    assert same(first, again)
    assert not same(first, fitted(stripes, seed=4))
    assert not same(first, fitted(stripes, fit=fit_of(augment=False)))
    small()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_resumed_is_as_undisturbed(
    stripes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    seen: list[EpochRecord] = []

    def interrupt(record: EpochRecord) -> None:
        seen.append(record)
        if record.epoch == epoch:
            raise Interrupted

    with pytest.raises(Interrupted):
        fitted(stripes, tmp_path, on_epoch=interrupt)
    resumed = fitted(stripes, tmp_path, on_epoch=seen.append)
    assert [record.epoch for record in seen] == [0, 1, 2, 3]
    assert same(resumed, fitted(stripes))


def test_resnet_resumes_bit_for_bit(stripes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    images, labels = stripes
    fit = fit_of(epochs=2)

    def interrupt(record: EpochRecord) -> None:
        raise Interrupted

    def run(folder: Path | None, on_epoch: Any = None) -> nn.Module:
        model = build("resnet8", classes=3, channels=1, seed=0)
        train(model, images, Supervised(labels, CPU), fit, PLAIN, seed=0, folder=folder, on_epoch=on_epoch)
        return model

    with pytest.raises(Interrupted):
        run(tmp_path, interrupt)
    assert same(run(tmp_path), run(None))


def test_checkpoints_are_not_written_all_the_time(
    stripes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    there: list[bool] = []
    path = tmp_path / "checkpoint.safetensors"
    fitted(stripes, tmp_path, on_epoch=lambda _: there.append(path.exists()))
    assert there == [False, False, False, True]


def test_finished_training_is_not_repeated(stripes: Labelled, tmp_path: Path) -> None:
    images, labels = stripes
    first, second = small(), small()
    calls: list[EpochRecord] = []
    loss = Supervised(labels, CPU)
    records = train(first, images, loss, FIT, PLAIN, seed=3, folder=tmp_path, on_epoch=calls.append)
    again = train(second, images, loss, FIT, PLAIN, seed=3, folder=tmp_path, on_epoch=calls.append)
    assert again == records == calls
    assert same(first, second)
    assert not second.training


def test_what_other_arguments_left_is_ignored(stripes: Labelled, tmp_path: Path) -> None:
    images, labels = stripes
    fitted(stripes, tmp_path)
    others: list[dict[str, Any]] = [
        {"fit": fit_of(learning_rate=0.04)},
        {"seed": 4},
        {"preprocessing": Preprocessing(mean=(0.4,))},
        {"stripes": (images[:89], labels)},
        {"stripes": (np.flip(images, axis=0), labels)},
        {"stripes": (images, np.flip(labels))},
        {"loss": Supervised(labels, CPU, label_smoothing=0.1)},
    ]
    for changes in others:
        epochs: list[EpochRecord] = []
        given = {"stripes": stripes, **changes}
        model = fitted(folder=tmp_path, on_epoch=epochs.append, **given)
        assert len(epochs) == 4, changes
        assert same(model, fitted(**given)), changes


def test_another_network_is_not_confused(stripes: Labelled, tmp_path: Path) -> None:
    images, labels = stripes
    fitted(stripes, tmp_path)
    wider = build("cnn3", classes=3, channels=1, seed=0)
    epochs: list[EpochRecord] = []
    loss = Supervised(labels, CPU)
    train(wider, images, loss, FIT, PLAIN, seed=3, folder=tmp_path, on_epoch=epochs.append, device=CPU)
    assert len(epochs) == 4


def test_damaged_checkpoint_is_ignored(stripes: Labelled, tmp_path: Path) -> None:
    first = fitted(stripes, tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    assert same(first, fitted(stripes, tmp_path))


def test_loss_that_is_not_finite(stripes: Labelled, tmp_path: Path) -> None:
    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.sum() * float("nan")

    with pytest.raises(StudentError, match=r"epoch 1 of 4: the loss is nan at learning rate 0.0.*Lower fit.learning"):
        fitted(stripes, tmp_path, loss=loss)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_weights_that_are_not_finite(stripes: Labelled) -> None:
    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return (logits.mean() * 0).abs().sqrt()  # 0, with a gradient that is not a number

    with pytest.raises(StudentError, match=r"the loss is 0 .*not finite"):
        fitted(stripes, loss=loss, fit=fit_of(epochs=1, batch_size=90))


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(10, 64, [10]), (10, 4, [4, 4]), (9, 8, [8]), (8, 4, [4, 4]), (1, 64, [2]), (5, 1, [2, 2])],
)
def test_batches(stripes: Labelled, n: int, batch_size: int, sizes: list[int]) -> None:
    images, labels = stripes
    supervised = Supervised(labels[:n], CPU)
    batches: list[list[int]] = []

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        batches.append(ids.tolist())
        assert logits.dtype == torch.float32
        assert len(logits) == len(ids)
        return supervised(logits, ids)

    fit = fit_of(epochs=2, batch_size=batch_size)
    train(small(), images[:n], loss, fit, PLAIN, seed=0, folder=None)
    assert [len(batch) for batch in batches] == 2 * sizes
    epochs = [list(itertools.chain(*part)) for part in (batches[: len(sizes)], batches[len(sizes) :])]
    if n > 1:
        assert all(len(set(epoch)) == sum(sizes) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_no_images(stripes: Labelled) -> None:
    images, labels = stripes
    with pytest.raises(StudentError, match="no images to train on"):
        fitted((images[:0], labels[:0]))


@pytest.mark.parametrize("augment", [False, True])
def test_network_sees_its_images(stripes: Labelled, augment: bool) -> None:
    images, labels = stripes
    seen: list[Tensor] = []
    model = small()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()) if model.training else None)
    fit = fit_of(epochs=1, batch_size=90, augment=augment)
    train(model, images, Supervised(labels, CPU), fit, PLAIN, seed=0, folder=None)
    wanted = {image.tobytes() for image in images}
    given = ((seen[0] * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    unchanged = sum(image.tobytes() in wanted for image in given)
    assert unchanged < 45 if augment else unchanged == 90


@pytest.mark.parametrize("mirror", [False, True])
def test_images_are_mirrored_unless_that_changes_what_they_are(mirror: bool) -> None:
    images = np.zeros((60, 16, 16, 1), np.uint8)
    images[:, :, :8] = 255
    seen: list[Tensor] = []
    model = small()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()) if model.training else None)
    fit = fit_of(epochs=1, batch_size=60, mirror=mirror)
    train(model, images, Supervised(np.zeros(60, np.int64), CPU), fit, PLAIN, seed=0, folder=None)
    bright_right = int((seen[0][:, 0, :, -1].mean(dim=1) > seen[0][:, 0, :, 0].mean(dim=1)).sum())
    assert 15 < bright_right < 45 if mirror else bright_right == 0


def test_network_that_does_not_fit_the_images(stripes: Labelled) -> None:
    images, labels = stripes
    for model in (
        build("cnn3", classes=3, channels=3, seed=0),
        build("torchvision:squeezenet1_1", classes=3, channels=1, seed=0),
    ):
        with pytest.raises(StudentError, match="does not take images of 16x16 pixels and 1 channels"):
            train(model, images, Supervised(labels, CPU), FIT, PLAIN, seed=0, folder=None)
    with pytest.raises(StudentError, match="one row of scores"):
        train(nn.Conv2d(1, 3, 1), images, Supervised(labels, CPU), FIT, PLAIN, seed=0, folder=None)


def test_preprocessing_is_applied(stripes: Labelled) -> None:
    images, labels = stripes
    model = build("cnn3", classes=3, channels=3, seed=0)
    to_colour = Preprocessing(channels=3, size=(20, 20))
    train(model, images, Supervised(labels, CPU), fit_of(epochs=1), to_colour, seed=0, folder=None)


def test_steps_and_weight_decay(stripes: Labelled) -> None:
    images, _ = stripes
    fit = fit_of(epochs=3, batch_size=90, learning_rate=0.5, weight_decay=0.5)
    model = build("cnn3", classes=3, channels=1, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, images, lambda logits, ids: logits.sum() * 0, fit, PLAIN, seed=0, folder=None)
    weight, momentum = 1.0, 0.0  # with no other gradient than the decay's, every weight shrinks alike
    for step in range(3):
        gradient = 0.5 * weight
        momentum = 0.9 * momentum + gradient
        weight -= one_cycle(step, 3, 0.5) * (gradient + 0.9 * momentum)
    for name, parameter in model.named_parameters():
        factor = weight if parameter.ndim > 1 else 1
        assert torch.allclose(parameter, before[name] * factor, atol=1e-6), name
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_compile_is_only_used_when_asked_for(stripes: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    plain = fitted(stripes)
    assert not compiled
    assert same(plain, fitted(stripes, fit=fit_of(compile=True)))
    assert len(compiled) == 1


def test_one_cycle() -> None:
    rates = [one_cycle(step, 100, 0.4) for step in range(100)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.4)
    assert 15 <= top <= 25
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.01 * 0.4
    assert np.diff(rates[: top + 1]) == pytest.approx(rates[0])
    assert one_cycle(0, 1, 0.4) == 0.4


def test_records_tell_the_learning_rate(stripes: Labelled) -> None:
    images, labels = stripes
    records = train(small(), images, Supervised(labels, CPU), FIT, PLAIN, seed=0, folder=None)
    assert [record.learning_rate for record in records] == [one_cycle(step, 8, 0.05) for step in (1, 3, 5, 7)]


def test_supervised_is_cross_entropy() -> None:
    loss = Supervised(np.array([1, 0, 2]), CPU, label_smoothing=0.3)
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    target = 0.7 * torch.tensor([[0.0, 0, 1], [1, 0, 0]]) + 0.1
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert loss(logits, torch.tensor([2, 1])) == pytest.approx(expected.item())
    with pytest.raises(StudentError, match="Label -100 is negative"):
        Supervised(np.array([1, -100]), CPU)


class WithSum(nn.Module):
    """A network that gives its scores and a feature of them, and a weight that only the loss uses."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.weight = small(), nn.Parameter(torch.tensor([scale]))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        scores = self.network(images)
        return scores, (scores.sum(dim=1),)


class InParts:
    """Cross-entropy, and the square of a feature times the model's own weight."""

    fingerprint = "in parts"

    def __init__(self, model: WithSum, labels: NDArray[np.int64]) -> None:
        self.model, self.labels = model, Supervised(labels, CPU)
        self.told: list[tuple[float, float]] = []

    def __call__(self, output: tuple[Tensor, tuple[Tensor]], ids: Tensor) -> Parted:
        scores, (feature,) = output
        assert feature.dtype == torch.float32
        plain, square = self.labels(scores, ids), (feature * self.model.weight).square().mean()
        self.told.append((plain.item(), square.item()))
        return Parted(plain + 0.5 * square, {"plain": plain.detach(), "square": square.detach()})


def in_parts(
    stripes: Labelled, folder: Path | None = None, scale: float = 1.0, **options: Any
) -> tuple[WithSum, InParts, list[EpochRecord]]:
    images, labels = stripes
    model = WithSum(scale)
    loss = InParts(model, labels)
    records = train(model, images, loss, FIT, PLAIN, seed=3, folder=folder, device=CPU, **options)
    return model, loss, records


def test_a_loss_tells_its_terms_and_trains_what_it_owns(stripes: Labelled) -> None:
    model, loss, records = in_parts(stripes)
    steps = len(stripes[0]) // FIT.batch_size
    for record in records:
        told = np.array(loss.told[record.epoch * steps :][:steps]).mean(axis=0)
        assert record.terms == pytest.approx({"plain": told[0], "square": told[1]}, rel=1e-5)
        assert record.loss == pytest.approx(told[0] + 0.5 * told[1], rel=1e-5)
    assert model.weight.item() != 1.0
    assert json.loads(json.dumps(asdict(records[0])))["terms"].keys() == {"plain", "square"}


def test_a_training_of_several_outputs_resumes_bit_for_bit(
    stripes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole, _, records = in_parts(stripes)

    def stop(record: EpochRecord) -> None:
        if record.epoch == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        in_parts(stripes, tmp_path, on_epoch=stop)
    resumed, loss, again = in_parts(stripes, tmp_path)
    assert len(loss.told) == 2 * (len(stripes[0]) // FIT.batch_size)
    assert same(whole, resumed)
    assert [dict(record.terms) for record in again] == [dict(record.terms) for record in records]


def test_a_training_from_other_weights_is_another_one(stripes: Labelled, tmp_path: Path) -> None:
    in_parts(stripes, tmp_path)
    _, finished, _ = in_parts(stripes, tmp_path)
    assert not finished.told
    _, other, _ = in_parts(stripes, tmp_path, scale=2.0)
    assert other.told


def test_a_tuple_without_scores_is_refused(stripes: Labelled) -> None:
    class Empty(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return (images,)

    images, labels = stripes
    with pytest.raises(StudentError, match="one row of scores"):
        train(Empty(), images, Supervised(labels, CPU), FIT, PLAIN, seed=0, folder=None, device=CPU)


def test_a_large_matrix_is_updated_in_one_pass_to_the_same_weights() -> None:
    torch.manual_seed(0)
    network = nn.Linear(512, 512)
    other = copy.deepcopy(network)
    ours = sgd(network, Fit(learning_rate=0.1, weight_decay=0.01))
    decays = [{"params": [other.weight], "weight_decay": 0.01}, {"params": [other.bias], "weight_decay": 0.0}]
    plain = torch.optim.SGD(decays, lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        for name, parameter in network.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            other.get_parameter(name).grad = parameter.grad.clone()
        ours.step()
        plain.step()
    assert [group["fused"] for group in ours.param_groups if group["params"]] == [None, True]
    torch.testing.assert_close(network.weight, other.weight)
    assert torch.equal(network.bias, other.bias)
