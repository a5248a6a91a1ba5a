"""Simulated sites that label their images by groups: what they hold, and a whole job of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.common.data import from_arrays
from consilience.common.errors import SettingsError
from consilience.common.files import read_json
from consilience.common.settings import ClassLists, JobSettings, Simulation
from consilience.common.settings_file import parse_settings
from consilience.deploy.partition_groups import coarsened, without_groups

NAMES = ("bar", "dot", "row", "spot", "blank")


def job(folder: Path, classes: list[list[Any]], groups: dict[str, list[str]], **labels: Any) -> dict[str, Any]:
    fit = {"epochs": 6, "precision": "f32", "augment": False, "batch_size": 16}
    return {
        "name": "groups",
        "labels": {"groups": groups, **labels},
        "ask": {"encoding": "f16"},
        "student": {"architecture": "cnn3@0.5", "fit": fit},
        "simulation": {
            "data": {"kind": "npz", "path": str(folder / "train.npz")},
            "test": {"kind": "npz", "path": str(folder / "test.npz")},
            "partition": {"kind": "class-lists", "classes": classes},
            "teachers": [{"kind": "train", "architecture": "cnn3@0.5", "fit": fit}],
        },
    }


def simulation(classes: list[list[Any]], groups: dict[str, list[str]], **labels: Any) -> tuple[Simulation, JobSettings]:
    raw = job(Path("/home"), classes, groups, **labels)
    settings = parse_settings(raw, JobSettings, source="job.yaml", folder=Path("/home"))
    assert settings.simulation is not None
    return settings.simulation, settings


def test_groups_in_class_lists_stand_for_their_classes() -> None:
    held, settings = simulation(
        [["lines", "spot"], ["bar", 1], ["Zeile", 0, "points"]],
        {"lines": ["bar", "row"], "points": ["dot", "spot"]},
        synonyms={"row": ["Zeile"]},
    )
    names = ("bar", "dot", "Zeile", "spot", "blank")  # the data's own name of a class
    plain, coarse = without_groups(held, settings.labels, names)
    assert isinstance(plain.partition, ClassLists)
    assert plain.partition.classes == ((0, 2, "spot"), ("bar", 1), ("Zeile", 0, 1, 3))
    assert coarse == [{"lines": (0, 2)}, {}, {"points": (1, 3)}]


def test_a_class_of_the_data_that_is_called_as_a_group_stays_one() -> None:
    held, settings = simulation([["lines", "spot"]], {"lines": ["bar", "row"]})
    plain, coarse = without_groups(held, settings.labels, ("lines", "spot"))
    assert (plain, coarse) == (held, [{}])


def test_without_groups_nothing_changes() -> None:
    held, settings = simulation([["bar", "spot"]], {})
    assert without_groups(held, settings.labels, NAMES) == (held, [])


def test_a_group_of_classes_that_the_data_lacks_is_refused() -> None:
    held, settings = simulation([["bar", "dot"], ["lines", "spot"]], {"lines": ["bar", "column"]})
    with pytest.raises(
        SettingsError, match=r"classes\.1 holds the group 'lines', of whose .* lacks 'column'"
    ) as caught:
        without_groups(held, settings.labels, NAMES)
    assert caught.value.hint


def test_images_are_labelled_by_their_group() -> None:
    labels = np.array([0, 1, 2, 3, 4, 2, 0])
    data = from_arrays(np.zeros((7, 2, 2), np.uint8), labels, NAMES, where="test")
    found = coarsened(data, {"lines": (2, 0), "points": (1, 3)})
    assert found.class_names == ("blank", "lines", "points")
    assert found.labels is not None
    assert [found.class_names[k] for k in found.labels] == [
        "lines", "points", "lines", "points", "blank", "lines", "lines"
    ]  # fmt: skip
    assert coarsened(data, {}) is data


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four kinds of 8 x 8 pictures in noise."""
    kinds = np.zeros((4, 8, 8), np.uint8)
    kinds[0, :, 3:5], kinds[1, 2:4, 2:4], kinds[2, 3:5], kinds[3, 1:7, 1:7] = 200, 200, 200, 100
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % 4)
    return kinds[labels] + random.integers(0, 50, (count, 8, 8), np.uint8), labels


def test_a_coarse_site_joins_fine_ones_in_a_whole_job(tmp_path: Path) -> None:
    """Two fine sites share no class, so that the odds between them are open; a coarse site settles them."""
    for name, count, seed in (("train", 400, 0), ("test", 80, 1)):
        x, y = images(count, seed)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, names=np.array(NAMES[:4]))
    lists = [["bar", "row"], ["dot", "spot"], ["lines", "points"]]
    raw = job(tmp_path, lists, {"lines": ["bar", "row"], "points": ["dot", "spot"]})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    forget_sites()
    result = CliRunner().invoke(app, ["simulate", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    report = read_json(tmp_path / "run" / "report.json")
    assert [site["classes"] for site in report["sites"]] == lists
    assert report["labels"]["groups"] == {"site-3": {"lines": ["bar", "row"], "points": ["dot", "spot"]}}
    assert report["partition"]["counts"][2] == [30, 30, 30, 30]
    assert report["unify"]["components"] == 1
    assert report["baselines"]["unified_ensemble"]["accuracy"] > 0.9
    assert report["sites"][2]["teacher_accuracy"] > 0.9
    assert report["baselines"]["best_site"]["site"] != "site-3"
