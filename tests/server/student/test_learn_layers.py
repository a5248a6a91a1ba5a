"""Layer-wise amalgamation from stores: what layers learn from, and what comes of full width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from consilience.common.cards import ComponentsCard
from consilience.common.encoding.features import pack_basis
from consilience.common.errors import StudentError
from consilience.common.files import sha256
from consilience.common.nets import build
from consilience.common.preprocessing import preprocess
from consilience.common.settings import LayerWise
from consilience.server.student import layer_wise, learn_layers, site_taps
from consilience.server.student.autoencoder import Affine
from consilience.server.student.folding import fold
from consilience.server.student.layer_wise import join, layers
from consilience.server.student.learn_layers import Amalgamated, LayerLesson, LayerTaps, amalgamated
from consilience.server.student.scores import ConcatenatedScores
from helpers.feature_answers import PLAIN, features, images, log_probs, stored, tap_cards, teacher

CPU = torch.device("cpu")
COUNT = 48
PIXELS = images(COUNT)
IDS = np.arange(COUNT)
NAME = "cnn3@0.1"


pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")


def told(folder: Path, networks: dict[str, nn.Module], upto: dict[str, int] | None = None) -> list[LayerTaps]:
    cards = {site: tap_cards(network, site) for site, network in networks.items()}
    found = []
    for at, card in enumerate(next(iter(cards.values()))):
        taps = []
        for site, network in networks.items():
            values = features(network, PIXELS, [card.name])[card.name]
            taps.append(stored(folder, site, cards[site][at], values, upto=(upto or {}).get(site, -1)))
        found.append(LayerTaps(card.name, tuple(taps)))
    return found


def two() -> dict[str, nn.Module]:
    return {"east": teacher(NAME, 1), "west": teacher(NAME, 2)}


def three() -> dict[str, nn.Module]:
    return {**two(), "north": teacher(NAME, 3)}


def lesson(
    taps: list[LayerTaps],
    networks: dict[str, nn.Module],
    samples: NDArray[np.int64] = IDS,
    name: str = NAME,
    batch: int = 16,
    **settings: Any,
) -> LayerLesson:
    fields = {"epochs": 3, "target": "concatenated", **settings}
    answers = [log_probs(network, PIXELS) for network in networks.values()]
    sets = [range(3 * i, 3 * i + 3) for i in range(len(networks))]
    loss = ConcatenatedScores(answers, sets, CPU, "answers", samples)
    about = (taps, loss, "answers", samples, LayerWise(**fields), PLAIN)
    return LayerLesson(*about, architecture=name, batch=batch, seed=0)


def student(name: str = NAME) -> nn.Module:
    return build(name, classes=6, channels=1, seed=5)


def scores(network: nn.Module) -> NDArray[np.float32]:
    with torch.no_grad():
        return network(torch.from_numpy(preprocess(PIXELS, PLAIN))).numpy()


def how(taps: LayerTaps, width: int, **settings: Any) -> Amalgamated:
    return amalgamated(taps, width, IDS, LayerWise(**settings), seed=0, batch=16, device=CPU)


def test_full_width_of_equal_teachers_loses_nothing(tmp_path: Path) -> None:
    """With what amalgamation gives a student of the teachers' own weights computes the teachers' own scores."""
    network = teacher(NAME, 1)
    made = [how(each, each.channels[0]) for each in told(tmp_path, {"east": network, "west": network})]
    assert [each.explained for each in made] == pytest.approx([1, 1, 1])
    assert [list(each.by_site.values()) for each in made] == [pytest.approx([1, 1])] * 3
    assert max(share for each in made for share in each.by_site.values()) <= 1
    found = layers(teacher(NAME, 1))
    for each, before, after in zip(made, found, found[1:], strict=False):
        width = each.layer.channels[0]
        square = each.encoder.weight[:, :width] + each.encoder.weight[:, width:]  # both teachers say the same
        fold(Affine(square, each.encoder.bias), before.unit)
        assert after.adapter is not None
        inverse = np.linalg.inv(square)
        with torch.no_grad():
            after.adapter.weight.copy_(torch.from_numpy(inverse))
            after.adapter.bias.copy_(torch.from_numpy(-inverse @ each.encoder.bias))
        target = each(IDS[:4])
        assert np.sqrt(np.square(each(IDS) - each(IDS).mean(axis=(0, 2, 3), keepdims=True)).mean()) == pytest.approx(1)
        assert target.shape == (4, width, *each.layer.taps[0].card.shape[1:])
    join(found)
    joined = nn.Sequential(*[each.unit for each in found])
    np.testing.assert_allclose(scores(joined), scores(network), atol=2e-3 * np.abs(scores(network)).max())


def test_a_student_of_equal_teachers_learns_their_scores(tmp_path: Path) -> None:
    network = teacher(NAME, 1)
    with torch.no_grad():
        network[-1].weight.mul_(20)  # type: ignore[index, union-attr, operator]  # scores that vary
    networks = {"east": network, "west": network}
    made = student()
    samples = IDS[::-1].copy()  # training's numbers of the samples are not the pool's
    learnt = lesson(told(tmp_path, networks), networks, samples, epochs=60)
    shown = learnt.teach(made, PIXELS[samples], tmp_path / "layers", CPU)
    answers = log_probs(network, PIXELS)
    wanted = np.concatenate([answers - answers.mean(axis=1, keepdims=True)] * 2, axis=1)
    missed = np.square(scores(made) - wanted).sum() / np.square(wanted - wanted.mean(axis=0)).sum()
    assert missed < 0.3
    fresh = np.square(scores(student().eval()) - wanted).sum()
    assert missed * np.square(wanted - wanted.mean(axis=0)).sum() < 0.1 * fresh
    assert [each["tap"] for each in shown] == ["layer1", "layer2", "layer3", "scores"]
    assert all(each["losses"][-1] < 0.5 * each["losses"][0] for each in shown)


@pytest.mark.parametrize(("target", "share"), [("concatenated", 0.1), ("unified", 1.0)])
def test_the_score_layer_learns_squared_error_at_a_tenth_of_the_layers_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, share: float
) -> None:
    networks, seen = two(), list[float]()
    real = learn_layers.train_layers

    def noted(made: nn.Module, blocks: Any, schedules: Any, **rest: Any) -> Any:
        seen.extend(each.learning_rate for each in schedules)
        return real(made, blocks, schedules, **rest)

    monkeypatch.setattr(learn_layers, "train_layers", noted)
    made = lesson(told(tmp_path, networks), networks, target=target, learning_rate=0.04, epochs=1)
    made.teach(student(), PIXELS, tmp_path / "layers", CPU)
    assert seen == pytest.approx([0.04] * 3 + [0.04 * share])


LEAST = {
    ("principal", "direct"): 1 - 1e-9,
    ("principal", "incremental"): 0.97,
    ("descent", "direct"): 0.95,
    ("descent", "incremental"): 0.9,
}
"""Of the best share of variance, what each way keeps at least."""


@pytest.mark.parametrize("autoencoder", ["principal", "descent"])
@pytest.mark.parametrize("order", ["direct", "incremental"])
def test_every_way_of_amalgamating_keeps_variance_and_none_more_than_direct_principal(
    tmp_path: Path, autoencoder: str, order: str
) -> None:
    taps = told(tmp_path, three())[1]
    best = how(taps, 5)
    found = how(taps, 5, autoencoder=autoencoder, order=order, epochs=30)
    least = LEAST[autoencoder, order]
    assert least * best.explained < found.explained <= best.explained + 1e-9
    assert found.encoder.weight.shape == (5, 18)
    values = taps.features(IDS)
    mapped = found(IDS).transpose(0, 2, 3, 1).reshape(-1, 5).astype(np.float64)
    rows = values.transpose(0, 2, 3, 1).reshape(-1, 18).astype(np.float64)
    # What the best linear decoder makes of F_a: direct principal components have it, others at most that.
    design = np.column_stack([mapped, np.ones(len(mapped))])
    left = rows - design @ np.linalg.lstsq(design, rows, rcond=None)[0]
    refitted = 1 - np.square(left).sum() / np.square(rows - rows.mean(axis=0)).sum()
    variances = [rows[:, at : at + 6].var(axis=0).sum() for at in (0, 6, 12)]
    assert np.dot(list(found.by_site.values()), variances) / sum(variances) == pytest.approx(found.explained, abs=1e-4)
    assert refitted >= found.explained - 1e-3
    if (autoencoder, order) == ("principal", "direct"):
        assert refitted == pytest.approx(found.explained, abs=1e-4)
    assert np.square(mapped - mapped.mean(axis=0)).mean() == pytest.approx(1, rel=1e-3)


def test_results_do_not_depend_on_the_size_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taps = told(tmp_path, two())[2]
    whole = how(taps, 10)
    seen = []
    monkeypatch.setattr(learn_layers, "in_blocks", lambda ids, values: site_taps.in_blocks(ids, values, most=1000))
    monkeypatch.setattr(LayerTaps, "features", spied(LayerTaps.features, seen))
    small = how(taps, 10)
    assert max(seen) < 10
    np.testing.assert_allclose(small.encoder.weight, whole.encoder.weight, atol=1e-8)
    assert small.explained == pytest.approx(whole.explained)


def spied(real: Any, seen: list[int]) -> Any:
    def features(self: LayerTaps, ids: NDArray[np.int64]) -> Any:
        seen.append(len(ids))
        return real(self, ids)

    return features


def test_principal_components_stand_for_the_channels_that_they_came_from(tmp_path: Path) -> None:
    network = teacher(NAME, 1)
    (card,) = tap_cards(network, "east", ["layer2"])
    values = features(network, PIXELS, ["layer2"])["layer2"]
    rng = np.random.default_rng(0)
    rotation, mean = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32), values.mean(axis=(0, 2, 3))
    directions = rotation[:4]
    components = np.einsum("kc,nchw->nkhw", directions, values - mean[:, None, None])
    data = pack_basis(directions, mean)
    about = ComponentsCard(number=4, kept=0.9, bytes=len(data), digest=sha256(data))
    packed = card.model_copy(update={"shape": (4, *card.shape[1:]), "components": about})
    tap = replace(stored(tmp_path, "east", packed, np.ascontiguousarray(components)), components=tmp_path / "held.bin")
    (tmp_path / "held.bin").write_bytes(data)
    np.testing.assert_allclose(tap.take(IDS), components, atol=2e-3)
    expected = np.einsum("kc,nkhw->nchw", directions, components) + mean[:, None, None]
    np.testing.assert_allclose(tap.channels(IDS), expected, atol=4e-3)
    assert LayerTaps("layer2", (tap,)).channels == [6]


def test_one_sample_of_huge_features_does_not_silence_the_others(tmp_path: Path) -> None:
    """All variance would be its, and the layers' targets of the other samples as good as 0."""
    networks = two()
    honest = told(tmp_path, networks)[1]
    values = honest.taps[0].take(IDS).copy()
    values[7] = 65_504
    odd = LayerTaps("layer2", (stored(tmp_path / "odd", "east", honest.taps[0].card, values), honest.taps[1]))
    others = np.delete(IDS, 7)
    spread = how(odd, 5)(others).var(axis=(0, 2, 3)).sum() / how(honest, 5)(others).var(axis=(0, 2, 3)).sum()
    assert spread > 0.1


def test_a_training_killed_within_a_layer_goes_on_from_its_last_epoch_to_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_wise, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    networks = two()
    taps = told(tmp_path, networks)
    whole, done = student(), list[str]()
    shown = lesson(taps, networks, epochs=4).teach(whole, PIXELS, tmp_path / "whole", CPU)
    real, left = layer_wise._epoch_loss, 6

    def counted(layer: Any, total: Any, steps: int, when: str, schedule: Any) -> float:
        done.append(when)
        if len(done) > left:
            raise KeyboardInterrupt
        return real(layer, total, steps, when, schedule)

    monkeypatch.setattr(layer_wise, "_epoch_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        lesson(taps, networks, epochs=4).teach(student(), PIXELS, tmp_path / "cut", CPU)
    assert done[left] == "epoch 3 of 4"
    left = 100
    done.clear()
    made = student()
    again = lesson(taps, networks, epochs=4).teach(made, PIXELS, tmp_path / "cut", CPU)
    assert len(done) == 4 * 4 - 6, "of the second layer two epochs are not done again"
    assert again == shown
    assert all(torch.equal(held, made.state_dict()[name]) for name, held in whole.state_dict().items())
    assert not list((tmp_path / "cut").glob("*under-way*"))


def test_a_killed_training_goes_on_after_the_last_layer_to_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = two()
    taps = told(tmp_path, networks)
    whole = student()
    shown = lesson(taps, networks).teach(whole, PIXELS, tmp_path / "whole", CPU)
    done = []

    def killed() -> None:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lesson(taps, networks).teach(student(), PIXELS, tmp_path / "cut", CPU, on_layer=killed)
    held = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert {"layer1.safetensors", "layer2.safetensors", "layer1-encoder.safetensors"} <= held.keys()
    assert "joined.safetensors" not in held
    again = student()
    assert lesson(taps, networks).teach(again, PIXELS, tmp_path / "cut", CPU) == shown
    assert same(again, whole)
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == when for name, when in held.items())
    # A finished one is not trained again, and another lesson does not take it for its own.
    monkeypatch.setattr(learn_layers, "train_layers", pytest.fail)
    third = student()
    assert lesson(taps, networks).teach(third, PIXELS, tmp_path / "cut", CPU) == shown
    assert same(third, whole)
    monkeypatch.undo()
    other = student()
    lesson(taps, networks, learning_rate=0.01).teach(other, PIXELS, tmp_path / "cut", CPU)
    assert not same(other, whole)


def test_the_picture_shows_the_same_thing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the score layer's FAM does to the amalgamated features is a part of the student's layer before it."""
    network = teacher(NAME, 1)
    with torch.no_grad():
        network[-1].weight.mul_(20)  # type: ignore[index, union-attr, operator]  # scores that vary
    networks = {"east": network, "west": network}
    made, learnt = student(), lesson(told(tmp_path, networks), networks, epochs=60)
    learnt.teach(made, PIXELS, tmp_path / "layers", CPU)
    seen: dict[str, NDArray[np.floating]] = {}
    monkeypatch.setattr(learn_layers, "picture", lambda vectors: seen.update(vectors))
    learnt.picture(made, PIXELS, tmp_path / "layers", CPU)
    apart = np.square(seen["student"] - seen["amalgamated"]).mean()
    assert apart < 0.3 * seen["amalgamated"].var(axis=0).mean()
    monkeypatch.undo()
    assert learnt.picture(made, PIXELS, tmp_path / "elsewhere", CPU) is None


def test_every_sample_is_learnt_from_where_batches_do_not_come_out_even(tmp_path: Path) -> None:
    """What an epoch leaves out, another takes; the same lesson takes the same each time."""
    seen: list[int] = []

    class Noted:
        def __call__(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            seen.extend(ids.tolist())
            return scores.square().mean()

    taps = told(tmp_path, two())
    orders = []
    for folder in ("one", "two"):
        made = LayerLesson(taps, Noted(), "noted", IDS, LayerWise(epochs=6), PLAIN, architecture=NAME, batch=20, seed=0)
        made.teach(student(), PIXELS, tmp_path / folder, CPU, workers=1 if folder == "one" else 4)
        orders.append(seen.copy())
        seen.clear()
    assert len(orders[0]) == 6 * 40
    assert set(orders[0]) == set(IDS)
    assert orders[0][:40] != orders[0][40:80]
    assert orders[0] == orders[1]


def test_images_are_taken_a_batch_at_a_time(tmp_path: Path) -> None:
    """A network that is not trained yet holds all its maps, as in training: no more at once than there."""
    seen = []

    class Watched(np.ndarray):  # type: ignore[type-arg]
        def __getitem__(self, part: Any) -> Any:
            seen.append(len(part))
            return np.asarray(super().__getitem__(part))

    networks = two()
    lesson(told(tmp_path, networks), networks).teach(student(), PIXELS.view(Watched), tmp_path / "layers", CPU)
    assert max(seen) == 16


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_student_of_another_width_does_not_take_what_was_kept_for_one(tmp_path: Path) -> None:
    networks, other = two(), "cnn3@0.15"
    taps = told(tmp_path, networks)
    lesson(taps, networks).teach(student(), PIXELS, tmp_path / "layers", CPU)
    again, fresh = student(other), student(other)
    shown = lesson(taps, networks, name=other).teach(again, PIXELS, tmp_path / "layers", CPU)
    assert shown == lesson(taps, networks, name=other).teach(fresh, PIXELS, tmp_path / "fresh", CPU)
    assert same(again, fresh)


def test_batch_normalisation_ends_with_the_statistics_of_all_samples(tmp_path: Path) -> None:
    """Also where they are no whole number of batches."""
    networks, made = two(), student()
    lesson(told(tmp_path, networks), networks, batch=20).teach(made, PIXELS, tmp_path / "layers", CPU)
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    given: list[torch.Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].transpose(0, 1).flatten(1)))
    scores(made)
    assert len(norms) == len(given) == 3
    for norm, rows in zip(norms, given, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(norm.running_mean, rows.mean(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, rows.var(dim=1, correction=0), rtol=1e-4, atol=1e-5)


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    networks = two()
    taps = told(tmp_path, networks)
    one, many = student(), student()
    lesson(taps, networks).teach(one, PIXELS, tmp_path / "one", CPU)
    lesson(taps, networks).teach(many, PIXELS, tmp_path / "many", CPU, workers=4)
    assert same(one, many)


def test_samples_that_some_site_did_not_tell_are_left_out_of_the_layers(tmp_path: Path) -> None:
    networks = two()
    made = lesson(told(tmp_path, networks, {"west": 32}), networks)
    assert made.places.tolist() == [*range(32)]
    whole = lesson(told(tmp_path / "whole", networks), networks)
    assert whole.places.tolist() == [*range(COUNT)]
    assert made.fingerprint != whole.fingerprint
    shown = made.teach(student(), PIXELS, tmp_path / "layers", CPU)
    assert np.isfinite([each["losses"] for each in shown]).all()


def test_without_features_of_two_samples_it_is_refused(tmp_path: Path) -> None:
    networks = two()
    with pytest.raises(StudentError, match=r"told for 0 samples that can be learnt from"):
        lesson(told(tmp_path, networks, {"west": 0}), networks)
