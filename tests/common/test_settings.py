"""Settings files: what a mistake reads like, and that what is written is what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from consilience.common.errors import SettingsError
from consilience.common.settings import (
    Ask,
    JobSettings,
    Limits,
    Pate,
    Policy,
    Preprocessing,
    SiteSettings,
    allowed_by,
    encoding_names,
)
from consilience.common.settings_file import dump_settings, load_settings, parse_settings

SITE: dict[str, Any] = {
    "name": "site-1",
    "pools": ["pool"],
    "data": {"kind": "npz", "path": "private.npz"},
    "teacher": {"kind": "train", "architecture": "cnn3"},
}
SIMULATION: dict[str, Any] = {
    "data": {"kind": "embedded"},
    "test": {"kind": "embedded", "split": "test"},
    "partition": {"kind": "class-lists", "classes": [[0, 1]]},
    "teachers": [{"kind": "train", "architecture": "cnn3"}],
}


def message(raw: Any, model: Any = SiteSettings) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw, model, source="site.yaml", folder=Path("/settings"))
    return str(caught.value)


def with_teacher(**fields: Any) -> dict[str, Any]:
    return {**SITE, "teacher": {**SITE["teacher"], **fields}}


HOSTED = {"kind": "onnx", "path": "m.onnx", "classes": ["a"], "preprocessing": {}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({**SITE, "colour": 1}, ["'colour' is unknown", "allowed here: name, data, teacher"]),
        ({**SITE, "data": {"kind": "csv"}}, ["'data.kind' is 'csv'", "'npz'", "'folder'"]),
        ({**SITE, "data": {"path": "x"}}, ["'data.kind' is missing"]),
        ({**SITE, "data": {**SITE["data"], "key": 1}}, ["'data.key' is unknown", "kind, path, images, labels, names"]),
        (with_teacher(fit={"epochs": 0}), ["'teacher.fit.epochs' is 0", "greater than or equal to 1"]),
        (with_teacher(fit={"epoch": 3}), ["'teacher.fit.epoch' is unknown", "epochs, batch_size"]),
        (with_teacher(preprocessing={"mean": [0, 0], "std": [1]}), ["teacher.preprocessing", "2", "1"]),
        (with_teacher(preprocessing={"std": [0]}), ["'teacher.preprocessing.std.0' is 0", "greater than 0"]),
        (with_teacher(preprocessing={"channels": 2}), ["'teacher.preprocessing.channels' is 2", "1 or 3"]),
        ({k: v for k, v in SITE.items() if k != "name"}, ["'name' is missing"]),
        ({k: v for k, v in SITE.items() if k != "data"}, ["teacher.kind is train", "data"]),
        ({**SITE, "name": "Site One"}, ["'name' is 'Site One'", "pattern"]),
        (
            {**SITE, "policy": {"precision": "f8"}},
            ["'policy.precision' is 'f8'", "f32, f16, u8, top-K"],
        ),
        ({**SITE, "policy": {"coverage": "f32"}}, ["'policy.coverage' is 'f32'", "'off', 'u8' or 'f16'"]),
        ({**SITE, "policy": {"coverage": True}}, ["'policy.coverage' is True"]),
        ({**SITE, "teacher": {**HOSTED, "classes": ["a", "a"]}}, ["teacher", "'a' is named twice"]),
        ({**SITE, "teacher": {**HOSTED, "classes": ["\x1b[2J"]}}, ["'teacher.classes.0'"]),
        (
            {**SITE, "policy": {"limit": {}}},
            ["'policy.limit' is unknown", "limits, sums_only, sum_owners, sealed_only, approval, ends"],
        ),
        (
            {**SITE, "policy": {"limits": {"per_week": 1}}},
            ["'policy.limits.per_week' is unknown", "per_job"],
        ),
        ({**SITE, "policy": {"limits": {"per_job": -1}}}, ["'policy.limits.per_job' is -1", "greater than or equal"]),
        ({**SITE, "policy": {"pools": ["abc"]}}, ["'policy.pools.0' is 'abc'"]),
        ({**SITE, "policy": {"temperature": 0.5}}, ["'policy.temperature' is 0.5", "greater than or equal to 1"]),
        ({**SITE, "policy": {"cap": 0.4}}, ["'policy.cap' is 0.4", "0.5"]),
        ({**SITE, "policy": {"floor": 0.5}}, ["'policy.floor' is 0.5", "less than 0.5"]),
        ({**SITE, "policy": {"floor": float("nan")}}, ["'policy.floor' is nan"]),
        ({**SITE, "policy": {"decimals": 0}}, ["'policy.decimals' is 0"]),
        ({**SITE, "policy": {"ends": "soon"}}, ["'policy.ends' is 'soon'", "date"]),
        ({**SITE, "policy": {"approval": "perhaps"}}, ["'policy.approval' is 'perhaps'"]),
        ({**SITE, "peers": {"site-2": "about " * 7}}, ["'peers.site-2' is 'about", "a key's 8 words"]),
        ({**SITE, "peers": {"site-2": "about " * 7 + "consilience"}}, ["'peers.site-2'", "a key's 8 words"]),
        ({**SITE, "peers": {"Site Two": "about " * 8}}, ["peers.Site Two"]),
        ({**SITE, "data": {"kind": "folder", "path": "x", "size": [0, 28]}}, ["'data.size.0' is 0"]),
        ({**SITE, "teacher": {**HOSTED, "classes": []}}, ["'teacher.classes'", "at least 1"]),
        ({**SITE, "teacher": {**HOSTED, "kind": "callable"}}, ["'teacher.callable' is missing"]),
        ([1, 2], ["holds [1, 2], not fields"]),
        (None, ["holds None"]),
    ],
)
def test_a_mistake_names_file_field_value_allowed_and_next_step(raw: Any, words: list[str]) -> None:
    text = message(raw)
    for word in ["site.yaml", *words]:
        assert word in text
    assert "\n" not in text
    assert "Correct the field" in text or "Write" in text


def test_the_sample_itself_is_fine_and_paths_are_absolute() -> None:
    settings = parse_settings(SITE, SiteSettings, source="site.yaml", folder=Path("/settings"))
    assert settings.data is not None
    assert settings.data.kind == "npz"
    assert settings.data.path == Path("/settings/private.npz")
    assert settings.pools == (Path("/settings/pool"),)
    assert settings.state == Path("/settings/state")


def test_a_job_comes_back_from_its_file_with_defaults_filled_in(tmp_path: Path) -> None:
    raw = {"name": "job", "simulation": SIMULATION, "unify": {"weights": {"site-1": 2}}}
    job = parse_settings(raw, JobSettings, source="job.yaml", folder=tmp_path)
    dump_settings(job, tmp_path / "job.yaml")
    assert load_settings(tmp_path / "job.yaml", JobSettings) == job
    assert "in_flight: 4" in (tmp_path / "job.yaml").read_text()


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(SettingsError, match="No such file"):
        load_settings(path, JobSettings)
    for text, words in [
        ("a: 1\nb: [1", "line 2"),
        ("name: a\nname: b\n", "'name' is given twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ]:
        path.write_text(text)
        with pytest.raises(SettingsError, match=words) as caught:
            load_settings(path, JobSettings)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_settings(path, JobSettings)


def test_the_policy_s_version_follows_its_content() -> None:
    assert Policy().version == Policy(precision="f16").version
    assert Policy().version != Policy(precision="f32").version


FINENESS = [
    ("f32", "f32, f16, u8, top-K, top-K-u8, votes", "f32 f16 u8 top-1 top-999999 top-9-u8 votes", "u16 top-0"),
    ("f16", "f16, u8, top-K, top-K-u8, votes", "f16 u8 top-1 top-999999 top-9-u8 votes", "f32"),
    ("u8", "u8, top-K-u8, votes", "u8 top-1-u8 top-999-u8 votes", "f32 f16 top-1 top-3"),
    (
        "top-3",
        "top-1 to top-3, top-1-u8 to top-3-u8, votes",
        "top-3 top-2 top-1 top-3-u8 top-1-u8 votes",
        "f32 f16 u8 top-4 top-30 top-4-u8",
    ),
    ("top-3-u8", "top-1-u8 to top-3-u8, votes", "top-3-u8 top-1-u8 votes", "f32 f16 u8 top-1 top-3 top-4-u8"),
    ("top-1", "top-1, top-1-u8, votes", "top-1 top-1-u8", "top-2 top-2-u8 u8"),
    ("votes", "votes", "votes", "f32 f16 u8 top-1 top-1-u8"),
]


@pytest.mark.parametrize(("finest", "told", "allowed", "refused"), FINENESS)
def test_a_policy_allows_what_can_be_computed_from_the_finest(
    finest: str, told: str, allowed: str, refused: str
) -> None:
    encodings = Policy(precision=finest).encodings
    assert ", ".join(encoding_names(encodings)) == told
    assert all(allowed_by(encodings, asked) for asked in allowed.split())
    assert not any(allowed_by(encodings, asked) for asked in refused.split())


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "f64",
        "F32",
        "top",
        "top-",
        "top-0",
        "top-03",
        "top--3",
        "top-1000000",
        "top-3 ",
        "top-3\n",
        "top-²",
        "top-3-u",
        "top-3-u8-u8",
    ],
)
def test_another_word_is_no_encoding(wrong: str) -> None:
    for model in (Policy, Ask):
        field = "precision" if model is Policy else "encoding"
        with pytest.raises(ValidationError, match="top-K"):
            model.model_validate({field: wrong})


def test_one_field_of_coverage_s_training_leaves_the_others_as_they_are() -> None:
    whole = SiteSettings.model_validate({**SITE, "coverage": {"fit": {"epochs": 30}}}).coverage.fit
    assert (whole.epochs, whole.batch_size, whole.learning_rate) == (30, 256, 0.05)


def test_direct_learning_cannot_follow_what_is_outside_all_classes() -> None:
    raw = {"name": "job", "unify": {"other": 0.1}, "student": {"architecture": "cnn3", "learning": "direct-ce"}}
    assert "unify.other is 0.1, which student.learning 'direct-ce' cannot follow" in message(raw, JobSettings)


def test_every_field_of_the_policy_enters_its_version() -> None:
    others: dict[str, Any] = {
        "precision": "f32",
        "coverage": "u8",
        "features": {"taps": {"layer1": {}}},
        "tail": {"allow": "questions"},
        "class_priors": True,
        "holdout_accuracy": True,
        "pools": ("0" * 64,),
        "temperature": 2.0,
        "decimals": 3,
        "cap": 0.9,
        "floor": 0.01,
        "limits": {"per_job": 1},
        "sums_only": True,
        "sum_owners": 2,
        "sealed_only": True,
        "approval": True,
        "ends": "2030-01-01",
    }
    assert set(others) == set(Policy.model_fields)
    versions = {Policy().version, *(Policy(**{name: value}).version for name, value in others.items())}
    versions |= {Policy(limits=Limits(**{name: None})).version for name in Limits.model_fields}
    told: dict[str, Any] = {"layer1": {"size": 4}}
    versions |= {Policy.model_validate({"features": {"taps": told, **more}}).version for more in (
        {}, {"precision": "u8"}, {"bytes": 5}, {"taps": {"layer1": {"channels": 4}}}, {"taps": {"*": {"size": 4}}},
    )}  # fmt: skip
    assert len(versions) == 1 + len(others) + 3 + 5


def test_a_policy_s_end_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "name: s\ndata: {kind: npz, path: d}\nteacher: {kind: train, architecture: cnn3}\n"
        "policy: {ends: 2030-01-31, limits: {lifetime: null}}\n"
    )
    loaded = load_settings(path, SiteSettings)
    assert str(loaded.policy.ends) == "2030-01-31"
    assert loaded.policy.limits.lifetime is None
    dump_settings(loaded, path)
    assert load_settings(path, SiteSettings).policy == loaded.policy


def test_one_value_a_channel_is_allowed() -> None:
    assert Preprocessing(channels=3, mean=(0.1, 0.2, 0.3), std=(1, 1, 1)).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("written", "allowed"), [("off", ()), ("'off'", ()), ("u8", ("u8",)), ("f16", ("f16", "u8")), ("", ())]
)
def test_the_policy_says_how_finely_coverage_may_leave(tmp_path: Path, written: str, allowed: tuple[str, ...]) -> None:
    path = tmp_path / "site.yaml"
    policy = f"policy: {{coverage: {written}}}\n" if written else ""
    path.write_text(
        f"name: s\ndata: {{kind: npz, path: d.npz}}\nteacher: {{kind: train, architecture: cnn3}}\n{policy}"
    )
    loaded = load_settings(path, SiteSettings)
    assert loaded.policy.coverage_encodings == allowed
    dump_settings(loaded, path)
    assert load_settings(path, SiteSettings) == loaded


def test_another_policy_of_coverage_is_another_version() -> None:
    versions = {Policy().version, Policy(coverage="u8").version, Policy(coverage="f16").version}
    assert len(versions) == 3


@pytest.mark.parametrize("method", ["sd", "mf-p", "mf-lv", "mf-lf"])
def test_a_prior_of_other_needs_a_method_that_knows_it(method: str) -> None:
    raw = {"name": "job", "unify": {"method": method, "other": 0.5}}
    text = message(raw, JobSettings)
    assert "unify" in text
    assert f"other is 0.5, which method '{method}' does not know" in text
    assert parse_settings({**raw, "unify": {"method": method}}, JobSettings, source="x", folder=Path()).unify.other == 0
    parse_settings({**raw, "unify": {"other": 0.5}}, JobSettings, source="x", folder=Path())


@pytest.mark.parametrize("other", [-0.1, float("nan"), float("inf")])
def test_a_prior_of_other_is_a_number_of_at_least_0(other: float) -> None:
    assert "'unify.other'" in message({"name": "job", "unify": {"other": other}}, JobSettings)


def test_a_simulation_s_sites_take_its_mechanism_or_refuse_it_at_once() -> None:
    pate = {"mechanism": "pate", "parts": 3, "sigma": 2}
    told = message({"name": "job", "simulation": {**SIMULATION, "privacy": pate}}, JobSettings)
    assert "calibration is temperature, which learns from the private data without noise" in told
    raw = {"name": "job", "simulation": {**SIMULATION, "privacy": pate, "calibration": "off"}}
    job = parse_settings(raw, JobSettings, source="job.yaml", folder=Path("/settings"))
    assert job.simulation is not None
    assert job.simulation.privacy == Pate(mechanism="pate", parts=3, sigma=2)


def test_branches_that_learn_answers_as_they_are_cannot_soften_them() -> None:
    student = {"architecture": "cnn3", "learning": "filtered", "classes": ["a", "b"]}
    raw = {"name": "job", "unify": {"temperature": 3}, "student": {**student, "filtered": {"target": "teachers"}}}
    assert "unify.temperature is 3, which student.learning 'filtered' cannot follow" in message(raw, JobSettings)
    JobSettings.model_validate({**raw, "student": student})
