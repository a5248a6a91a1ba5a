"""What a run's stages before judging left, as judging and reporting take it.

Does not live here: where it comes from (server/job), what is made of it (server/publishing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.common.cards import SiteCard
from consilience.common.data import ImageData
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.settings import JobSettings
from consilience.server.answered import CoverageStores, Usable
from consilience.server.answers import AnswerStore
from consilience.server.chosen import Chosen
from consilience.server.contract import RunContract
from consilience.server.labelling import Diagnostics
from consilience.server.labelling_top import Labels


@dataclass(frozen=True)
class Outcome:
    """What the stages before judging left: paths, settings, and the sites that answered anything about the pool."""

    run: Path
    settings: JobSettings
    pool: Pool
    test: ImageData | None
    contract: RunContract
    space: LabelSpace
    cards: Sequence[SiteCard]
    stores: Sequence[AnswerStore]
    coverage: CoverageStores
    samples: Usable
    test_stores: Sequence[AnswerStore] | None
    test_coverage: CoverageStores
    labels: Labels
    diagnostics: Diagnostics
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    failures: Mapping[str, str]
    """Site -> why it left samples unanswered."""
    chosen: Chosen
    other_share: float
    """How much of the unified labels' mass is on what the student does not tell apart."""
    summed: tuple[str, ...] | None = None
    """The sites whose answers are in a secure sum; None where sites answered openly."""
