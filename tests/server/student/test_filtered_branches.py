"""Where branches leave the trunk, what they begin with, and what the finished student is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.common.files import canonical_json, read_json, write_json
from consilience.common.nets import build, load_model, save_model
from consilience.common.nets.blocks import Blocks
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Fit
from consilience.server.student.filtered_blocks import FilteredTrunk, agreement
from consilience.server.student.filtered_branches import (
    Branching,
    BranchLoss,
    ScoresLoss,
    assemble,
    choose,
    train_together,
)
from consilience.server.student.filtered_filter import Filter
from consilience.server.student.filtered_student import (
    Branch,
    BranchAbout,
    FilteredStudent,
    StudentAbout,
    finished,
    parameters,
    read_about,
    rebuild,
    trimmed,
)
from consilience.server.student.filtered_tasks import Matter, Task, Teacher, pooled
from helpers.feature_answers import PLAIN, images, log_probs, teacher
from helpers.filtered import everything, local, logits, teaching

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")

CPU = torch.device("cpu")
KINDS: tuple[Literal["teacher", "random"], ...] = ("teacher", "random")
NAME = "cnn3@0.2"
WIDTHS = (6, 13, 26)
PIXELS = images(48)
INPUTS = torch.from_numpy(preprocess(PIXELS, PLAIN))
FIT = Fit(epochs=8, batch_size=16, learning_rate=0.02, augment=False, precision="f32")


def trunk_of(
    matter: Matter, network: nn.Module | None = None, name: str = NAME, level: Any = "teacher"
) -> FilteredTrunk:
    return FilteredTrunk(network or build(name, classes=1, channels=1, seed=5), name, matter, level, 5).eval()


@torch.no_grad()
def opened(trunk: FilteredTrunk) -> FilteredTrunk:
    """Let every filter let all through as it is."""
    for module in trunk.modules():
        if isinstance(module, Filter):
            module.excite.weight.zero_()
            module.excite.bias.fill_(40.0)
    return trunk


@torch.no_grad()
def spoilt(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


def constructed() -> tuple[FilteredTrunk, Matter]:
    """Two teachers that have block 1 in common; the trunk is the first one's up to block 2, and block 3 is nobody's."""
    first, second = teacher(NAME, 1), teacher(NAME, 2)
    Blocks(second).units[0].load_state_dict(Blocks(first).units[0].state_dict())
    sites = [
        Teacher(local(name, NAME, network), log_probs(network, PIXELS))
        for name, network in (("first", first), ("second", second))
    ]
    matter = everything(sites)
    trunk = opened(trunk_of(matter, teacher(NAME, 1, 3)))
    spoilt(trunk.units[2])
    with torch.no_grad():
        first_filter = trunk.at(1).teachers["0"]
        assert isinstance(first_filter, Filter)
        first_filter.excite.bias.copy_(torch.linspace(-3, 3, WIDTHS[0]))
    return trunk, matter


def test_a_branch_leaves_where_it_agrees_best_by_construction() -> None:
    trunk, matter = constructed()
    found = agreement(trunk, matter, PIXELS, PLAIN, CPU, 16)
    assert found[1, 0] < 1e-7
    assert found[0, 1] < 1e-7
    assert min(found[0, 0], found[2, 0], found[1, 1], found[2, 1]) > 1e-3
    assert choose(found, trunk.stages, matter) == (2, 1)


def test_the_deepest_of_blocks_alike_and_none_without_a_tail() -> None:
    matter = everything([teaching("a", PIXELS), teaching("b", PIXELS, seed=2)])
    told = np.array([[0.3, np.nan], [0.2, np.nan], [0.2, 0.9]])
    assert choose(told, (1, 2, 3), matter) == (3, 3)
    assert choose(told, (2, 3, 4), matter) == (4, 4)
    told[:, 1] = np.nan
    with pytest.raises(StudentError, match="No sample held out was answered by site b, so that task 'all of b'"):
        choose(told, (1, 2, 3), matter)


@torch.no_grad()
def test_a_branch_begins_as_what_the_tail_made_of_the_trunk() -> None:
    trunk, matter = constructed()
    student = assemble(trunk, matter, (2, 1), 1, seed=0)
    scores, outputs = student.branched(INPUTS)
    for at, name in enumerate((1, 2)):
        # the trunk is these teachers', so the student is them
        expected = torch.from_numpy(matter.teachers[at].answers)
        assert torch.allclose(outputs[at].log_softmax(dim=1), expected, atol=1e-4), name
    assert torch.equal(scores, torch.cat(outputs, dim=1))
    assert torch.equal(student(INPUTS), scores)
    assert not student.training


@pytest.mark.parametrize("level", ["teacher", "task"])
@torch.no_grad()
def test_rows_of_the_head_are_copied_the_wanted_first(level: str) -> None:
    one = teaching("one", PIXELS, classes=5)
    many = teaching("many", PIXELS, classes=5, multi=True, seed=2, first=2)
    tasks = [Task("a", 0, (3, 1), (0, 1)), Task("b", 1, (2,), (2,)), Task("c", 1, (4, 0), (3, 1))]
    matter = Matter([one, many], tasks, 4, np.arange(48))
    trunk = trunk_of(matter, level=level)
    student = assemble(trunk, matter, (1, 3, 2), 1, seed=0)
    shared = Blocks(build(NAME, classes=1, channels=1, seed=5)).eval()
    scores, outputs = student.branched(INPUTS)
    assert [each.shape[1] for each in outputs] == [5, 1, 2]
    for at, (task, block) in enumerate(zip(tasks, (1, 3, 2), strict=True)):
        features = shared.run(INPUTS, 0, block)
        for each in trunk.at(block).chain(task.teacher, at):
            features = each(features)
        tail = matter.teachers[task.teacher].tail.lent
        assert tail is not None
        whole = tail[0].run(features, block, 4)
        assert torch.allclose(outputs[at][:, : len(task.outputs)], whole[:, list(task.outputs)], atol=1e-4)
        if at == 0:
            assert torch.allclose(outputs[0][:, 2:], whole[:, [0, 2, 4]], atol=1e-4)
    # class 1 is known to two branches
    assert torch.allclose(scores[:, 1], (outputs[0][:, 1] + outputs[2][:, 1]) / 2, atol=1e-6)
    assert torch.allclose(scores[:, [0, 2, 3]], torch.stack([outputs[0][:, 0], outputs[1][:, 0], outputs[2][:, 0]], 1))


@torch.no_grad()
def test_random_branches_keep_filters_and_widths() -> None:
    trunk, matter = constructed()
    copied = assemble(trunk, matter, (2, 1), 1, seed=0)
    random, other = (assemble(trunk, matter, (2, 1), 1, branches="random", seed=seed) for seed in (0, 1))
    assert copied.about == random.about
    for name, held in copied.state_dict().items():
        if "filters" in name or name.startswith("units"):
            assert torch.equal(held, random.state_dict()[name])
    assert not torch.allclose(random(INPUTS), copied(INPUTS), atol=0.1)
    assert not torch.allclose(random(INPUTS), other(INPUTS), atol=0.1)


def test_a_branch_of_a_tail_at_its_site_is_the_students_own() -> None:
    far = teaching("far", PIXELS, architecture="cnn3@0.4", remote=True)
    near = teaching("near", PIXELS, seed=2, architecture="cnn3@0.5")
    matter = everything([far, near])
    trunk = trunk_of(matter, level="task")
    for student in (assemble(trunk, matter, (1, 2), 1, branches=kind, seed=0) for kind in KINDS):
        about = student.about.branches
        assert [(each.architecture, each.filters) for each in about] == [(NAME, 1), ("cnn3@0.5", 2)]
        assert student(INPUTS).shape == (48, 6)


def test_blocks_beyond_the_deepest_branch_and_unwanted_classes_cost_nothing() -> None:
    matter = everything([teaching("a", PIXELS), teaching("b", PIXELS, seed=2)])
    trunk = trunk_of(matter)
    convolution = [9 * inputs * outputs + 2 * outputs for inputs, outputs in zip((1, *WIDTHS), WIDTHS, strict=False)]
    squeeze = [2 * width * max(4, width // 4) + width + max(4, width // 4) for width in WIDTHS]
    head = WIDTHS[2] * 3 + 3
    for blocks in ((1, 1), (1, 2), (3, 3)):
        student = finished(assemble(trunk, matter, blocks, 1, seed=0))
        parts = parameters(student.about)
        assert parts.trunk == sum(convolution[: max(blocks)])
        assert parts.filters == sum(squeeze[block - 1] for block in blocks)
        assert parts.branches == tuple(sum(convolution[block:]) + head for block in blocks)
        assert parts.total == sum(parameter.numel() for parameter in student.parameters())
    fewer = Matter(matter.teachers, [Task("t", 0, (0, 2), (0, 1))], 2, matter.samples)
    learning = [assemble(trunk, some, blocks, 1, seed=0) for some, blocks in ((fewer, (2,)), (matter, (2, 2)))]
    small, full = (parameters(trimmed(each.about)) for each in learning)
    rest = sum(convolution[2:]) + WIDTHS[2] * 2 + 2  # two are wanted
    assert small.branches == (rest,)
    assert parameters(learning[0].about).branches == (rest + WIDTHS[2] + 1,)
    assert small.total == full.total - squeeze[1] - sum(convolution[2:]) - head - WIDTHS[2] - 1


@torch.no_grad()
def test_a_finished_student_has_the_same_scores_and_nothing_else() -> None:
    one = teaching("one", PIXELS, classes=5)
    many = teaching("many", PIXELS, classes=5, multi=True, seed=2)
    matter = Matter([one, many], [Task("a", 0, (3, 1), (0, 1)), Task("b", 1, (2, 4), (2, 1))], 3, np.arange(48))
    student = assemble(trunk_of(matter), matter, (1, 2), 1, seed=0)
    student.train()(INPUTS)  # batch normalisation sees something
    made = finished(student)
    assert torch.allclose(made(INPUTS), student.eval()(INPUTS), atol=1e-6)
    assert [each.shape[1] for each in made.branched(INPUTS)[1]] == [2, 2]
    assert made.about == trimmed(student.about) != student.about
    assert not made.training


def test_a_student_is_kept_and_built_again_by_its_words(tmp_path: Path) -> None:
    far = teaching("far", PIXELS, remote=True)
    near = teaching("near", PIXELS, seed=2, architecture="cnn3@0.5", classes=4)
    tasks = [Task("a", 0, (0, 1, 2), (0, 3, 1)), Task("b", 1, (3, 0), (2, 1))]
    matter = Matter([far, near], tasks, 4, np.arange(48))
    student = finished(assemble(trunk_of(matter, level="task"), matter, (3, 1), 1, seed=0))
    with torch.no_grad():
        student.train()(INPUTS)  # batch normalisation sees something
    save_model(tmp_path / "model.safetensors", student.eval())
    write_json(tmp_path / "filtered.json", student.about.model_dump(mode="json"))
    again = rebuild(read_about(read_json(tmp_path / "filtered.json")))
    load_model(tmp_path / "model.safetensors", again)
    with torch.no_grad():
        assert torch.equal(again.eval()(INPUTS), student(INPUTS))
    assert (tmp_path / "filtered.json").stat().st_size < 1000
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(held.numel() for name, held in names.items() if not name.endswith(("_mean", "_var", "_tracked"))) == (
        parameters(student.about).total
    )


BRANCH = {"task": "a", "block": 2, "architecture": NAME, "classes": [0, 1], "filters": 1}
ABOUT = {"form": 1, "architecture": NAME, "channels": 1, "classes": 2, "branches": [BRANCH]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": 2}, "form: Input should be less than or equal to 1"),
        ({"more": 1}, "more: Extra inputs"),
        ({"channels": 0}, "channels"),
        ({"channels": 10**9}, "channels"),
        ({"classes": 3}, "1 classes have no branch"),
        ({"classes": 0}, "classes"),
        ({"branches": []}, "branches"),
        ({"branches": [BRANCH] * 1001}, "branches"),
        ({"branches": [BRANCH | {"classes": [0, 2]}]}, "others than 0 to 1"),
        ({"branches": [BRANCH | {"classes": [0, 1, 1]}]}, "names classes twice"),
        ({"branches": [BRANCH | {"classes": [0, -1]}]}, "others than 0 to 1"),
        ({"branches": [BRANCH | {"filters": 3}]}, "branches.0.filters"),
        ({"branches": [BRANCH | {"block": 0}]}, "branches.0.block"),
        ({"branches": [BRANCH | {"block": 4}]}, "leaves from block 4; cnn3@0.2 has 3 and cnn3@0.2 3"),
        ({"branches": [BRANCH | {"filters": 0, "architecture": "cnn3"}]}, "has no filter that would bring"),
        ({"branches": [BRANCH | {"architecture": "python:os:system"}]}, "none of ours"),
        ({"architecture": "torchvision:resnet18"}, "none of ours"),
        (
            {"architecture": "vgg6@16", "branches": [BRANCH | {"architecture": "vgg6@16"}] * 40},
            "parameters; allowed are",
        ),
    ],
)
def test_descriptions_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudentError, match=message):
        rebuild(read_about(ABOUT | changes))
    assert rebuild(read_about(ABOUT)).about.classes == 2


@pytest.mark.parametrize("told", [None, [], "x", {}, 3])
def test_no_descriptions_at_all(told: Any) -> None:
    with pytest.raises(StudentError, match="A student's description is not one"):
        read_about(told)


def test_the_loss_of_branches_is_that_of_a_direct_computation() -> None:
    one = teaching("one", PIXELS, classes=5)
    many = teaching("many", PIXELS, classes=4, multi=True, seed=2)
    answered = np.arange(48) % 3 > 0
    many = Teacher(many.tail, many.answers, True, answered)
    tasks = [Task("a", 0, (3, 1), (0, 1)), Task("b", 1, (2, 0), (2, 1))]
    matter = Matter([one, many], tasks, 3, np.arange(48)[::-1].copy())
    ids = torch.tensor([4, 47, 20, 3])
    at = 47 - ids.numpy()
    outputs = (torch.randn(4, 5), torch.randn(4, 2))
    told = BranchLoss(matter, "f")((torch.zeros(4, 3), outputs), ids)
    target = pooled(torch.from_numpy(one.answers[at]), (3, 1))
    first = nn.functional.kl_div(pooled(outputs[0], (0, 1)), target, reduction="batchmean", log_target=True)
    rows = torch.from_numpy(many.answers[at][:, [2, 0]]).sigmoid()
    known = torch.from_numpy(answered[at])
    assert 0 < int(known.sum()) < 4
    second = nn.functional.binary_cross_entropy_with_logits(outputs[1][known], rows[known], reduction="sum")
    second = second / int(known.sum())
    assert float(told.total) == pytest.approx(float(first + second), rel=1e-5)
    assert {name: float(each) for name, each in told.terms.items()} == pytest.approx(
        {"a": float(first), "b": float(second)}
    )


def test_all_together_learn_the_teachers_answers() -> None:
    far = teaching("far", PIXELS, remote=True)
    near = teaching("near", PIXELS, seed=2)
    matter = everything([far, near])
    student = assemble(trunk_of(matter), matter, (2, 1), 1, seed=0)
    before = {name: held.clone() for name, held in student.state_dict().items()}
    records = train_together(student, BranchLoss(matter, "f"), PIXELS, FIT, PLAIN, seed=0, device=CPU)
    assert records[-1].loss < 0.75 * records[0].loss
    assert set(records[0].terms) == {"all of far", "all of near"}
    moved = {name.split(".")[0] for name, held in student.state_dict().items() if not torch.equal(held, before[name])}
    assert moved == {"units", "branches"}
    assert any("filters" in name and not torch.equal(held, before[name]) for name, held in student.state_dict().items())
    assert far.tail.spent.rounds == 0  # type: ignore[attr-defined]


def test_scores_may_learn_another_loss() -> None:
    matter = everything([teaching("a", PIXELS), teaching("b", PIXELS, seed=2)])
    student = assemble(trunk_of(matter), matter, (2, 2), 1, seed=0)
    seen = []

    def scores(given: Tensor, ids: Tensor) -> Tensor:
        seen.append(given.shape)
        return (given - 1).square().mean()

    records = train_together(student, ScoresLoss(scores, "f"), PIXELS, FIT, PLAIN, seed=0, device=CPU)
    assert set(seen) == {(16, 6)}
    assert records[-1].loss < 0.5 * records[0].loss


@torch.no_grad()
def test_branches_without_filters_are_heads_on_the_trunk_s_features() -> None:
    heads = [
        BranchAbout(task=task, block=3, architecture=NAME, classes=classes, others=others, filters=0)
        for task, classes, others in (("a", (0, 3), 4), ("b", (1, 2, 4), 0))
    ]
    about = StudentAbout(architecture=NAME, channels=1, classes=5, branches=tuple(heads))
    student = FilteredStudent(about, 3).eval()
    parts = parameters(about)
    assert parts.filters == 0
    assert parts.branches == (26 * 6 + 6, 26 * 3 + 3)
    network = build(NAME, classes=1, channels=1, seed=3).eval()
    features = Blocks(network).run(INPUTS, 0, 3).relu().mean(dim=(2, 3))
    scores, outputs = student.branched(INPUTS)
    for at, each in enumerate(outputs):
        branch = student.branches[at]
        assert isinstance(branch, Branch)
        assert torch.allclose(each, branch.blocks.head(features), atol=1e-5)
    assert torch.equal(scores[:, [0, 3]], outputs[0][:, :2])
    assert torch.equal(scores[:, [1, 2, 4]], outputs[1])
    assert torch.equal(Branching(student)(INPUTS)[0], scores)


def test_a_student_is_exported(tmp_path: Path) -> None:
    about = StudentAbout(
        architecture=NAME,
        channels=1,
        classes=2,
        branches=(BranchAbout(task="a", block=2, architecture=NAME, classes=(1, 0), others=1, filters=2),),
    )
    student = FilteredStudent(about, 0).eval()
    program = torch.export.export(student, (INPUTS[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        assert torch.allclose(program.module()(INPUTS[:5]), student(INPUTS[:5]), atol=1e-5)
    assert len(canonical_json(about.model_dump(mode="json"))) < 400
    assert logits(student, PIXELS).shape == (48, 2)
