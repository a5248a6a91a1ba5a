"""What a mechanism would need and give: enough noise, hardly more, and an estimate that says what it rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import binom, norm
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.privacy import load_private, train_private
from consilience.client.privacy.estimates import ASSUMED, Held, estimate_outputs, estimate_votes, look
from consilience.client.privacy.pate import PateTeacher
from consilience.client.privacy.plan import alternatives
from consilience.client.privacy.records import places
from consilience.common.data import open_data
from consilience.common.errors import SettingsError
from consilience.common.settings import NoPrivacy, OutputNoise, Pate, SiteSettings
from helpers.private_site import Make, bars, settings_of, write_data

VOTE: dict[str, Any] = {"mechanism": "pate", "parts": 3, "sigma": 0.5}
SURE: dict[str, Any] = {**VOTE, "answer": "confident", "threshold": 2.5, "threshold_sigma": 1.0}


def run(folder: Path, raw: dict[str, Any], *options: str) -> Any:
    (folder / "site.yaml").write_text(yaml.safe_dump(raw))
    return CliRunner().invoke(app, ["site", "plan", str(folder / "site.yaml"), *options])


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command says of a site that has trained nothing yet."""
    folder = tmp_path_factory.mktemp("plan")
    write_data(folder, *bars(120))
    raw = settings_of(folder, SURE).model_dump(mode="json")
    result = run(folder, raw, "--epsilon", "3", "--samples", "1000", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["ok"]
    assert not (folder / "state" / "privacy" / "pate").exists()  # a plan trains nothing
    data: dict[str, Any] = told["data"]
    return data


def test_every_mechanism_is_planned_with_its_unit(planned: dict[str, Any]) -> None:
    assert (planned["epsilon"], planned["samples"], planned["delta"]) == (3, 1000, 1e-5)
    told = [(a["settings"]["mechanism"], a["settings"].get("answer"), a["unit"]) for a in planned["alternatives"]]
    assert told == [
        ("pate", "arg-max", "record"),
        ("pate", "confident", "record"),
        ("pate", "average", "record"),
        ("dp-sgd", None, "record"),
        ("output-noise", None, "model"),
        ("none", None, None),
        ("pate", "confident", "record"),
    ]
    assert [a["configured"] for a in planned["alternatives"]] == [False] * 6 + [True]
    assert [a["trainings"] for a in planned["alternatives"]] == [3, 3, 3, 1, 1, 1, 3]
    assert [a["paid"] for a in planned["alternatives"]][3:6] == ["once", "by answer", "never"]


def test_the_noise_is_enough_and_hardly_more(planned: dict[str, Any]) -> None:
    for one in planned["alternatives"][:5]:
        least = 2.5 if one["settings"]["mechanism"] == "dp-sgd" else 2.97  # searched for by the looser accountant
        assert least < one["epsilon"] <= 3, one
        assert one["epsilon"] == min(one["epsilon_rdp"], one["epsilon_pld"])
    assert planned["alternatives"][5]["epsilon"] is None
    own = planned["alternatives"][6]
    assert own["settings"] == SURE
    assert own["epsilon"] > 100
    # the threshold's noise keeps its proportion to the votes'
    sure = planned["alternatives"][1]["settings"]
    assert sure["threshold_sigma"] == pytest.approx(2 * sure["sigma"])


def test_what_is_only_assumed_says_so(planned: dict[str, Any]) -> None:
    for one in planned["alternatives"][:3]:
        assert "assumed: every part is right 70% of the time" in one["basis"]
        assert 0.2 < one["accuracy"] < 0.6
    assert planned["alternatives"][3]["accuracy"] is None
    assert "assumed" in planned["alternatives"][4]["basis"]


def test_the_table_says_the_same(make: Make, tmp_path: Path) -> None:
    hosted = {"kind": "onnx", "path": "m.onnx", "classes": ["a", "b"], "preprocessing": {}}
    raw = {"name": "s", "teacher": hosted, "privacy": {"mechanism": "output-noise", "sigma": 2.0}}
    result = run(tmp_path, raw, "--epsilon", "8", "--samples", "10", "--delta", "1e-6")
    assert result.exit_code == 0, result.output
    assert "pate" not in result.stdout  # which would have to train the teacher
    for told in ("output-noise *", "model", "nothing", "10 samples at delta 1e-06", "assumed: the teacher is certain"):
        assert told in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--epsilon", "0", "--samples", "10"), "--epsilon is 0; allowed: more than 0, at most 100"),
        (("--epsilon", "nan", "--samples", "10"), "--epsilon is nan"),
        (("--epsilon", "1e9", "--samples", "10"), "--epsilon is 1e+09"),
        (("--epsilon", "3", "--samples", "0"), "--samples is 0; allowed: 1 to 10^12"),
        (("--epsilon", "3", "--samples", "10", "--delta", "1"), "--delta is 1; allowed: between 0 and 1"),
        (
            ("--epsilon", "0.001", "--samples", "1000000000000"),
            "Epsilon 0.001 at delta 1e-05 needs more noise than 1e+09, the most that settings take",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(make: Make, tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    result = run(tmp_path, make(VOTE).model_dump(mode="json"), *options, "--json")
    assert result.exit_code == SettingsError.exit_code
    error = json.loads(result.stdout)["error"]
    assert told in error["message"]
    assert error["hint"].startswith(("Correct --", "Raise --epsilon, or lower --samples"))


def test_up_to_the_most_noise_there_is_a_plan(tmp_path: Path) -> None:
    write_data(tmp_path, *bars(120))
    found = alternatives(settings_of(tmp_path, SURE), 0.02, 10**12, 1e-5)
    assert all(one.spent.epsilon is not None and one.spent.epsilon <= 0.02 for one in found[:5])
    # the threshold's noise, in proportion, would be less than there is
    odd = {**SURE, "sigma": 1e9, "threshold_sigma": 0.01}
    with pytest.raises(SettingsError, match=r"more noise than 1e\+09"):
        alternatives(settings_of(tmp_path, odd), 1, 10, 1e-5)


@pytest.mark.parametrize(("parts", "sigma"), [(5, 1.0), (25, 12.0)])
def test_an_assumed_vote_is_right_as_often_as_a_formula_says(parts: int, sigma: float) -> None:
    right = np.arange(parts + 1)
    chance = float(np.sum(binom.pmf(right, parts, ASSUMED) * norm.cdf((2 * right - parts) / (sigma * np.sqrt(2)))))
    found = estimate_votes(Pate(mechanism="pate", parts=parts, sigma=sigma), Held(2, None))
    assert found.accuracy == pytest.approx(chance, abs=0.02)
    assert found.answered == 1
    sure = Pate(mechanism="pate", parts=parts, sigma=sigma, answer="confident", threshold=4, threshold_sigma=2)
    passes = binom.pmf(right, parts, ASSUMED) * norm.cdf((np.maximum(right, parts - right) - 4) / 2)
    assert estimate_votes(sure, Held(2, None)).answered == pytest.approx(float(passes.sum()), abs=0.02)


def test_parts_are_judged_on_records_that_none_of_them_learned_from(make: Make) -> None:
    settings = make(VOTE, fit={"epochs": 3}, teacher={"holdout": 0.4})
    train_private(settings)
    teacher = load_private(settings)
    assert isinstance(teacher, PateTeacher)
    assert settings.data is not None
    data = open_data(settings.data)
    found_places = places(data, 3, 0.4, 0)
    ids = found_places.ids(-1)
    assert len(ids) not in [len(found_places.ids(part)) for part in range(3)]
    assert data.labels is not None
    votes = teacher.sums(data.read(ids))
    quiet = Pate(mechanism="pate", parts=3, sigma=0.01)
    found = estimate_votes(quiet, look(settings))
    assert f"the parts' votes on {len(ids)} held-out private images" in found.basis
    untied = np.sort(votes, axis=1)[:, -1] > np.sort(votes, axis=1)[:, -2]
    right = (votes.argmax(axis=1) == data.labels[ids])[untied].sum()
    assert found.accuracy is not None
    assert right / len(ids) <= found.accuracy <= (right + np.sum(~untied)) / len(ids)


def test_a_whole_teacher_is_judged_where_it_is_trained(make: Make) -> None:
    settings = make({"mechanism": "none"})
    assert estimate_outputs(None, look(settings)).accuracy is None
    train_private(settings)
    held = look(settings)
    bare = estimate_outputs(None, held)
    assert bare.accuracy == held.whole_accuracy
    assert "held-out private images" in bare.basis
    noisy = [estimate_outputs(OutputNoise(mechanism="output-noise", sigma=s), held).accuracy for s in (0.01, 0.5, 50)]
    assert noisy[0] == pytest.approx(bare.accuracy, abs=0.05)
    assert noisy == sorted(noisy, reverse=True)  # type: ignore[type-var]
    assert noisy[2] == pytest.approx(1 / 3, abs=0.12)


def test_the_settings_delta_is_taken_unless_another_is_asked_for() -> None:
    hosted = {"kind": "onnx", "path": "m.onnx", "classes": ["a", "b"], "preprocessing": {}}
    privacy = {"mechanism": "output-noise", "sigma": 2.0, "delta": 1e-7}
    settings = SiteSettings.model_validate({"name": "s", "teacher": hosted, "privacy": privacy})
    assert {one.spent.delta for one in alternatives(settings, 3, 10)} == {1e-7}
    assert {one.spent.delta for one in alternatives(settings, 3, 10, 1e-3)} == {1e-3}
    bare = settings.model_copy(update={"privacy": NoPrivacy()})
    assert [one.settings.mechanism for one in alternatives(bare, 3, 10)] == ["output-noise", "none"]
