"""Unified labels that are not written: rows are solved from the answers whenever somebody looks at them.

Lives here: such rows, for students that do not learn unified labels and look at few of them or once. Does not live
here: the first pass over all samples, which tells how unification went (server/labelling).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.common.labels import LabelSpace
from consilience.server.answered import CoverageStores, block_size, blocks
from consilience.server.answers import AnswerStore
from consilience.server.solvers import Solvers
from consilience.server.unify.sharpen import sharpened


class SolvedRows:
    """Labels (n, L): `rows[ids]` are those of the samples `ids` (b,) ascending, (b, L) float32, solved anew each time.

    Of a sample that no site answered they are zero. `coverage` is what is believed of it, labels made with it are taken
    to the power of `exponent`.
    """

    def __init__(
        self,
        space: LabelSpace,
        stores: Sequence[AnswerStore],
        coverage: CoverageStores | None,
        solvers: Solvers,
        exponent: float | None,
    ) -> None:
        self._space, self._stores, self._coverage = space, stores, coverage
        self._solvers, self._exponent = solvers, exponent
        self.shape = stores[0].about.size, len(space)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Any) -> NDArray[np.float32]:
        at = np.asarray(ids, np.int64)
        out = np.zeros((len(at), self.shape[1]), np.float32)
        for block in blocks(self._stores, block_size(self._space), self._coverage, at, stored=True):
            found = self._solvers.solve(block)
            probs = found.labels.probs
            if found.coverage is not None:
                probs = sharpened(probs, self._exponent)
            out[np.searchsorted(at, block.ids)] = found.kept.spread(probs, self._space)
        return out
