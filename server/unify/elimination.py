"""Potentials from flows: the linear system of one Newton step, solved without subtraction.

Lives here: elimination on graph Laplacians (Grassmann-Taksar-Heyman, or star-mesh transformation), batched.
Does not live here: where links and flows come from.

The system is sum_j h_ij (d_i - d_j) = sum_j f_ij with links h >= 0 symmetric and flows f antisymmetric. Only
differences of d mean anything; d_0 = 0. Why flows, and not their sums g_i = sum_j f_ij: two groups of sites
may hang together by a link of 1e-20 only, and rounding in g_i (1e-16) would then decide their ratio. A flow
is only as uncertain as its own link is small.
"""

from __future__ import annotations

import torch

PANEL = 32
"""Up to so many sites the batch is the vector; beyond, blocks of so many sites are eliminated together."""

_TINY = 1e-300


def potentials(links: torch.Tensor, flows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d (n, b), and the smallest pivot (b,): the weakest conductance between a site and those before it.

    links  (n, n, b) fp64, symmetric, non-negative, connected; the diagonal is not used. Overwritten.
    flows  (n, n, b) fp64, antisymmetric. Overwritten.
    """
    n = links.shape[0]
    if n <= PANEL:
        return _small(links, flows)
    inner = _large(links.permute(2, 0, 1).contiguous(), flows.permute(2, 0, 1).contiguous())
    return inner[0].t().contiguous(), inner[1]


def _small(links: torch.Tensor, flows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, _, batch = links.shape
    shares: list[torch.Tensor] = []
    gains: list[torch.Tensor] = []
    weakest = links.new_full((batch,), torch.inf)
    for k in range(n - 1, 0, -1):
        link, flow = links[k, :k], flows[k, :k]
        pivot = link.sum(0).clamp_(min=_TINY)
        share = link / pivot
        weakest = torch.minimum(weakest, pivot)
        shares.append(share)
        gains.append(flow.sum(0).div_(pivot))
        # The star around k becomes a mesh among its neighbours; each flow through k is shared out likewise.
        links[:k, :k].addcmul_(share[:, None], link[None])
        flows[:k, :k].addcmul_(share[:, None], flow[None]).addcmul_(flow[:, None], share[None], value=-1)
    out = links.new_zeros((n, batch))
    for k in range(1, n):
        out[k] = gains[n - 1 - k] + (shares[n - 1 - k] * out[:k]).sum(0)
    return out, weakest


def _large(links: torch.Tensor, flows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the batch first, (b, n, n): the bulk of the work is done by matrix products."""
    batch, n, _ = links.shape
    shares = torch.zeros_like(links)
    gains = links.new_zeros((batch, n))
    weakest = links.new_full((batch,), torch.inf)
    high = n
    while high > 1:
        low = max(high - PANEL, 0)
        for k in range(high - 1, max(low, 1) - 1, -1):
            link, flow = links[:, k, :k], flows[:, k, :k]
            pivot = link.sum(1, keepdim=True).clamp_(min=_TINY)
            share = link / pivot
            weakest = torch.minimum(weakest, pivot[:, 0])
            shares[:, k, :k] = share
            gains[:, k] = flow.sum(1) / pivot[:, 0]
            links[:, low:k, :k].addcmul_(share[:, low:k, None], link[:, None])
            mesh = flows[:, low:k, :k]
            mesh.addcmul_(share[:, low:k, None], flow[:, None]).addcmul_(flow[:, low:k, None], share[:, None], value=-1)
        panel = shares[:, low:high, :low].transpose(1, 2)
        links[:, :low, :low] += panel @ links[:, low:high, :low]
        through = panel @ flows[:, low:high, :low]
        flows[:, :low, :low] += through - through.transpose(1, 2)
        high = low
    out = torch.zeros_like(gains)
    for k in range(1, n):
        out[:, k] = gains[:, k] + (shares[:, k, :k] * out[:, :k]).sum(1)
    return out, weakest
