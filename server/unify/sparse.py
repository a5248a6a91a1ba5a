"""Two small operations on tensors whose last dimension is the batch.

Lives here: sparse matrices and the maximum over groups of rows. Does not live here: what they stand for.
"""

from __future__ import annotations

import numpy.typing as npt
import torch


class Sparse:
    """A fixed sparse matrix (r, c) in fp64, to be multiplied with dense (c, b) blocks."""

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
        self._matrix = matrix.coalesce().to(device)

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.sparse.mm(self._matrix, block)
        return product


def group_max(block: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(groups, b): the maximum over the rows of `block` (r, b) that belong to each group; `group` (r,)."""
    out = block.new_full((groups, block.shape[1]), -torch.inf)
    return out.scatter_reduce(0, group[:, None].expand_as(block), block, "amax")
