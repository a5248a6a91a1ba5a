"""What an answer store is about (server/answers), and its rows by kind and encoding.

Does not live here: the encodings themselves (common/encoding), the files.
"""

from __future__ import annotations

from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from consilience.common.cards import SiteCard
from consilience.common.encoding import (
    check,
    check_features,
    coverage_bytes,
    coverage_values,
    decode_coverage,
    feature_bytes,
    feature_values,
    row_bytes,
    unpack,
)
from consilience.common.protocol import Kind
from consilience.common.records import Digest
from consilience.common.settings import CoverageEncoding, Encoding, FeatureEncoding, JobSettings


class About(BaseModel):
    """What a store's answers are about; another about is another store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    pool: Digest
    size: int = Field(ge=0)
    """Samples of the pool, or of the part of it that is asked about."""
    teacher: Digest
    """Fingerprint of what answers: of the teacher, of the coverage, or of the tap."""
    policy: str
    kind: Kind = "log-probs"
    encoding: Encoding
    """Of coverage only a `CoverageEncoding`, of features a `FeatureEncoding`."""
    classes: int = Field(ge=1)
    """Numbers a row: the site's classes; 1 for coverage, `TapCard.values` for features."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample's answer."""
        if self.kind == "coverage":
            return coverage_bytes(cast(CoverageEncoding, self.encoding))
        if self.kind == "features":
            return feature_bytes(self.classes, cast(FeatureEncoding, self.encoding))
        return row_bytes(self.classes, self.encoding, odds=self.kind == "log-odds")

    def need_rows(self, data: bytes, rows: int) -> None:
        """Raise `ProtocolError` unless `data` are so many rows that an honest site may have sent."""
        if self.kind == "coverage":
            decode_coverage(data, rows, cast(CoverageEncoding, self.encoding))
        elif self.kind == "features":
            check_features(data, rows, self.classes, cast(FeatureEncoding, self.encoding))
        else:
            check(data, rows, self.classes, self.encoding, odds=self.kind == "log-odds")

    def decode(self, raw: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Decode stored rows into `out`; they were checked when they arrived, and their SHA-256 says they are those."""
        if self.kind == "coverage":
            out[:, 0] = coverage_values(raw, cast(CoverageEncoding, self.encoding))
        elif self.kind == "features":
            out[:] = feature_values(raw.reshape(len(out), self.row_bytes), cast(FeatureEncoding, self.encoding))
        else:
            unpack(raw, self.encoding, out, odds=self.kind == "log-odds")


def coverage_encoding(job: JobSettings, card: SiteCard) -> CoverageEncoding | None:
    """Return the encoding in which a site is asked for coverage, the finest it allows; None when it is not asked."""
    if card.coverage is None or not job.asks_coverage:
        return None
    offered = card.coverage.encodings
    return next(encoding for encoding in get_args(CoverageEncoding) if encoding in offered)
