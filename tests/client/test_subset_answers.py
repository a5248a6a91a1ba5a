"""A part of the pool is answered as the whole is, bit for bit, and only what left is counted."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.client.explain import explain
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.common.errors import SettingsError
from consilience.common.pool import Pool
from consilience.common.protocol import Contract, Question
from consilience.common.samples_asked import drawn
from consilience.common.settings import JobSettings
from consilience.common.settings_file import load_settings
from consilience.common.subsets import subset_text
from helpers.small_site import CLASSES, ROW, SIZE, Fickle, about, make_pool, make_site


class Joint:
    """A teacher whose answer about an image depends on the batch that it is in: where batches differ, bits do."""

    classes, fingerprint = CLASSES, Fickle.fingerprint

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        """Return (n, 3) float32."""
        logits = images.reshape(len(images), -1)[:, :3] / 17 + images.mean() + len(images)
        return np.asarray(log_softmax(logits * [1, 2, 3], axis=1), np.float32)


def chosen(site: Site, pool: Pool, ids: list[int], **changes: Any) -> Question:
    """Return the question about these samples."""
    start, stop = min(ids), max(ids) + 1
    mask = np.isin(np.arange(start, stop), ids)
    return about(site, pool, start, stop, subset=None if mask.all() else subset_text(mask), **changes)


def cut(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    """Return the samples in questions, cut anywhere and in any order."""
    places = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)))) - {len(ids)})
    parts = [ids[low:high] for low, high in zip([0, *places], [*places, len(ids)], strict=True)]
    return data.draw(st.permutations([part for part in parts if part]))


@given(data=st.data())
def test_a_part_is_answered_as_the_whole_bit_for_bit_whatever_the_cut(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        pool = make_pool(Path(name))
        kind = data.draw(st.sampled_from(["log-probs", "coverage"]))
        changes: dict[str, Any] = {} if kind == "log-probs" else {"kind": kind, "encoding": "f16", "teacher": "e" * 64}
        width = ROW if kind == "log-probs" else 2
        teacher = Joint() if data.draw(st.booleans()) else Fickle()
        kept = isinstance(teacher, Fickle) or kind == "coverage"  # it never says the same twice
        with contextlib.closing(make_site(Path(name), teacher, coverage="f16")) as site:
            asked: set[int] = set()
            given_out: dict[int, bytes] = {}
            for _ in range(data.draw(st.integers(1, 3))):  # jobs whose parts overlap
                ids = sorted(data.draw(st.sets(st.integers(0, SIZE - 1), min_size=1)))
                for part in cut(data, ids):
                    answer = site.answer(chosen(site, pool, part, **changes)).data
                    assert len(answer) == len(part) * width
                    for at, sample in enumerate(part):
                        row = answer[at * width : (at + 1) * width]
                        assert given_out.setdefault(sample, row) == row
                asked |= set(ids)
                assert site.ledger.spent.lifetime == len(asked)
            told = [tuple(held) for row in site.ledger.rows() for held in row.entry.body["ranges"]]
            assert sorted(sample for low, high in told for sample in range(low, high)) == sorted(asked)
            whole = site.answer(about(site, pool, 0, SIZE, **changes)).data
        if not kept:
            with contextlib.closing(make_site(Path(name) / "other", teacher)) as fresh:
                make_pool(Path(name) / "other")
                whole = fresh.answer(about(fresh, pool, 0, SIZE, **changes)).data
        assert {sample: whole[sample * width : (sample + 1) * width] for sample in asked} == given_out


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def contract(pool: Pool, ids: list[int] | None, **changes: Any) -> Contract:
    subset = None if ids is None else subset_text(np.isin(np.arange(SIZE), ids))
    fields: dict[str, Any] = {"job": "job", "labels": CLASSES, "class_set": (0, 1, 2), "pools": (pool.digest,)}
    return Contract(**{**fields, "teacher": Fickle.fingerprint, "encoding": "f32", "subset": subset, **changes})


def test_limits_count_the_samples_that_are_asked_about(tmp_path: Path, pool: Pool) -> None:
    with contextlib.closing(make_site(tmp_path, limits={"per_job": 20})) as site:
        ids = list(range(1, 40, 2))
        site.agree(contract(pool, ids))
        with pytest.raises(RefusedError, match="limits"):
            site.agree(contract(pool, [*ids, 44]))
        with pytest.raises(RefusedError, match="limits"):
            site.agree(contract(pool, None))
        site.answer(chosen(site, pool, ids[:13]))
        site.agree(contract(pool, ids))  # of a run that goes on: what left does not count again
        site.answer(chosen(site, pool, ids))
        with pytest.raises(RefusedError, match="limits"):
            site.answer(chosen(site, pool, [*ids, 45]))
        assert site.ledger.spent.lifetime == 20


def test_limits_count_samples_that_are_chosen_later(tmp_path: Path, pool: Pool) -> None:
    """Which they are is not known yet: as many as can be new count, of those that are left."""
    with contextlib.closing(make_site(tmp_path, limits={"per_job": 20})) as site:
        ids = list(range(12))
        site.agree(contract(pool, ids, more=8))
        with pytest.raises(RefusedError, match="limits"):
            site.agree(contract(pool, ids, more=9))
    make_pool(tmp_path / "other")
    with contextlib.closing(make_site(tmp_path / "other", limits={"per_job": 36})) as site:
        site.answer(chosen(site, pool, [*ids[:6], *range(20, SIZE)], job="earlier"))
        site.agree(contract(pool, ids, more=SIZE))  # 6 of these, and the 8 that are left, are new


def test_more_samples_than_a_part_are_of_no_whole_pool(pool: Pool) -> None:
    with pytest.raises(ValueError, match="all are asked about"):
        contract(pool, None, more=1)


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        (subset_text(np.zeros(SIZE, np.bool_)), "has no sample"),
        (subset_text(np.ones(SIZE + 8, np.bool_)), "does not fit"),
        (subset_text(np.ones(SIZE + 1, np.bool_)), "does not fit"),
        ("!" * len(subset_text(np.ones(SIZE, np.bool_))), "does not fit"),
    ],
)
def test_a_contract_about_no_part_of_the_pool_is_refused(tmp_path: Path, pool: Pool, subset: str, words: str) -> None:
    with contextlib.closing(make_site(tmp_path)) as site, pytest.raises(RefusedError, match=words):
        site.agree(contract(pool, None, subset=subset))


def test_a_part_beyond_the_pool_is_refused(tmp_path: Path, pool: Pool) -> None:
    with contextlib.closing(make_site(tmp_path)) as site, pytest.raises(RefusedError, match="not in the pool"):
        site.answer(chosen(site, pool, [3, SIZE]))


def job(folder: Path, **ask: Any) -> JobSettings:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({"name": "job", "pool": "pool", "ask": {"encoding": "f32", **ask}}))
    return load_settings(file, JobSettings)


def test_a_person_is_told_how_much_of_the_pool_a_job_asks_about(tmp_path: Path, pool: Pool) -> None:
    asking = job(tmp_path, samples=20)
    ids = drawn(asking, SIZE)
    assert ids is not None
    others = sorted(set(range(SIZE)) - set(ids.tolist()))
    with contextlib.closing(make_site(tmp_path, limits={"per_job": 20})) as site:
        site.answer(chosen(site, pool, [int(ids[3]), *others[:5]], job="earlier"))
        found = explain(asking, site)
        (part,) = found.parts
        assert (part.samples, part.of, part.new, found.new) == (20, SIZE, 19, 19)
        assert part.words.endswith(f"of 20 of the 50 samples of pool {pool.digest[:12]}, 1 of them released before")
        assert found.refusal == ""
        whole = explain(job(tmp_path), site)
        assert (whole.parts[0].samples, whole.refusal[:17]) == (SIZE, "the site's limits")
        with pytest.raises(SettingsError, match=r"'ask\.samples' is 51; the pool has 50 samples; allowed: 1 to 50"):
            explain(job(tmp_path, samples=51), site)


def test_of_samples_that_are_chosen_later_a_person_is_told_how_many(tmp_path: Path, pool: Pool) -> None:
    asking = job(tmp_path, samples=20, choose="uncertainty", rounds=4)
    first = drawn(asking, SIZE)
    assert first is not None
    assert len(first) == 5
    with contextlib.closing(make_site(tmp_path, limits={"per_job": 45})) as site:
        site.answer(chosen(site, pool, sorted({*first.tolist(), *range(40)})[:45], job="earlier"))
        left = SIZE - site.ledger.spent.lifetime
        found = explain(asking, site)
        assert (found.parts[0].samples, found.parts[0].of) == (20, SIZE)
        assert found.new == min(15, left)
        assert found.refusal == ""
