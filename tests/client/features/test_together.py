"""Several taps of one pass: the same bytes, fewer passes, no more memory than allowed, and whose fault a failure is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.client.features import learn_bases, together
from consilience.client.features.network_layers import NetworkLayers
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.client.teacher import load_teacher
from consilience.common.pool import Pool
from consilience.common.protocol import Contract, Question
from helpers.feature_site import CALLABLE, CLASSES, SIZE, hosted, make_pool, make_settings

NAMES = ("layer1", "layer2", "layer3", "penultimate")
TAPS: dict[str, Any] = {"*": {"size": 4, "channels": 8}, "penultimate": {}}
BATCHES = -(-SIZE // 16)
Opening = Callable[..., Site]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path / "pool")


@pytest.fixture
def opening(tmp_path: Path, pool: Pool) -> Iterator[Opening]:
    """opening(name, taps, ...) makes a site of its own state."""
    sites: list[Site] = []

    def make(name: str, taps: dict[str, Any] | None = None, **changes: Any) -> Site:
        settings = make_settings(tmp_path / name, TAPS if taps is None else taps, pools=[str(pool.folder)], **changes)
        learn_bases(settings, load_teacher(settings))
        sites.append(Site.load(tmp_path / name / "site.yaml"))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The layers of each pass over a batch, once the site is ready."""
    seen: list[list[str]] = []
    real = NetworkLayers.features

    def features(self: NetworkLayers, images: Any, names: Any) -> Any:
        seen.append(list(names))
        return real(self, images, names)

    monkeypatch.setattr(NetworkLayers, "features", features)
    return seen


def agreed(site: Site, pool: Pool, names: tuple[str, ...] = NAMES) -> None:
    asked = Contract(
        job="job", labels=CLASSES, class_set=(0, 1, 2), pools=(pool.digest,), encoding="f16",
        teacher=site.teacher.fingerprint, features=names,
    )  # fmt: skip
    site.agree(asked)


def told(site: Site, pool: Pool, names: tuple[str, ...] = NAMES, step: int = SIZE) -> dict[str, bytes]:
    """What the site answers, asked as the server asks: of each range about every tap."""
    found = dict.fromkeys(names, b"")
    for start in range(0, SIZE, step):
        for tap in (tap for tap in site.taps if tap.card.name in names):
            question = Question(
                job="job", pool=pool.digest, start=start, stop=min(start + step, SIZE), kind="features",
                encoding="f16", teacher=tap.card.fingerprint, policy=site.settings.policy.version,
            )  # fmt: skip
            found[tap.card.name] += site.answer(question).data
    return found


def test_all_taps_of_a_job_cost_one_pass_and_are_the_same_bytes(
    pool: Pool, opening: Opening, passes: list[list[str]]
) -> None:
    alone = opening("alone")
    passes.clear()
    expected = told(alone, pool)  # no contract says what a job asks for
    assert len(passes) == 4 * BATCHES
    assert all(len(names) == 1 for names in passes)
    for step in (SIZE, 20):
        site = opening(f"together-{step}")
        agreed(site, pool)
        passes.clear()
        assert told(site, pool, step=step) == expected
        assert all(sorted(names) == list(NAMES) for names in passes if len(names) > 1)
        assert len(passes) == (BATCHES if step == SIZE else BATCHES + 2)  # two batches stand in two questions


def test_taps_that_no_job_asks_for_are_not_computed(pool: Pool, opening: Opening, passes: list[list[str]]) -> None:
    site = opening("site")
    agreed(site, pool, ("layer1", "layer3"))
    passes.clear()
    told(site, pool, ("layer1", "layer3"))
    assert passes == [["layer1", "layer3"]] * BATCHES
    passes.clear()
    told(site, pool, ("layer2",))
    assert passes == [["layer2"]] * BATCHES


@pytest.mark.parametrize("bound", ["MOST_BYTES", "MOST_PASS_BYTES"])
def test_without_room_each_tap_costs_a_pass_and_is_the_same(
    pool: Pool, opening: Opening, passes: list[list[str]], monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    expected = told(opening("alone"), pool)
    monkeypatch.setattr(together, bound, 1)
    site = opening("site")
    agreed(site, pool)
    passes.clear()
    assert told(site, pool) == expected
    assert len(passes) == 4 * BATCHES
    assert site.encoder.together._held == {}


def test_what_is_kept_stays_within_its_bound_and_makes_room(
    pool: Pool, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_batch = 16 * 8 * 16 * 4
    monkeypatch.setattr(together, "MOST_BYTES", 3 * a_batch)
    site = opening("site")
    agreed(site, pool)
    held = site.encoder.together
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(30):  # batches of which nobody asks for another tap
        held.values(site.taps[0], random.integers(0, 256, (16, 16, 16, 1), np.uint8))
        kept = sum(rows.nbytes for rows in held._held.values())
        assert kept == held._bytes <= 3 * a_batch
        seen |= held._held.keys()
    assert len(seen) > 8  # the first ones did not stay for ever


def test_a_tap_that_fails_does_so_when_it_is_asked_about(
    tmp_path: Path, pool: Pool, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "feature_model.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("feature_model", None)
    taps: dict[str, Any] = {"maps": {}, "means": {}}
    for number, gives in enumerate(({"means": np.full((16, 3), np.nan, np.float32)}, {"means": "nothing"})):
        site = opening(f"site-{number}", taps, teacher=hosted("model"))
        agreed(site, pool, ("maps", "means"))
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["feature_model"].Model, "gives", gives)
            question = Question(
                job="job", pool=pool.digest, start=0, stop=16, kind="features", encoding="f16",
                teacher=site.taps[0].card.fingerprint, policy=site.settings.policy.version,
            )  # fmt: skip
            assert site.answer(question).data
            with pytest.raises(RefusedError, match="tap means gave no usable answer"):
                site.answer(question.model_copy(update={"teacher": site.taps[1].card.fingerprint}))
    sys.modules.pop("feature_model", None)
