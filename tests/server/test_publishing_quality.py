"""When the quality of a run's student can be estimated at all: by what hangs together of the answers that count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from consilience.common.cards import SiteCard
from consilience.common.encoding import encode
from consilience.common.labels import LabelSpace
from consilience.common.protocol import Answer, Question
from consilience.server.answered import Usable
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.publishing_quality import pool_quality
from consilience.server.quality import Quality
from consilience.server.robust import SiteTrust, Trust

DIGEST, POLICY, SIZE = "a" * 64, "c" * 16, 500
CLASSES = {"bridge": ["a", "b", "c", "d"], "one": ["a", "b"], "two": ["c", "d"]}
SPACE = LabelSpace.build(CLASSES)
HONEST = SiteTrust(agreement=0.9, sites=2, samples=90)


def estimated(folder: Path, bridge: SiteTrust | None = None, *, apart: int = 0, joined: bool = False) -> Quality:
    """Return the estimate where sites are calibrated and the student says what the labels say."""
    posterior = np.maximum(np.random.default_rng(2).dirichlet(np.full(4, 0.4), SIZE), 1e-6).astype(np.float32)
    posterior /= posterior.sum(axis=1, keepdims=True)
    stores, cards = [], []
    for site, held in zip(SPACE.sites, SPACE.class_sets, strict=True):
        rows = np.log(posterior[:, held])
        rows -= np.logaddexp.reduce(rows, axis=1)[:, None]
        about: dict[str, Any] = {"pool": DIGEST, "encoding": "f32", "teacher": DIGEST, "policy": POLICY}
        store = AnswerStore(folder / site, About(site=site, size=SIZE, classes=len(held), **about))
        store.append(Answer(Question(job="job", start=0, stop=SIZE, **about), encode(rows, "f32"), 0.0))
        stores.append(store)
        names = tuple(CLASSES[site])
        cards.append(
            SiteCard(name=site, classes=names, encodings=("f32",), teacher=DIGEST, description="", policy=POLICY)
        )
    trust = None if bridge is None else Trust(sites={"bridge": bridge, "one": HONEST, "two": HONEST})
    pool: Any = SimpleNamespace(take=lambda ids: ids)
    student: Any = SimpleNamespace(log_probs=lambda ids: posterior[ids])
    about_pool = (pool, SPACE, stores, cards, posterior, student, Usable(SIZE, None, {}))
    return pool_quality(*about_pool, 0, trust, apart=apart, joined=joined)


@pytest.mark.parametrize(
    ("bridge", "apart", "joined", "told"),
    [
        (None, 0, False, True),
        (HONEST, 0, False, True),
        (None, SIZE // 2, False, True),
        (None, SIZE // 2 + 1, False, False),
        (None, SIZE // 2 + 1, True, True),
        (HONEST.model_copy(update={"trust": 0.0, "left_out": ("a", "b", "c", "d")}), 0, False, False),
        (HONEST.model_copy(update={"left_out": ("a", "b")}), 0, False, False),
        (HONEST.model_copy(update={"left_out": ("a",)}), 0, False, True),
        (HONEST.model_copy(update={"left_out": ("a", "b")}), 0, True, True),
    ],
)
def test_nothing_is_estimated_where_the_answers_that_count_fall_apart(
    tmp_path: Path, bridge: SiteTrust | None, apart: int, joined: bool, told: bool
) -> None:
    found = estimated(tmp_path, bridge, apart=apart, joined=joined)
    assert (found.accuracy is not None) is told
    assert ("fall apart into components" in found.reason) is not told


def test_a_site_that_counts_less_says_nothing_of_the_labels(tmp_path: Path) -> None:
    assert estimated(tmp_path / "whole", HONEST).sites["bridge"].labels is not None
    assert "bridge" not in estimated(tmp_path / "half", HONEST.model_copy(update={"trust": 0.5})).sites
