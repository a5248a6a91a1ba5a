"""Which taps a site lets out and as what: against the networks themselves and NumPy, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from consilience.client.calibration import CalibrationMap
from consilience.client.features import OpenTap, learn_bases, open_taps
from consilience.client.features.layers import layers_of as teacher_layers
from consilience.client.privacy.dp_sgd import grouped
from consilience.client.teacher import CalibratedTeacher, CalibrationRecord, load_teacher
from consilience.client.teacher.protocol import ScoringTeacher
from consilience.client.teacher.torch_modules import NetworkScores
from consilience.client.teacher.trained import train_teacher
from consilience.common.encoding.features import basis_bytes, unpack_basis
from consilience.common.errors import SettingsError, StorageError, TeacherError
from consilience.common.files import sha256
from consilience.common.nets.tapped import Tapped
from consilience.common.nets.taps import taps as layers_of
from consilience.common.pool import Pool
from consilience.common.settings import Policy, Preprocessing, SiteSettings
from helpers.feature_site import CALLABLE, SIZE, fed, hosted, make_pool, make_settings, network


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path / "pool")


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "feature_model.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("feature_model", None)


def opened(settings: SiteSettings) -> dict[str, OpenTap]:
    teacher = load_teacher(settings)
    learn_bases(settings, teacher)
    return {tap.card.name: tap for tap in open_taps(settings, teacher)}


def told(tap: OpenTap, pool: Pool, batch: int = 16) -> NDArray[np.float32]:
    parts = [tap.values(pool.read(first, min(first + batch, len(pool)))) for first in range(0, len(pool), batch)]
    return np.concatenate(parts).reshape(len(pool), *tap.card.shape)


def whole(pool: Pool, name: str, architecture: str = "cnn3") -> NDArray[np.float32]:
    """What the network computes there, by itself."""
    with torch.no_grad():
        _, (found,) = Tapped(network(architecture), [name])(fed(pool))
    return np.asarray(found.numpy())


def test_features_are_the_network_s_own(tmp_path: Path, pool: Pool) -> None:
    taps = opened(make_settings(tmp_path, {"penultimate": {}, "layer2": {}}))
    assert list(taps) == ["layer2", "penultimate"]  # from the input to the output, whatever the policy's order
    assert [tap.card.shape for tap in taps.values()] == [(64, 8, 8), (128,)]
    for name, tap in taps.items():
        np.testing.assert_allclose(told(tap, pool), whole(pool, name), rtol=1e-4, atol=1e-5)
        assert tap.card.components is None
    assert taps["layer2"].card.layout == layers_of(network())[1].unit
    assert taps["penultimate"].card.layout == ""


@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_maps_are_averaged_as_torch_does(tmp_path: Path, pool: Pool, size: int) -> None:
    (tap,) = opened(make_settings(tmp_path, {"layer2": {"size": size}})).values()
    expected = F.adaptive_avg_pool2d(torch.from_numpy(whole(pool, "layer2")), min(size, 8)).numpy()
    assert tap.card.shape == expected.shape[1:]
    np.testing.assert_allclose(told(tap, pool), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("layer2", None), ("layer2", 2), ("penultimate", None)])
def test_components_are_those_of_all_features_at_once(tmp_path: Path, pool: Pool, name: str, size: int | None) -> None:
    (tap,) = opened(make_settings(tmp_path, {name: {"channels": 5, "size": size}})).values()
    maps = torch.from_numpy(whole(pool, name))
    maps = maps if size is None else F.adaptive_avg_pool2d(maps, size)
    rows = np.moveaxis(maps.numpy().astype(np.float64), 1, -1).reshape(-1, maps.shape[1])
    mean = rows.mean(axis=0)
    _, spread, right = np.linalg.svd(rows - mean, full_matrices=False)
    card = tap.card.components
    assert card is not None
    assert (card.number, card.bytes, card.digest) == (5, len(tap.components), sha256(tap.components))
    directions, kept_mean = unpack_basis(tap.components, 5, tap.card.channels)
    np.testing.assert_allclose(kept_mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(directions * right[:5], axis=1)), 1, atol=1e-4)
    largest = np.abs(directions).argmax(axis=1)
    assert np.all(directions[np.arange(5), largest] > 0)
    assert card.kept == pytest.approx(np.sum(spread[:5] ** 2) / np.sum(spread**2), rel=1e-4)
    leaving = np.moveaxis(told(tap, pool), 1, -1).reshape(-1, 5)
    np.testing.assert_allclose(leaving, (rows - mean) @ directions.T, rtol=1e-3, atol=1e-4)


def test_a_width_that_the_layer_has_needs_no_components(tmp_path: Path, pool: Pool) -> None:
    (tap,) = opened(make_settings(tmp_path, {"layer1": {"channels": 32}})).values()
    assert (tap.card.components, tap.card.shape[0]) == (None, 32)
    assert not (tmp_path / "state" / "features").exists()


def test_components_do_not_depend_on_the_batch(tmp_path: Path, pool: Pool) -> None:
    one = opened(make_settings(tmp_path / "one", {"layer3": {"channels": 4}}, pools=[str(pool.folder)], batch_size=7))
    other = opened(make_settings(tmp_path / "other", {"layer3": {"channels": 4}}, pools=[str(pool.folder)]))
    np.testing.assert_allclose(told(one["layer3"], pool), told(other["layer3"], pool, 50), rtol=1e-3, atol=1e-4)


def test_every_layer_but_those_that_are_named(tmp_path: Path, pool: Pool) -> None:
    taps = opened(make_settings(tmp_path, {"*": {"size": 2}, "layer2": {"size": 1}}, architecture="resnet8"))
    assert {name: tap.card.shape for name, tap in taps.items()} == {
        "layer1": (16, 2, 2),
        "layer2": (16, 1, 1),
        "layer3": (32, 2, 2),
        "layer4": (64, 2, 2),
    }


def test_another_teacher_tap_or_reduction_is_another_tap(tmp_path: Path, pool: Pool) -> None:
    def fingerprint(folder: str, taps: dict[str, Any], seed: int = 1) -> str:
        settings = make_settings(
            tmp_path / folder, taps, model=network(seed=seed), pools=[str(pool.folder)], batch_size=SIZE
        )
        return next(iter(opened(settings).values())).card.fingerprint

    first = fingerprint("a", {"layer2": {"size": 4, "channels": 8}})
    assert first == fingerprint("again", {"layer2": {"size": 4, "channels": 8}})
    others = [
        fingerprint("b", {"layer2": {"size": 4, "channels": 8}}, seed=2),
        fingerprint("c", {"layer2": {"size": 4, "channels": 7}}),
        fingerprint("d", {"layer2": {"size": 4}}),
        fingerprint("e", {"layer2": {"size": 3, "channels": 8}}),
        fingerprint("f", {"layer3": {"size": 4, "channels": 8}}),
    ]
    assert len({first, *others}) == 6
    plain = fingerprint("g", {"layer2": {"size": 4}})
    assert plain != fingerprint("h", {"layer2": {"size": 4}}, seed=2)  # without components too
    assert plain == fingerprint("i", {"layer2": {"size": 4, "channels": 64}})


def test_other_components_are_another_tap(tmp_path: Path, pool: Pool) -> None:
    make_pool(tmp_path / "other", seed=1)
    (one,) = opened(make_settings(tmp_path, {"layer2": {"channels": 8}})).values()
    (other,) = opened(make_settings(tmp_path, {"layer2": {"channels": 8}}, pools=["other"])).values()
    assert one.card.fingerprint != other.card.fingerprint


def test_a_calibration_map_is_no_other_tap(tmp_path: Path, pool: Pool) -> None:
    settings = make_settings(tmp_path, {"layer2": {}})
    teacher = load_teacher(settings)
    record = CalibrationRecord(
        asked="temperature",
        teacher=teacher.fingerprint,
        data_digest="",
        method="temperature",
        map=CalibrationMap(temperature=2.0),
        samples=0,
        before=None,
        after=None,
        note="",
    )
    mapped = CalibratedTeacher(teacher.teacher, record, "")
    assert mapped.fingerprint != teacher.fingerprint
    (one,), (other,) = open_taps(settings, teacher), open_taps(settings, mapped)
    assert one.card == other.card


def test_a_teacher_trained_here_has_taps(tmp_path: Path, pool: Pool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "private.npz", x=images, y=np.arange(60) % 3, names=np.array(["a", "b", "c"]))
    fit = {"epochs": 1, "augment": False, "precision": "f32"}
    settings = make_settings(
        tmp_path,
        {"*": {"channels": 3}},
        data={"kind": "npz", "path": "private.npz"},
        teacher={"kind": "train", "architecture": "cnn3", "fit": fit},
    )
    train_teacher(settings)
    assert [tap.card.shape for tap in opened(settings).values()] == [(3, 16, 16), (3, 8, 8), (3, 4, 4)]


@pytest.mark.parametrize(("architecture", "width"), [("cnn3", 128), ("resnet8", 64)])
def test_a_network_as_dp_sgd_trains_it_has_its_modules_for_taps(architecture: str, width: int) -> None:
    preprocessing = Preprocessing(size=(16, 16), channels=1)
    private = grouped(network(architecture)).eval()
    scores = NetworkScores(private, 3, preprocessing, torch.device("cpu"))
    layers = teacher_layers(ScoringTeacher(("a", "b", "c"), "f" * 64, "logits", "here", scores))
    assert layers is not None
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), np.uint8)
    found = {layer.name: layer for layer in layers.find(images)}
    assert (found["1"].shape[1:], found["penultimate"].shape) == ((16, 16), (width,))
    assert not any(layer.layout for layer in found.values())
    (maps,) = layers.features(images, ["1"])
    with torch.no_grad():
        expected = private.get_submodule("1")(private.get_submodule("0")(scores.prepare(images)))
    np.testing.assert_allclose(maps, expected.numpy(), atol=1e-6)


def test_a_head_that_is_called_by_keyword_is_found() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(256, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(input=images.flatten(1))  # type: ignore[no-any-return]

    scores = NetworkScores(Named().eval(), 3, Preprocessing(size=(16, 16), channels=1), torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), np.uint8)
    assert np.array_equal(scores.features(images), scores.prepare(images).flatten(1).numpy())
    layers = teacher_layers(ScoringTeacher(("a", "b", "c"), "f" * 64, "logits", "here", scores))
    assert layers is not None
    assert [layer.name for layer in layers.find(images)] == ["penultimate"]
    assert np.array_equal(layers.features(images, ["penultimate"])[0], scores.features(images))


def test_a_callable_tells_its_features(tmp_path: Path, pool: Pool) -> None:
    taps = opened(make_settings(tmp_path, {"means": {}, "maps": {"size": 4, "channels": 1}}, teacher=hosted("model")))
    assert [(name, tap.card.shape) for name, tap in taps.items()] == [("maps", (1, 4, 4)), ("means", (3,))]
    expected = fed(pool).numpy().mean(axis=(2, 3)) * [1, 2, -1]
    np.testing.assert_allclose(told(taps["means"], pool), expected, rtol=1e-5, atol=1e-5)
    components = taps["maps"].card.components
    assert components is not None
    assert components.kept == pytest.approx(1)  # the three channels are one


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ({"maps": np.zeros((16, 3, 4), np.float32)}, r"float32 of shape \(16, 3, 4\)"),
        ({"maps": np.zeros((16, 3), np.int64)}, "int64"),
        ({"maps": np.zeros((3, 3), np.float32)}, r"shape \(3, 3\) for 16 images"),
        ({"maps": np.zeros((16, 3, 8, 8), np.float32)}, r"gives \(3, 8, 8\) a sample; its card says \(3, 16, 16\)"),
        ({"maps": np.full((16, 3, 16, 16), np.nan, np.float32)}, "gives nan in row 0"),
        ({"maps": np.full((16, 3, 16, 16), np.inf, np.float32)}, "gives inf in row 0"),
        ({"maps": np.full((16, 3, 16, 16), 65520.0, np.float32)}, "gives 65520 in row 0"),
    ],
)
def test_a_callable_that_gives_something_else_is_told(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, gives: dict[str, Any], said: str
) -> None:
    (tap,) = opened(make_settings(tmp_path, {"maps": {}}, teacher=hosted("model"))).values()
    monkeypatch.setattr(sys.modules["feature_model"].Model, "gives", gives)
    with pytest.raises(TeacherError, match=said):
        tap.values(pool.read(0, 16))


def test_a_tap_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path, pool: Pool) -> None:
    settings = make_settings(tmp_path, {"layer9": {}})
    with pytest.raises(
        SettingsError, match=r"policy\.features\.taps\.layer9 .* has: layer1, layer2, layer3, penultimate"
    ) as caught:
        open_taps(settings, load_teacher(settings))
    assert "site taps" in (caught.value.hint or "")
    settings = make_settings(tmp_path, {"*": {}}, teacher=hosted("model"))
    with pytest.raises(SettingsError, match="one of our architectures, which the teacher is not; it has: maps, means"):
        open_taps(settings, load_teacher(settings))


def test_a_teacher_without_taps_takes_part_by_its_labels(tmp_path: Path, pool: Pool) -> None:
    settings = make_settings(tmp_path, {}, teacher=hosted("plain"))
    assert open_taps(settings, load_teacher(settings)) == ()
    settings = make_settings(tmp_path, {"maps": {}}, teacher=hosted("plain"))
    with pytest.raises(SettingsError, match="names maps; a teacher of kind callable has no taps") as caught:
        open_taps(settings, load_teacher(settings))
    assert "takes part by its labels" in (caught.value.hint or "")


def test_taps_that_no_card_describes_are_refused_before_anything_is_learned(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tmp_path, {"layer1": {"channels": 8}, "layer2": {"channels": 8}})
    teacher = load_teacher(settings)
    sizes = basis_bytes(8, 32), basis_bytes(8, 64)
    for name, most, words in (
        (
            "MOST_COMPONENTS",
            sum(sizes) - 1,
            rf"{sum(sizes):,} bytes .*layer1 {sizes[0]:,}, layer2 {sizes[1]:,}.*allowed are",
        ),
        ("MOST_CHANNELS", 63, r"taps\.layer2: features of shape \(8, 8, 8\) from 64 channels are more"),
        ("MOST_FEATURES", 8 * 16 * 16 - 1, r"taps\.layer1: features of shape \(8, 16, 16\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["consilience.client.features.taps"], name, most)
            for action in (learn_bases, open_taps):
                with pytest.raises(SettingsError, match=words):
                    action(settings, teacher)
    assert not (tmp_path / "state" / "features").exists()
    assert learn_bases(settings, teacher) == ("layer1", "layer2")


def test_components_need_a_pool(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, {"layer2": {"channels": 4}}, pools=[])
    for action in (learn_bases, open_taps):
        with pytest.raises(SettingsError, match="'pools' is not given"):
            action(settings, load_teacher(settings))
    settings = make_settings(tmp_path, {"layer2": {}}, pools=[])
    assert [tap.card.shape for tap in open_taps(settings, load_teacher(settings))] == [(64, 8, 8)]


def test_components_of_another_teacher_pool_or_policy_are_stale(tmp_path: Path, pool: Pool) -> None:
    settings = make_settings(tmp_path, {"layer2": {"channels": 8}})
    with pytest.raises(TeacherError, match=r"components of layer2 .* are not learned") as caught:
        open_taps(settings, load_teacher(settings))
    assert caught.value.hint == "Run `consilience site train`"
    opened(settings)
    make_pool(tmp_path / "other", seed=1)
    for stale in (
        make_settings(tmp_path, {"layer2": {"channels": 7}}),
        make_settings(tmp_path, {"layer2": {"channels": 8, "size": 2}}),
        make_settings(tmp_path, {"layer2": {"channels": 8}, "layer3": {"channels": 8}}),
        make_settings(tmp_path, {"layer2": {"channels": 8}}, pools=["other"]),
        make_settings(tmp_path, {"layer2": {"channels": 8}}, model=network(seed=2)),
    ):
        with pytest.raises(TeacherError, match="are not learned"):
            open_taps(stale, load_teacher(stale))
    kept = make_settings(tmp_path, {"layer2": {"channels": 8}})
    assert len(open_taps(kept, load_teacher(kept))) == 1


def test_what_is_learned_is_not_learned_again(tmp_path: Path, pool: Pool) -> None:
    settings = make_settings(tmp_path, {"layer2": {"channels": 8}})
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        assert learn_bases(settings, load_teacher(settings), lambda *now: seen.append(now)) == ("layer2",)
    assert seen == [(16, SIZE)] * 3 + [(2, SIZE)]


@pytest.mark.parametrize("damage", ["bases.safetensors", "features.json"])
def test_damaged_components_are_refused_and_learned_anew(tmp_path: Path, pool: Pool, damage: str) -> None:
    settings = make_settings(tmp_path, {"layer2": {"channels": 8}})
    (before,) = opened(settings).values()
    path = tmp_path / "state" / "features" / damage
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises((TeacherError, StorageError), match=damage):
        open_taps(settings, load_teacher(settings))
    if damage == "features.json":
        path.unlink()
    (after,) = opened(settings).values()
    assert before.card == after.card


def test_features_that_are_not_finite_teach_no_components(tmp_path: Path, pool: Pool) -> None:
    broken = network()
    with torch.no_grad():
        next(broken.parameters())[3] = float("nan")
    settings = make_settings(tmp_path, {"layer1": {"channels": 8}}, model=broken)
    with pytest.raises(TeacherError, match="tap 'layer1', pool samples 0 to 15: Features hold nan in channel 3"):
        learn_bases(settings, load_teacher(settings))


def test_the_policy_s_version_tells_features_from_none() -> None:
    assert Policy().version != Policy.model_validate({"features": {"taps": {"layer1": {}}}}).version
