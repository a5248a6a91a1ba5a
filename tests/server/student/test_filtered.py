"""Filtered amalgamation from end to end: what it keeps, tells and asks, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.common.nets import scores as scores_of
from consilience.common.settings import Fit
from consilience.common.settings.filtered import Filtered
from consilience.server.student.filtered import FilteredLesson, Rows, held_out
from consilience.server.student.filtered_student import Branch, parameters
from consilience.server.student.filtered_tasks import Matter, Task, Teacher
from consilience.server.student.remote_tail import RemoteTail
from helpers.feature_answers import PLAIN, images
from helpers.filtered import everything, teaching

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")

CPU = torch.device("cpu")
PIXELS = images(40)
FIT = Fit(epochs=2, batch_size=8, learning_rate=0.02, augment=False, precision="f32")
QUICK = Filtered(epochs=2, held_out=0.2)


def matter(*, remote: bool = False) -> Matter:
    far = teaching("far", PIXELS, remote=remote)
    near = teaching("near", PIXELS, seed=2, classes=4)
    return Matter([far, near], [Task("a", 0, (0, 2), (0, 1)), Task("b", 1, (3, 0), (2, 1))], 3, np.arange(40))


def lesson(settings: Filtered = QUICK, **options: Any) -> FilteredLesson:
    about: dict[str, Any] = {"answers": "answers", "seed": 4, "fit": FIT, "matter": matter(), **options}
    return FilteredLesson(
        about.pop("matter"), about.pop("architecture", "cnn3@0.3"), settings, about.pop("fit"), PLAIN, **about
    )


def mean(given: Tensor, ids: Tensor) -> Tensor:
    return given.square().mean()


def test_what_the_report_tells(tmp_path: Path) -> None:
    student, records, told = lesson(matter=matter(remote=True)).teach(PIXELS, tmp_path, CPU)
    assert len(records) == 2
    assert told["held_out"] == 8
    assert {name: len(each) for name, each in told["blocks"].items()} == {"block1": 2, "block2": 2, "block3": 2}
    first, second = told["branches"]
    assert (first["task"], first["site"], first["begins"], first["classes"]) == ("a", "far", "fresh", [0, 1])
    assert (second["task"], second["site"], second["begins"], second["classes"]) == ("b", "near", "teacher", [2, 1])
    for branch, about in zip(told["branches"], student.about.branches, strict=True):
        assert branch["block"] == about.block
        assert min(branch["agreement"], key=branch["agreement"].get) == str(branch["block"])
        assert all(each > 0 for each in branch["agreement"].values())
    parts = parameters(student.about)
    assert told["parameters"]["total"] == parts.total == sum(each.numel() for each in student.parameters())
    # one output for the class of the first teacher that nobody wants, two of the second's
    widths = [each.blocks.head.in_features + 1 for each in student.branches if isinstance(each, Branch)]
    assert told["parameters"]["learning"] - parts.total == widths[0] + 2 * widths[1]
    assert [branch["parameters"] for branch in told["branches"]] == list(parts.branches)
    spent = told["asked"]["far"]
    assert set(told["asked"]) == {"far"}
    # 3 blocks of 2 epochs of 4 batches of 8, twice, and 8 held out at each block
    assert spent["samples"] == 3 * (2 * 2 * 4 * 8 + 8)
    assert scores_of(student, PIXELS, PLAIN, device=CPU).shape == (40, 3)
    assert not student.training


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        (QUICK, "teacher"),
        (QUICK.model_copy(update={"branches": "random"}), "random"),
        (QUICK.model_copy(update={"filters": "task", "order": "sampled"}), "teacher"),
    ],
)
def test_ways_of_doing_it(tmp_path: Path, settings: Filtered, begins: str) -> None:
    student, _, told = lesson(settings).teach(PIXELS, tmp_path, CPU)
    assert {branch["begins"] for branch in told["branches"]} == {begins}
    assert [branch.filters for branch in student.about.branches] == [2 if settings.filters == "task" else 1] * 2
    assert len(told["blocks"]) == (1 if settings.order == "sampled" else 3)
    assert told["asked"] == {}


def test_without_the_last_step_branches_are_as_they_began(tmp_path: Path) -> None:
    student, records, _ = lesson(QUICK.model_copy(update={"joint": False})).teach(PIXELS, tmp_path, CPU)
    assert records == []
    lent = matter().teachers[1].tail.lent
    assert lent is not None
    branch = student.branches[1]
    assert isinstance(branch, Branch)
    assert torch.equal(branch.blocks.head.weight, lent[0].head.weight[[3, 0]])


def test_all_samples_are_learnt_from_together_and_those_held_out_not_before(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def watched(given: Tensor, ids: Tensor) -> Tensor:
        seen.append(ids)
        return mean(given, ids)

    made = lesson(QUICK.model_copy(update={"target": "unified"}), scores=watched)
    held = matter().teachers[0]
    answers = np.array(held.answers)
    answers[made.held] = np.nan  # nothing is looked at before, or the loss would not be finite
    teachers = [Teacher(held.tail, answers), matter().teachers[1]]
    poisoned = Matter(teachers, matter().tasks, 3, np.arange(40))
    with pytest.raises(StudentError, match="nothing to choose its branch by"):
        lesson(QUICK, matter=poisoned).teach(PIXELS, tmp_path / "poisoned", CPU)
    made.teach(PIXELS, tmp_path, CPU)
    assert set(torch.cat(seen).tolist()) == set(range(40))


def test_a_second_call_returns_what_the_first_did(tmp_path: Path) -> None:
    first = lesson(matter=matter(remote=True)).teach(PIXELS, tmp_path, CPU)
    seen: list[Any] = []
    again = matter(remote=True)
    second = lesson(matter=again).teach(PIXELS, tmp_path, CPU, on_epoch=seen.append)
    assert seen == []
    assert isinstance(again.teachers[0].tail, RemoteTail)
    assert again.teachers[0].tail.spent.rounds == 0
    assert second[1:] == first[1:]
    assert second[0].about == first[0].about
    assert all(torch.equal(held, second[0].state_dict()[name]) for name, held in first[0].state_dict().items())
    other = lesson(matter=again, seed=5).teach(PIXELS, tmp_path, CPU)
    assert not torch.equal(scores_tensor(other[0]), scores_tensor(first[0]))


def scores_tensor(student: torch.nn.Module) -> Tensor:
    return torch.from_numpy(scores_of(student, PIXELS, PLAIN, device=CPU))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 6, 7])
def test_an_interrupted_lesson_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    expected, _, told = lesson().teach(PIXELS, tmp_path / "whole", CPU)
    seen = []

    def stop(record: Any) -> None:
        seen.append(record)
        if len(seen) == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        lesson().teach(PIXELS, tmp_path / "parts", CPU, on_epoch=stop)
    again: list[Any] = []
    student, records, retold = lesson().teach(PIXELS, tmp_path / "parts", CPU, on_epoch=again.append)
    assert len(again) == 8 - after
    assert len(records) == 2
    assert retold == told
    assert all(torch.equal(held, student.state_dict()[name]) for name, held in expected.state_dict().items())


def test_what_was_measured_once_is_not_asked_again(tmp_path: Path) -> None:
    seen = []

    def stop(record: Any) -> None:
        seen.append(record)
        if len(seen) == 7:  # all blocks are done, and the branches chosen
            raise Interrupted

    with pytest.raises(Interrupted):
        lesson(matter=matter(remote=True)).teach(PIXELS, tmp_path, CPU, on_epoch=stop)
    again = matter(remote=True)
    _, _, told = lesson(matter=again).teach(PIXELS, tmp_path, CPU)
    assert told["asked"]["far"] == {"rounds": 0, "samples": 0, "sent": 0, "received": 0}


def test_lessons_are_told_apart() -> None:
    found = [
        lesson().fingerprint,
        lesson(seed=5).fingerprint,
        lesson(answers="others").fingerprint,
        lesson(architecture="cnn3@0.4").fingerprint,
        lesson(QUICK.model_copy(update={"epochs": 3})).fingerprint,
        lesson(fit=FIT.model_copy(update={"epochs": 3})).fingerprint,
        lesson(matter=matter(remote=True)).fingerprint,
        lesson(matter=matter().with_samples(np.arange(39))).fingerprint,
        lesson(matter=everything(matter().teachers)).fingerprint,
    ]
    assert len(set(found)) == len(found)
    assert lesson().fingerprint == found[0]


def test_unified_labels_need_a_loss() -> None:
    with pytest.raises(StudentError, match="no loss for unified labels"):
        lesson(QUICK.model_copy(update={"target": "unified"}))


@given(st.integers(4, 300), st.floats(0.01, 0.5), st.integers(0, 5))
def test_held_out_samples_are_some_of_all(samples: int, share: float, seed: int) -> None:
    kept, held = held_out(samples, share, seed)
    assert sorted([*kept, *held]) == list(range(samples))
    assert len(held) == max(1, round(share * samples))
    assert list(kept) == sorted(kept)
    again = held_out(samples, share, seed)
    assert np.array_equal(again[1], held)
    if samples > 50 and len(held) > 5:
        assert not np.array_equal(held_out(samples, share, seed + 1)[1], held)


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_too_few_samples(samples: int) -> None:
    with pytest.raises(StudentError, match=f"There are {samples} samples to learn from"):
        held_out(samples, 0.1, 0)


def test_rows_are_those_of_the_images() -> None:
    places = np.array([7, 3, 30])
    rows = Rows(PIXELS, places)
    assert rows.shape == (3, 16, 16, 1)
    assert np.array_equal(rows[np.array([2, 0])], PIXELS[[30, 7]])
    assert np.array_equal(rows[1:], PIXELS[[3, 30]])
