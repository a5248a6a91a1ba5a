"""Coverage by heads on a teacher's features and outputs: how good it is, what it needs, and that no head is partial."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from click.testing import Result
from scipy.stats import norm
from torch import nn
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.coverage import CoverageRecord, load_coverage, read_record, tell_coverage
from consilience.client.coverage.head import PARTS, train_heads
from consilience.client.coverage.learned import LearnedCoverage
from consilience.client.coverage.learning import learn_coverage
from consilience.client.coverage.prior import auroc
from consilience.client.coverage.vectors import Vectors, vectors_of
from consilience.client.site import Site
from consilience.client.teacher import CalibratedTeacher, calibrate_teacher, load_teacher
from consilience.client.teacher.protocol import ScoringTeacher
from consilience.client.teacher.torch_modules import NetworkScores
from consilience.client.teacher.trained import train_teacher
from consilience.common.data import from_arrays
from consilience.common.errors import CoverageError, SettingsError, StorageError, TeacherError
from consilience.common.files import read_json, sha256_file, write_json
from consilience.common.pool import Pool
from consilience.common.settings import Preprocessing, SiteSettings
from consilience.common.settings_file import load_settings

NAMES = ["first", "second", "third", "stranger"]
CENTRES = np.array([[2.0, -0.5], [-0.5, 2.0], [2.0, 2.0], [-1.0, -1.0]])
"""Of each class's Gaussian in the plane; deviation 1. The last class is nobody's."""
HOSTED = {
    "kind": "callable",
    "callable": "planted_model:scores",
    "classes": NAMES[:3],
    "preprocessing": {"mean": [0.0], "std": [1.0]},
}
MODEL = """import numpy as np


def scores(images):
    plane = images[:, 0, 0, :2] * 12 - 6
    logits = np.concatenate([plane, np.zeros((len(plane), 1))], axis=1)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def same(images):
    return np.tile([0.2, 0.3, 0.5], (len(images), 1))
"""
TRAIN = {
    "kind": "train",
    "architecture": "cnn3",
    "holdout": 0.2,
    "fit": {"epochs": 3, "batch_size": 32, "learning_rate": 0.05, "augment": False, "precision": "f32"},
}


def drawn(classes: list[int], n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, 2), images (n, 8, 8, 1) uint8 whose first row begins with them, and their labels (n,)."""
    random = np.random.default_rng(seed)
    labels = np.array(classes)[random.integers(0, len(classes), n)]
    points = CENTRES[labels] + random.normal(size=(n, 2))
    images = random.integers(0, 256, (n, 8, 8, 1), np.uint8)
    images[:, 0, :2, 0] = np.clip(np.round((points + 6) / 12 * 255), 0, 255)
    return points, images, labels


def stripes(classes: list[int], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes (n, 12, 12, 1) uint8, of a direction for each class, and labels (n,)."""
    random = np.random.default_rng(seed)
    labels = np.array(classes)[random.integers(0, len(classes), n)]
    down, right = np.indices((12, 12))
    ways = np.stack([down, right, down + right, down - right])[labels]
    waves = np.sin(ways * 1.6 + random.uniform(0, 2 * np.pi, n)[:, None, None])
    grey = 127 + 60 * waves + random.normal(0, 25, (n, 12, 12))
    return np.clip(grey, 0, 255).astype(np.uint8)[..., None], labels


_, PRIVATE, PRIVATE_LABELS = drawn([0, 1, 2], 400, 1)
POINTS, PUBLIC, PUBLIC_LABELS = drawn([0, 1, 2, 3, 3, 3], 800, 2)
IS_MINE = PUBLIC_LABELS < 3
STRIPES, STRIPE_LABELS = stripes([0, 1], 400, 1)
STRIPED, STRIPED_LABELS = stripes([0, 1, 2, 3], 600, 2)


def make(
    folder: Path, private: tuple[np.ndarray, np.ndarray | None], public: np.ndarray, family: str, **fields: Any
) -> SiteSettings:
    """Write a site's data, pool, teacher and site.yaml, and read the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planted_model.py").write_text(MODEL)
    arrays: dict[str, Any] = {} if private[1] is None else {"y": private[1], "names": np.array(NAMES)}
    np.savez(folder / "private.npz", x=private[0], **arrays)
    shutil.rmtree(folder / "pool", ignore_errors=True)
    Pool.build(from_arrays(public, None, (), where="test"), folder / "pool")
    raw = {
        "name": "site-1",
        "data": {"kind": "npz", "path": "private.npz"},
        "teacher": HOSTED,
        "policy": {"coverage": "f16"},
        "coverage": {"family": family},
        "pools": ["pool"],
        **fields,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(raw))
    return load_settings(folder / "site.yaml", SiteSettings)


def typed(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})


def loaded(settings: SiteSettings) -> LearnedCoverage:
    coverage = load_coverage(settings)
    assert coverage is not None
    return coverage


def record_of(settings: SiteSettings) -> CoverageRecord:
    record = read_record(settings)
    assert record is not None
    return record


def images_seen(settings: SiteSettings) -> int:
    """Learn, and return how many images the teacher has seen for it."""
    seen: list[int] = []
    learn_coverage(settings, on_images=lambda count, total: seen.append(count))
    return sum(seen)


@pytest.fixture(scope="module")
def black_box(tmp_path_factory: pytest.TempPathFactory) -> SiteSettings:
    """A site with a callable that has learned its coverage; tests do not change it."""
    folder = tmp_path_factory.mktemp("black-box")
    settings = make(folder, (PRIVATE, PRIVATE_LABELS), PUBLIC, "outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.delitem(sys.modules, "planted_model", raising=False)
        learn_coverage(settings)
    return settings


@pytest.fixture
def site(black_box: SiteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteSettings:
    """A copy of it that a test may change."""
    shutil.copytree(black_box.state.parent, tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "planted_model", raising=False)
    return load_settings(tmp_path / "site" / "site.yaml", SiteSettings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SiteSettings:
    """A site with a trained teacher; tests do not change it."""
    settings = make(tmp_path_factory.mktemp("trained"), (STRIPES, STRIPE_LABELS), STRIPED, "features", teacher=TRAIN)
    train_teacher(settings)
    return settings


def with_family(settings: SiteSettings, folder: Path, family: str, **teacher: Any) -> SiteSettings:
    """Return a trained site with a state folder of its own, another family and other teacher settings."""
    shutil.copytree(settings.state, folder / "state")
    coverage = settings.coverage.model_copy(update={"family": family})
    return settings.model_copy(update={"state": folder / "state", "coverage": coverage, **teacher})


# What is learned


def test_heads_on_a_black_box_s_outputs_rank_nearly_as_the_densities_do(site: SiteSettings) -> None:
    """The callable's outputs hold the point, so the best ranking there is is that of the ratio of the densities."""
    record, told = record_of(site), loaded(site).scores(PUBLIC)
    densities = norm.pdf(POINTS[:, None, :] - CENTRES).prod(axis=2)
    best = auroc(*((densities[:, :3].sum(axis=1) / densities[:, 3])[which] for which in (IS_MINE, ~IS_MINE)))
    assert auroc(told[IS_MINE], told[~IS_MINE]) > best - 0.02
    surest = load_teacher(site).log_probs(PUBLIC).max(axis=1)
    assert auroc(surest[IS_MINE], surest[~IS_MINE]) < best - 0.1  # so there was something to learn
    assert record.prior == pytest.approx(IS_MINE.mean(), abs=0.1)
    assert told.mean() == pytest.approx(IS_MINE.mean(), abs=0.1)
    assert (record.family, record.classes, record.held_out, record.warnings) == ("outputs", 3, 400, ())
    _, fresh, labels = drawn([0, 1, 2, 3, 3, 3], 600, 9)
    seen = loaded(site).scores(fresh)
    assert auroc(seen[labels < 3], seen[labels == 3]) > best - 0.04


@pytest.mark.parametrize(("family", "least"), [("features", 0.85), ("outputs", 0.7)])
def test_heads_on_a_trained_teacher_are_calibrated_on_what_it_has_not_learned_from(
    trained: SiteSettings, tmp_path: Path, family: str, least: float
) -> None:
    settings = with_family(trained, tmp_path, family)
    record = learn_coverage(settings)
    told = loaded(settings).scores(STRIPED)
    assert auroc(told[STRIPED_LABELS < 2], told[STRIPED_LABELS >= 2]) > least
    assert record.held_out == 80  # a fifth of 400, as teacher.holdout says
    assert record.family == family


def test_a_hosted_state_dict_has_features_too(trained: SiteSettings, tmp_path: Path) -> None:
    weights = trained.state / "teacher" / "model.safetensors"
    preprocessing = {"size": [12, 12], "channels": 1}
    hosted = {"kind": "state_dict", "architecture": "cnn3", "path": str(weights), "classes": NAMES[:2]}
    teacher = {**hosted, "preprocessing": preprocessing}
    settings = make(tmp_path, (STRIPES, STRIPE_LABELS), STRIPED, "features", teacher=teacher)
    assert learn_coverage(settings).held_out == 400
    told = loaded(settings).scores(STRIPED)
    assert auroc(told[STRIPED_LABELS < 2], told[STRIPED_LABELS >= 2]) > 0.85


def test_features_are_what_the_last_linear_layer_is_fed(trained: SiteSettings) -> None:
    teacher = load_teacher(trained)
    vectors = vectors_of(trained, teacher)
    last = safetensors.torch.load_file(trained.state / "teacher" / "model.safetensors")
    weight, bias = (last[next(n for n in reversed(list(last)) if last[n].shape == s)] for s in ((2, 128), (2,)))
    logits = vectors(STRIPED[:50]) @ weight.numpy().T + bias.numpy()
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert log_probs == pytest.approx(teacher.log_probs(STRIPED[:50]), abs=1e-4)


def test_data_without_labels_is_one_class(site: SiteSettings) -> None:
    settings = make(site.state.parent, (PRIVATE, None), PUBLIC, "outputs")
    record = learn_coverage(settings)
    told = loaded(settings).scores(PUBLIC)
    assert record.classes == 1
    assert auroc(told[IS_MINE], told[~IS_MINE]) > 0.9


def test_a_head_has_not_learned_from_the_images_that_it_scores() -> None:
    random = np.random.default_rng(0)
    private, pool = (random.normal(size=(n, 3)).astype(np.float32) for n in (100, 150))
    labels, parts = random.integers(0, 2, 100), (random.integers(0, PARTS, 100), random.integers(0, PARTS, 150))
    first = train_heads(private, labels, 2, pool, parts, 0.5, 1)
    asked, of_part = np.concatenate([private, pool]), np.concatenate(parts)
    for part in range(PARTS):
        changed = np.where((parts[0] == part)[:, None], 9.0, private).astype(np.float32)
        moved = np.where(parts[0] == part, 1 - labels, labels)
        other = train_heads(changed, moved, 2, pool, parts, 0.5, 1)
        same = first.scores(asked, of_part) == other.scores(asked, of_part)
        assert same[of_part == part].all()
        assert not same[of_part != part].any()


def test_scores_do_not_depend_on_the_batch(site: SiteSettings) -> None:
    coverage = loaded(site)
    whole = coverage.scores(PUBLIC[:300])
    parts = np.concatenate([coverage.scores(PUBLIC[a:b]) for a, b in ((0, 1), (1, 70), (70, 70), (70, 300))])
    assert parts == pytest.approx(whole, abs=1e-6)


# What cannot be learned from


@pytest.mark.parametrize("kind", ["callable", "torchscript", "onnx"])
def test_features_of_a_black_box_are_refused_as_the_settings_are_read(tmp_path: Path, kind: str) -> None:
    named = HOSTED if kind == "callable" else {**HOSTED, "kind": kind, "path": "model.bin"}
    teacher = {field: value for field, value in named.items() if field != "callable" or kind == "callable"}
    with pytest.raises(SettingsError, match=r"not " + kind + r"; take coverage\.family: outputs"):
        make(tmp_path, (PRIVATE, PRIVATE_LABELS), PUBLIC, "features", teacher=teacher)


def test_features_of_a_network_without_a_last_linear_layer_are_refused(trained: SiteSettings) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 9), nn.ReLU())
    scores = NetworkScores(network.eval(), 2, Preprocessing(), torch.device("cpu"))
    teacher = ScoringTeacher(("a", "b"), "0" * 64, "logits", "test", scores)
    with pytest.raises(CoverageError, match="no linear layer gives") as caught:
        vectors_of(trained, CalibratedTeacher(teacher, None, "none"))
    assert "coverage.family: outputs" in caught.value.hint


@pytest.mark.parametrize("found", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_the_teacher_s_error(found: float) -> None:
    vectors = Vectors("0" * 64, 2, lambda images: np.full((len(images), 2), found, np.float32))
    with pytest.raises(TeacherError, match="not finite"):
        vectors(PUBLIC[:3])
    assert vectors(PUBLIC[:0]).shape == (0, 2)


def test_a_teacher_that_says_the_same_of_every_image_is_a_reason_to_abstain(site: SiteSettings) -> None:
    same = {**HOSTED, "callable": "planted_model:same"}
    settings = make(site.state.parent, (PRIVATE, PRIVATE_LABELS), PUBLIC, "outputs", teacher=same)
    record = learn_coverage(settings)
    assert record.abstains == "the teacher's outputs are the same for every image"
    assert (load_coverage(settings), images_seen(settings)) == (None, 0)
    assert record.abstains in tell_coverage(settings)


def test_too_few_images_that_are_new_to_the_teacher_are_a_reason_to_abstain(tmp_path: Path) -> None:
    few = {**TRAIN, "holdout": 0.05, "fit": {**TRAIN["fit"], "epochs": 1}}  # type: ignore[dict-item]
    settings = make(tmp_path, (STRIPES, STRIPE_LABELS), STRIPED, "features", teacher=few)
    train_teacher(settings)
    record = learn_coverage(settings)
    assert record.abstains is not None
    assert record.abstains.startswith("20 private images that the teacher was not trained on are too few")
    assert "teacher.holdout" in record.abstains


def test_too_few_images_are_a_reason_to_abstain(site: SiteSettings) -> None:
    settings = make(site.state.parent, (PRIVATE[:199], PRIVATE_LABELS[:199]), PUBLIC, "outputs")
    assert "199 private images" in str(learn_coverage(settings).abstains)


def test_private_data_that_is_the_pool_is_refused(site: SiteSettings) -> None:
    settings = make(site.state.parent, (PUBLIC[:400], PRIVATE_LABELS), PUBLIC, "outputs")
    with pytest.raises(CoverageError, match="100% of the private images are in the pool"):
        learn_coverage(settings)


def test_data_that_the_teacher_was_not_trained_on_are_refused(trained: SiteSettings, tmp_path: Path) -> None:
    settings = with_family(trained, tmp_path, "features")
    np.savez(tmp_path / "other.npz", x=STRIPES, y=1 - STRIPE_LABELS, names=np.array(NAMES))
    assert settings.data is not None
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"path": tmp_path / "other.npz"})})
    with pytest.raises(TeacherError, match="not those that the teacher was trained on"):
        learn_coverage(other)


# Once, and again


def test_it_is_learned_once_and_to_the_same_bytes(site: SiteSettings) -> None:
    before = record_of(site)
    assert images_seen(site) == 0
    shutil.rmtree(site.state / "coverage")
    assert images_seen(site) == 400 + 800
    assert record_of(site) == before
    other = site.model_copy(update={"seed": 1})
    with pytest.raises(CoverageError, match="other settings or another seed"):
        load_coverage(other)
    learn_coverage(other)
    assert record_of(other).model != before.model


def test_another_teacher_s_coverage_does_not_load_and_is_learned_anew(site: SiteSettings) -> None:
    before = loaded(site).fingerprint
    other = {**HOSTED, "preprocessing": {"mean": [0.1], "std": [1.0]}}
    settings = make(site.state.parent, (PRIVATE, PRIVATE_LABELS), PUBLIC, "outputs", teacher=other)
    with pytest.raises(CoverageError, match="learned for another teacher") as caught:
        load_coverage(settings)
    assert "consilience site train" in caught.value.hint
    assert images_seen(settings) == 1200
    assert loaded(settings).fingerprint != before


def test_another_calibration_map_is_another_teacher_for_outputs_alone(trained: SiteSettings, tmp_path: Path) -> None:
    pairs = [with_family(trained, tmp_path / family, family) for family in ("features", "outputs")]
    for settings in pairs:
        learn_coverage(settings)
        teacher = load_teacher(settings)
        calibrate_teacher(settings)
        path = settings.state / "calibration" / "calibration.json"
        write_json(path, {**read_json(path), "method": "temperature", "map": {"temperature": 2.0}})
        assert load_teacher(settings).fingerprint != teacher.fingerprint
    assert load_coverage(pairs[0]) is not None
    with pytest.raises(CoverageError, match="learned for another teacher"):
        load_coverage(pairs[1])


def other_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "centre": torch.zeros(5)}


def one_missing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "scale"}


@pytest.mark.parametrize("change", [other_shape, one_missing])
def test_a_model_of_another_shape_does_not_load(
    site: SiteSettings, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    folder = site.state / "coverage"
    path = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    with pytest.raises(CoverageError, match="is not the model that"):
        load_coverage(site)
    write_json(folder / "coverage.json", {**read_json(folder / "coverage.json"), "model": sha256_file(path)})
    with pytest.raises(CoverageError, match="tensor"):
        load_coverage(site)


def test_a_model_that_gives_no_numbers_is_an_error_of_ours(site: SiteSettings) -> None:
    folder = site.state / "coverage"
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "scale": torch.full_like(tensors["scale"], torch.nan)}, path)
    write_json(folder / "coverage.json", {**read_json(folder / "coverage.json"), "model": sha256_file(path)})
    with pytest.raises(TeacherError, match="not finite"):
        loaded(site).scores(PUBLIC[:10])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ({"family": "pickle"}, CoverageError),
        ({"classes": -1}, CoverageError),
        ({"classes": 10**12}, CoverageError),
        ({"teacher": 7}, CoverageError),
        ({"teacher": "another"}, CoverageError),
        (None, StorageError),
    ],
)
def test_a_damaged_record_is_an_error_of_ours(
    site: SiteSettings, damage: dict[str, Any] | None, error: type[Exception]
) -> None:
    path = site.state / "coverage" / "coverage.json"
    if damage is None:
        path.write_text(path.read_text()[:40])
    else:
        write_json(path, {**read_json(path), **damage})
    with pytest.raises(error):
        load_coverage(site)


# What is told


def test_site_train_show_and_check_tell_the_family(site: SiteSettings) -> None:
    file = site.state.parent / "site.yaml"
    result = typed("site", "train", file, "--json")
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)["data"]["coverage"]
    assert card["description"] == "private data against the pool, heads on the teacher's outputs"
    assert "heads on the teacher's outputs: 0." in typed("site", "show", file).stdout
    rows = {row["check"]: row for row in json.loads(typed("site", "check", file, "--json").stdout)["data"]["rows"]}
    assert rows["coverage"]["found"].startswith("heads on the teacher's outputs: ")
    held = Site.load(file)
    assert held.coverage is not None
    assert held.coverage.fingerprint == card["fingerprint"]
