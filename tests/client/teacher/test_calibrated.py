"""A teacher behind its map: what it is fitted on, where it is kept, what it changes, and when there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from scipy.special import log_softmax
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.site import Site
from consilience.client.teacher import calibrate_teacher, calibrated, kept_calibration, load_teacher
from consilience.client.teacher.private_samples import split
from consilience.client.teacher.trained import train_teacher
from consilience.common.epochs import EpochRecord
from consilience.common.errors import RunError, SettingsError, StorageError, TeacherError
from consilience.common.files import lock
from consilience.common.seeds import derive
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings

CLASSES = ["red", "green", "blue"]
FIT = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "augment": False, "precision": "f32"}
TRAIN = {"kind": "train", "architecture": "cnn3", "fit": FIT, "holdout": 0.5, "preprocessing": {"size": [16, 16]}}
HOSTED = {"kind": "callable", "callable": "calibrated_model:scores", "classes": CLASSES, "preprocessing": {}}
MODEL = '''"""A teacher that is three times too sure: channel means, and how often it was asked."""
import numpy as np

asked = []


def scores(images):
    asked.append(len(images))
    means = images.reshape(len(images), 3, -1).mean(axis=2)
    odds = np.exp(SURE * (means - means.max(axis=1, keepdims=True)))
    return odds / odds.sum(axis=1, keepdims=True)


SURE = 9.0
'''
Make = Callable[..., SiteSettings]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """make(teacher, labels=..., names=..., ...) writes a site's data and site.yaml and reads the settings."""
    (tmp_path / "calibrated_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "calibrated_model", raising=False)
    random = np.random.default_rng(0)
    means = random.normal(0, 1, (200, 3)) * 40 + 127
    images = np.clip(means[:, None, None, :], 0, 255).round().astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    chances = np.exp(log_softmax(3 * (images[:, 0, 0].astype(float) / 127.5 - 1), axis=1)).cumsum(axis=1)
    drawn = (chances > random.random(200)[:, None]).argmax(axis=1)

    def settings(
        teacher: dict[str, Any] = HOSTED,
        *,
        labels: np.ndarray | None = drawn,
        names: list[str] = CLASSES,
        count: int = 200,
        **fields: Any,
    ) -> SiteSettings:
        arrays: dict[str, Any] = {} if labels is None else {"y": labels[:count], "names": np.array(names)}
        np.savez(tmp_path / "private.npz", x=images[:count], **arrays)
        raw = {"name": "site-1", "data": {"kind": "npz", "path": "private.npz"}, "teacher": teacher, **fields}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}))
        return load_settings(tmp_path / "site.yaml", SiteSettings)

    return settings


@pytest.fixture
def images(make: Make, tmp_path: Path) -> np.ndarray:
    make()
    with np.load(tmp_path / "private.npz") as held:
        return np.asarray(held["x"])


def file(settings: SiteSettings) -> Path:
    return settings.state / "calibration" / "calibration.json"


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "300"})


def test_a_hosted_teacher_that_is_three_times_too_sure(make: Make, images: np.ndarray) -> None:
    settings = make()
    bare = load_teacher(settings)
    assert bare.told == "none (not looked at yet: run `consilience site train`)"
    record = calibrate_teacher(settings)
    assert (record.method, record.samples, record.note) == ("temperature", 200, "")
    assert record.map is not None
    assert record.map.temperature is not None
    assert record.map.temperature == pytest.approx(3, rel=0.35)
    assert record.before is not None
    assert record.after is not None
    assert record.after.ece < record.before.ece / 2
    teacher = load_teacher(settings)
    assert teacher.record == record
    before, after = bare.log_probs(images), teacher.log_probs(images)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, log_softmax(before / record.map.temperature, axis=1), atol=1e-5)
    np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
    assert teacher.log_probs(images[:0]).shape == (0, 3)
    assert teacher.told.startswith(
        f"temperature {record.map.temperature:.3g}; calibration error {record.before.ece:.3f}"
    )


def test_a_hosted_teacher_is_not_made_surer_by_images_that_it_may_have_seen(make: Make, tmp_path: Path) -> None:
    (tmp_path / "calibrated_model.py").write_text(MODEL.replace("SURE = 9.0", "SURE = 1.0"))
    settings = make()
    record = calibrate_teacher(settings)
    assert (record.method, record.map) == ("identity", None)
    assert record.after == record.before
    assert "may have been trained on these images" in load_teacher(settings).told


def test_another_map_is_another_teacher(make: Make) -> None:
    bare = load_teacher(make()).fingerprint
    calibrate_teacher(make())
    one = load_teacher(make()).fingerprint
    assert one == load_teacher(make()).fingerprint
    assert load_teacher(make(calibration="off")).fingerprint == bare
    calibrate_teacher(make(count=150))
    assert len({bare, one, load_teacher(make()).fingerprint}) == 3


def test_it_is_fitted_once_for_a_teacher_its_data_and_its_method(make: Make, tmp_path: Path) -> None:
    calibrate_teacher(make())
    import calibrated_model  # type: ignore[import-not-found]

    calibrated_model.asked.clear()
    first = calibrate_teacher(make())
    assert calibrated_model.asked == []
    assert calibrate_teacher(make(count=100)).samples == 100
    assert calibrated_model.asked == [100]
    assert calibrate_teacher(make(calibration="dirichlet")).asked == "dirichlet"
    assert calibrate_teacher(make()) == first
    calibrate_teacher(make(batch_size=64))
    assert sum(calibrated_model.asked) == 500


def test_it_is_scored_in_batches_to_the_same_map(make: Make) -> None:
    whole = calibrate_teacher(make())
    file(make()).unlink()
    assert calibrate_teacher(make(batch_size=7)) == whole


def test_a_map_for_another_teacher_or_by_another_method_is_not_applied(make: Make, tmp_path: Path) -> None:
    calibrate_teacher(make())
    other = load_teacher(make(calibration="dirichlet"))
    assert other.record is None
    assert other.told == "none (it was for another teacher or by another method: run `consilience site train`)"
    (tmp_path / "calibrated_model.py").write_text(MODEL.replace("9.0", "8.0"))
    assert load_teacher(make()).record is None
    assert load_teacher(make(calibration="off")).told == "none (off in the settings)"
    calibrate_teacher(make())
    assert load_teacher(make()).record is not None
    assert load_teacher(make(data=None)).record is not None  # the map is kept, the data need not be there to answer


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"labels": None}, "the private data have no labels"),
        ({"names": ["red", "green", "Blue"]}, "the private data have no class 'blue', which the teacher knows"),
        ({"count": 19}, "too few held-out samples: 19; 20 are needed"),
        ({"count": 1}, "too few held-out samples: 1; 20 are needed"),
        ({"count": 0}, "too few held-out samples: 0; 20 are needed"),
    ],
)
def test_data_that_do_not_serve_leave_the_answers_as_they_are(
    make: Make, images: np.ndarray, fields: dict[str, Any], note: str
) -> None:
    bare = load_teacher(make(**fields))
    record = calibrate_teacher(make(**fields))
    assert (record.method, record.map, record.before, record.note) == ("identity", None, None, note)
    teacher = load_teacher(make(**fields))
    assert teacher.told == f"none ({note})"
    assert teacher.fingerprint == bare.fingerprint
    assert np.array_equal(teacher.log_probs(images), bare.log_probs(images))


def test_samples_of_classes_that_it_does_not_know_are_left_out_and_names_decide(make: Make, images: np.ndarray) -> None:
    """The data number the classes otherwise than the teacher and have one more."""
    first = calibrate_teacher(make())
    with np.load(make().data.path) as held:  # type: ignore[union-attr]
        labels = held["y"]
    names = ["blue", "grey", "red", "green"]
    renumbered = np.array([2, 3, 0])[labels]
    assert calibrate_teacher(make(labels=renumbered, names=names)).map == first.map
    renumbered[:50] = 1
    fewer = calibrate_teacher(make(labels=renumbered, names=names))
    assert (fewer.samples, fewer.method) == (150, "temperature")


def test_of_very_many_samples_a_part_is_enough(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "MOST_CELLS", 180)
    first = calibrate_teacher(make())
    assert first.samples == 60
    file(make()).unlink()
    assert calibrate_teacher(make()) == first
    monkeypatch.setattr(calibrated, "MOST_CELLS", 3)
    file(make()).unlink()
    assert calibrate_teacher(make()).samples == 20


def test_nothing_to_calibrate_is_said(make: Make) -> None:
    with pytest.raises(SettingsError, match="field 'calibration' is off"):
        calibrate_teacher(make(calibration="off"))
    with pytest.raises(SettingsError, match="field 'data' is not given"):
        calibrate_teacher(make(data=None))
    assert load_teacher(make(data=None)).told == "none (the settings name no private data)"


def test_a_damaged_file_is_noticed(make: Make) -> None:
    settings = make()
    calibrate_teacher(settings)
    good = json.loads(file(settings).read_text())
    for change in ({"map": {"temperature": 0}}, {"map": {}}, {"samples": "many"}, {"more": 1}):
        file(settings).write_text(json.dumps(good | change))
        for use in (load_teacher, calibrate_teacher):
            with pytest.raises(TeacherError, match=r"calibration\.json: is not as it must be") as caught:
                use(settings)
            assert "Remove" in caught.value.hint
    file(settings).write_text(json.dumps(good | {"map": {"matrix": [[1.0]], "intercept": [0.0]}}))
    with pytest.raises(TeacherError, match="its map is for 1 classes; the teacher knows 3"):
        load_teacher(settings)
    file(settings).write_bytes(b"{")
    with pytest.raises(StorageError, match="is not JSON"):
        load_teacher(settings)
    file(settings).unlink()
    assert calibrate_teacher(settings).model_dump(mode="json") == good


def test_an_interrupted_fit_leaves_nothing_and_is_done_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make()
    expected = calibrate_teacher(settings)
    file(settings).unlink()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kept_calibration, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate_teacher(settings)
    assert load_teacher(settings).record is None
    assert calibrate_teacher(settings) == expected
    with lock(settings.state / "calibration"), pytest.raises(RunError, match="Another process"):
        calibrate_teacher(settings)


def test_a_trained_teacher_is_calibrated_on_what_its_training_held_out(make: Make, images: np.ndarray) -> None:
    settings = make(TRAIN)
    trained = train_teacher(settings)
    bare = load_teacher(settings)
    record = calibrate_teacher(settings)
    assert record.samples == trained.holdout_count
    assert record.data_digest == trained.data_digest
    with np.load(settings.data.path) as held:  # type: ignore[union-attr]
        labels = held["y"]
    _, held_out = split(labels, 0.5, derive(settings.seed, "holdout"))
    rows = bare.log_probs(images[held_out])
    assert record.before is not None
    assert record.before.nll == pytest.approx(float(-rows[np.arange(len(rows)), labels[held_out]].mean()), rel=1e-6)


def test_another_calibration_trains_nothing_again(make: Make) -> None:
    train_teacher(make(TRAIN))
    again: list[EpochRecord] = []
    for method in ("off", "dirichlet", "temperature"):
        train_teacher(make(TRAIN, calibration=method), again.append)
    assert again == []
    calibrate_teacher(make(TRAIN))
    with pytest.raises(TeacherError, match="not those that the teacher was trained on"):
        calibrate_teacher(make(TRAIN, count=190))


def test_a_trained_teacher_without_a_part_held_out_stays_as_it_is(make: Make) -> None:
    settings = make(TRAIN | {"holdout": 0})
    train_teacher(settings)
    assert calibrate_teacher(settings).note == "too few held-out samples: 0; 20 are needed"


def test_site_train_calibrates_and_show_says_what_came_of_it(make: Make, tmp_path: Path) -> None:
    site = str(tmp_path / "site.yaml")
    settings = make(policy={"holdout_accuracy": True})
    assert "run `consilience site train`); not told" in typed("site", "show", site).stdout
    assert json.loads(typed("site", "show", site, "--json").stdout)["data"]["calibration"] is None
    told = json.loads(typed("site", "train", site, "--json").stdout)["data"]["calibration"]
    record = load_teacher(settings).record
    assert record is not None
    assert record.before is not None
    assert record.after is not None
    assert told == {  # in thousandths: all digits of a mean tell what it is a mean of
        "method": "temperature",
        "samples": 200,
        "ece_before": round(record.before.ece, 3),
        "ece_after": round(record.after.ece, 3),
        "nll_before": round(record.before.nll, 3),
        "nll_after": round(record.after.nll, 3),
    }
    assert told["nll_before"] != record.before.nll
    shown = typed("site", "show", site).stdout
    assert record.told in shown
    assert "; not told" not in shown
    make()  # the policy tells nothing about the private images unless it says so
    assert Site.load(tmp_path / "site.yaml").card.calibration is None
    assert f"{record.told}; not told" in typed("site", "show", site).stdout


def test_the_card_of_a_teacher_that_stays_as_it_is_has_its_error(
    make: Make, images: np.ndarray, tmp_path: Path
) -> None:
    record = calibrate_teacher(make(policy={"holdout_accuracy": True}, labels=images[:, 0, 0].argmax(axis=1)))
    assert (record.method, record.map) == ("identity", None)
    assert record.told.startswith("none (the teacher makes too few mistakes")
    card = Site.load(tmp_path / "site.yaml").card.calibration
    assert card is not None
    assert (card.method, card.ece_before, card.nll_before) == ("identity", card.ece_after, card.nll_after)


@pytest.mark.parametrize(
    ("fields", "said"), [({"calibration": "off"}, "'calibration' is off"), ({"data": None}, "'data' is not given")]
)
def test_site_train_says_where_there_is_nothing_to_do(
    make: Make, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    make(**fields)
    result = typed("site", "train", str(tmp_path / "site.yaml"), "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert "'callable', which is not trained here, and there is nothing to calibrate" in error["message"]
    assert said in error["message"]


def test_site_train_trains_with_calibration_off_and_calibrates_later(make: Make, tmp_path: Path) -> None:
    site = str(tmp_path / "site.yaml")
    settings = make(TRAIN, calibration="off")
    assert typed("site", "train", site).exit_code == 0
    assert not file(settings).exists()
    make(TRAIN)
    assert typed("site", "train", site).exit_code == 0
    assert file(settings).exists()
