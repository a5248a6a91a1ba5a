"""Common-feature learning from stores: the loss against a direct computation, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.common.errors import StudentError
from consilience.common.nets import build, train
from consilience.common.nets.tapped import tap_shapes
from consilience.common.settings import Fit
from consilience.server.student import learn_common
from consilience.server.student.common_feature import CommonFeature, Weights
from consilience.server.student.learn_common import CommonLoss, CommonStudent, Space, common_fingerprint, told_of
from consilience.server.student.mmd import mmd
from consilience.server.student.site_taps import SiteTap
from helpers.feature_answers import PLAIN, features, images, stored, tap_cards, teacher

CPU = torch.device("cpu")
COUNT = 40
PIXELS = images(COUNT)
FIT = Fit(epochs=3, batch_size=16, learning_rate=0.05, precision="f32")


pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")


class Fixed:
    """A loss of the scores: their mean square."""

    fingerprint = "fixed"

    def __call__(self, scores: Tensor, ids: Tensor) -> Tensor:
        return scores.square().mean()


def tap(folder: Path, site: str, architecture: str, seed: int, name: str, upto: int = -1) -> SiteTap:
    network = teacher(architecture, seed)
    (card,) = tap_cards(network, site, [name])
    return stored(folder, site, card, features(network, PIXELS, [name])[name], upto=upto)


def space_of(model: CommonStudent) -> CommonFeature:
    (common,) = model.common.taps
    assert isinstance(common, CommonFeature)
    return common


def student() -> torch.nn.Module:
    return build("cnn3@0.1", classes=5, channels=1, seed=5)


SHAPES = tap_shapes(student().eval(), torch.zeros(2, 1, 16, 16))


def maps(folder: Path, upto: int = -1, size: int | None = None) -> Space:
    taps = (tap(folder, "east", "resnet8@0.2", 1, "layer4"), tap(folder, "west", "cnn3@0.2", 2, "layer2", upto))
    return Space("layer3", SHAPES["layer3"], taps, 6, size)


def vectors(folder: Path, upto: int = -1) -> Space:
    taps = (tap(folder, "east", "resnet8@0.2", 1, "penultimate"), tap(folder, "west", "cnn3@0.2", 2, "layer2", upto))
    return Space("penultimate", SHAPES["penultimate"], taps)


def test_the_form_in_which_features_meet(tmp_path: Path) -> None:
    assert SHAPES["layer3"][1:] == (4, 4)
    assert maps(tmp_path).meeting == (4, 4)
    assert maps(tmp_path / "less", size=3).meeting == (3, 3)
    made = vectors(tmp_path / "vectors")
    assert made.vectors
    assert made.meeting is None
    assert made.build(0).width == SHAPES["penultimate"][0]
    assert made.formed(torch.ones(2, 3, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize("form", ["maps", "vectors"])
@pytest.mark.parametrize("upto", [-1, 20])
@torch.no_grad()
def test_the_loss_is_that_of_a_direct_computation(tmp_path: Path, form: str, upto: int) -> None:
    space = maps(tmp_path, upto) if form == "maps" else vectors(tmp_path, upto)
    model = CommonStudent(student(), [space], Weights(0.5, 3.0, 7.0), seed=0).eval()
    samples = np.arange(COUNT)[::-1].copy()
    loss = CommonLoss(model, [space], Fixed(), "f", samples)
    ids = torch.tensor([0, 7, 25, 39, 12, 30])
    output = model(torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    told = loss(output, ids)
    at = samples[ids.numpy()]
    common = space_of(model)
    own = common.project(common.brought(space.formed(output[1][0])))
    apart = lost = 0.0
    for number, each in enumerate(space.taps):
        rows = np.flatnonzero(at < (upto if each.site == "west" and upto > 0 else COUNT))
        values = each.store.take(at[rows]).reshape(len(rows), *each.card.shape)
        given = common.brought(space.formed(torch.from_numpy(values / np.float32(each.scale))))
        projected = common.project(given, number)
        apart += float(mmd(own[rows], projected))
        lost += float((common.decoders[number](projected) - given).square().mean())
    assert float(told.terms["soft"]) == pytest.approx(float(output[0].square().mean()))
    assert float(told.terms["mmd"]) == pytest.approx(apart, rel=1e-5)
    assert float(told.terms["reconstruction"]) == pytest.approx(lost, rel=1e-5)
    assert apart > 0
    expected = 0.5 * float(output[0].square().mean()) + 3 * apart + 7 * lost
    assert float(told.total) == pytest.approx(expected, rel=1e-5)


def test_features_count_in_units_of_the_median_samples_root_mean_square(tmp_path: Path) -> None:
    made = tap(tmp_path, "east", "cnn3@0.2", 2, "layer2")
    values = made.take(np.arange(COUNT))
    squares = np.square(values, dtype=np.float64).mean(axis=(1, 2, 3))
    assert made.scale == pytest.approx(float(np.sqrt(np.median(squares))), rel=1e-6)
    zeros = stored(tmp_path, "zero", made.card, np.zeros_like(values))
    assert zeros.scale == 1
    few = np.zeros_like(values)
    few[3] = 8
    assert stored(tmp_path, "few", made.card, few).scale == pytest.approx(8 / np.sqrt(COUNT), rel=1e-6)


@pytest.mark.parametrize("form", ["maps", "vectors"])
def test_one_sample_of_huge_features_does_not_silence_the_others(tmp_path: Path, form: str) -> None:
    """As f16 lets through: in units of a mean over all, the others would come to nothing."""
    name = "layer2" if form == "maps" else "penultimate"
    honest = tap(tmp_path, "honest", "cnn3@0.2", 2, name)
    values = honest.take(np.arange(COUNT)).copy()
    values[7] = 65_504
    odd = stored(tmp_path, "odd", honest.card, values)
    shape = SHAPES["layer3"] if form == "maps" else SHAPES["penultimate"]
    space = Space("layer3" if form == "maps" else "penultimate", shape, (odd,))
    others = np.delete(np.arange(COUNT), 7)
    given = space.given(odd, others, CPU)
    np.testing.assert_allclose(given, space.given(honest, others, CPU), rtol=0.1)
    large = space.given(odd, np.array([6, 7]), CPU)
    assert float(large[1].square().mean().sqrt()) == pytest.approx(10, rel=1e-3)
    assert torch.equal(large[0], space.given(odd, np.array([6]), CPU)[0])


@pytest.mark.parametrize("form", ["maps", "vectors"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_site_whose_features_are_the_same_for_every_sample_has_no_part(
    tmp_path: Path, form: str, value: float
) -> None:
    """Normalised by a variance of 0 they would send gradients beyond bounds, and the training of all would fail."""
    space = maps(tmp_path) if form == "maps" else vectors(tmp_path)
    dead = stored(
        tmp_path / "dead", "north", (held := space.taps[0]).card, np.full_like(held.take(np.arange(40)), value)
    )
    spoilt = replace(space, taps=(*space.taps, dead))
    trained = []
    for some in (space, spoilt):
        model = CommonStudent(student(), [some], Weights(), seed=0)
        loss = CommonLoss(model, [some], Fixed(), "f", np.arange(COUNT))
        records = train(model, PIXELS, loss, FIT, PLAIN, seed=0, folder=None, device=CPU)
        assert all(np.isfinite(record.loss) for record in records)
        trained.append((model, records[-1].terms["mmd"]))
    assert trained[1][1] == pytest.approx(trained[0][1], rel=0.5), "of the others, by networks drawn beside another"
    (told,) = told_of(trained[1][0], [spoilt], PIXELS, np.arange(COUNT), PLAIN, CPU, 16)
    assert told["still"] == ["north"]
    assert told["missed"].keys() == {"east", "west"}
    assert told["picture"]["points"].keys() == {"student", "site east", "site west"}


@pytest.mark.parametrize("upto", [0, 1])
@torch.no_grad()
def test_a_site_that_told_one_sample_of_the_batch_or_none_has_no_part(tmp_path: Path, upto: int) -> None:
    """Vectors of one sample cannot be normalised by batch: training would fail."""
    space = vectors(tmp_path, upto)
    model = CommonStudent(student(), [space], Weights(), seed=0).train()
    ids = torch.arange(6)
    output = model(torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    terms = CommonLoss(model, [space], Fixed(), "f", np.arange(COUNT))(output, ids).terms
    common = space_of(model)
    given = space.given(space.taps[0], ids.numpy(), CPU)
    projected = common.project(given, 0)
    assert float(terms["mmd"]) == pytest.approx(float(mmd(common.project(output[1][0]), projected)), rel=1e-4)
    missed = (common.decoders[0](projected) - given).square().mean()
    assert float(terms["reconstruction"]) == pytest.approx(float(missed), rel=1e-4)


@pytest.mark.parametrize("form", ["maps", "vectors"])
def test_training_brings_the_terms_down_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    space = maps(tmp_path, 30) if form == "maps" else vectors(tmp_path, 30)
    fit = FIT.model_copy(update={"epochs": 6})

    def done(folder: Path, stop: int = -1, apart: float = 10) -> tuple[CommonStudent, list[dict[str, float]]]:
        model = CommonStudent(student(), [space], Weights(mmd=apart), seed=0)
        loss = CommonLoss(model, [space], Fixed(), "f", np.arange(COUNT))

        def watch(record: object) -> None:
            if record.epoch == stop:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        records = train(model, PIXELS, loss, fit, PLAIN, seed=0, folder=folder, on_epoch=watch, device=CPU)
        return model, [dict(record.terms) for record in records]

    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole, terms = done(tmp_path / "whole")
    assert terms[-1]["reconstruction"] < 0.7 * terms[0]["reconstruction"]
    assert terms[-1]["soft"] < terms[0]["soft"]
    aside = done(tmp_path / "aside", apart=1e-9)[1]
    assert terms[-1]["mmd"] < 0.95 * terms[0]["mmd"]
    assert terms[-1]["mmd"] < 0.95 * aside[-1]["mmd"], "not by what the other terms do"
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path / "cut", stop=2)
    resumed, again = done(tmp_path / "cut")
    assert again == terms
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_of_which_no_site_told_anything(tmp_path: Path) -> None:
    """Without soft targets nothing is left to learn from it: the step changes nothing, and does not fail."""
    network = teacher("cnn3@0.2", 2)
    (card,) = tap_cards(network, "west", ["penultimate"])
    some = stored(tmp_path, "west", card, features(network, PIXELS, ["penultimate"])["penultimate"], upto=20)
    space = Space("penultimate", SHAPES["penultimate"], (some,))
    model = CommonStudent(student(), [space], Weights(soft=0), seed=0)
    loss = CommonLoss(model, [space], Fixed(), "f", np.arange(COUNT))
    told = loss(model(torch.ones(6, 1, 16, 16)), torch.arange(20, 26))
    torch.autograd.backward(told.total)
    assert float(told.total.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_is_told_of_a_space(tmp_path: Path) -> None:
    space = maps(tmp_path, 30)
    model = CommonStudent(student(), [space], Weights(), seed=0)
    (told,) = told_of(model, [space], PIXELS, np.arange(COUNT), PLAIN, CPU, 8)
    assert told["sites"] == {"east": "layer4", "west": "layer2"}
    assert told["measured"] == {"east": COUNT, "west": 30}
    points = {who: len(points) for who, points in told["picture"]["points"].items()}
    assert points == {"student": COUNT, "site east": COUNT, "site west": 30}


@pytest.mark.parametrize("form", ["maps", "vectors"])
def test_what_reconstruction_misses_is_measured_as_it_was_trained(tmp_path: Path, form: str) -> None:
    """The extractor's running statistics are of student and sites together: by these it may miss more than all."""
    space = maps(tmp_path, 27) if form == "maps" else vectors(tmp_path, 27)
    model = CommonStudent(student(), [space], Weights(), seed=0)
    loss = CommonLoss(model, [space], Fixed(), "f", np.arange(COUNT))
    records = train(model, PIXELS, loss, FIT.model_copy(update={"epochs": 20}), PLAIN, seed=0, folder=None, device=CPU)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    (told,) = told_of(model, [space], PIXELS, np.arange(COUNT), PLAIN, CPU, 8)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], held) for name, held in before.items())
    assert not any(module.training for module in model.modules())
    assert told["measured"] == {"east": COUNT, "west": 27}
    assert max(told["missed"].values()) < 1
    common, missed = space_of(model).train(), 0.0
    with torch.no_grad():
        for start, stop in ((0, 8), (8, 16), (16, 27)):  # the last three alone would be normalised by too few
            given = common.brought(space.given(space.taps[1], np.arange(start, stop), CPU))
            lost = (common.decoders[1](common.project(given, 1)) - given).square().mean() / given.square().mean()
            missed += float(lost) * (stop - start) / 27
    assert told["missed"]["west"] == pytest.approx(missed, rel=1e-4)
    assert len(records) == 20


def test_a_site_that_told_one_sample_is_not_told_of(tmp_path: Path) -> None:
    space = vectors(tmp_path, 1)
    model = CommonStudent(student(), [space], Weights(), seed=0)
    (told,) = told_of(model, [space], PIXELS, np.arange(COUNT), PLAIN, CPU, 1)
    assert told["measured"] == {"east": COUNT, "west": 0}
    assert told["missed"].keys() == {"east"}
    assert told["picture"]["points"].keys() == {"student", "site east"}
    (told,) = told_of(model, [space], PIXELS[:1], np.arange(1), PLAIN, CPU, 1)
    assert (told["measured"], told["missed"], told["picture"]) == ({"east": 0, "west": 0}, {}, None)


def test_a_picture_holds_few_numbers_of_large_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def look(vectors: Mapping[str, NDArray[np.floating]]) -> None:
        seen.update({who: held.shape for who, held in vectors.items()})

    monkeypatch.setattr(learn_common, "picture", look)
    monkeypatch.setattr(learn_common, "DRAWN", 30)
    space = maps(tmp_path)
    model = CommonStudent(student(), [space], Weights(), seed=0)
    told_of(model, [space], PIXELS, np.arange(COUNT), PLAIN, CPU, 8)
    assert seen == dict.fromkeys(("student", "site east", "site west"), (10, 6 * 4 * 4))
    monkeypatch.setattr(learn_common, "MOST_VALUES", 6 * 2 * 2)
    told_of(model, [space], PIXELS, np.arange(COUNT), PLAIN, CPU, 8)
    assert seen == dict.fromkeys(("student", "site east", "site west"), (10, 6 * 2 * 2))


def test_another_space_weight_or_feature_is_another_lesson(tmp_path: Path) -> None:
    space = maps(tmp_path)
    other = Space("layer2", SHAPES["layer2"], space.taps, 6)
    kinds = [
        common_fingerprint([space], Weights()),
        common_fingerprint([space], Weights(mmd=1)),
        common_fingerprint([other], Weights()),
        common_fingerprint([maps(tmp_path / "less", upto=20)], Weights()),
    ]
    assert len(set(kinds)) == 4


def test_a_tap_that_the_student_has_not(tmp_path: Path) -> None:
    space = Space("layer9", SHAPES["layer3"], maps(tmp_path).taps)
    with pytest.raises(StudentError, match="no tap 'layer9'"):
        CommonStudent(student(), [space], Weights(), seed=0)
