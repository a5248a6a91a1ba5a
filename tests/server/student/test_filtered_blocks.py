"""Block-wise training: what moves and what does not, the loss of a block, and agreement on samples held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from consilience.common.errors import ProtocolError, StudentError
from consilience.common.nets import build
from consilience.common.nets.blocks import Blocks
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Fit
from consilience.server.student.filtered_blocks import (
    BlockLoss,
    FilteredTrunk,
    Filters,
    Stage,
    Stream,
    agreement,
    losses,
    train_blocks,
)
from consilience.server.student.filtered_tasks import Matter, Task, Teacher
from consilience.server.student.remote_tail import RemoteTail
from helpers.feature_answers import PLAIN, images, log_probs, teacher
from helpers.filtered import StandIn, everything, local, teaching

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")

CPU = torch.device("cpu")
PIXELS = images(48)
FIT = Fit(epochs=3, batch_size=16, learning_rate=0.05, augment=False, precision="f32")
INPUTS = torch.from_numpy(preprocess(PIXELS, PLAIN))


def trunk_of(matter: Matter, name: str = "cnn3@0.3", level: Any = "teacher", seed: int = 5) -> FilteredTrunk:
    return FilteredTrunk(build(name, classes=1, channels=1, seed=seed), name, matter, level, seed)


def two(**options: Any) -> Matter:
    return everything([teaching("east", PIXELS, **options), teaching("west", PIXELS, seed=2, **options)])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: held.clone() for name, held in module.state_dict().items()}


def differing(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, held in module.state_dict().items() if not torch.equal(held, before[name])}


def trained(matter: Matter, folder: Path | None = None, **options: Any) -> tuple[FilteredTrunk, dict[str, Any]]:
    trunk = trunk_of(matter, level=options.pop("level", "teacher"))
    fit = options.pop("fit", FIT)
    records = train_blocks(
        trunk, matter, PIXELS, fit, PLAIN, seed=3, fingerprint="f", folder=folder, device=CPU, **options
    )
    return trunk, records


def test_filters_have_the_tails_channels() -> None:
    matter = everything([teaching("east", PIXELS), teaching("west", PIXELS, architecture="cnn3@0.4", first=2)])
    trunk = trunk_of(matter)
    assert trunk.stages == (1, 2, 3)
    widths = {"east": (6, 13, 26), "west": (13, 26, 51)}
    found = Stage(trunk, trunk.stages)(INPUTS[:2])[1]
    assert [each.shape[1] for each in found[0]] == [widths["east"][0]]
    for block in (2, 3):
        assert [each.shape[1] for each in found[block - 1]] == [widths["east"][block - 1], widths["west"][block - 1]]
        assert [stream.teacher for stream in trunk.at(block).streams] == [0, 1]


def test_filters_of_tasks_come_after_the_teachers() -> None:
    east = teaching("east", PIXELS, multi=True, classes=4)
    tasks = [Task("a", 0, (0, 1), (0, 1)), Task("b", 0, (3,), (2,))]
    matter = Matter([east], tasks, 3, np.arange(48))
    whole, parted = (trunk_of(matter, level=level).at(2) for level in ("teacher", "task"))
    assert whole.streams == (Stream(0, (0, 1)),)
    assert parted.streams == (Stream(0, (0,)), Stream(0, (1,)))
    features = torch.randn(2, 19, 4, 4)
    assert len(whole.chain(0, 1)) == 1
    for at, found in enumerate(parted(features)):
        chain = parted.chain(0, at)
        assert len(chain) == 2
        assert chain[0] is parted.teachers["0"]
        assert torch.equal(found, chain[1](chain[0](features)))


def test_a_teacher_of_whom_nothing_is_wanted_has_no_filter() -> None:
    other = teaching("north", PIXELS, architecture="resnet8@0.3")  # of another layout, which does not matter
    teachers = [teaching("east", PIXELS), teaching("west", PIXELS, seed=2, first=2), other]
    matter = Matter(teachers, [Task("t", 1, (0, 1), (0, 1))], 2, np.arange(48))
    trunk = trunk_of(matter)
    assert trunk.stages == (2, 3)
    assert set(trunk.at(2).teachers) == {"1"}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("multi", [False, True])
def test_the_loss_is_that_of_a_direct_computation(remote: bool, multi: bool) -> None:
    matter = two(multi=multi, remote=remote)
    trunk = trunk_of(matter).eval()
    ids = torch.tensor([5, 40, 2, 17])
    for block in trunk.stages:
        stage = Stage(trunk, [block])
        loss = BlockLoss(stage, matter, "f", 0)
        told = loss(stage(INPUTS[ids]), ids)
        shared = Blocks(build("cnn3@0.3", classes=1, channels=1, seed=5)).eval().run(INPUTS[ids], 0, block)
        expected, terms = 0.0, {}
        for at, seed in enumerate((1, 2)):
            network = teacher("cnn3@0.2", seed)
            outputs = Blocks(network).run(trunk.at(block).teachers[str(at)](shared), block, 4)
            answers = torch.from_numpy(matter.teachers[at].answers[ids.numpy()])
            if multi:
                summed = nn.functional.binary_cross_entropy_with_logits(outputs, answers.sigmoid(), reduction="sum")
                each = summed / len(ids)
            else:
                each = nn.functional.kl_div(outputs.log_softmax(1), answers, reduction="batchmean", log_target=True)
            terms[("east", "west")[at]] = float(each.detach())
            expected += float(each.detach())
        assert float(told.total.detach()) == pytest.approx(expected, rel=1e-4)
        assert {name: float(held) for name, held in told.terms.items()} == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize("level", ["teacher", "task"])
def test_both_kinds_of_tails_teach_the_same(level: str) -> None:
    found = []
    for remote in (False, True):
        trunk = trunk_of(two(remote=remote), level=level)
        stage = Stage(trunk, [2])
        ids = torch.arange(16)
        torch.autograd.backward(BlockLoss(stage, two(remote=remote), "f", 0)(stage(INPUTS[ids]), ids).total)
        found.append({name: held.grad for name, held in stage.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, held in found[0].items():
        other = found[1][name]
        assert held is not None
        assert other is not None
        assert torch.allclose(held, other, atol=1e-4 * float(held.abs().max()))
    assert max(float(held.abs().max()) for held in found[0].values() if held is not None) > 1e-3


def test_the_loss_of_every_block_falls() -> None:
    trunk, records = trained(two(), fit=FIT.model_copy(update={"epochs": 12}))
    assert list(records) == ["block1", "block2", "block3"]
    for each in records.values():
        assert len(each) == 12
        assert each[-1].loss < 0.6 * each[0].loss
        assert set(each[0].terms) == {"east", "west"}
    assert not any(module.training for module in trunk.modules())


def test_a_block_leaves_those_before_it_alone() -> None:
    matter = two()
    trunk = trunk_of(matter)
    before = state(trunk)
    moved = []

    def on_epoch(_: Any) -> None:
        moved.append({name for name, held in trunk.state_dict().items() if not torch.equal(held, before[name])})
        before.update(state(trunk))

    train_blocks(trunk, matter, PIXELS, FIT, PLAIN, seed=3, fingerprint="f", device=CPU, on_epoch=on_epoch)
    for epoch, names in enumerate(moved):
        block = epoch // FIT.epochs
        assert {name.split(".")[1] for name in names} == {str(block)}
        assert any(name.startswith("units.") and "running_mean" in name for name in names)
        assert any(name.startswith(f"filters.{block}.teachers.1.") for name in names)
    assert all(parameter.requires_grad for parameter in trunk.parameters())


def test_teachers_are_never_trained() -> None:
    matter = two()
    before = [each.tail.lent[0].state_dict() for each in matter.teachers if each.tail.lent]
    before = [{name: held.clone() for name, held in each.items()} for each in before]
    trained(matter)
    for each, held in zip(matter.teachers, before, strict=True):
        assert each.tail.lent is not None
        assert all(torch.equal(value, held[name]) for name, value in each.tail.lent[0].state_dict().items())


def test_blocks_before_the_first_tail_are_trained_with_it() -> None:
    matter = two(first=2)
    trunk, records = trained(matter)
    assert list(records) == ["block2", "block3"]
    fresh = trunk_of(matter)
    assert differing(state(fresh.units), trunk.units) == {"0", "1", "2"}


def test_sampled_blocks_are_trained_together() -> None:
    matter = two()
    fit = FIT.model_copy(update={"epochs": 10})
    trunk, records = trained(matter, sampled=True, fit=fit)
    assert list(records) == ["sampled"]
    losses = [record.loss for record in records["sampled"]]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    fresh = trunk_of(matter)
    assert differing(state(fresh.units), trunk.units) == {"0", "1", "2"}
    assert differing(state(fresh.filters), trunk.filters) == {"0", "1", "2"}


def test_a_batch_draws_its_block_by_its_samples_and_the_seed() -> None:
    matter = two()
    trunk = trunk_of(matter).eval()
    stage = Stage(trunk, trunk.stages)
    alone = {block: BlockLoss(Stage(trunk, [block]), matter, "f", 0) for block in trunk.stages}
    seen: dict[int, set[int]] = {1: set(), 2: set()}
    with torch.no_grad():
        for at in range(30):
            ids = torch.randperm(48, generator=torch.Generator().manual_seed(at))[:4]
            given = stage(INPUTS[ids])
            each = {b: float(alone[b](Stage(trunk, [b])(INPUTS[ids]), ids).total) for b in trunk.stages}
            for seed, found in seen.items():
                totals = [float(BlockLoss(stage, matter, "f", seed)(given, ids).total) for _ in range(2)]
                assert totals[0] == totals[1]
                found.add(min(each, key=lambda b: abs(each[b] - totals[0])) * 100 + at)
    assert {block // 100 for block in seen[1]} == {1, 2, 3}
    assert seen[1] != seen[2]


def test_answers_that_are_missing_have_no_part() -> None:
    whole = two(remote=True)
    answered = np.arange(48) < 20
    west = Teacher(whole.teachers[1].tail, whole.teachers[1].answers, answered=answered)
    matter = Matter([whole.teachers[0], west], whole.tasks, whole.classes, whole.samples)
    trunk = trunk_of(matter).eval()
    stage = Stage(trunk, [2])
    ids, some = torch.tensor([30, 3, 47, 9]), torch.tensor([3, 9])
    told = BlockLoss(stage, matter, "f", 0)(stage(INPUTS[ids]), ids)
    expected = BlockLoss(stage, whole, "f", 0)(stage(INPUTS[some]), some)
    assert float(told.terms["west"]) == pytest.approx(float(expected.terms["west"]), rel=1e-4)
    assert isinstance(west.tail, RemoteTail)
    assert west.tail.spent.samples == 4
    none = torch.tensor([30, 47])
    told = BlockLoss(stage, Matter([west, west], whole.tasks, 6, whole.samples), "f", 0)(stage(INPUTS[none]), none)
    torch.autograd.backward(told.total)
    assert float(told.total.detach()) == 0
    assert west.tail.spent.samples == 4


def test_agreement_is_the_mean_over_samples_held_out() -> None:
    matter = everything([teaching("east", PIXELS), teaching("west", PIXELS, seed=2, first=2, multi=True)])
    trunk = trunk_of(matter)
    samples = np.arange(48)[::-1][:21].copy()
    some = matter.with_samples(samples)
    found = [agreement(trunk, some, PIXELS[samples], PLAIN, CPU, batch) for batch in (5, 64)]
    assert np.allclose(found[0], found[1], atol=1e-5, equal_nan=True)
    assert found[0].shape == (3, 2)
    assert np.isnan(found[0]).tolist() == [[False, True], [False, False], [False, False]]
    stage = Stage(trunk, [2])
    with torch.no_grad():
        features = stage(INPUTS[samples.copy()])[1][0]
        expected = {
            task: float(each.mean()) for _, task, each in losses(some, 2, trunk.at(2).streams, features, np.arange(21))
        }
    assert found[0][1].tolist() == pytest.approx([expected[0], expected[1]], rel=1e-4)


def test_agreement_of_nobody() -> None:
    east = teaching("east", PIXELS)
    silent = Teacher(east.tail, east.answers, answered=np.zeros(48, bool))
    found = agreement(trunk_of(everything([silent])), everything([silent]), PIXELS, PLAIN, CPU, 16)
    assert np.isnan(found).all()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("after", [1, 4, 8])
def test_an_interrupted_training_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool, after: int
) -> None:
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    expected, curve = trained(two(), sampled=sampled)
    seen = []

    def stop(record: Any) -> None:
        seen.append(record)
        if len(seen) == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        trained(two(), tmp_path, sampled=sampled, on_epoch=stop)
    again: list[Any] = []
    found, records = trained(two(), tmp_path, sampled=sampled, on_epoch=again.append)
    assert len(again) == 9 - after
    assert {name: [r.loss for r in each] for name, each in records.items()} == {
        name: [r.loss for r in each] for name, each in curve.items()
    }
    assert all(torch.equal(held, expected.state_dict()[name]) for name, held in found.state_dict().items())


def test_what_a_remote_tail_is_asked(tmp_path: Path) -> None:
    matter = everything([teaching("east", PIXELS, remote=True)])
    trained(matter, tmp_path)
    tail = matter.teachers[0].tail
    assert isinstance(tail, RemoteTail)
    # three blocks, three epochs, three batches, twice
    assert (tail.spent.rounds, tail.spent.samples) == (54, 54 * 16)
    trained(matter, tmp_path)
    assert tail.spent.rounds == 54  # done before


def test_a_site_is_asked_once_for_all_of_its_tasks() -> None:
    east = teaching("east", PIXELS, multi=True, remote=True, classes=4)
    tasks = [Task("a", 0, (0, 1), (0, 1)), Task("b", 0, (3,), (2,)), Task("c", 0, (2,), (3,))]
    matter = Matter([east], tasks, 4, np.arange(48))
    stage = Stage(trunk_of(matter, level="task"), [2])
    ids = torch.arange(16)
    torch.autograd.backward(BlockLoss(stage, matter, "f", 0)(stage(INPUTS[ids]), ids).total)
    assert isinstance(east.tail, RemoteTail)
    assert (east.tail.spent.rounds, east.tail.spent.samples) == (2, 6 * 16)
    assert all(parameter.grad is not None for parameter in stage.filters.parameters())


def test_a_tail_that_answers_another_shape_ends_the_training() -> None:
    network = teacher("cnn3@0.2", 1)
    site = StandIn(network)
    tail = RemoteTail("east", "", site.blocks.taps, 1, lambda b, f: site.ask(b, f)[:, :2], site.ask_vjp)
    with pytest.raises(ProtocolError, match=r"site east answered outputs \(16, 2\) float32; expected \(16, 3\)"):
        trained(everything([Teacher(tail, log_probs(network, PIXELS))]))


def test_networks_and_layouts_that_do_not_do() -> None:
    matter = two()
    with pytest.raises(StudentError, match="cannot be cut into blocks"):
        FilteredTrunk(nn.Linear(256, 2), "mine", matter, "teacher", 0)
    with pytest.raises(StudentError, match=r"the student \(vgg6@0.2\) and site east differ in layout at layer2"):
        trunk_of(matter, "vgg6@0.2")
    other = everything(
        [
            Teacher(
                local("north", "resnet8@0.3", teacher("resnet8@0.3", 1)), log_probs(teacher("resnet8@0.3", 1), PIXELS)
            )
        ]
    )
    with pytest.raises(StudentError, match="site north differ in layout"):
        trunk_of(other)


def test_filters_are_built_by_the_seed_alone() -> None:
    one, again, other = (state(trunk_of(two(), seed=seed).filters) for seed in (5, 5, 6))
    assert all(torch.equal(held, again[name]) for name, held in one.items())
    assert not all(torch.equal(held, other[name]) for name, held in one.items())
    assert isinstance(trunk_of(two()).at(1), Filters)
