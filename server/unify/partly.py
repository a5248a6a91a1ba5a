"""CE where some sites give no coverage, or coverage that is believed in part: the convex core inside a loop over them.

Lives here: the loop, its safeguard, what "converged" means for it. Does not live here: the core (`centre`).

A site k adds w_k log q(L_k), w_k being the weight of its plain term, which is concave. For any x_k > 0 it is at most
x_k q(L_k) - w_k log x_k plus a constant, with equality at x_k = w_k / q(L_k): for fixed x the core can solve what is
left. Setting x to w / q(L) again and again is minorise-maximise, monotone but slow. V(x), the least value for
given x, has a gradient and a Hessian in log x that cost no more than one more system of linear equations, so steps
are Newton's; where V is not convex, those of its curvatures' sizes. A step after which the value rose is not taken:
minorise-maximise goes instead, and the next reaches less far.
"""

from __future__ import annotations

import torch

from consilience.server.unify.centre import Centre, Frame, Point, centre, curvature, moved, solve_positive, start

STEP_TOLERANCE = 1e-7
"""Converged: V is convex here and its Newton step moves no log x by more than this."""

MAX_ROUNDS = 50

_LONGEST = 3.0  # of log x in one round
_CORE_STEPS = 50  # in one round, from near
_NOISE = 1e-13
_FLATTEST = 1e-3  # of a curvature where V is not convex, over the largest


def solve(
    frame: Frame, sets: torch.Tensor, sites: torch.Tensor, weights: torch.Tensor, max_rounds: int = MAX_ROUNDS
) -> Centre:
    """Masses of sets for A (S, b), d (n, b) and the weights (m, 1) of the plain terms."""
    plain = frame.inside[frame.covered :]
    if plain.shape[0] == 0:
        return centre(frame, sets, sites, start(frame, sets, sites, torch.zeros_like(sets)))
    total = sets.sum(0) + sites.sum(0)
    x = weights / (plain @ start(frame, sets, sites, torch.zeros_like(sets)).q)
    found = centre(frame, sets, sites, start(frame, sets, sites, plain.t() @ x))
    point, steps = found.point, found.steps
    converged, residual = torch.zeros_like(found.converged), found.residual
    value = objective(frame, sets, sites, weights, point)
    rows = torch.arange(sets.shape[1], device=sets.device)
    inner, cautious, stuck = found.converged, torch.zeros_like(converged), torch.zeros_like(converged)
    reach = torch.full_like(residual, _LONGEST)
    for number in range(max_rounds + 1):
        masses = plain @ point.q[:, rows]
        now, here = x[:, rows], point.select(rows)
        step, convex, sound = _newton(frame, here, now, weights)
        short = step.abs().amax(0) <= STEP_TOLERANCE
        done = convex & short & inner[rows]
        converged[rows] = done
        keep = torch.nonzero(~done & ~stuck[rows])[:, 0]
        if keep.numel() == 0 or number == max_rounds:
            break
        rows, now, here, masses = rows[keep], now[:, keep], here.select(keep), masses[:, keep]
        step, sound = step[:, keep], sound[keep]
        length = step.abs().amax(0)
        step = step * (reach[rows] / torch.maximum(length, reach[rows]))
        safe = weights / masses
        trial = torch.where(sound & ~cautious[rows], now * step.exp(), safe)
        a, d = sets[:, rows], sites[:, rows]
        again = centre(frame, a, d, moved(here, plain.t() @ (trial - now)), warm=True, max_steps=_CORE_STEPS)
        reached = objective(frame, a, d, weights, again.point)
        better = reached <= value[rows] + _NOISE * total[rows]
        steps[rows] += again.steps
        # If even the step that cannot fail does, rounding is all that is left to gain.
        stuck[rows] = ~better & cautious[rows]
        # A step that failed reached too far: the next, after one that cannot fail, is shorter.
        tried = sound & ~cautious[rows]
        further = torch.where(better, 2 * reach[rows], torch.minimum(length, reach[rows]) / 4).clamp(max=_LONGEST)
        reach[rows] = torch.where(tried, further, reach[rows])
        cautious[rows] = ~better
        won = torch.nonzero(better)[:, 0]
        where = rows[won]
        point.put(where, again.point.select(won))
        x[:, where], value[where] = trial[:, won], reached[won]
        inner[where], residual[where] = again.converged[won], again.residual[won]
    return Centre(point, steps, converged, torch.maximum(residual, (plain @ point.q - weights / x).abs().amax(0)))


def objective(
    frame: Frame, sets: torch.Tensor, sites: torch.Tensor, weights: torch.Tensor, point: Point
) -> torch.Tensor:
    """(b,) the value of J, up to what depends on the answers alone."""
    plain = frame.inside[frame.covered :]
    return (weights * (plain @ point.q).log()).sum(0) - (sets * point.q.log()).sum(0) - (sites * point.r.log()).sum(0)


def _newton(
    frame: Frame, point: Point, x: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Newton step of V in log x (m, b), where V is convex (b,), and where the step is sound (b,).

    Where V is not convex the step is that of its curvatures' sizes: down along every axis, and far where it is flat.
    """
    gram, matrix = curvature(frame, point)
    size = 1 + frame.covered
    cross = gram[:, :size, size:]
    # How q(L_k) falls as x_j rises.
    answer = gram[:, size:, size:] - cross.transpose(1, 2) @ solve_positive(matrix, cross)[0]
    each = x.t()
    masses = (frame.inside[frame.covered :] @ point.q).t()
    hessian = -answer * each[:, :, None] * each[:, None]
    hessian.diagonal(dim1=1, dim2=2).add_(each * masses)
    slope = weights.t() - each * masses
    convex = torch.linalg.cholesky_ex(hessian)[1] == 0
    bent = torch.nonzero(~convex & hessian.isfinite().all(2).all(1))[:, 0]
    hessian[bent] = _upright(hessian[bent])
    found, good = solve_positive(hessian, slope[:, :, None])
    step = found[:, :, 0]
    sound = good & step.isfinite().all(1)
    return step.t(), convex & sound, sound


def _upright(matrices: torch.Tensor) -> torch.Tensor:
    """Symmetric matrices (b, m, m) with their eigenvalues' sizes in place of these, none far below the largest."""
    values, vectors = torch.linalg.eigh(matrices)
    sizes = values.abs()
    sizes = torch.maximum(sizes, _FLATTEST * sizes.amax(1, keepdim=True))
    upright: torch.Tensor = (vectors * sizes[:, None]) @ vectors.transpose(1, 2)
    return upright
