"""Noise on outputs: after everything else, remembered by what it is drawn from, and another for another model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.client.privacy import answering_costs, train_private
from consilience.client.privacy.events import NoisyOutputs
from consilience.client.privacy.noise import Secret, load_secret
from consilience.client.privacy.outputs import STEPS, NoisyTeacher, beside, in_steps
from consilience.client.teacher import calibrate_teacher, describe_teacher, load_teacher
from consilience.common.nets import build, scores
from consilience.common.settings import OutputNoise, Preprocessing
from consilience.common.simplex import as_answer, project
from helpers.private_site import Make, bars

QUIET = OutputNoise(mechanism="output-noise", sigma=0.01)
LOUD = OutputNoise(mechanism="output-noise", sigma=1.5)


class Fixed:
    """Answers the same row for every image."""

    classes = ("a", "b", "c")

    def __init__(self, fingerprint: str = "f" * 64, row: tuple[float, ...] = (0.5, 0.3, 0.2)) -> None:
        self.fingerprint, self.row = fingerprint, row

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        return np.tile(np.log(self.row).astype(np.float32), (len(images), 1))


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), np.uint8)


def noisy(settings: OutputNoise = LOUD, fingerprint: str = "f" * 64, key: bytes = b"k" * 32) -> NoisyTeacher:
    return NoisyTeacher(Fixed(fingerprint), settings, Secret(key))


def test_small_noise_leaves_the_answer_nearly_as_it_was() -> None:
    found = np.exp(noisy(QUIET).log_probs(pictures(3000)))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    centre = 0.99 * np.array([0.5, 0.3, 0.2]) + 0.01 / 3
    np.testing.assert_allclose(found.mean(axis=0), centre, atol=2e-3)
    # what is along (1, 1, 1) the projection takes away
    np.testing.assert_allclose(found.std(axis=0), 0.99 * 0.01 * np.sqrt(2 / 3), rtol=0.06)


def test_asked_again_the_bytes_are_the_same_so_that_averaging_gains_nothing() -> None:
    images = pictures(20)
    first = noisy().log_probs(images)
    again = [
        noisy().log_probs(images[order])[np.argsort(order)]
        for order in np.random.default_rng(1).permuted(np.tile(np.arange(20), (50, 1)), axis=1)
    ]
    assert all(np.array_equal(rows, first) for rows in again)
    truth = np.log([0.5, 0.3, 0.2])
    assert np.abs(np.mean(again, axis=0) - truth).mean() == pytest.approx(np.abs(first - truth).mean(), rel=1e-5)


def test_another_site_model_or_scale_has_independent_noise_and_another_fingerprint() -> None:
    images = pictures(2000)
    one = noisy()
    others = [
        noisy(key=b"x" * 32),
        noisy(fingerprint="e" * 64),
        noisy(LOUD.model_copy(update={"sigma": 1.500001})),
    ]
    assert len({t.fingerprint for t in [one, *others]}) == 4
    assert one.fingerprint != "f" * 64
    own = one.log_probs(images).argmax(axis=1)
    chance = np.bincount(own, minlength=3) / len(own)
    for other in others:
        same = np.mean(other.log_probs(images).argmax(axis=1) == own)
        assert abs(same - np.sum(chance**2)) < 0.05
    # delta is for accounting alone: it changes no answer
    assert noisy(LOUD.model_copy(update={"delta": 1e-7})).fingerprint == one.fingerprint


def test_a_model_that_changes_behind_its_fingerprint_has_other_noise() -> None:
    images = pictures(3000)
    before = noisy(QUIET)
    after = NoisyTeacher(Fixed(row=(0.504, 0.3, 0.196)), QUIET, before.secret)
    assert after.fingerprint == before.fingerprint
    told = np.exp(after.log_probs(images)) - np.exp(before.log_probs(images))
    # the difference of two answers is as noisy as two answers are
    np.testing.assert_allclose(told.std(axis=0), 0.99 * 0.01 * np.sqrt(2 * 2 / 3), rtol=0.06)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30).filter(lambda row: sum(row) > 1e-3),
    st.lists(st.floats(-1e-7, 1e-7), min_size=30, max_size=30),
)
def test_two_answers_have_the_same_noise_only_where_nothing_of_their_difference_is_told(
    row: list[float], change: list[float]
) -> None:
    class Model(Fixed):
        classes = tuple(map(str, range(len(row))))

    before = np.array(row) / sum(row)
    after = np.maximum(before + change[: len(row)], 0)
    images = pictures(1)
    one, other = (
        NoisyTeacher(Model(row=tuple(np.maximum(probs, 1e-30))), LOUD, Secret(b"k" * 32)).log_probs(images)
        for probs in (before, after)
    )
    edge = np.abs((before * STEPS) % 1 - 0.5).min() < 1e-3  # of a step: there the answer is another, noise and all
    assert edge or np.array_equal(one, other)
    told = project(in_steps(np.log(np.maximum([before, after], 1e-30)).astype(np.float32)) / STEPS)
    np.testing.assert_allclose(told.sum(axis=1), 1, atol=1e-12)  # on the simplex, whose diameter is accounted for
    assert (told >= 0).all()


@pytest.mark.parametrize("architecture", ["cnn3", "resnet8"])
def test_an_image_has_the_same_noise_in_a_batch_of_any_size(architecture: str) -> None:
    network = build(architecture, classes=10, channels=1, seed=0).eval()
    used = Preprocessing(size=(28, 28), channels=1)

    class Network:
        classes, fingerprint = tuple("abcdefghij"), "f" * 64

        def log_probs(self, images: np.ndarray) -> np.ndarray:
            return log_softmax(scores(network, images, used).astype(np.float64), axis=1).astype(np.float32)

    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 1), np.uint8)
    teacher = NoisyTeacher(Network(), LOUD, Secret(b"k" * 32))
    together = teacher.log_probs(images)
    alone = np.concatenate([teacher.log_probs(images[k : k + 1]) for k in range(len(images))])
    # at the edge of a step an image may have two answers: of some thousands, one
    assert np.mean((alone != together).any(axis=1)) <= 0.01
    raw = Network().log_probs(images)
    first, mean = (np.abs(np.exp(rows) - np.exp(raw)).sum() for rows in (together, (together + alone) / 2))
    assert mean >= 0.99 * first


def test_a_site_answers_behind_the_noise_after_its_calibration(make: Make) -> None:
    bare = make({"mechanism": "none"}, calibration="temperature", teacher={"holdout": 0.3}, fit={"epochs": 3})
    train_private(bare)
    calibrate_teacher(bare)
    settings = make(
        {"mechanism": "output-noise", "sigma": 0.05},
        calibration="temperature",
        teacher={"holdout": 0.3},
        fit={"epochs": 3},
    )
    images = bars(30, seed=9)[0]
    plain, teacher = load_teacher(bare), load_teacher(settings)
    assert plain.record is not None
    assert plain.record.map is not None
    assert teacher.told == f"{plain.told}, before noise"
    assert len({teacher.fingerprint, plain.fingerprint, plain.teacher.fingerprint}) == 3
    purpose = [{"mechanism": "output-noise", "sigma": 0.05}, plain.fingerprint]
    told = in_steps(plain.log_probs(images))
    noise = 0.05 * load_secret(settings).normal(purpose, beside(images, told), 3)
    probs = project(told / STEPS) + noise
    np.testing.assert_allclose(teacher.log_probs(images), as_answer(project(probs)), atol=1e-3)
    np.testing.assert_allclose(told / STEPS, np.exp(plain.log_probs(images)), atol=0.5001 / STEPS)
    assert np.abs(teacher.log_probs(images) - plain.log_probs(images)).max() > 0.05
    assert answering_costs(settings, 9) == (NoisyOutputs(sigma=0.05, count=9),)
    assert describe_teacher(settings)[0].endswith("protects the whole model's answer, not a record; noise 0.05")


def test_no_image_is_no_answer() -> None:
    assert noisy().log_probs(pictures(0)).shape == (0, 3)
