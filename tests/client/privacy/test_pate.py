"""The vote of parts: each record in one part, one answer an image, and nothing of it without the secret."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.client.privacy import PateTeacher, answering_costs, load_private, train_private, training_epochs
from consilience.client.privacy.events import PateVotes
from consilience.client.privacy.noise import load_secret
from consilience.client.privacy.records import places
from consilience.client.site import Site
from consilience.client.teacher import describe_teacher, load_teacher
from consilience.common.data import from_arrays, open_data
from consilience.common.encoding import decode
from consilience.common.epochs import EpochRecord
from consilience.common.errors import SettingsError, TeacherError
from consilience.common.pool import Pool
from consilience.common.protocol import Question
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import parse_settings
from helpers.private_site import Make, bars, settings_of, write_data

VOTE: dict[str, Any] = {"mechanism": "pate", "parts": 3, "sigma": 0.5}
SURE: dict[str, Any] = {**VOTE, "answer": "confident", "threshold": 2.5, "threshold_sigma": 0.5}
MEAN: dict[str, Any] = {**VOTE, "answer": "average"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with private data and the teachers of three parts, which no test changes."""
    folder = tmp_path_factory.mktemp("pate")
    write_data(folder, *bars(120))
    train_private(settings_of(folder, VOTE))
    return folder


def pate(settings: SiteSettings) -> PateTeacher:
    teacher = load_private(settings)
    assert isinstance(teacher, PateTeacher)
    return teacher


def test_every_record_is_in_one_part_by_itself_alone() -> None:
    images, labels = bars(120)
    data = from_arrays(images, labels, ("a", "b", "c"), where="test")
    found = places(data, 5, 0.2, 1)
    assert sorted(np.concatenate([found.ids(part) for part in range(-1, 5)])) == list(range(120))
    assert 5 <= len(found.ids(-1)) <= 45
    assert all(len(found.ids(part)) > 5 for part in range(5))
    order = np.random.default_rng(0).permutation(120)[:70]
    fewer = places(data.subset(order), 5, 0.2, 1)
    np.testing.assert_array_equal(fewer.part, found.part[order])
    # another share held out moves no record from part to part
    none = places(data, 5, 0.0, 1).part
    np.testing.assert_array_equal(none[found.part >= 0], found.part[found.part >= 0])
    assert (none >= 0).all()
    # copies of an image are in one part, whatever they are called
    twice = from_arrays(np.repeat(images, 2, axis=0), np.arange(240) % 3, ("a", "b", "c"), where="test")
    np.testing.assert_array_equal(places(twice, 5, 0.2, 1).part, np.repeat(found.part, 2))
    assert not np.array_equal(places(data, 5, 0.2, 2).part, found.part)
    assert found.digest == places(data, 7, 0.5, 1).digest != fewer.digest


def test_one_record_fewer_changes_one_part_alone(trained: Path, tmp_path: Path) -> None:
    images, labels = bars(120)
    before = pate(settings_of(trained, VOTE))
    gone = places(open_data(settings_of(trained, VOTE).data), 3, 0.2, 0).ids(1)[0]  # type: ignore[arg-type]
    shutil.copytree(trained, tmp_path / "site")
    write_data(tmp_path / "site", np.delete(images, gone, axis=0), np.delete(labels, gone))
    settings = settings_of(tmp_path / "site", VOTE)
    train_private(settings)
    after = pate(settings)
    same = [one.fingerprint == other.fingerprint for one, other in zip(before.parts, after.parts, strict=True)]
    assert same == [True, False, True]
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("privacy", [VOTE, SURE, MEAN])
def test_answers_are_the_same_after_a_restart_and_however_they_are_cut(trained: Path, privacy: dict[str, Any]) -> None:
    settings = settings_of(trained, privacy)
    images, _ = bars(40, seed=9)
    first = load_teacher(settings).log_probs(images)
    np.testing.assert_allclose(np.exp(first.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    again = load_teacher(settings)
    for size in (7, 1):  # a batch of one has other last digits: the same noise all the same
        cut = np.concatenate([again.log_probs(images[k : k + size]) for k in range(0, 40, size)])
        np.testing.assert_allclose(cut, first, atol=1e-5)
    assert load_teacher(settings).log_probs(images[:0]).shape == (0, 3)


def test_answers_are_the_noisy_vote_and_right_as_often_as_it_is(trained: Path) -> None:
    teacher = pate(settings_of(trained, VOTE))
    images, labels = bars(60, seed=9)
    votes = teacher.sums(images)
    np.testing.assert_array_equal(votes.sum(axis=1), 3)
    by_hand = np.stack([part.log_probs(images).argmax(axis=1) for part in teacher.parts])
    np.testing.assert_array_equal(votes, (by_hand[:, :, None] == np.arange(3)).sum(axis=0))
    noise = 0.5 * teacher.secret.normal(teacher.fingerprint, images, 3)
    answered = teacher.log_probs(images).argmax(axis=1)
    np.testing.assert_array_equal(answered, (votes + noise).argmax(axis=1))
    assert np.mean(answered == labels) > 0.6


def test_what_does_not_pass_is_uniform(trained: Path) -> None:
    rows = np.exp(load_teacher(settings_of(trained, SURE)).log_probs(bars(60, seed=9)[0]).astype(np.float64))
    silent = np.isclose(rows, 1 / 3, atol=1e-6).all(axis=1)
    assert silent.any()
    assert not silent.all()
    never = settings_of(trained, {**SURE, "threshold": 3, "threshold_sigma": 0.01, "parts": 3})
    unanimous = pate(never).sums(bars(60, seed=9)[0]).max(axis=1)
    told = load_teacher(never).log_probs(bars(60, seed=9)[0]).max(axis=1) > np.log(0.9)
    assert not told[unanimous < 3].any()


def test_another_form_or_noise_is_another_teacher_with_noise_of_its_own(trained: Path) -> None:
    images = bars(200, seed=11)[0]
    loud = {**VOTE, "sigma": 100.0}
    forms = [VOTE, SURE, MEAN, loud, {**VOTE, "sigma": 100.001}]
    teachers = [pate(settings_of(trained, form)) for form in forms]
    assert len({teacher.fingerprint for teacher in teachers}) == 5
    # so loud that noise alone decides: answers agree as often as chance has it
    same = np.mean(teachers[3].log_probs(images).argmax(axis=1) == teachers[4].log_probs(images).argmax(axis=1))
    assert abs(same - 1 / 3) < 0.12
    assert pate(settings_of(trained, {**VOTE, "delta": 1e-7})).fingerprint == teachers[0].fingerprint


def test_the_fingerprint_is_under_the_secret(trained: Path, tmp_path: Path) -> None:
    before = pate(settings_of(trained, VOTE))
    shutil.copytree(trained, tmp_path / "site")
    (tmp_path / "site" / "state" / "privacy" / "noise.key").unlink(missing_ok=True)
    after = pate(settings_of(tmp_path / "site", VOTE))
    assert [p.fingerprint for p in after.parts] == [p.fingerprint for p in before.parts]
    assert after.fingerprint != before.fingerprint
    assert load_secret(settings_of(tmp_path / "site", VOTE)) != before.secret


def test_a_site_answers_the_same_bytes_for_a_sample_however_it_is_asked(trained: Path, tmp_path: Path) -> None:
    pool = Pool.build(from_arrays(bars(50, seed=3)[0], None, (), where="test"), tmp_path / "pool")
    settings = settings_of(trained, MEAN, pools=[str(pool.folder)], batch_size=16, policy={"precision": "f32"})
    site = Site(settings, load_teacher(settings))

    def ask(start: int, stop: int) -> bytes:
        question = Question(
            job="job",
            pool=pool.digest,
            start=start,
            stop=stop,
            encoding="f32",
            teacher=site.teacher.fingerprint,
            policy=settings.policy.version,
        )
        return site.answer(question).data

    whole = ask(0, 50)
    assert b"".join(ask(k, min(k + 11, 50)) for k in range(0, 50, 11)) == whole
    assert decode(whole, 50, 3, "f32").shape == (50, 3)
    card = site.card
    assert card.description == "trained cnn3; pate (average): protects a record; 3 parts, noise 0.5 votes"
    assert (card.holdout_accuracy, card.class_priors, card.coverage) == (None, None, None)
    assert describe_teacher(settings)[1] is None


def test_costs_and_epochs(trained: Path) -> None:
    settings = settings_of(trained, VOTE)
    assert answering_costs(settings, 50) == (PateVotes(sigma=0.5, count=50),)
    assert training_epochs(settings) == 45


def test_what_is_trained_is_not_trained_again_and_goes_on_where_it_was_interrupted(make: Make) -> None:
    settings = make(VOTE, fit={"epochs": 1})

    def stop(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_private(settings, stop)
    with pytest.raises(TeacherError, match="holds no trained teacher"):
        load_teacher(settings)
    epochs: list[EpochRecord] = []
    train_private(settings, epochs.append)
    assert 2 <= len(epochs) <= 3
    train_private(settings, epochs.append)
    assert len(epochs) <= 3
    # teachers of another division of the data are never taken for this one's
    for other in ({**VOTE, "parts": 2}, {**VOTE, "parts": 4}):
        with pytest.raises(TeacherError, match=r"other settings|holds no trained"):
            load_teacher(make(other, fit={"epochs": 1}))
    with pytest.raises(TeacherError, match="other settings"):
        load_teacher(make(VOTE, fit={"epochs": 1}, teacher={"holdout": 0.3}))


def test_a_part_without_an_image_is_refused(make: Make) -> None:
    with pytest.raises(TeacherError, match=r"part \d+ of 500 has no image, of 120 in all. Lower privacy.parts"):
        train_private(make({**VOTE, "parts": 500}))


@pytest.mark.parametrize(
    ("privacy", "changes", "told"),
    [
        (VOTE, {"calibration": "temperature"}, "calibration is temperature, which learns from the private data"),
        (VOTE, {"policy": {"coverage": "u8"}}, "policy.coverage lets out"),
        (VOTE, {"policy": {"class_priors": True}}, "policy.class_priors lets out"),
        (
            {"mechanism": "output-noise", "sigma": 1},
            {"policy": {"holdout_accuracy": True}},
            "holdout_accuracy lets out",
        ),
        ({"mechanism": "dp-sgd", "noise_multiplier": 1}, {"fit": {"compile": True}}, "fit.compile is true"),
        ({**VOTE, "threshold": 2}, {}, "answer is 'arg-max', which does not use threshold; leave it out"),
        ({**SURE, "threshold": 4}, {}, "threshold is 4; there are 3 parts"),
        ({k: v for k, v in SURE.items() if k != "threshold_sigma"}, {}, "needs threshold_sigma; set it"),
        ({**VOTE, "sigma": 0}, {}, "without noise there is no guarantee"),
        ({**SURE, "threshold_sigma": 0.0}, {}, "without noise there is no guarantee"),
        ({"mechanism": "dp-sgd", "noise_multiplier": 0}, {}, "without noise there is no guarantee"),
        ({"mechanism": "output-noise", "sigma": 0}, {}, "without noise there is no guarantee"),
        ({**VOTE, "sigma": -1}, {}, "'privacy.sigma' is -1"),
        ({**VOTE, "sigma": float("nan")}, {}, "'privacy.sigma' is nan"),
        ({**VOTE, "sigma": float("inf")}, {}, "'privacy.sigma' is inf"),
        ({**VOTE, "parts": 1}, {}, "'privacy.parts' is 1"),
        ({**VOTE, "delta": 0.5}, {}, "'privacy.delta' is 0.5"),
        ({**VOTE, "epsilon": 3}, {}, "'privacy.epsilon' is unknown; allowed here: mechanism, parts, answer"),
        ({"mechanism": "laplace"}, {}, "'privacy.mechanism' is 'laplace'; allowed: 'none', 'pate', 'dp-sgd'"),
        ({"sigma": 1}, {}, "'privacy.mechanism' is missing"),
    ],
)
def test_settings_that_claim_what_they_do_not_keep_are_refused(
    make: Make, privacy: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        make(privacy, **changes)
    assert told in str(caught.value)


@pytest.mark.parametrize("privacy", [VOTE, {"mechanism": "dp-sgd", "noise_multiplier": 1}])
def test_a_hosted_teacher_cannot_be_made_private_by_training(tmp_path: Path, privacy: dict[str, Any]) -> None:
    hosted = {"kind": "onnx", "path": "m.onnx", "classes": ["a"], "preprocessing": {}}
    raw = {"name": "s", "teacher": hosted, "calibration": "off", "privacy": privacy}
    with pytest.raises(SettingsError, match=r"trains the teacher itself; teacher\.kind is 'onnx'"):
        parse_settings(raw, SiteSettings, source="f", folder=tmp_path)
