"""Coverage learned from small patterns: how good it is, what it says of odd data, and that it is learned once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.coverage import CoverageRecord, load_coverage, read_record, tell_coverage
from consilience.client.coverage import samples as samples_module
from consilience.client.coverage.by_network import epochs_of
from consilience.client.coverage.learned import LearnedCoverage
from consilience.client.coverage.learning import learn_coverage
from consilience.client.coverage.prior import auroc
from consilience.client.coverage.samples import LEAST_POOL, LEAST_PRIVATE, gather, hold_out, mine, refuse_copies
from consilience.client.site import Site
from consilience.common.cards import CoverageCard
from consilience.common.data import from_arrays, open_data
from consilience.common.epochs import EpochRecord
from consilience.common.errors import CoverageError, RunError, SettingsError, StorageError, TeacherError
from consilience.common.files import lock
from consilience.common.pool import Pool
from consilience.common.preprocessing import resize
from consilience.common.protocol import Question
from consilience.common.settings import CoverageEncoding, SiteSettings
from consilience.common.settings_file import load_settings

NAMES = ["rows", "columns", "rising", "falling"]
MINE = ["rows", "columns"]
FIT = {"epochs": 6, "batch_size": 32, "learning_rate": 0.05, "augment": False, "precision": "f32"}
COVERAGE = {"architecture": "cnn3", "fit": {**FIT, "pretrain": 10}}
LONGER = {**COVERAGE, "fit": {**FIT, "pretrain": 10, "epochs": 15}}
TRAIN = {"kind": "train", "architecture": "cnn3", "fit": {**FIT, "epochs": 1}}
HOSTED = {"kind": "callable", "callable": "covering_model:scores", "classes": MINE, "preprocessing": {}}
MODEL = """import numpy as np


def scores(images):
    return np.tile([0.25, 0.75], (len(images), 1))
"""
SIZE = 12


def drawn(classes: list[int], n: int, seed: int, size: int = SIZE, noise: float = 25) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes (n, size, size, 1) uint8, of a direction for each class, and labels (n,)."""
    random = np.random.default_rng(seed)
    labels = np.array(classes)[random.integers(0, len(classes), n)]
    down, right = np.indices((size, size))
    ways = np.stack([down, right, down + right, down - right])[labels]
    waves = np.sin(ways * 1.6 + random.uniform(0, 2 * np.pi, n)[:, None, None])
    grey = 127 + 60 * waves + random.normal(0, noise, (n, size, size))
    return np.clip(grey, 0, 255).astype(np.uint8)[..., None], labels


PRIVATE, PRIVATE_LABELS = drawn([0, 1], 300, 1)
PUBLIC, PUBLIC_LABELS = drawn([0, 1, 2, 3], 600, 2)
IS_MINE = PUBLIC_LABELS < 2


def make(folder: Path, images: np.ndarray = PRIVATE, public: np.ndarray = PUBLIC, **fields: Any) -> SiteSettings:
    """Write a site's data, pool and site.yaml, and read the settings; `labels` None leaves the labels out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "covering_model.py").write_text(MODEL)
    labels = fields.pop("labels", PRIVATE_LABELS[: len(images)])
    arrays: dict[str, Any] = {} if labels is None else {"y": labels, "names": np.array(NAMES)}
    np.savez(folder / "private.npz", x=images, **arrays)
    shutil.rmtree(folder / "pool", ignore_errors=True)
    Pool.build(from_arrays(public, None, (), where="test"), folder / "pool")
    raw = {
        "name": "site-1",
        "data": {"kind": "npz", "path": "private.npz"},
        "teacher": TRAIN,
        "policy": {"coverage": "f16"},
        "coverage": COVERAGE,
        "pools": ["pool"],
        **fields,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}))
    return load_settings(folder / "site.yaml", SiteSettings)


def typed(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> SiteSettings:
    """A site that has learned its coverage; tests do not change it."""
    settings = make(tmp_path_factory.mktemp("learned"))
    learn_coverage(settings)
    return settings


@pytest.fixture
def site(learned: SiteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteSettings:
    """A copy of it that a test may change."""
    shutil.copytree(learned.state.parent, tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(__import__("sys").modules, "covering_model", raising=False)
    return load_settings(tmp_path / "site" / "site.yaml", SiteSettings)


def loaded(settings: SiteSettings) -> LearnedCoverage:
    coverage = load_coverage(settings)
    assert coverage is not None
    return coverage


def record_of(settings: SiteSettings) -> CoverageRecord:
    record = read_record(settings)
    assert record is not None
    return record


def epochs(settings: SiteSettings) -> int:
    """Learn, and return how many epochs were trained for it, which are told of as the last of all there are."""
    done: list[EpochRecord] = []
    learn_coverage(settings, done.append)
    in_all = epochs_of(settings.coverage_fit, settings.coverage.prior)
    assert [record.epoch for record in done] == list(range(in_all - len(done), in_all))
    return len(done)


def pretraining(settings: SiteSettings) -> int:
    """Learn, and return for how many epochs the network learned the site's classes before."""
    done: list[EpochRecord] = []
    learn_coverage(settings, on_pretraining=done.append)
    return len(done)


# What is learned


def test_it_tells_the_site_s_classes_from_others_and_how_many_they_are(learned: SiteSettings) -> None:
    record, coverage = record_of(learned), loaded(learned)
    told = coverage.scores(PUBLIC)
    assert told.dtype == np.float32
    assert told.shape == (600,)
    assert auroc(told[IS_MINE], told[~IS_MINE]) > 0.9
    assert record.auroc == pytest.approx(auroc(told[IS_MINE], told[~IS_MINE]), abs=0.15)
    assert record.prior == pytest.approx(IS_MINE.mean(), abs=0.12)
    assert told.mean() == pytest.approx(IS_MINE.mean(), abs=0.12)
    assert told[IS_MINE].mean() > 0.7 > 0.3 > told[~IS_MINE].mean()
    assert (record.held_out, record.classes, record.warnings, record.abstains) == (60, 2, (), None)
    fresh, labels = drawn([0, 1, 2, 3], 200, 9)  # neither private nor of the pool
    seen = coverage.scores(fresh)
    assert auroc(seen[labels < 2], seen[labels >= 2]) > 0.9


def test_a_pool_without_the_site_s_classes(tmp_path: Path) -> None:
    settings = make(tmp_path, public=drawn([2, 3], 600, 3)[0], coverage=LONGER)
    record = learn_coverage(settings)
    assert record.prior < 0.05
    assert ["hardly any image" in warning for warning in record.warnings] == [True]
    assert loaded(settings).scores(PUBLIC[~IS_MINE]).mean() < 0.1


def test_a_pool_that_is_learned_by_heart_is_not_taken_for_others(tmp_path: Path) -> None:
    """Of images that are hard to tell, and by a training long enough to know each: the share, and the mean, stay."""
    (private, labels), (public, classes) = (drawn(c, n, n, noise=100) for c, n in (([0, 1], 300), ([0, 1, 2, 3], 600)))
    longest = {**COVERAGE, "fit": {**FIT, "pretrain": 20, "epochs": 30}}
    settings = make(tmp_path, private, public, labels=labels, coverage=longest)
    prior = learn_coverage(settings).prior
    assert prior == pytest.approx((classes < 2).mean(), abs=0.12)
    assert loaded(settings).scores(public).mean() == pytest.approx(prior, abs=0.01)


def test_a_pool_of_another_style(tmp_path: Path) -> None:
    record = learn_coverage(make(tmp_path, public=255 - PUBLIC // 2))
    assert any("how the images were made" in warning for warning in record.warnings)
    assert "AUROC" not in record.told, "it would be that of telling styles apart"


def test_a_pool_of_the_site_s_classes_alone(tmp_path: Path) -> None:
    settings = make(tmp_path, public=drawn([0, 1], 600, 3)[0])
    record = learn_coverage(settings)
    assert record.prior > 0.9
    assert (record.warnings, record.auroc) == ((), None)
    assert loaded(settings).scores(drawn([0, 1], 100, 4)[0]).mean() > 0.9


def test_a_site_is_warned_when_the_rest_of_the_pool_looks_like_its_own_images(tmp_path: Path) -> None:
    alike = drawn([0, 1], 600, 3)[0]
    settings = make(tmp_path, public=alike, coverage={**COVERAGE, "prior": 0.3})
    record = learn_coverage(settings)
    assert record.prior == 0.3
    assert ["says little" in warning for warning in record.warnings] == [True]
    assert loaded(settings).scores(alike).mean() == pytest.approx(0.3, abs=0.1)


def test_a_prior_that_is_known_saves_the_first_training(site: SiteSettings) -> None:
    assert epochs(with_coverage(site, prior=0.5)) == 6
    assert record_of(site).prior == 0.5


def test_it_learns_the_site_s_classes_before(site: SiteSettings) -> None:
    fit = site.coverage.fit
    assert pretraining(with_coverage(site, fit=fit.model_copy(update={"pretrain": 4}))) == 4
    model = record_of(site).model
    assert pretraining(with_coverage(site, fit=fit.model_copy(update={"pretrain": 0}))) == 0
    assert record_of(site).model != model


def test_where_there_is_one_class_it_learns_none_before(tmp_path: Path) -> None:
    assert pretraining(make(tmp_path, labels=None, teacher=HOSTED)) == 0


def test_classes_are_learned_in_small_batches(learned: SiteSettings) -> None:
    fit = learned.coverage.fit

    def batch(size: int) -> int:
        changed = with_coverage(learned, fit=fit.model_copy(update={"batch_size": size})).coverage_pretraining
        assert changed is not None
        return changed.batch_size

    assert (batch(256), batch(16)) == (64, 16)


def test_data_without_labels_is_one_class(tmp_path: Path) -> None:
    settings = make(tmp_path, labels=None, teacher=HOSTED)
    record = learn_coverage(settings)
    told = loaded(settings).scores(PUBLIC)
    assert record.classes == 1
    assert auroc(told[IS_MINE], told[~IS_MINE]) > 0.8
    assert epochs(settings) == 0
    make(tmp_path, 255 - PRIVATE, labels=None, teacher=HOSTED)
    assert epochs(settings) > 0


def test_a_hosted_teacher_that_knows_some_classes_of_the_data(tmp_path: Path) -> None:
    """What the teacher does not know is not the site's, though the site has images of it."""
    images, labels = drawn([0, 1, 2, 3], 500, 5)
    settings = make(tmp_path, images, labels=labels, teacher=HOSTED)
    record = learn_coverage(settings)
    told = loaded(settings).scores(PUBLIC)
    assert record.classes == 2
    assert record.held_out == round((labels < 2).sum() / 5)
    assert auroc(told[IS_MINE], told[~IS_MINE]) > 0.9


def test_classes_taken_as_equally_frequent_do_not_tell_how_frequent_they_are(tmp_path: Path) -> None:
    """Nine in ten private images are of one class; of the pool's of the site's classes one in two is."""
    images, labels = drawn([0] * 9 + [1], 400, 5)
    told = {}
    for shares in ("private", "equal"):
        settings = make(tmp_path / shares, images, labels=labels, coverage={**COVERAGE, "shares": shares})
        learn_coverage(settings)
        coverage = loaded(settings).scores(PUBLIC)
        told[shares] = [float(coverage[k == PUBLIC_LABELS].mean()) for k in range(2)]
    assert told["private"][1] < told["private"][0] / 2
    assert told["equal"][1] > 0.75 * told["equal"][0]


def test_copies_of_an_image_are_held_out_together(tmp_path: Path) -> None:
    """Data in which each image is there three times: what calibrates is of images that nothing was learned from."""
    few = PRIVATE[:250]
    settings = make(tmp_path, np.concatenate([few] * 3), labels=np.concatenate([PRIVATE_LABELS[:250]] * 3))
    assert settings.data is not None
    data, pool = open_data(settings.data), Pool.open(settings.pools[0])
    samples = gather(settings, data, *mine(settings, data), pool)
    learned = {image.tobytes() for image in samples.private}
    assert len(samples.held_out) == 150
    assert not any(image.tobytes() in learned for image in samples.held_out)
    again = make(
        tmp_path / "few", np.concatenate([PRIVATE[:150]] * 3), labels=np.concatenate([PRIVATE_LABELS[:150]] * 3)
    )
    learn_coverage(again)
    assert str(record_of(again).abstains).startswith(
        "450 private images of its classes are 150 different ones, too few"
    )


@pytest.mark.parametrize(("private", "public"), [(1, 3), (3, 1)])
def test_private_images_of_another_size_and_other_channels(tmp_path: Path, private: int, public: int) -> None:
    larger = np.kron(PRIVATE, np.ones((1, 2, 2, private), np.uint8))
    alike = resize(np.kron(PUBLIC, np.ones((1, 2, 2, public), np.uint8)), (SIZE, SIZE))
    settings = make(tmp_path, larger, alike)
    learn_coverage(settings)
    told = loaded(settings).scores(alike)
    assert auroc(told[IS_MINE], told[~IS_MINE]) > 0.8


def test_a_few_of_many_pool_images_are_drawn(site: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MOST_POOL", 300)
    pool, data = Pool.open(site.state.parent / "pool"), from_arrays(PRIVATE, PRIVATE_LABELS, NAMES, where="test")
    drawn_of = [
        gather(site.model_copy(update={"seed": seed}), data, np.arange(300), PRIVATE_LABELS, 2, pool)
        for seed in (5, 5, 6)
    ]
    first, again, other = (held.public for held in drawn_of)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    there = {image.tobytes() for image in PUBLIC}
    assert len({image.tobytes() for image in first} & there) == 300


def test_halves_of_the_pool_are_as_large_and_keep_copies_together(tmp_path: Path) -> None:
    settings = make(tmp_path, public=np.concatenate([PUBLIC[:300], PUBLIC[:300], PRIVATE[:50]]))
    assert settings.data is not None
    data, pool = open_data(settings.data), Pool.open(settings.pools[0])
    samples = gather(settings, data, *mine(settings, data), pool)
    halves: dict[bytes, set[int]] = {}
    for images, which in ((samples.public, samples.half), (samples.held_out, samples.held_out_half)):
        for image, half in zip(images, which, strict=True):
            halves.setdefault(image.tobytes(), set()).add(int(half))
    assert {len(found) for found in halves.values()} == {1}
    in_pool = {image.tobytes() for image in samples.public}
    assert any(image.tobytes() in in_pool for image in samples.held_out), "or nothing is shown of these"
    assert 0.4 < samples.half.mean() < 0.6
    assert 0.3 < samples.held_out_half.mean() < 0.7


# When there is nothing to learn


@pytest.mark.parametrize(
    ("private", "public"), [(LEAST_PRIVATE - 1, LEAST_POOL), (LEAST_PRIVATE, LEAST_POOL - 1), (3, 0)]
)
def test_too_few_images_are_a_reason_to_abstain(tmp_path: Path, private: int, public: int) -> None:
    settings = make(tmp_path, PRIVATE[:private], PUBLIC[:public])
    record = learn_coverage(settings)
    assert record.abstains is not None
    assert f"{private} private images of its classes and {public} of the pool" in record.abstains
    assert (record.auroc, load_coverage(settings), epochs(settings)) == (None, None, 0)
    assert record.abstains in tell_coverage(settings)
    with pytest.raises(CoverageError, match="other settings"):
        load_coverage(settings.model_copy(update={"seed": 1}))


def test_just_enough_images_are_learned_from(tmp_path: Path) -> None:
    settings = make(tmp_path, PRIVATE[:LEAST_PRIVATE], PUBLIC[:LEAST_POOL])
    assert learn_coverage(settings).held_out == LEAST_PRIVATE // 5
    assert load_coverage(settings) is not None


def test_private_data_that_is_the_pool_is_refused(tmp_path: Path) -> None:
    settings = make(tmp_path, PUBLIC[:300], labels=PUBLIC_LABELS[:300])
    with pytest.raises(CoverageError, match="100% of the private images are in the pool") as caught:
        learn_coverage(settings)
    assert "policy.coverage: off" in caught.value.hint
    with pytest.raises(CoverageError, match="100% of the private images"):  # a tenth of the pool was looked at
        refuse_copies(settings, list("abcdefghij"), ["a", "x"], 0.1)
    refuse_copies(settings, list("abcdefghij"), ["a", "x"], 0.6)
    mixed = make(tmp_path, np.concatenate([PRIVATE[:280], PUBLIC[:20]]), labels=PRIVATE_LABELS)
    assert learn_coverage(mixed).abstains is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pools": None}, "'pools' is not given"),
        ({"data": None, "teacher": HOSTED}, "'data' is not given"),
        ({"teacher": {**HOSTED, "classes": ["cat", "dog"]}}, "no private image is of a class that the teacher knows"),
        ({"coverage": {**COVERAGE, "preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]}}}, "1 channels"),
    ],
)
def test_what_cannot_be_learned_from_is_said(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    settings = make(tmp_path, **fields)
    with pytest.raises(CoverageError, match=words) as caught:
        learn_coverage(settings)
    assert caught.value.hint
    assert read_record(settings) is None


@pytest.mark.parametrize(("pretrain", "purpose"), [(60, "own classes"), (0, "prior 0")])
def test_a_training_that_fails_names_itself_and_the_setting(tmp_path: Path, pretrain: int, purpose: str) -> None:
    fit = {**FIT, "pretrain": pretrain, "learning_rate": 10, "weight_decay": 1, "epochs": 30}
    settings = make(tmp_path, coverage={**COVERAGE, "fit": fit})
    with pytest.raises(CoverageError, match=rf"site-1, coverage \({purpose}\): .*not finite") as caught:
        learn_coverage(settings)
    assert "Lower coverage.fit.learning_rate" in caught.value.hint


@pytest.mark.parametrize("shape", [{"size": [8, 8]}, {"channels": 3}])
def test_size_and_channels_are_the_pool_s(tmp_path: Path, shape: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="which are the pool's"):
        make(tmp_path, coverage={**COVERAGE, "preprocessing": shape})


@pytest.mark.parametrize("counts", [[1] * 200, [2] * 100, [200], [7, 13, 180], [199, 1]])
def test_every_fifth_image_is_held_out_however_many_classes(counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    first, second = hold_out(labels, 1)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(200))
    assert len(second) == 40
    held = np.bincount(labels[second], minlength=len(counts))
    assert np.all(np.abs(held - np.array(counts) / 5) < 1)
    assert not np.array_equal(second, hold_out(labels, 2)[1])


# Once, and again


def test_it_is_learned_once(site: SiteSettings) -> None:
    before = record_of(site)
    assert epochs(site) == 0
    assert record_of(site) == before
    with lock(site.state / "coverage"), pytest.raises(RunError):
        learn_coverage(site)


def with_coverage(settings: SiteSettings, **changes: Any) -> SiteSettings:
    return settings.model_copy(update={"coverage": settings.coverage.model_copy(update=changes)})


def test_other_settings_learn_anew_and_do_not_load(site: SiteSettings) -> None:
    before = record_of(site)
    for changed in (with_coverage(site, prior=0.4), site.model_copy(update={"seed": 7})):
        with pytest.raises(CoverageError, match="other settings or another seed"):
            load_coverage(changed)
        assert epochs(changed) > 0
        assert loaded(changed).fingerprint != before.model
        assert record_of(changed).settings != before.settings
    assert epochs(site) > 0
    assert record_of(site) == before  # the same seed, the same bytes of the model


def test_images_are_mirrored_as_the_teacher_s_are_unless_the_settings_say(tmp_path: Path) -> None:
    moved = {**FIT, "augment": True}

    def model(name: str, teacher: bool, coverage: bool | None) -> str:
        settings = make(
            tmp_path / name,
            teacher={**TRAIN, "fit": {**moved, "epochs": 1, "mirror": teacher}},
            coverage={"architecture": "cnn3", "fit": {**moved, "pretrain": 1, "mirror": coverage}},
        )
        return learn_coverage(settings).model

    plain = model("plain", False, None)
    assert plain == model("said", True, False)
    assert plain != model("mirrored", True, None)


def test_other_data_and_another_pool_learn_anew(site: SiteSettings) -> None:
    make(site.state.parent, labels=1 - PRIVATE_LABELS)
    assert epochs(site) > 0
    make(site.state.parent, public=PUBLIC[:-1], labels=1 - PRIVATE_LABELS)
    with pytest.raises(CoverageError, match="learned on pool"):
        load_coverage(site)
    assert epochs(site) > 0
    assert epochs(site) == 0


def test_an_interrupted_learning_goes_on_to_the_same_model(site: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0)
    before = record_of(site)
    shutil.rmtree(site.state / "coverage")
    done = 0

    def stop(record: EpochRecord) -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_coverage(site, stop)
    assert load_coverage(site) is None
    assert epochs(site) == 12 - 3  # two each of the three first trainings, six of the last
    assert record_of(site) == before


def test_an_interrupted_pretraining_goes_on_to_the_same_model(
    site: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0)
    before = record_of(site)
    shutil.rmtree(site.state / "coverage")

    def stop(record: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_coverage(site, on_pretraining=stop)
    assert pretraining(site) == 10 - 1
    assert record_of(site) == before


def test_a_damaged_model_does_not_load_and_is_learned_anew(site: SiteSettings) -> None:
    before, path = record_of(site), site.state / "coverage" / "model.safetensors"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1] + b"!"), path.unlink):
        damage()
        with pytest.raises(CoverageError, match=r"is not the model that coverage\.json speaks of") as caught:
            load_coverage(site)
        assert "consilience site train" in caught.value.hint
        learn_coverage(site)
        assert record_of(site) == before
        assert load_coverage(site) is not None


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda text: text[:50], StorageError),
        (lambda text: "{}", CoverageError),
        (lambda text: text.replace('"prior"', '"priors"'), CoverageError),
        (lambda text: json.dumps({**json.loads(text), "abstains": "both"}), CoverageError),
        (lambda text: json.dumps({**json.loads(text), "calibration": None}), CoverageError),
        (lambda text: json.dumps({**json.loads(text), "calibration": {"slope": -1, "offset": 0}}), CoverageError),
        (lambda text: json.dumps({**json.loads(text), "prior": 1.5}), CoverageError),
        (lambda text: json.dumps({**json.loads(text), "classes": 5}), CoverageError),
    ],
)
def test_a_damaged_record_is_an_error_of_ours(
    site: SiteSettings, damage: Callable[[str], str], error: type[Exception]
) -> None:
    path = site.state / "coverage" / "coverage.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(error):
        load_coverage(site)


def test_images_that_the_network_does_not_take_are_a_teacher_s_error(learned: SiteSettings) -> None:
    coverage = loaded(learned)
    with pytest.raises(TeacherError, match="coverage"):
        coverage.scores(np.zeros((2, 5), np.uint8))
    assert coverage.scores(PUBLIC[:0]).shape == (0,)
    assert np.isfinite(coverage.scores(np.full((2, 3, 40, 3), 255, np.uint8))).all()


def test_a_policy_that_keeps_coverage_off_loads_and_learns_none(site: SiteSettings) -> None:
    off = make(site.state.parent, policy=None)
    assert load_coverage(off) is None
    assert "none" in tell_coverage(off)
    shutil.rmtree(off.state)
    result = typed("site", "train", off.state.parent / "site.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["data"]["coverage"] is None
    assert not (off.state / "coverage").exists()


# What leaves, and what does not


def test_an_answer_is_the_same_bytes_however_questions_are_cut(site: SiteSettings) -> None:
    def settings_of(batch: int) -> Site:
        typed_site = make(site.state.parent, teacher=HOSTED, calibration="off", batch_size=batch)
        learn_coverage(typed_site)
        return Site.load(site.state.parent / "site.yaml")

    held, pool = settings_of(37), Pool.open(site.state.parent / "pool")
    assert held.coverage is not None

    def ask(start: int, stop: int, encoding: CoverageEncoding) -> bytes:
        assert held.coverage is not None
        question = Question(
            job="job",
            pool=pool.digest,
            start=start,
            stop=stop,
            kind="coverage",
            encoding=encoding,
            teacher=held.coverage.fingerprint,
            policy=held.settings.policy.version,
        )
        return held.answer(question).data

    widths: list[tuple[CoverageEncoding, int]] = [("f16", 2), ("u8", 1)]
    for encoding, width in widths:
        whole = ask(0, 600, encoding)
        assert len(whole) == 600 * width
        for cuts in ([0, 1, 36, 37, 38, 300, 599, 600], [0, 250, 600]):
            parts = [ask(a, b, encoding) for a, b in pairwise(cuts)]
            assert b"".join(parts) == whole


def test_site_train_learns_and_show_and_check_tell(tmp_path: Path) -> None:
    file = make(tmp_path).state.parent / "site.yaml"
    assert "not learned yet" in tell_coverage(load_settings(file, SiteSettings))
    trained = typed("site", "train", file, "--json")
    assert trained.exit_code == 0, trained.output
    settings = load_settings(file, SiteSettings)
    card = json.loads(trained.stdout)["data"]["coverage"]
    coverage, record = loaded(settings), record_of(settings)
    assert CoverageCard.model_validate_json(json.dumps(card)) == CoverageCard(
        fingerprint=coverage.fingerprint,
        encodings=("f16", "u8"),
        description="private data against the pool, cnn3",
    )
    assert set(card) == {"fingerprint", "encodings", "description"}
    shown = typed("site", "show", file).stdout
    assert coverage.fingerprint in shown
    assert coverage.description in shown
    assert f"{record.prior:.3g} of the pool" in shown
    assert f"AUROC about {record.auroc:.3f}" in shown
    rows = {row["check"]: row for row in json.loads(typed("site", "check", file, "--json").stdout)["data"]["rows"]}
    assert "coverage, if the site has learned it, as f16 or u8" in rows["policy"]["found"]
    assert rows["coverage"]["result"] == "ok"
    assert rows["coverage"]["found"] == record.told
    (settings.state / "coverage" / "model.safetensors").unlink()
    checked = typed("site", "check", file, "--json")
    (row,) = (row for row in json.loads(checked.stdout)["data"]["rows"] if row["check"] == "coverage")
    assert (row["result"], row["fix"]) == ("problem", "Run `consilience site train`")
    assert typed("site", "show", file).exit_code == 23


def test_warnings_and_reasons_are_shown_to_the_site_alone(tmp_path: Path) -> None:
    file = make(tmp_path, public=drawn([2, 3], 600, 3)[0], coverage=LONGER).state.parent / "site.yaml"
    trained = typed("site", "train", file, "--json")
    assert "Warning: site-1: private and pool images can be told apart" in trained.stderr.replace("\n", " ")
    assert "told apart" not in trained.stdout
    assert "Warning: private and pool images can be told apart" in typed("site", "show", file).stdout
    few = make(tmp_path, PRIVATE[:100]).state.parent / "site.yaml"
    trained = typed("site", "train", few, "--json")
    assert "gives no coverage: 100 private images" in trained.stderr.replace("\n", " ")
    assert json.loads(trained.stdout)["data"]["coverage"] is None
