"""Layer-wise parameter learning: each layer by itself, then one network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.common.errors import StudentError
from consilience.common.moments import Moments
from consilience.common.nets import build, load_model, save_model
from consilience.common.nets.taps import features, taps
from consilience.server.student.amalgamate import concatenated, direct
from consilience.server.student.layer_wise import (
    Adapter,
    Blocks,
    Layer,
    Schedule,
    join,
    layers,
    train_layer,
    train_layers,
)

Floats = NDArray[np.float32]
IMAGES = np.random.default_rng(0).normal(size=(24, 1, 16, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(network: nn.Module, images: Floats) -> list[Floats]:
    with torch.no_grad():
        return [held.numpy() for held in features(network, torch.from_numpy(images)).values()]


def teacher(name: str, seed: int) -> nn.Module:
    network = build(name, classes=3, channels=1, seed=seed)
    with torch.no_grad():
        for _ in range(30):
            network(torch.from_numpy(IMAGES))
    return network.eval()


def problems(teachers: list[nn.Module], student: nn.Module) -> list[Blocks]:
    """Amalgamate directly to the student's widths; return each layer's blocks."""
    joined = [concatenated(each) for each in zip(*(numbers(net, IMAGES) for net in teachers), strict=True)]
    inputs, blocks = IMAGES, []
    for tap, held in zip(taps(student), joined, strict=True):
        target = held
        if tap.name != "scores":
            moments = Moments(held.shape[1])
            moments.update(held)
            target = direct(moments, tap.channels).encoder(held)
        target.flags.writeable = False  # as of a memory map
        blocks.append([(inputs[cut : cut + 8], target[cut : cut + 8]) for cut in range(0, len(IMAGES), 8)])
        inputs = target
    return blocks


def randomised(problem: Layer) -> Layer:
    with torch.no_grad():
        for parameter in problem.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return problem


@pytest.mark.parametrize("name", ["cnn3@1.2", "vgg6@0.3", "resnet8@1.5", "resnet20", "mobilenet-small@0.5"])
def test_the_joined_student_does_what_its_layers_do(name: str) -> None:
    student = build(name, classes=6, channels=1, seed=0).eval()
    found = [randomised(problem).eval() for problem in layers(student)]
    expected = torch.from_numpy(IMAGES)
    with torch.no_grad():
        for problem in found:
            expected = problem(expected)
        unfolded = student(torch.from_numpy(IMAGES))
        join(found)
        assert torch.allclose(
            student(torch.from_numpy(IMAGES)), expected, atol=1e-5 * max(1.0, expected.abs().max().item())
        )
    assert not torch.allclose(unfolded, expected, atol=1e-2)


def test_the_adapter_is_the_identity_to_begin_with() -> None:
    maps = torch.randn(2, 5, 3, 4)
    assert torch.equal(Adapter(5)(maps), maps)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Blocks], list[list[float]]]:
    student = build("cnn3@1.2", classes=6, channels=1, seed=0)
    blocks = problems([teacher("cnn3", 1), teacher("cnn3", 2)], student)
    losses = train_layers(student, blocks, [Schedule(12, 0.02)] * 4)
    return student, blocks, losses


def test_every_layer_learns(trained: tuple[nn.Module, list[Blocks], list[list[float]]]) -> None:
    for losses in trained[2]:
        assert len(losses) == 12
        assert losses[-1] < 0.5 * losses[0]


def test_the_student_is_near_the_teachers_scores(trained: tuple[nn.Module, list[Blocks], list[list[float]]]) -> None:
    student, blocks, _ = trained
    assert not any(module.training for module in student.modules())
    given, wanted = IMAGES, np.concatenate([target for _, target in blocks[-1]])
    found = numbers(student, given)[-1]
    fresh = numbers(build("cnn3@1.2", classes=6, channels=1, seed=0).eval(), given)[-1]
    assert np.square(found - wanted).mean() < 0.5 * np.square(fresh - wanted).mean()


@pytest.mark.parametrize("name", ["cnn3@0.3", "resnet8@0.5", "mobilenet-small@0.5"])
def test_few_steps_leave_a_layer_that_does_in_evaluation_what_it_did_in_training(name: str) -> None:
    made = name.partition("@")[0]
    student = build(name, classes=6, channels=1, seed=0)
    blocks = problems([teacher(f"{made}@0.25", 1), teacher(f"{made}@0.25", 2)], student)
    for problem, pairs in zip(layers(student)[:-1], blocks, strict=False):
        train_layer(problem, pairs, Schedule(2, 0.05))
        assert not any(module.training for module in problem.modules())
        given, wanted = (torch.from_numpy(np.concatenate(part)) for part in zip(*pairs, strict=True))
        with torch.no_grad():
            found = (problem(given) - wanted).square().sum(dim=1).mean() / 2
            # the same by all samples' own statistics, whatever the layer holds
            expected = (problem.train()(given) - wanted).square().sum(dim=1).mean() / 2
        assert found.item() == pytest.approx(expected.item(), rel=0.05)


def test_results_do_not_depend_on_workers(trained: tuple[nn.Module, list[Blocks], list[list[float]]]) -> None:
    student = build("cnn3@1.2", classes=6, channels=1, seed=0)
    losses = train_layers(student, trained[1], [Schedule(12, 0.02)] * 4, workers=3)
    assert losses == trained[2]
    assert all(torch.equal(held, trained[0].state_dict()[key]) for key, held in student.state_dict().items())


def test_the_student_is_its_trained_layers_in_turn(
    trained: tuple[nn.Module, list[Blocks], list[list[float]]],
) -> None:
    expected = torch.from_numpy(IMAGES)
    alone = layers(build("cnn3@1.2", classes=6, channels=1, seed=0))
    for problem, blocks in zip(alone, trained[1], strict=True):
        train_layer(problem, blocks, Schedule(12, 0.02))
        with torch.no_grad():
            expected = problem(expected)
    assert np.allclose(numbers(trained[0], IMAGES)[-1], expected.numpy(), atol=1e-5)


def test_a_layer_does_not_see_the_others(trained: tuple[nn.Module, list[Blocks], list[list[float]]]) -> None:
    student = build("cnn3@1.2", classes=6, channels=1, seed=0)
    assert train_layer(layers(student)[2], trained[1][2], Schedule(12, 0.02)) == trained[2][2]


def test_the_student_is_saved_and_loaded_by_its_name(
    trained: tuple[nn.Module, list[Blocks], list[list[float]]], tmp_path: object
) -> None:
    path = tmp_path / "model.safetensors"  # type: ignore[operator]
    save_model(path, trained[0])
    again = build("cnn3@1.2", classes=6, channels=1, seed=9)
    load_model(path, again)
    assert np.array_equal(numbers(again.eval(), IMAGES)[-1], numbers(trained[0], IMAGES)[-1])


def test_the_loss_is_half_the_squared_distance_over_channels() -> None:
    problem = layers(build("cnn3", classes=2, channels=1, seed=0))[3]  # no batch normalisation in the score layer
    given, wanted = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(5, 128, 2, 2), (5, 2)]))
    with torch.no_grad():
        estimate = problem(torch.from_numpy(given).float()).numpy()
    expected = np.mean([np.sum((e - w) ** 2) / 2 for e, w in zip(estimate, wanted, strict=True)])
    empty = (given[:0], wanted[:0])
    assert train_layer(problem, [(given, wanted), empty], Schedule(1, 0.0)) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ((4, 32, 16, 16), (4, 65, 8, 8), r"layer2 gives features \(4, 64, 8, 8\); .*\(4, 65, 8, 8\)"),
        ((4, 31, 16, 16), (4, 64, 8, 8), r"layer2 does not take features \(4, 31, 16, 16\)"),
        ((1, 32, 2, 2), (1, 64, 1, 1), r"layer2 does not take .*in blocks of two or more"),
        ((0, 32, 2, 2), (0, 64, 1, 1), "no features to train the student's layer2 on"),
    ],
)
def test_blocks_that_do_not_fit(given: tuple[int, ...], wanted: tuple[int, ...], message: str) -> None:
    problem = layers(build("cnn3", classes=2, channels=1, seed=0))[1]
    with pytest.raises(StudentError, match=message):
        train_layer(problem, [(np.ones(given), np.ones(wanted))], Schedule(1, 0.1))


def test_blocks_that_can_be_read_once() -> None:
    with pytest.raises(StudentError, match="can be read only once"):
        train_layer(layers(build("cnn3", classes=2, channels=1, seed=0))[0], iter([]), Schedule(2, 0.1))


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_layer_that_fails_is_named(bad: float) -> None:
    problem = layers(build("cnn3", classes=2, channels=1, seed=0))[1]
    blocks = [(np.ones((2, 32, 4, 4)), np.full((2, 64, 2, 2), bad))]
    with pytest.raises(
        StudentError, match=r"student's layer2 failed in epoch 1 of 3: .*student\.layer_wise\.learning_rate"
    ):
        train_layer(problem, blocks, Schedule(3, 0.1))


class Read:
    """Blocks that count how often they were read."""

    def __init__(self, blocks: Blocks, failure: BaseException | None = None) -> None:
        self.blocks, self.failure, self.times = blocks, failure, 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        if self.failure is not None:
            raise self.failure
        return iter(self.blocks)


@pytest.mark.parametrize("failure", [StudentError("broken", hint="none"), KeyboardInterrupt()])
def test_where_a_layer_fails_the_others_do_not_go_on(failure: BaseException) -> None:
    student, epochs = build("cnn3@0.1", classes=3, channels=1, seed=0), 300
    given = [Read(each) for each in problems([teacher("cnn3@0.1", 1)], student)]
    given[0].failure = failure
    with pytest.raises(type(failure)):
        train_layers(student, given, [Schedule(epochs, 0.001)] * 4, workers=2)
    assert max(each.times for each in given) < epochs


def test_one_schedule_a_layer() -> None:
    student = build("cnn3", classes=2, channels=1, seed=0)
    with pytest.raises(StudentError, match="has 4 layers; given: blocks for 4 and schedules for 3"):
        train_layers(student, [[]] * 4, [Schedule(1, 0.1)] * 3)
