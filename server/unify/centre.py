"""CE with coverage, the convex core: a weighted centre, by Newton on masses and their prices at once.

Lives here: the start, the iteration, what "converged" means. Does not live here: where masses come from
(`covered`), sites without coverage (`partly`). The derivation is in docs/unify.md.

For S owner sets T with masses A_T and n sites with d_i, all positive, it minimises over q on the simplex of sets
    - sum_T A_T log q_T - sum_i d_i log r_i + sum_T b_T q_T,      r_i = sum of q_T over the sets without i.
With prices s_T = b_T + mu + sum of y_i over T the minimum is where q_T s_T = A_T and r_i y_i = d_i. For any q and
any (mu, y) with positive prices, value minus minimum is at most
    gap = sum_T A_T (t - 1 - log t)(q_T s_T / A_T) + sum_i d_i (t - 1 - log t)(r_i y_i / d_i),
which is convex in (q, mu, y) together, and which every step decreases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from consilience.server.unify.sparse import Sparse

LEAST = 1e-10
"""A set's mass counts as at least this share of all: a set that everything else leaves the mass to gets it anyway.
Masses of labels move by less than its square root, and by that much only at the very edge."""

TOLERANCE = 1e-9
"""Converged: every product q_T s_T and r_i y_i is its target up to this share. The gap is then below its square."""

MAX_STEPS = 200

_FIRST_LEAST = 1e-2  # the floor that the iteration begins with, so that no mass starts at the edge
_NARROWER = 1e-2
_NEAR = 0.5
_TO_BOUNDARY = 0.99
_HALVINGS = 40
_RIDGE = 1e-16
_EM_STEPS = 3


@dataclass(frozen=True)
class Frame:
    """Who is in which set: S sets, n sites with coverage first, then m without."""

    inside: torch.Tensor
    """(n + m, S) 1 where the site is in the set."""
    outside: torch.Tensor
    """(n, S) 1 where it is not."""
    links: Sparse
    """(1 + n + m)^2 x S: row (i, j) adds up the sets that hold both, 0 standing for all sets."""
    covered: int
    """n."""

    def gram(self, values: torch.Tensor) -> torch.Tensor:
        """(b, k, k) with k = 1 + n + m: the sums over sets that hold both, of values (S, b)."""
        k = 1 + int(self.inside.shape[0])
        return (self.links @ values).view(k, k, -1).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Point:
    """q, s (S, b); r, y (n, b): masses and prices of sets, masses outside sites and their prices."""

    q: torch.Tensor
    s: torch.Tensor
    r: torch.Tensor
    y: torch.Tensor

    def select(self, rows: torch.Tensor) -> Point:
        """The same for some samples of the block."""
        return Point(*(part.index_select(1, rows) for part in (self.q, self.s, self.r, self.y)))

    def put(self, rows: torch.Tensor, other: Point) -> None:
        """Overwrite some samples of the block."""
        self.q[:, rows], self.s[:, rows], self.r[:, rows], self.y[:, rows] = other.q, other.s, other.r, other.y


@dataclass(frozen=True)
class Centre:
    """The point reached, steps (b,) int32, converged (b,) bool, residual (b,): see `residual_of`."""

    point: Point
    steps: torch.Tensor
    converged: torch.Tensor
    residual: torch.Tensor


def start(frame: Frame, sets: torch.Tensor, sites: torch.Tensor, linear: torch.Tensor) -> Point:
    """A point inside: a few steps of expectation-maximisation, and prices high enough for every set."""
    total = sets.sum(0) + sites.sum(0)
    q = sets + _FIRST_LEAST * total
    q = q / q.sum(0)
    for _ in range(_EM_STEPS):
        q = q * (frame.outside.t() @ (sites / (frame.outside @ q))) + sets + _FIRST_LEAST * total
        q = q / q.sum(0)
    r = frame.outside @ q
    y = sites.clamp(min=_FIRST_LEAST * total) / r
    s = linear - frame.outside.t() @ y
    level = torch.maximum(total - (linear * q).sum(0), 0.05 * total - s.amin(0))
    return Point(q, s + level, r, y)


def moved(point: Point, change: torch.Tensor) -> Point:
    """The same point after b has changed by (S, b), with all prices raised alike until none falls by much."""
    raised = (-0.9 * point.s - change).amax(0).clamp(min=0.0)
    return Point(point.q, point.s + change + raised, point.r, point.y)


def centre(
    frame: Frame,
    sets: torch.Tensor,
    sites: torch.Tensor,
    point: Point,
    *,
    warm: bool = False,
    max_steps: int = MAX_STEPS,
) -> Centre:
    """From `point`, whose prices carry b, to the minimum. A warm point is taken to be near it."""
    batch, device = sets.shape[1], sets.device
    total = sets.sum(0) + sites.sum(0)
    sets, sites = torch.maximum(sets, LEAST * total), torch.maximum(sites, LEAST * total)
    everything = sets, sites
    out = Point(*(part.clone() for part in (point.q, point.s, point.r, point.y)))
    steps = torch.zeros(batch, dtype=torch.int32, device=device)
    converged = torch.zeros(batch, dtype=torch.bool, device=device)
    rows = torch.arange(batch, device=device)
    active = torch.ones_like(converged)
    floor = torch.full_like(total, LEAST if warm else _FIRST_LEAST)
    for step in range(max_steps + 1):
        products = point.q * point.s, point.r * point.y
        real = torch.maximum(_off(products[0], sets), _off(products[1], sites))
        done = real <= TOLERANCE
        stop = active & (done | ~real.isfinite())
        if step == max_steps:
            stop = active
        if bool(stop.any()):
            where = torch.nonzero(stop)[:, 0]
            out.put(rows[where], point.select(where))
            steps[rows[where]], converged[rows[where]] = step, done[where]
            active = active & ~stop
            keep = torch.nonzero(active)[:, 0]
            if keep.numel() == 0:
                break
            # As in `dual`: samples that are done are carried along, unread, until they are half of the block.
            if 2 * keep.numel() <= active.numel():
                point, rows, floor, active = point.select(keep), rows[keep], floor[keep], active[keep]
                sets, sites, total = sets[:, keep], sites[:, keep], total[keep]
                products = products[0][:, keep], products[1][:, keep]
        # The floor under the targets falls as soon as the iteration has come near them: from far away, a mass
        # that is nearly nothing would be driven against the edge and cripple every later step.
        aims = torch.maximum(sets, floor * total), torch.maximum(sites, floor * total)
        near = torch.maximum(_off(products[0], aims[0]), _off(products[1], aims[1])) <= _NEAR
        floor = torch.where(near, (floor * _NARROWER).clamp(min=LEAST), floor)
        point = _step(frame, torch.maximum(sets, floor * total), torch.maximum(sites, floor * total), point, total)
    return Centre(out, steps, converged, residual_of(*everything, out))


def residual_of(sets: torch.Tensor, sites: torch.Tensor, point: Point) -> torch.Tensor:
    """(b,) the largest difference between a mass of labels and the mass that its price stands for."""
    wrong = (point.q - sets / point.s).abs().amax(0)
    if sites.shape[0] == 0:
        return wrong
    return torch.maximum(wrong, (point.r - sites / point.y).abs().amax(0))


def curvature(frame: Frame, point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    """The Gram matrix (b, k, k) of q / s, see `Frame.gram`, and the Newton matrix (b, 1 + n, 1 + n)."""
    gram = frame.gram(point.q / point.s)
    size = 1 + frame.covered
    matrix = gram[:, :size, :size].clone()
    matrix.diagonal(dim1=1, dim2=2)[:, 1:].add_((point.r / point.y).t())
    return gram, matrix


def solve_positive(matrix: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """matrix^-1 given for symmetric (b, k, k) and (b, k, j), and where the matrix was positive (b,)."""
    unit = torch.rsqrt(matrix.diagonal(dim1=1, dim2=2).clamp(min=1e-300))
    scaled = matrix * unit[:, :, None] * unit[:, None]
    scaled.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    factor, info = torch.linalg.cholesky_ex(scaled)
    good = info == 0
    if not bool(good.all()):
        # Rounding has eaten a pivot: a larger ridge still gives a direction that descends.
        scaled.diagonal(dim1=1, dim2=2).add_(1e-9)
        again, info = torch.linalg.cholesky_ex(scaled)
        again[info != 0] = torch.eye(again.shape[1], dtype=again.dtype, device=again.device)
        factor = torch.where(good[:, None, None], factor, again)
    return torch.cholesky_solve(given * unit[:, :, None], factor) * unit[:, :, None], good


def _off(product: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """(b,) the largest |product / goal - 1|."""
    return (product / goal - 1.0).abs().amax(0) if goal.shape[0] > 0 else torch.zeros_like(product.sum(0))


def _step(frame: Frame, sets: torch.Tensor, sites: torch.Tensor, point: Point, total: torch.Tensor) -> Point:
    """One Newton step, cut short where it would leave the inside or not decrease the gap."""
    q, s, r, y = point.q, point.s, point.r, point.y
    n = frame.covered
    _, matrix = curvature(frame, point)
    missing = sets / s - q
    given = torch.cat([missing.sum(0, keepdim=True), sites / y - r + frame.inside[:n] @ missing])
    solved = solve_positive(matrix, given.t()[:, :, None])[0][:, :, 0].t()
    dy = solved[1:]
    ds = solved[:1] + frame.inside[:n].t() @ dy
    dq = missing - q / s * ds
    dr = frame.outside @ dq
    furthest = torch.stack([_reach(a, b) for a, b in ((q, dq), (s, ds), (r, dr), (y, dy))]).amin(0)
    length = (_TO_BOUNDARY * furthest).clamp(max=1.0)
    before = _gap(sets, q * s) + _gap(sites, r * y)
    for _ in range(_HALVINGS):
        after = _gap(sets, (q + length * dq) * (s + length * ds)) + _gap(sites, (r + length * dr) * (y + length * dy))
        worse = ~(after <= before + 1e-20 * total)
        if not bool(worse.any()):
            break
        length = torch.where(worse, 0.5 * length, length)
    new = q + length * dq
    new = new / new.sum(0)
    return Point(new, s + length * ds, frame.outside @ new, y + length * dy)


def _reach(value: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """(b,) how many steps until the first value is 0."""
    if value.shape[0] == 0:
        return torch.full_like(value.sum(0), torch.inf)
    return torch.where(step < 0, -value / step, torch.inf).amin(0)


def _gap(goal: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    off = product / goal - 1.0
    return (goal * (off - torch.log1p(off))).sum(0)
