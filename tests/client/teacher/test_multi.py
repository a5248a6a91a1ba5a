"""Multi-label teachers: their scores, their training, their calibration, and what their sites cannot have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score

from consilience.client.card import card_of
from consilience.client.coverage import load_coverage
from consilience.client.coverage.learning import learn_coverage
from consilience.client.coverage.samples import mine
from consilience.client.features import open_taps
from consilience.client.privacy import train_private
from consilience.client.shaping import shape_odds
from consilience.client.teacher import CalibratedMulti, calibrate_any, holdout_ap, load_any, load_teacher
from consilience.client.teacher.multi import checked_odds
from consilience.client.teacher.multi_calibrated import fit_label
from consilience.client.teacher.private_samples import split_images
from consilience.common.data import from_arrays, open_data
from consilience.common.encoding.odds import MOST_ODDS
from consilience.common.errors import DataError, SettingsError, TeacherError
from consilience.common.nets import build
from consilience.common.pool import Pool
from consilience.common.settings import Coverage, Policy, SiteSettings
from consilience.common.settings_file import parse_settings

Site = Callable[..., SiteSettings]
FIT = {"epochs": 6, "batch_size": 8, "learning_rate": 0.05, "augment": False, "precision": "f32"}
TRAIN: dict[str, Any] = {"kind": "train", "labels": "multi", "architecture": "cnn3", "fit": FIT, "holdout": 0.25}
NAMES = ("left", "nowhere", "right")


@pytest.fixture
def private(tmp_path: Path) -> dict[str, Any]:
    """Private images with a bar at the left, at the right, at both or none; a third label that none has."""
    random = np.random.default_rng(5)
    images = random.integers(0, 60, (320, 16, 16, 1), np.uint8)
    labels = np.zeros((320, 3), np.int8)
    labels[:, [0, 2]] = random.integers(0, 2, (320, 2))
    images[labels[:, 0] == 1, :, 1:5] += np.uint8(120)
    images[labels[:, 2] == 1, :, 11:15] += np.uint8(120)
    np.savez(tmp_path / "private.npz", x=images, y=labels, names=np.array(NAMES))
    return {"kind": "npz", "path": "private.npz"}


def test_a_trained_one_learns_each_label_and_measures_it_on_what_it_held_out(
    site: Site, private: dict[str, Any]
) -> None:
    settings = site(data=private, **TRAIN)
    train_private(settings)
    record = calibrate_any(settings)
    teacher = load_any(settings)
    assert isinstance(teacher, CalibratedMulti)
    assert teacher.classes == ("left", "right")  # a label that no image has cannot be learned
    data = open_data(private_source(settings))
    found = teacher.log_odds(data.read())
    assert data.many is not None
    _, held = split_images(data.many[:, [0, 2]], 0.25, 0)
    assert len(held) == 80
    assert ((found > 0) == (data.many[:, [0, 2]] > 0)).mean() > 0.95
    precision = holdout_ap(settings)
    assert precision is not None
    assert precision > 0.9
    assert record.samples in (0, 80)
    told = card_of(settings.model_copy(update={"policy": Policy(holdout_accuracy=True)}), teacher, None, (), None, None)
    assert (told.labels, told.holdout_ap, told.holdout_accuracy) == ("multi", pytest.approx(precision, abs=5e-4), None)
    assert told.holdout_ap == round(precision, 3)  # thousandths tell no counts
    with pytest.raises(TeacherError, match=r"teacher.labels.* is 'multi'"):
        load_teacher(settings)


def private_source(settings: SiteSettings) -> Any:
    return settings.data


def test_what_is_not_known_is_no_lesson(site: Site, private: dict[str, Any], tmp_path: Path) -> None:
    with np.load(tmp_path / "private.npz") as held:
        arrays = dict(held)
    labels = arrays["y"].astype(np.float32)
    labels[160:, 0] = np.nan
    np.savez(tmp_path / "private.npz", x=arrays["x"], y=labels, names=arrays["names"])
    settings = site(data=private, **(TRAIN | {"holdout": 0.0}))
    train_private(settings)
    found = load_any(settings)
    assert isinstance(found, CalibratedMulti)
    right = (found.log_odds(arrays["x"]) > 0) == (arrays["y"][:, [0, 2]] > 0)
    assert right.mean() > 0.9


def test_data_of_the_other_kind_is_refused_with_what_to_do(
    site: Site, private: dict[str, Any], blobs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"\(n, 3\); one label an image is needed") as error:
        train_private(site(data=private, **(TRAIN | {"labels": "single"})))
    assert "teacher.labels: multi" in error.value.hint
    np.savez(tmp_path / "private.npz", x=blobs[0], y=blobs[1])
    with pytest.raises(DataError, match="has one label an image") as error:
        train_private(site(data=private, **TRAIN))
    assert "teacher.labels: single" in error.value.hint


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.full((320, 3), 2), "label 2 of sample 0, 'left'"),
        (np.zeros((320, 2), np.int8), "one column for each of 3 names"),
        (np.zeros((319, 3), np.int8), r"allowed: \(320, 3\) numbers"),
        (np.full((320, 3), "yes"), "type <U3"),
        (np.full((320, 3), 0.5), "label 0.5 of sample 0"),
    ],
)
def test_labels_that_are_none_are_refused(
    site: Site, private: dict[str, Any], tmp_path: Path, labels: np.ndarray, reason: str
) -> None:
    with np.load(tmp_path / "private.npz") as held:
        arrays = dict(held)
    np.savez(tmp_path / "private.npz", x=arrays["x"], y=labels, names=arrays["names"])
    with pytest.raises(DataError, match=reason):
        open_data(private_source(site(data=private, **TRAIN)))


@given(st.integers(1, 40), st.floats(0, 0.89), st.integers(0, 5))
def test_every_label_keeps_an_image_to_learn_from(n: int, share: float, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(-1, 2, (n, 3)).astype(np.int8)
    learned, held = split_images(labels, share, seed)
    assert sorted([*learned, *held]) == list(range(n))
    assert np.array_equal((labels[learned] > 0).any(axis=0), (labels > 0).any(axis=0))
    assert abs(len(held) - share * n) <= 4


def test_scores_become_log_odds_within_bounds() -> None:
    about: dict[str, Any] = {"rows": 1, "classes": ("a", "b", "c"), "where": "w"}
    found = checked_odds(np.array([[0.0, 0.25, 1.0]]), outputs="probabilities", **about)
    assert np.allclose(found, [[-MOST_ODDS, logit(0.25), MOST_ODDS]])
    assert found.dtype == np.float32
    logits = checked_odds(np.array([[1e300, -3.5, -1e300]]), outputs="logits", **about)
    assert logits.tolist() == [[MOST_ODDS, -3.5, -MOST_ODDS]]
    for bad, outputs, reason in (
        ([[0.1, 0.2, 1.1]], "probabilities", "probabilities from 0 to 1"),
        ([[0.1, 0.2, -0.1]], "probabilities", "probabilities from 0 to 1"),
        ([[0.1, np.nan, 0.1]], "logits", "finite scores"),
        ([[0.1, 0.2]], "logits", "expected \\(1, 3\\)"),
        ([[1, 0, 1]], "probabilities", "floating point"),
    ):
        with pytest.raises(TeacherError, match=reason):
            checked_odds(np.array(bad), outputs=outputs, **about)  # type: ignore[arg-type]


def test_a_hosted_one_gives_the_logits_of_its_network(site: Site, private: dict[str, Any], tmp_path: Path) -> None:
    module = build("cnn3", classes=3, channels=1, seed=3)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    common: dict[str, Any] = {
        "kind": "state_dict",
        "architecture": "cnn3",
        "path": "model.safetensors",
        "classes": list(NAMES),
    }
    common["preprocessing"] = {"channels": 1, "size": [16, 16]}
    settings = site(**common, labels="multi", data=private)
    teacher = load_any(settings)
    assert isinstance(teacher, CalibratedMulti)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), np.uint8)
    with torch.inference_mode():
        expected = module.eval()(torch.from_numpy((images / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()).numpy()
    assert np.allclose(teacher.log_odds(images), expected, atol=1e-4)
    assert teacher.fingerprint != load_teacher(site(**common)).fingerprint
    assert teacher.log_odds(images[:0]).shape == (0, 3)
    # An untrained network is never made surer on data that it may have seen.
    assert calibrate_any(settings).samples == 320
    calibrated = load_any(settings)
    assert isinstance(calibrated, CalibratedMulti)
    assert calibrated.record is not None
    assert min(calibrated.record.temperatures or (1.0,)) >= 1
    policy = Policy.model_validate({"features": {"taps": {"layer1": {}}}})
    taps = open_taps(settings.model_copy(update={"policy": policy}), teacher)
    assert [tap.card.name for tap in taps] == ["layer1"]


def test_a_label_s_temperature_is_the_one_that_made_it_too_sure() -> None:
    random = np.random.default_rng(0)
    true = random.normal(0, 2, 20_000)
    truth = (random.random(20_000) < expit(true)).astype(np.int8)
    truth[:100] = -1
    fitted = fit_label(3 * true, truth, 0)
    assert fitted.map is not None
    assert fitted.map.temperature == pytest.approx(3, rel=0.05)
    assert fitted.samples == 19_900
    assert fitted.after.ece < 0.02 < fitted.before.ece  # type: ignore[union-attr]
    assert fit_label(true, np.where(np.arange(20_000) < 4, 1, 0).astype(np.int8), 0).map is None


def test_temperatures_keep_the_order_of_images(site: Site, private: dict[str, Any]) -> None:
    settings = site(data=private, **TRAIN)
    train_private(settings)
    bare = load_any(settings)
    record = calibrate_any(settings)
    assert isinstance(bare, CalibratedMulti)
    record = record.model_copy(update={"temperatures": (2.0, 0.5)})
    behind = CalibratedMulti(bare.teacher, record, "")  # type: ignore[arg-type]
    data = open_data(private_source(settings))
    before, after = bare.teacher.log_odds(data.read()), behind.log_odds(data.read())
    assert np.allclose(after, before / [2, 0.5], atol=1e-5)
    assert behind.fingerprint != bare.fingerprint
    assert data.many is not None
    assert average_precision_score(data.many[:, 0], after[:, 0]) == average_precision_score(
        data.many[:, 0], before[:, 0]
    )


@given(
    st.floats(-30, 30), st.floats(1, 5), st.one_of(st.none(), st.integers(1, 4)), st.floats(0.5, 1), st.floats(0, 0.4)
)
def test_a_policy_shapes_each_label_as_two_classes(
    odds: float, temperature: float, decimals: int | None, cap: float, floor: float
) -> None:
    policy = Policy(temperature=temperature, decimals=decimals, cap=cap, floor=floor)
    found = expit(float(shape_odds(np.array([[odds]], np.float32), policy)[0, 0]))
    p = expit(odds / temperature)
    if decimals is not None:
        p = min(max(round(p, decimals), 10.0**-decimals / 2), 1 - 10.0**-decimals / 2)
    p = min(max(p, 1 - cap), cap)
    p = floor + (1 - 2 * floor) * p
    near = 10.0**-decimals if decimals is not None else 1e-4  # where rounding is a matter of the last bit
    assert found == pytest.approx(p, abs=near)
    assert max(found, 1 - found) <= max(cap, 0.5) + 1e-6 or floor > 0
    assert min(found, 1 - found) >= floor - 1e-6


def test_a_policy_that_takes_nothing_away_leaves_the_rows_as_they_are() -> None:
    rows = np.array([[1.0, -2.0]], np.float32)
    assert shape_odds(rows, Policy()) is rows


def test_coverage_learns_from_images_that_have_any_of_its_labels(site: Site, private: dict[str, Any]) -> None:
    settings = site(data=private, **TRAIN)
    data = open_data(private_source(settings))
    assert data.many is not None
    ids, labels, classes = mine(settings, data)
    assert np.array_equal(ids, np.flatnonzero((data.many > 0).any(axis=1)))
    assert (set(labels.tolist()), classes) == ({0}, 1)


def test_coverage_tells_images_with_any_of_its_labels_from_others(
    site: Site, private: dict[str, Any], tmp_path: Path
) -> None:
    random = np.random.default_rng(9)
    images = random.integers(0, 60, (300, 16, 16, 1), np.uint8)
    kinds = np.arange(150) % 3  # at the left, at the right, or both, as in the private data; the others have neither
    images[np.flatnonzero(kinds != 1), :, 1:5] += np.uint8(120)
    images[np.flatnonzero(kinds != 0), :, 11:15] += np.uint8(120)
    pool = Pool.build(from_arrays(images, None, (), where="test"), tmp_path / "pool")
    settings = site(data=private, **TRAIN).model_copy(
        update={
            "pools": (pool.folder,),
            "policy": Policy(coverage="f16"),
            "coverage": Coverage(family="outputs"),
        }
    )
    train_private(settings)
    record = learn_coverage(settings)
    assert record.abstains is None, record.abstains
    found = load_coverage(settings)
    assert found is not None
    told = found.scores(pool.read(0, 300))
    assert told[:150].mean() > told[150:].mean() + 0.3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"privacy": {"mechanism": "output-noise", "sigma": 1.0}, "calibration": "off"},
            "privacy.mechanism is output-",
        ),
        ({"privacy": {"mechanism": "dp-sgd", "noise_multiplier": 1.0}, "calibration": "off"}, "mechanism is dp-sgd"),
        ({"policy": {"sums_only": True}}, "policy.sums_only is true"),
        ({"policy": {"class_priors": True}}, "policy.class_priors is true"),
        ({"calibration": "dirichlet"}, "calibration is dirichlet"),
    ],
)
def test_what_is_made_for_one_label_an_image_is_refused_when_site_yaml_is_read(
    tmp_path: Path, private: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    raw = {"name": "site-1", "teacher": TRAIN, "data": private} | changes
    with pytest.raises(SettingsError, match=reason) as error:
        parse_settings(raw, SiteSettings, source="site.yaml", folder=tmp_path)
    assert "teacher.labels: multi" in str(error.value)
    parse_settings(raw | {"teacher": TRAIN | {"labels": "single"}}, SiteSettings, source="s", folder=tmp_path)
