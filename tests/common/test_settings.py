"""Settings files: what a mistake reads like, and that what is written is what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from consilience.common.errors import SettingsError
from consilience.common.settings import JobSettings, Policy, Preprocessing, SiteSettings
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
        ({**SITE, "policy": {"precision": "f8"}}, ["'policy.precision' is 'f8'", "'f32' or 'f16'"]),
        ({**SITE, "teacher": {**HOSTED, "classes": ["a", "a"]}}, ["teacher", "'a' is named twice"]),
        ({**SITE, "teacher": {**HOSTED, "classes": ["\x1b[2J"]}}, ["'teacher.classes.0'"]),
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
    assert Policy().version == Policy(precision="f32").version
    assert Policy().version != Policy(precision="f16").version
    assert Policy(precision="f16").encodings == ("f16",)
    assert Policy().encodings == ("f32", "f16")


def test_one_value_a_channel_is_allowed() -> None:
    assert Preprocessing(channels=3, mean=(0.1, 0.2, 0.3), std=(1, 1, 1)).mean == (0.1, 0.2, 0.3)
