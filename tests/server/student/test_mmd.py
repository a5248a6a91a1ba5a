"""MMD against a direct double loop, known values and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.common.errors import StudentError
from consilience.server.student.mmd import BANDWIDTHS, mmd


def by_loop(first: np.ndarray, second: np.ndarray, variances: list[float]) -> float:
    def unit(rows: np.ndarray) -> list[np.ndarray]:
        return [row.ravel() / (np.linalg.norm(row) or 1) for row in rows.astype(np.float64)]

    def mean(one: list[np.ndarray], other: list[np.ndarray]) -> float:
        total = 0.0
        for a in one:
            for b in other:
                total += sum(math.exp(-float(np.sum((a - b) ** 2)) / (2 * v)) for v in variances)
        return total / len(one) / len(other)

    x, y = unit(first), unit(second)
    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@settings(max_examples=40)
@given(n=st.integers(1, 5), m=st.integers(1, 5), near=st.booleans(), seed=st.integers(0, 100))
def test_a_double_loop(n: int, m: int, near: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(n, 2, 3, 2)), rng.normal(size=(m, 2, 3, 2))
    if near:  # so that the narrow kernels see something too
        second = first[rng.integers(0, n, m)] + 1e-3 * second
    expected = by_loop(first, second, [sigma**2 for sigma in BANDWIDTHS])
    assert mmd(torch.from_numpy(first), torch.from_numpy(second)).item() == pytest.approx(expected, abs=1e-9)


def test_bandwidths_of_the_data() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 6)), rng.normal(size=(3, 6)) + 1
    rows = [row / np.linalg.norm(row) for row in (*first, *second)]
    mean = float(np.mean([np.sum((a - b) ** 2) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]))
    expected = by_loop(first, second, [mean / 4, mean / 2, mean, 2 * mean, 4 * mean])
    assert mmd(torch.from_numpy(first), torch.from_numpy(second), None).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("angle", "squared"), [(math.pi / 2, 2.0), (math.pi, 4.0), (0.1, 4 * math.sin(0.05) ** 2)])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (0.01, 500.0)])
def test_two_points(angle: float, squared: float, lengths: tuple[float, float]) -> None:
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64) * lengths[0]
    second = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64) * lengths[1]
    expected = sum(2 - 2 * math.exp(-squared / (2 * sigma**2)) for sigma in BANDWIDTHS)
    assert mmd(first, second).item() == pytest.approx(expected, abs=1e-9)
    assert mmd(first.repeat(5, 1), second.repeat(7, 1)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_samples_are_at_zero_in_any_order(kind: torch.dtype) -> None:
    rows = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).to(kind)
    assert mmd(rows, rows.flip(0)).item() == pytest.approx(0, abs=1e-6)
    assert mmd(rows, rows, None).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_compared_in_full(kind: torch.dtype, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(6, 64, generator=generator).mul(scale).to(kind) for scale in (600.0, 1e-3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = mmd(first, second)  # squares beyond fp16 at both ends
    assert found.dtype == torch.float32
    expected = by_loop(first.float().numpy(), second.float().numpy(), [sigma**2 for sigma in BANDWIDTHS])
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bandwidths", [(0.2, 1.0, 2.0), None])
def test_gradients(bandwidths: tuple[float, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 2, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 3))
    if bandwidths is None:  # the bandwidth counts as a constant, so finite differences, which move it, differ
        mmd(first, second, None).backward()
        assert first.grad is not None
        assert first.grad.abs().sum() > 0
    else:
        assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, bandwidths), (first, second), atol=1e-6)


def test_gradients_where_points_coincide_are_finite() -> None:
    rows = torch.ones(3, 4, requires_grad=True)
    (mmd(rows, torch.ones(3, 4)) + mmd(rows, torch.zeros(3, 4), None) + mmd(rows, rows, None)).backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_zeros_stay_zeros() -> None:
    expected = sum(2 - 2 * math.exp(-1 / (2 * sigma**2)) for sigma in BANDWIDTHS)
    assert mmd(torch.zeros(2, 4), torch.tensor([[0.0, 3, 0, 0]])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [((0, 3), (2, 3)), ((2, 3), (0, 3)), ((2, 3, 2), (2, 3))])
def test_samples_that_cannot_be_compared(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(StudentError, match="cannot be compared; allowed: one or more samples each, of equal length"):
        mmd(torch.ones(first), torch.ones(second))
