"""Canaries sing where a teacher learned them by heart, and behind a mechanism never more than it allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.client.audit import canaries
from consilience.client.audit.canaries import CanaryAudit, audit_canaries, choose, suspicion
from consilience.client.audit.record import Audit
from consilience.client.privacy import account, dp_draws, train_private
from consilience.client.privacy.events import NoisyOutputs, PateVotes
from consilience.client.privacy.noise import Secret
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import RunError, SettingsError, TeacherError
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import parse_settings
from helpers.private_site import bars, settings_of, write_data

EAGER = {"epochs": 20, "batch_size": 16, "learning_rate": 0.05}
NONE: dict[str, Any] = {"mechanism": "none"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 160 private images and a secret, which no audit changes."""
    folder = tmp_path_factory.mktemp("site")
    write_data(folder, *bars(160))
    return folder


@pytest.fixture(scope="module")
def found(site: Path) -> CanaryAudit:
    """What an audit of a teacher finds that nothing protects."""
    before = held(site)
    done = audit(site, NONE)
    assert held(site) == before | {"state/audit/canaries/.lock": b""}
    assert sorted(path.name for path in site.iterdir()) == ["private.npz", "state"]
    return done


def audit(folder: Path, privacy: dict[str, Any], count: int = 60, **raw: Any) -> CanaryAudit:
    settings = settings_of(folder, privacy, fit=EAGER, teacher={"holdout": 0.0}, **raw)
    return audit_canaries(settings, canaries=count, seed=7)


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_teacher_that_learned_by_heart_is_found_out(found: CanaryAudit) -> None:
    assert found.auc > 0.9
    assert 0.8 < found.low < found.auc <= found.high <= 1
    assert found.lower > 1
    assert found.correct / found.guesses > 0.8
    assert 15 < found.planted < 45
    assert (found.upper, found.unit) == (None, None)
    assert "no formal guarantee" in found.why
    assert found.holds


def test_while_it_is_at_it_no_image_is_written_and_what_a_killed_audit_left_is_removed(tmp_path: Path) -> None:
    images, labels = bars(60)
    write_data(tmp_path, images, labels)
    before = held(tmp_path)
    left = tmp_path / "state" / "audit" / "canaries" / "copy" / "teacher" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a killed audit")
    seen = list[dict[str, bytes]]()
    settings = settings_of(tmp_path, NONE, fit={"epochs": 1})

    def look(_: EpochRecord) -> None:
        assert left.parents[1].stat().st_mode & 0o777 == 0o700
        seen.append({path: data for path, data in held(tmp_path).items() if path not in before})
        with pytest.raises(RunError, match="Another process is working in"):
            audit_canaries(settings, canaries=10)

    audit_canaries(settings, canaries=20, seed=7, on_epoch=look)
    (during,) = seen
    assert all(path.startswith("state/audit/canaries/") for path in during)
    assert b"of a killed audit" not in during.values()
    assert not any(image.tobytes() in data for data in during.values() for image in images)
    assert held(tmp_path) == before | {"state/audit/canaries/.lock": b""}


def test_planted_canaries_are_learned_from_whatever_is_held_out(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = list[tuple[float, int, Any]]()

    def spy(settings: SiteSettings, on_epoch: Any, data: ImageData | None = None) -> None:
        assert settings.teacher.kind == "train"
        learned.append((settings.teacher.holdout, 0 if data is None else len(data), data))
        train_private(settings, on_epoch, data)

    monkeypatch.setattr(canaries, "train_private", spy)
    settings = settings_of(site, NONE, fit=EAGER, teacher={"holdout": 0.5}, calibration="temperature")
    half = audit_canaries(settings, canaries=60, seed=7)
    # of the 100 images that are no canaries half are held out, to calibrate on; of the canaries none
    ((holdout, count, data),) = learned
    assert holdout == 0
    assert abs(count - 50 - half.planted) <= 2
    chosen = choose(np.arange(160) % 3, 60, np.random.default_rng(7))
    planted = {image.tobytes() for image in bars(160)[0][chosen.ids[chosen.planted]]}
    assert planted <= {image.tobytes() for image in data.read()}
    assert half.planted == len(planted)
    assert half.auc > 0.9


def test_a_teacher_that_hardly_learned_tells_nothing(site: Path) -> None:
    settings = settings_of(site, NONE, fit={"epochs": 1, "learning_rate": 1e-4})
    found = audit_canaries(settings, canaries=60, seed=7)
    assert found.auc < 0.7
    assert found.lower < 0.5


@pytest.mark.parametrize(
    ("privacy", "event"),
    [
        ({"mechanism": "pate", "parts": 4, "sigma": 4.0}, PateVotes(sigma=4.0, count=60)),
        ({"mechanism": "output-noise", "sigma": 2.0}, NoisyOutputs(sigma=2.0, count=60)),
    ],
)
def test_behind_noise_on_answers_it_stays_below_what_a_question_a_canary_costs(
    site: Path, privacy: dict[str, Any], event: PateVotes | NoisyOutputs
) -> None:
    found = audit(site, privacy)
    spent = account([event], 1e-5)
    assert (found.upper, found.unit, found.why) == (spent.epsilon, spent.unit, "")
    assert found.upper is not None
    assert found.lower < found.upper
    assert found.holds


def test_noise_in_sums_bounds_no_answer_that_is_asked_openly(site: Path) -> None:
    found = audit(site, {"mechanism": "sum-noise", "sigma": 20.0, "honest": 1}, policy={"sums_only": True})
    assert found.lower > 1
    assert (found.upper, found.unit) == (None, None)
    assert "in sums over sites alone" in found.why
    assert found.holds


@pytest.mark.slow
def test_behind_noisy_gradients_it_stays_below_what_the_training_cost(site: Path) -> None:
    found = audit(site, {"mechanism": "dp-sgd", "noise_multiplier": 1.0})
    assert found.unit == "record"
    assert found.upper is not None
    assert 1 < found.upper < 100
    assert found.lower < found.upper
    # the training's cost, whatever is asked
    assert audit(site, {"mechanism": "dp-sgd", "noise_multiplier": 1.0}, count=12).upper == pytest.approx(
        found.upper, rel=0.3
    )


def test_a_mechanism_whose_noise_is_missing_is_found_out(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Secret, "normal", lambda self, purpose, images, count: np.zeros((len(images), count)))
    found = audit(site, {"mechanism": "output-noise", "sigma": 200.0})
    assert found.upper is not None
    assert found.lower > found.upper
    assert not found.holds


@pytest.mark.slow
def test_votes_without_noise_are_found_out(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two parts, or the vote itself hides a canary, and the audit is blind to what noise does."""
    monkeypatch.setattr(Secret, "normal", lambda self, purpose, images, count: np.zeros((len(images), count)))
    found = audit(site, {"mechanism": "pate", "parts": 2, "sigma": 400.0})
    assert found.upper is not None
    assert found.lower > found.upper
    assert not found.holds


@pytest.mark.slow
def test_gradients_without_noise_are_found_out(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = torch.zeros(1, dtype=torch.float64)
    monkeypatch.setattr(dp_draws, "normal", lambda stream, count, device: none.expand(count))
    private = {"mechanism": "dp-sgd", "noise_multiplier": 50.0, "clip": 20.0}  # cut to 1, nothing is learned by heart
    settings = settings_of(site, private, fit={**EAGER, "epochs": 40}, teacher={"holdout": 0.0})
    found = audit_canaries(settings, canaries=60, seed=7)
    assert found.upper is not None
    assert found.lower > found.upper
    assert not found.holds


def test_it_asks_as_the_policy_lets_answers_leave(site: Path, found: CanaryAudit) -> None:
    """A policy that rounds all answers of a teacher that knows little to the same one leaves nothing to go by."""
    short = {"epochs": 1, "learning_rate": 1e-4}
    rounded = settings_of(site, NONE, fit=short, policy={"temperature": 100, "decimals": 1, "precision": "u8"})
    dull = audit_canaries(rounded, canaries=60, seed=7)
    assert (found.encoding, dull.encoding) == ("f16", "u8")
    assert dull.auc == 0.5
    assert audit_canaries(settings_of(site, NONE, fit=short), canaries=60, seed=7).auc != 0.5
    votes = audit_canaries(settings_of(site, NONE, fit=short), canaries=60, seed=7, encoding="votes")
    assert votes.encoding == "votes"


def test_all_follows_from_the_seed(site: Path, found: CanaryAudit) -> None:
    assert audit(site, NONE) == found
    labels = np.arange(300) % 3
    first, again = (choose(labels, 60, np.random.default_rng(1)) for _ in range(2))
    other = choose(labels, 60, np.random.default_rng(2))
    np.testing.assert_array_equal(first.ids, again.ids)
    np.testing.assert_array_equal(first.planted, again.planted)
    assert not np.array_equal(first.ids, other.ids)
    assert not np.array_equal(first.planted, other.planted)


def test_canaries_are_wrong_and_leave_every_class_an_image() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2, 3])
    seen = []
    for seed in range(20):
        chosen = choose(labels, 50, np.random.default_rng(seed))
        assert len(set(chosen.ids)) == 50
        np.testing.assert_array_equal(chosen.true, labels[chosen.ids])
        assert (chosen.wrong != chosen.true).all()
        assert ((chosen.wrong >= 0) & (chosen.wrong < 4)).all()
        assert set(np.delete(labels, chosen.ids)) == {0, 1, 2, 3}
        seen.append(chosen.planted.mean())
    assert 0.4 < np.mean(seen) < 0.6
    assert len(set(np.concatenate([choose(labels, 50, np.random.default_rng(s)).wrong for s in range(5)]))) == 4


def test_suspicion_grows_with_the_wrong_class_and_falls_with_the_true_one() -> None:
    chosen = choose(np.arange(60) % 3, 30, np.random.default_rng(0))
    rows = np.full((30, 3), -2.0, np.float32)
    at = np.arange(30)
    rows[at, chosen.wrong] = np.where(chosen.planted, -0.5, -3.0)
    scores = suspicion(rows, chosen)
    np.testing.assert_allclose(scores, np.where(chosen.planted, 1.5, -1.0))


@pytest.mark.parametrize(("count", "allowed"), [(9, "10 to 80"), (81, "10 to 80"), (-5, "10 to 80")])
def test_too_many_or_few_canaries_are_refused(site: Path, count: int, allowed: str) -> None:
    with pytest.raises(SettingsError, match=allowed):
        audit(site, NONE, count=count)


def test_without_two_classes_there_is_no_wrong_one() -> None:
    with pytest.raises(SettingsError, match="of 1 classes: none"):
        choose(np.zeros(100, np.int64), 20, np.random.default_rng(0))


def test_a_hosted_teacher_cannot_be_trained_again(tmp_path: Path) -> None:
    raw = {
        "name": "site-1",
        "teacher": {
            "kind": "onnx",
            "path": "model.onnx",
            "classes": ["a", "b"],
            "preprocessing": {"size": [8, 8], "channels": 1},
        },
    }
    settings = parse_settings(raw, SiteSettings, source="site.yaml", folder=tmp_path)
    with pytest.raises(TeacherError, match="only 'train' is trained here"):
        audit_canaries(settings)


def test_the_audit_tells_of_canaries_where_it_is_asked_to(found: CanaryAudit) -> None:
    bare: dict[str, Any] = dict.fromkeys(Audit.model_fields) | {"left_out": {}, "notes": (), "mechanism": ""}
    told = Audit.model_construct(None, **bare | {"canaries": found}).findings
    assert len(told) == 1
    assert f"epsilon for a record is {found.lower:.2f} at least" in told[0]
    assert told[0].endswith(f"No upper bound stands beside it: {found.why}.")
    allowed = found.model_copy(update={"upper": 50.0, "unit": "record"})
    (said,) = Audit.model_construct(None, **bare | {"canaries": allowed}).findings
    assert said.endswith("the accountant says 50 at most, for a record.")
    broken = found.model_copy(update={"upper": 0.1, "unit": "record"})
    (said,) = Audit.model_construct(None, **bare | {"canaries": broken}).findings
    assert said.endswith("This must not be: report it.")
    assert Audit.model_construct(None, **bare).findings == ()
