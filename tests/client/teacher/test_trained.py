from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from consilience.client.teacher import describe_teacher, load_teacher
from consilience.client.teacher.private_samples import split
from consilience.client.teacher.trained import train_teacher
from consilience.common.epochs import EpochRecord
from consilience.common.errors import DataError, RunError, TeacherError
from consilience.common.files import lock
from consilience.common.nets import build, loop
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing, SiteSettings

Site = Callable[..., SiteSettings]
Blobs = tuple[np.ndarray, np.ndarray]
FIT = {"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "augment": False, "precision": "f32"}
TRAIN: dict[str, Any] = {"kind": "train", "architecture": "cnn3", "fit": FIT, "holdout": 0.25}


@pytest.fixture
def make(site: Site, blobs: Blobs, tmp_path: Path) -> Callable[..., SiteSettings]:
    """make(labels=..., ...) writes private data of five class names, three of them present, and gives the settings."""

    def settings(
        labels: np.ndarray | None = None, images: np.ndarray | None = None, seed: int = 0, **teacher: Any
    ) -> SiteSettings:
        np.savez(
            tmp_path / "private.npz",
            x=blobs[0] if images is None else images,
            y=np.array([3, 0, 4])[blobs[1]] if labels is None else labels,
            names=np.array(["right", "none", "nil", "left", "middle"]),
        )
        # Numbered in the data's order: right, left, middle.
        return site(seed=seed, data={"kind": "npz", "path": "private.npz"}, **(TRAIN | teacher))

    return settings


def weights(settings: SiteSettings) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(settings.state / "teacher" / "model.safetensors")


def test_training_learns_and_records_what_it_did(make: Site, blobs: Blobs) -> None:
    settings = make(fit=FIT | {"epochs": 15})
    epochs: list[EpochRecord] = []
    record = train_teacher(settings, epochs.append)
    assert record.classes == ("right", "left", "middle")
    assert [e.epoch for e in epochs] == list(range(15))
    assert record.learning_curve == tuple(epochs)
    assert (record.holdout_count, record.train_count) == (15, 45)
    assert record.preprocessing == Preprocessing(size=(16, 16), channels=1)
    teacher = load_teacher(settings)
    assert teacher.classes == record.classes
    truth = np.array([1, 0, 2])[blobs[1]]
    assert np.mean(teacher.log_probs(blobs[0]).argmax(axis=1) == truth) > 0.9
    assert describe_teacher(settings) == ("trained cnn3", record.holdout_accuracy)

    # The accuracy is that of the samples held out, computed without any of the code under test but the split.
    module = build("cnn3", classes=3, channels=1, seed=99)
    module.load_state_dict(weights(settings))
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(preprocess(blobs[0], record.preprocessing)))
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), torch.log_softmax(logits, 1).numpy(), atol=1e-5)
    told = json.loads((settings.state / "teacher" / "teacher.json").read_text())
    assert told["holdout_accuracy"] == record.holdout_accuracy
    assert told["preprocessing"]["size"] == [16, 16]


def test_the_accuracy_is_of_samples_never_learned_from(make: Site, blobs: Blobs, monkeypatch: Any) -> None:
    """Labels of pure noise: what was learned from may be known by heart, what was held out can only be guessed."""
    labels = np.random.default_rng(8).permutation(np.array([3, 0, 4])[blobs[1]])
    noise = np.random.default_rng(9).integers(0, 256, blobs[0].shape, np.uint8)
    settings = make(labels, noise, holdout=0.5, fit=FIT | {"epochs": 40})
    record = train_teacher(settings)
    teacher = load_teacher(settings)
    right = teacher.log_probs(noise).argmax(axis=1) == np.array([0, -1, -1, 1, 2])[labels]
    assert record.holdout_accuracy is not None
    assert right.sum() > 25 + record.holdout_accuracy * 30
    assert record.holdout_accuracy < 0.6


def test_what_was_held_out_is_exactly_what_is_counted(make: Site, blobs: Blobs, monkeypatch: Any) -> None:
    from consilience.client.teacher import trained
    from consilience.common.seeds import derive

    settings = make()
    seen: dict[str, Any] = {}

    def spy(model: Any, images: np.ndarray, *rest: Any, **named: Any) -> Any:
        seen["images"] = images
        return loop.train(model, images, *rest, **named)

    monkeypatch.setattr(trained, "train", spy)
    record = train_teacher(settings)
    numbered = np.array([1, 0, 2])[blobs[1]]
    learned, held_out = split(numbered, 0.25, derive(0, "holdout"))
    np.testing.assert_array_equal(seen["images"], blobs[0][learned])
    best = load_teacher(settings).log_probs(blobs[0][held_out]).argmax(axis=1)
    assert record.holdout_accuracy == np.mean(best == numbered[held_out])


def test_an_interrupted_training_ends_at_the_same_weights(
    make: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = make()
    train_teacher(whole)
    expected = weights(whole)
    (whole.state / "teacher").rename(tmp_path / "whole")

    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def stop(record: EpochRecord) -> None:
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(whole, stop)
    with pytest.raises(TeacherError, match="holds no trained teacher"):
        load_teacher(whole)
    later: list[EpochRecord] = []
    record = train_teacher(whole, later.append)
    assert [e.epoch for e in later] == [2, 3]
    assert [e.epoch for e in record.learning_curve] == [0, 1, 2, 3]
    found = weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_same_settings_are_not_trained_again(make: Site) -> None:
    first = train_teacher(make())
    fingerprint = load_teacher(make()).fingerprint
    again: list[EpochRecord] = []
    assert train_teacher(make(), again.append) == first
    assert again == []
    other = train_teacher(make(seed=1), again.append)
    assert len(again) == 4
    assert other.model_digest != first.model_digest
    assert load_teacher(make(seed=1)).fingerprint != fingerprint


def test_other_data_are_trained_from_again(make: Site, blobs: Blobs) -> None:
    first = train_teacher(make())
    again: list[EpochRecord] = []
    darker = train_teacher(make(images=blobs[0] // 2), again.append)
    assert len(again) == 4
    assert darker.model_digest != first.model_digest
    relabelled = train_teacher(make(labels=np.array([3, 0, 2])[blobs[1]]))
    assert relabelled.classes == ("right", "nil", "left")


@pytest.mark.parametrize(
    "change",
    [{"architecture": "resnet8"}, {"seed": 1}, {"fit": FIT | {"epochs": 5}}, {"preprocessing": {"mean": (0,)}}],
)
def test_a_teacher_of_other_settings_is_not_loaded(change: dict[str, Any], make: Site) -> None:
    with pytest.raises(TeacherError, match="holds no trained teacher") as caught:
        load_teacher(make())
    assert "consilience site train" in caught.value.hint
    train_teacher(make())
    load_teacher(make())
    with pytest.raises(TeacherError, match="trained from other settings or another seed") as caught:
        load_teacher(make(**change))
    assert "consilience site train" in caught.value.hint


def test_a_changed_model_file_is_noticed(make: Site) -> None:
    settings = make()
    train_teacher(settings)
    path = settings.state / "teacher" / "model.safetensors"
    held = weights(settings)
    held["13.bias"] += 1
    safetensors.torch.save_file(held, path)
    with pytest.raises(TeacherError, match=r"model\.safetensors: is not the model that teacher\.json speaks of"):
        load_teacher(settings)
    again: list[EpochRecord] = []
    train_teacher(settings, again.append)  # mends it, from the finished checkpoint
    assert again == []
    load_teacher(settings)
    path.unlink()
    with pytest.raises(TeacherError, match=r"model\.safetensors: no such file"):
        load_teacher(settings)
    (path.parent / "teacher.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"teacher\.json: is not as it must be"):
        load_teacher(settings)


def test_one_class_alone_is_certain(make: Site, blobs: Blobs) -> None:
    settings = make(np.full(60, 4), holdout=0)
    record = train_teacher(settings)
    assert record.classes == ("middle",)
    assert (record.holdout_accuracy, record.holdout_count) == (None, 0)
    assert (load_teacher(settings).log_probs(blobs[0]) == np.zeros((60, 1))).all()


def test_the_network_keeps_its_size_and_channels(make: Site, blobs: Blobs) -> None:
    """Pool images of another shape are brought to what the network was trained at."""
    settings = make(fit=FIT | {"epochs": 15}, preprocessing={"mean": (0.3,), "std": (0.2,)})
    train_teacher(settings)
    teacher = load_teacher(settings)
    big = np.repeat(np.repeat(np.repeat(blobs[0], 2, axis=1), 2, axis=2), 3, axis=3)
    assert np.mean(teacher.log_probs(big).argmax(1) == teacher.log_probs(blobs[0]).argmax(1)) > 0.9


def test_data_that_cannot_be_learned_from(make: Site, site: Site, blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="holds no sample"):
        train_teacher(make(np.zeros(0, np.int64), blobs[0][:0]))
    np.savez(tmp_path / "bare.npz", x=blobs[0])
    with pytest.raises(DataError, match="no labels"):
        train_teacher(site(data={"kind": "npz", "path": "bare.npz"}, **TRAIN))
    with pytest.raises(TeacherError, match="mean has 3 values; the images have 1 channels"):
        train_teacher(make(preprocessing={"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}))
    with pytest.raises(TeacherError, match="'callable'; only 'train' is trained here"):
        train_teacher(site(kind="callable", callable="a:b"))


def test_a_loss_that_is_not_finite_is_the_teachers_failure(make: Site) -> None:
    with pytest.raises(TeacherError, match=r"^site-1: Training failed .*not finite") as caught:
        train_teacher(make(fit=FIT | {"learning_rate": 10, "weight_decay": 1, "epochs": 60}))
    assert "learning_rate" in caught.value.hint


def test_two_processes_do_not_train_one_teacher(make: Site) -> None:
    settings = make()
    with lock(settings.state / "teacher"), pytest.raises(RunError, match="Another process"):
        train_teacher(settings)


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.5, 0.89])
def test_the_split_is_stratified_seeded_and_leaves_something_to_learn(share: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [1, 2, 30, 100]))
    learned, held_out = split(labels, share, 7)
    assert sorted([*learned, *held_out]) == list(range(133))
    counts = np.bincount(labels[held_out], minlength=4)
    np.testing.assert_array_equal(counts, [min(round(share * n), n - 1) for n in (1, 2, 30, 100)])
    np.testing.assert_array_equal(split(labels, share, 7)[1], held_out)
    if share:
        assert list(split(labels, share, 8)[1]) != list(held_out)
