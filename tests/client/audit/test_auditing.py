"""An audit from the site's files to its record: what is found, by whom it is stopped, and that nothing is left or lost.

Where an attack should succeed it must: an audit that finds nothing on a teacher that remembers everything is blind.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.client.audit import auditing
from consilience.client.audit.answers import answers_as_released
from consilience.client.audit.auditing import audit_site
from consilience.client.audit.averaging import Averaging, average, average_site
from consilience.client.audit.cli import audit_to
from consilience.client.audit.record import Audit
from consilience.client.ledger import Ledger
from consilience.client.privacy import NoisyTeacher, train_private
from consilience.client.privacy.noise import Secret
from consilience.client.privacy.outputs import beside
from consilience.client.site import Site
from consilience.client.teacher import load_teacher
from consilience.common.data import open_data
from consilience.common.encoding import decode
from consilience.common.epochs import EpochRecord
from consilience.common.errors import SettingsError, TeacherError
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import OutputNoise
from consilience.common.simplex import as_answer, project
from helpers.small_site import Fickle, make_pool
from helpers.small_site import make_site as make_small

PATE = {"mechanism": "pate", "parts": 4, "sigma": 3.0}
NOISE = {"mechanism": "output-noise", "sigma": 0.5}
FORGOT = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 64}


@pytest.fixture(scope="module")
def audited(make_site: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """audited(...) gives the audit of make_site(...), made once."""
    done: dict[str, Audit] = {}

    def audit(*args: Any, **raw: Any) -> Audit:
        key = repr((args, raw))
        if key not in done:
            with counting_no_repetitions():
                done[key] = audit_site(make_site(*args, **raw), tmp_path_factory.mktemp("audit") / "shadows")
        return done[key]

    return audit


@contextmanager
def counting_no_repetitions() -> Iterator[None]:
    """Ask a few times instead of a thousand, where repetitions are not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "average_site", lambda site, pool: average_site(site, pool, 3))
        yield


def test_both_attacks_succeed_on_a_teacher_that_remembers_everything(audited: Any) -> None:
    found = audited()
    for attack in (found.loss, found.shadows):
        assert attack.low > 0.6
        assert (attack.members, attack.others) == (120, 80)
    assert found.verdict == "Answers tell clearly better than chance whether the teacher learned from an image"
    assert found.guarantee.startswith("No formal guarantee")
    assert (found.pooled.targets, found.pooled.images) == (8, 200)
    # half of 200 images are others of each of 8 shadows, and the attack works on shadows too
    assert found.pooled.found[0.001] is None
    assert found.pooled.found[0.01].low > 0.01
    assert found.pooled.auc > 0.6


def test_both_attacks_fail_on_a_teacher_that_remembers_nothing(audited: Any) -> None:
    found = audited({"mechanism": "none"}, FORGOT)
    for attack in (found.loss, found.shadows):
        assert attack.low < 0.5 < attack.high
    assert "did not tell" in found.verdict


def test_noisy_votes_of_parts_hide_what_the_parts_remember(audited: Any) -> None:
    bare, hidden = audited(), audited(PATE)
    for attack, before in ((hidden.loss, bare.loss), (hidden.shadows, bare.shadows)):
        assert attack.high < before.low
        assert attack.low < 0.5 < attack.high
    assert any("the likelihood ratio is a weak attack" in note for note in hidden.notes)
    assert not any("the likelihood ratio is a weak attack" in note for note in bare.notes)
    assert hidden.guarantee.startswith("Answers leave behind a mechanism: pate (arg-max): protects a record")


def test_answers_that_say_less_hide_some_of_it_and_are_audited_as_they_leave(audited: Any) -> None:
    bare, votes = audited(), audited(policy={"precision": "votes"})
    assert votes.encoding == "votes"
    assert votes.loss.high < bare.loss.low
    assert votes.loss.low > 0.6  # rightness alone tells of memory
    # two scores there are, right and wrong, so the curve has one corner
    assert len(votes.loss.roc) == 3


@pytest.mark.slow
def test_training_by_noisy_gradients_hides_members(audited: Any) -> None:
    bare = audited()
    hidden = audited({"mechanism": "dp-sgd", "noise_multiplier": 4.0}, {"epochs": 4, "batch_size": 16})
    for attack, before in ((hidden.loss, bare.loss), (hidden.shadows, bare.shadows)):
        assert attack.high < before.low
    assert hidden.worst is None


def test_what_the_teacher_learned_shows_in_the_shares_of_classes(audited: Any) -> None:
    shares = audited().shares
    assert shares.distance_by_mean < shares.distance_uniform / 2
    assert shares.samples == 60
    assert shares.true == pytest.approx(np.array([69, 40, 11]) / 120, abs=0.05)


def tree(folder: Path) -> dict[str, str]:
    """Return every file below a folder with its digest, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, NOISE])
def test_an_audit_spends_and_releases_nothing_and_leaves_the_state_as_it_was(
    make_site: Any, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    source = make_site(privacy, FORGOT).settings
    shutil.copytree(source.state.parent, tmp_path / "site")
    settings = source.model_copy(
        update={
            "state": tmp_path / "site" / "state",
            "ledger_head": tmp_path / "site" / "head",
            "pools": (tmp_path / "site" / "pool",),
        }
    )
    site = Site(settings, load_teacher(settings))
    pool = Pool.open(settings.pools[0])
    question = site.question("real", pool.digest, 8, "log-probs", "f16")
    before = site.answer(question).data
    site.close()
    state = tree(tmp_path)
    with Reporter() as reporter:
        audit_to(site, tmp_path / "out", reporter, 4, 10)
    site.close()
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(settings.state / "audit")
    assert tree(tmp_path) == state
    with closing(Ledger.open(settings)) as ledger:
        assert ledger.spent.lifetime == 8
        assert ledger.count == (1 if privacy["mechanism"] == "none" else 2)
    assert site.answer(question).data == before


def test_what_is_attacked_is_what_would_leave(make_site: Any) -> None:
    site = make_site(policy={"precision": "top-2", "decimals": 2, "cap": 0.9})
    pool = Pool.open(site.settings.pools[0])
    images = pool.read(0, 20)
    for encoding in ("top-2", "votes"):
        question = site.question("job", pool.digest, 20, "log-probs", encoding)
        left = decode(site.answer(question).data, 20, 3, encoding)
        np.testing.assert_array_equal(answers_as_released(site, images, encoding), left)
    np.testing.assert_array_equal(answers_as_released(site, images), answers_as_released(site, images, "top-2"))


@pytest.mark.parametrize("privacy", [PATE | {"answer": "average"}, NOISE])
def test_noise_of_an_audit_is_repeatable_and_tells_nothing_of_the_noise_that_leaves(
    make_site: Any, privacy: dict[str, Any]
) -> None:
    site = make_site(privacy, FORGOT)
    images = np.random.default_rng(1).integers(0, 256, (3000, 8, 8, 1), np.uint8)
    ours, left = (np.exp(rows) for rows in (answers_as_released(site, images), site.teacher.log_probs(images)))
    np.testing.assert_array_equal(ours, np.exp(answers_as_released(site, images)))
    assert (ours != left).any(axis=1).mean() > 0.9
    # the teacher does not tell these images apart, so that what varies is noise
    for k in range(3):
        assert abs(np.corrcoef(ours[:, k], left[:, k])[0, 1]) < 0.08
        assert left[:, k].std() > 0.1


def test_averaging_takes_fresh_noise_away_and_this_is_seen() -> None:
    random, truth = np.random.default_rng(0), np.full((40, 5), 0.2)
    found = average(lambda _: truth + random.normal(0, 0.1, truth.shape), truth)
    assert found.works
    assert found.repetitions == 1000
    for times, error in found.errors.items():  # the mean absolute value of a Gaussian, over 5 classes, halved
        assert error == pytest.approx(5 / 2 * 0.1 * np.sqrt(2 / np.pi / times), rel=0.2)


@pytest.mark.parametrize("privacy", [NOISE, PATE, {"mechanism": "none"}])
def test_asking_a_site_a_thousand_times_gains_nothing(make_site: Any, privacy: dict[str, Any]) -> None:
    site = make_site(privacy)
    found = average_site(site, Pool.open(site.settings.pools[0]))
    assert found.repetitions == 1000
    assert not found.works
    assert found.noisy == (privacy["mechanism"] != "none")
    assert found.errors[1000] >= found.errors[1] * (0.999 if found.noisy else 1)  # encodings round
    if found.noisy:
        assert found.errors[1] > 0.05


class Trusting(NoisyTeacher):
    """Noise that follows from all bytes of the model's answer, as it did once."""

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        rows = self.teacher.log_probs(images)
        noise = self.settings.sigma * self.secret.normal(self._purpose, beside(images, rows), rows.shape[1])
        return as_answer(project(np.exp(rows.astype(np.float64)) + noise))


class Aligned:
    """A teacher of which a batch of one changes the last digits, as that of a network does."""

    classes, fingerprint = ("cat", "dog", "cow"), "f" * 64

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        row = np.log([0.5, 0.3, 0.2]) + (1e-7 if len(images) == 1 else 0)
        return np.tile(row.astype(np.float32), (len(images), 1))


@pytest.mark.parametrize(("kind", "works"), [(NoisyTeacher, False), (Trusting, True)])
@pytest.mark.parametrize("size", [16, 50])
def test_noise_that_follows_from_last_digits_is_found_by_another_pool(
    tmp_path: Path, unsynced: None, kind: type[NoisyTeacher], works: bool, size: int
) -> None:
    pool = make_pool(tmp_path, size)
    teacher = kind(Aligned(), OutputNoise(mechanism="output-noise", sigma=0.5), Secret(b"k" * 32))
    site = make_small(tmp_path, teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consilience.client.audit.averaging.audited_teacher", lambda site: site.teacher)
        found = average_site(site, pool, 100)
    assert found.works == works
    assert (found.gained > 0.15) == works
    assert found.noisy


@pytest.mark.parametrize("precision", ["f32", "u8", "votes"])
def test_a_teacher_that_never_says_the_same_twice_is_averaged_over_pools_and_encodings_alone(
    tmp_path: Path, unsynced: None, precision: str
) -> None:
    pool = make_pool(tmp_path)
    found = average_site(make_small(tmp_path, Fickle(), approval=True, precision=precision), pool, 100)
    assert found.noisy
    assert found.works
    # in one pool, of which the first ten ask, it is averaged over encodings
    assert (found.errors[10] < 0.9 * found.errors[1]) == (precision == "f32")


def test_a_hosted_teacher_is_audited_for_what_is_known_of_it(tmp_path: Path, unsynced: None) -> None:
    make_pool(tmp_path)
    site = make_small(tmp_path)
    found = audit_site(site, tmp_path / "shadows")
    assert found.loss is found.shadows is found.shares is None
    assert "kind callable) was not trained here" in found.left_out["loss"]
    assert set(found.left_out) == {"loss", "shadows", "shares"}
    assert found.verdict == "Whether answers tell which images the teacher learned from was not audited"
    assert found.averaging is not None
    assert found.averaging.repetitions == 1000


def test_noise_in_sums_is_not_said_to_be_in_what_was_attacked(make_site: Any, tmp_path: Path) -> None:
    site = make_site({"mechanism": "sum-noise", "sigma": 20.0, "honest": 1}, FORGOT, policy={"sums_only": True})
    found = audit_site(Site(site.settings.model_copy(update={"pools": ()}), site.teacher), tmp_path / "shadows", 4)
    assert any("noise of sums is in none of these figures" in note for note in found.notes)
    assert "Answers leave in sums with noise, and what was attacked here is without it: sum-noise" in found.guarantee


def test_without_a_pool_what_needs_one_is_left_out(make_site: Any, tmp_path: Path) -> None:
    site = make_site(fit=FORGOT)
    bare = Site(site.settings.model_copy(update={"pools": ()}), site.teacher)
    found = audit_site(bare, tmp_path / "shadows", 4)
    assert set(found.left_out) == {"shares", "averaging"}
    assert "name no pool" in found.left_out["averaging"]
    assert found.loss is not None


def test_too_few_shadows_are_refused_before_anything_is_done(make_site: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--shadows is 3; allowed: 4 or more"):
        audit_site(make_site(), tmp_path / "shadows", 3)
    assert not (tmp_path / "shadows").exists()


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PATE])
def test_without_held_out_images_the_audit_says_what_to_do(make_site: Any, privacy: Any, tmp_path: Path) -> None:
    site = make_site(privacy, FORGOT, teacher={"holdout": 0.02})
    with pytest.raises(TeacherError, match="were held out; an audit needs at least 20 of each") as caught:
        audit_site(site, tmp_path / "shadows")
    assert "Raise teacher.holdout" in caught.value.hint


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PATE])
def test_other_data_than_the_teacher_was_trained_on_are_refused(make_site: Any, privacy: Any, tmp_path: Path) -> None:
    source = make_site(privacy, FORGOT).settings
    shutil.copytree(source.state.parent, tmp_path / "site")
    path = tmp_path / "site" / "private.npz"
    data = dict(np.load(path))
    np.savez(path, **{**data, "y": (data["y"] + 1) % 3})
    assert source.data is not None
    settings = source.model_copy(
        update={"state": tmp_path / "site" / "state", "data": source.data.model_copy(update={"path": path})}
    )
    with pytest.raises(TeacherError, match="the private data are not those that"):
        audit_site(Site(settings, load_teacher(settings)), tmp_path / "shadows")


def test_an_interrupted_audit_goes_on_with_the_shadows_that_are_there(make_site: Any, tmp_path: Path) -> None:
    site, epochs = make_site(fit={"epochs": 3, "batch_size": 32}), list[int]()
    of_one = site.settings.teacher.fit.epochs

    def stop_in_the_third(record: EpochRecord) -> None:
        epochs.append(record.epoch)
        if len(epochs) == 2 * of_one + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit_site(site, tmp_path / "shadows", 4, stop_in_the_third)
    epochs.clear()
    found = audit_site(site, tmp_path / "shadows", 4, lambda record: epochs.append(record.epoch))
    assert len(epochs) <= 2 * of_one
    again = audit_site(site, tmp_path / "again", 4)
    assert again == found


def test_a_class_that_some_shadows_never_see_is_no_obstacle(make_site: Any, tmp_path: Path) -> None:
    source = make_site(fit=FORGOT).settings
    assert source.data is not None
    data = open_data(source.data)
    labels = data.need_labels("the data").copy()
    labels[labels == 2] = 1
    labels[np.flatnonzero(labels == 1)[:2]] = 2  # two images: of four shadows some have neither
    path = tmp_path / "private.npz"
    np.savez(path, x=data.read(), y=labels, names=np.array(data.class_names))
    settings = source.model_copy(
        update={"state": tmp_path / "state", "data": source.data.model_copy(update={"path": path})}
    )
    train_private(settings)
    found = audit_site(Site(settings, load_teacher(settings)), tmp_path / "shadows", 4)
    assert found.shadows is not None
    assert found.shadow_count == 4


def test_parts_that_half_of_the_data_cannot_fill_leave_shadows_out(make_site: Any, tmp_path: Path) -> None:
    many = make_site({"mechanism": "pate", "parts": 30, "sigma": 3.0}, FORGOT)
    found = audit_site(many, tmp_path / "shadows", 4)
    assert found.shadows is None
    assert "No shadow teacher could be trained on half of the private data" in found.left_out["shadows"]
    assert found.loss is not None


def test_what_a_record_says_follows_from_its_figures(audited: Any) -> None:
    found = audited()
    assert Audit.model_validate_json(found.model_dump_json()) == found
    text = " ".join(found.findings).replace("\u00a0", " ")
    assert f"names the right one in {found.strongest.auc * 100:.1f} % of cases" in text
    assert "answers tell of the shares" in text
    leaking = found.model_copy(update={"averaging": Averaging(samples=4, errors={1: 0.5, 1000: 0.02})})
    assert "This must not be: report it" in leaking.findings[-1]
