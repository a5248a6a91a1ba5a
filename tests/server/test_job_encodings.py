"""A whole job in every encoding of answers: what the sites send is what the report says, and it is what was asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.common.cards import SiteCard
from consilience.common.data import from_arrays
from consilience.common.encoding import decode, encode
from consilience.common.errors import SettingsError
from consilience.common.files import read_json
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.protocol import Question
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings, parse_settings
from consilience.server.contract import objection
from consilience.server.job import Job
from consilience.server.unify import unify
from helpers.sites import CLASSES, DIGEST, POLICY, Sites, grid_of, honest, rows

SAMPLES = 40


def settings(folder: Path, encoding: str, **changes: Any) -> JobSettings:
    raw: dict[str, Any] = {
        "name": "job",
        "pool": "pool",
        "ask": {"encoding": encoding, "question_size": 16},
        "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32", "augment": False}},
        **changes,
    }
    return parse_settings(raw, JobSettings, source="job.yaml", folder=folder)


@pytest.mark.parametrize(
    ("encoding", "width", "numbers", "precision", "words"),
    [
        ("f16", 6, 3, "16-bit (f16)", "one log-probability for each class"),
        ("u8", 3, 3, "8-bit (u8)", "one log-probability for each class"),
        ("top-1", 5, 3, "the 1 largest, 16-bit (top-1)", "likeliest classes, at most 1, with"),
        ("top-2", 8, 5, "the 2 largest, 16-bit (top-2)", "likeliest classes, at most 2, with"),
        ("top-7", 9, 6, "the 7 largest, 16-bit (top-7)", "likeliest classes, at most 7, with"),
        ("top-1-u8", 1, 2, "the 1 largest, 8-bit (top-1-u8)", "likeliest classes, at most 1, with"),
        ("top-7-u8", 3, 6, "the 7 largest, 8-bit (top-7-u8)", "likeliest classes, at most 7, with"),
        ("votes", 1, 1, "the largest class alone (votes)", "which of the site's classes is the likeliest"),
    ],
)
def test_a_job_in_an_encoding_says_what_left_the_sites(
    tmp_path: Path, encoding: str, width: int, numbers: int, precision: str, words: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 16, 16), np.uint8)
    Pool.build(from_arrays(pixels, None, (), where="test"), tmp_path / "pool")
    run = tmp_path / "run"
    run.mkdir()
    dump_settings(settings(tmp_path, encoding), run / "job.yaml")
    with grid_of(Sites({"one": honest, "two": honest})) as grid, Reporter(quiet=True) as reporter:
        Job.open(run, reporter).do(grid)
    report = read_json(run / "report.json")
    assert [(site["precision"], site["answers"], site["bytes"]) for site in report["sites"]] == [
        (encoding, SAMPLES, SAMPLES * width)
    ] * 2
    assert report["settings"]["ask"]["encoding"] == encoding
    assert f"<small>as {encoding}</small>" in (run / "report.html").read_text()
    card = re.sub(r"\\(.)", r"\1", (run / "card.md").read_text())
    assert f"| one | {SAMPLES} | {numbers} | {precision} | {SAMPLES * width} " in card
    assert words in card
    question = Question(job="job", pool=DIGEST, start=0, stop=SAMPLES, encoding=encoding, teacher=DIGEST, policy=POLICY)
    sent = decode(encode(rows(question), encoding), SAMPLES, CLASSES, encoding)
    assert np.allclose(np.load(run / "labels" / "q.npy"), unify([sent, sent], [(0, 1, 2)] * 2).probs, atol=1e-6)


@pytest.mark.parametrize(
    ("allowed", "asked", "told"),
    [
        (("f16", "u8", "votes"), "f32", "f16, u8, top-K, top-K-u8, votes"),
        (("u8", "votes"), "top-3", "u8, top-K-u8, votes"),
        (("top-3", "votes"), "top-4", "top-1 to top-3, top-1-u8 to top-3-u8, votes"),
        (("votes",), "u8", "votes"),
    ],
)
def test_a_site_whose_policy_is_coarser_objects(
    tmp_path: Path, allowed: tuple[str, ...], asked: str, told: str
) -> None:
    card = SiteCard(name="one", classes=("a", "b"), encodings=allowed, teacher=DIGEST, description="", policy=POLICY)
    assert objection(settings(tmp_path, asked), card).endswith(f"site one allows: {told}")
    assert objection(settings(tmp_path, allowed[0]), card) == ""


def test_a_simulation_asks_what_its_policy_allows(tmp_path: Path) -> None:
    simulation = {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "partition": {"kind": "class-lists", "classes": [[0, 1]]},
        "teachers": [{"kind": "train", "architecture": "cnn3"}],
        "policy": {"precision": "top-3"},
    }
    assert settings(tmp_path, "top-2", pool=None, simulation=simulation).ask.encoding == "top-2"
    with pytest.raises(
        SettingsError,
        match=r"ask\.encoding is 'u8'; simulation\.policy allows: top-1 to top-3, top-1-u8 to top-3-u8, votes",
    ):
        settings(tmp_path, "u8", pool=None, simulation=simulation)
