"""Two small operations on tensors whose last dimension is the batch.

Lives here: sparse matrices and the maximum over groups of rows. Does not live here: what they stand for.
"""

from __future__ import annotations

from copy import copy

import numpy.typing as npt
import torch

_DENSE = 4
"""A matrix of which more than one entry in so many is not zero is multiplied faster as a dense one."""


class Sparse:
    """A fixed sparse matrix (r, c) in fp64, to be multiplied with dense (c, b) blocks of the same type."""

    def __init__(
        self,
        rows: npt.ArrayLike,
        columns: npt.ArrayLike,
        shape: tuple[int, int],
        device: torch.device,
        values: npt.ArrayLike | None = None,
    ) -> None:
        index = torch.stack([torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)])
        entries = (
            torch.ones(index.shape[1], dtype=torch.float64)
            if values is None
            else torch.as_tensor(values, dtype=torch.float64)
        )
        # Checked on purpose: an index out of range would read foreign memory in the product.
        matrix = torch.sparse_coo_tensor(index, entries, shape, check_invariants=True)
        matrix = matrix.coalesce().to(device)
        self._dense = shape[0] * shape[1] <= _DENSE * matrix._nnz()
        self._matrix = matrix.to_dense() if self._dense else matrix

    def to(self, dtype: torch.dtype) -> Sparse:
        """The same in another type."""
        other = copy(self)
        other._matrix = self._matrix.to(dtype)
        return other

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._matrix @ block if self._dense else torch.sparse.mm(self._matrix, block)
        return product


def group_max(block: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, b): the maximum over the rows of `block` (r, b) that belong to each group; `group` (r,)."""
    out = block.new_full((groups, block.shape[1]), -torch.inf)
    return out.scatter_reduce(0, group[:, None].expand_as(block), block, "amax")
