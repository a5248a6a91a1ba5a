"""One process of several that teach one head, each its share of a batch: `torchrun ... concentrated_process.py FOLDER`.

Writes the gradients that the processes agree on to FOLDER/RANK.npz; alone, those of the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from consilience.common.settings import Head
from consilience.server.student.concentrated_head import ConcentratedHead, HeadPlan, verticals_in
from consilience.server.student.sparse_loss import SparseSigmoid, SparseTargets

BATCH, BOTTLENECK, SIZES, KEEP = 8, 6, [5, 3, 4], 3


def main(folder: Path) -> None:
    """Do one step up to the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, share = dist.get_rank(), BATCH // dist.get_world_size()
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    head = Head(kind="fc-sc", first=7, second=5, shared=2, scaling="vertical")
    plan = HeadPlan(head=head, verticals=verticals_in(SIZES))
    network = ConcentratedHead(plan, BOTTLENECK)
    network.in_parts = True
    features = torch.randn(BATCH, BOTTLENECK)
    starts = np.cumsum([0, *SIZES])[random.integers(len(SIZES), size=BATCH)]
    labels = starts[:, None].astype(np.int32) + np.arange(KEEP, dtype=np.int32)
    targets = SparseTargets(labels, random.dirichlet(np.ones(KEEP), BATCH).astype(np.float32))
    loss = SparseSigmoid(targets, list(plan.verticals.values()), torch.device("cpu"))
    ids = torch.arange(rank * share, (rank + 1) * share)
    parallel = DistributedDataParallel(network)  # named: what it hooks goes with it
    torch.autograd.backward(loss(parallel(features[ids]), ids))
    found = {name: held.grad.numpy() for name, held in network.named_parameters() if held.grad is not None}
    np.savez(folder / f"{rank}.npz", allow_pickle=False, **found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
