"""Moments, and the linear autoencoder against scikit-learn's PCA and against gradient descent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from consilience.common.errors import StudentError
from consilience.common.moments import Moments
from consilience.server.student.autoencoder import Affine, Autoencoder, descended, measured, principal

Floats = NDArray[np.float64]


def spread(n: int, channels: int, seed: int, mean: float = 3.0) -> Floats:
    """Rows whose variances fall geometrically along random directions."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    return rng.normal(size=(n, channels)) * 0.7 ** np.arange(channels) @ directions.T + mean * rng.normal(size=channels)


def moments_of(*blocks: NDArray[np.floating]) -> Moments:
    moments = Moments(blocks[0].shape[1])
    for block in blocks:
        moments.update(block)
    return moments


def brute_error(fitted: Autoencoder, rows: Floats) -> float:
    return float(np.square(fitted.decoder(fitted.encoder(rows)) - rows).sum(axis=1).mean())


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    mean=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_moments_do_not_depend_on_blocks(sizes: list[int], order: object, mean: float) -> None:
    rows = spread(sum(sizes) + 2, 4, seed=len(sizes)) + mean
    blocks = np.split(rows, np.cumsum(sizes))
    order.shuffle(blocks)  # type: ignore[attr-defined]
    moments = moments_of(*blocks)
    assert moments.count == len(rows)
    assert np.allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    assert np.allclose(moments.covariance, np.cov(rows.T, bias=True), rtol=1e-6, atol=1e-9)


@given(cut=st.integers(0, 20))
def test_merged_moments_are_those_of_all(cut: int) -> None:
    rows = spread(20, 3, seed=5)
    first, second, whole = moments_of(rows[:cut]), moments_of(rows[cut:]), moments_of(rows)
    first.merge(second)
    assert first.count == 20
    assert np.allclose(first.mean, whole.mean, rtol=1e-12)
    assert np.allclose(first.scatter, whole.scatter, rtol=1e-10)


def test_every_position_of_a_map_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = np.random.default_rng(0).normal(size=(5, 3, 4, 2)).astype(np.float32)
    rows = np.stack([maps[n, :, h, w] for n in range(5) for h in range(4) for w in range(2)])
    whole = moments_of(maps)
    monkeypatch.setattr("consilience.common.moments._ROWS", 16)
    for moments in (whole, moments_of(maps)):
        assert moments.count == 40
        assert np.allclose(moments.mean, rows.mean(axis=0), atol=1e-6)
        assert np.allclose(moments.covariance, np.cov(rows.T, bias=True), atol=1e-6)


def test_moments_of_half_precision_are_summed_in_double() -> None:
    rows = np.full((70_000, 1), 60_000, np.float16)
    moments = moments_of(rows)
    assert moments.mean[0] == float(rows[0, 0])
    assert moments.scatter[0, 0] == 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((3, 5)), r"shape \(3, 5\).*allowed: \(n, 4\)"),
        (np.zeros((3, 4, 2)), r"shape \(3, 4, 2\)"),
        (np.zeros((3, 4), np.int64), "type int64"),
        (np.array([[0.0, 1, 2, 3], [0, 1, np.nan, 3]]), "nan in channel 2 of sample 1"),
        (np.full((2, 4, 2, 2), np.inf), "inf in channel 0 of sample 0"),
        (np.array([[1e200] * 4, [-1e200] * 4]), r"as large as .*beyond"),
    ],
)
def test_features_that_are_none(features: NDArray[np.generic], message: str) -> None:
    moments = moments_of(np.ones((2, 4)))
    with np.errstate(over="ignore"), pytest.raises(StudentError, match=message):
        moments.update(features)  # type: ignore[arg-type]
    assert moments.count == 2
    assert (moments.mean == 1).all()


def test_moments_of_other_channels_do_not_merge() -> None:
    with pytest.raises(StudentError, match="3 channels cannot join those of 2"):
        Moments(2).merge(Moments(3))


@pytest.mark.parametrize("width", [1, 3, 6])
def test_principal_is_pca(width: int) -> None:
    rows = spread(300, 6, seed=1)
    fitted = principal(moments_of(*np.array_split(rows, 7)), width)
    oracle = PCA(width).fit(rows)
    assert np.allclose(np.abs(fitted.encoder(rows)), np.abs(oracle.transform(rows)), atol=1e-8)
    assert np.allclose(
        fitted.decoder(fitted.encoder(rows)), oracle.inverse_transform(oracle.transform(rows)), atol=1e-8
    )
    assert fitted.explained == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-9)
    assert fitted.error == pytest.approx(brute_error(fitted, rows), abs=1e-9)


def test_principal_maps_each_position_of_a_map() -> None:
    maps = spread(60, 5, seed=2).reshape(10, 3, 2, 5).transpose(0, 3, 1, 2)
    fitted = principal(moments_of(maps), 2)
    coded = fitted.encoder(maps)
    assert coded.shape == (10, 2, 3, 2)
    assert np.allclose(coded[7, :, 2, 1], fitted.encoder(maps[7:8, :, 2, 1])[0], atol=1e-12)
    assert fitted.encoder(maps.astype(np.float16)).dtype == np.float32


def test_signs_do_not_depend_on_blocks() -> None:
    rows = spread(50, 5, seed=3)
    one, other = principal(moments_of(rows), 4), principal(moments_of(*rows[::-1, None]), 4)
    assert np.allclose(one.encoder.weight, other.encoder.weight, atol=1e-8)
    assert np.allclose(one.encoder.bias, other.encoder.bias, atol=1e-8)
    for seed in range(10):
        weight = principal(moments_of(spread(50, 5, seed)), 4).encoder.weight
        assert (weight[range(4), np.abs(weight).argmax(axis=1)] > 0).all()


def test_width_beyond_the_rank() -> None:
    rows = spread(40, 6, seed=4)
    rows[:, 3:] = rows[:, :3] @ np.arange(9.0).reshape(3, 3)
    fitted = principal(moments_of(rows), 5)
    assert fitted.error == pytest.approx(0, abs=1e-8)
    assert fitted.explained == pytest.approx(1)
    assert brute_error(fitted, rows) == pytest.approx(0, abs=1e-8)
    assert np.allclose(fitted.encoder(rows)[:, 3:], 0, atol=1e-5)


@pytest.mark.parametrize("rows", [np.full((9, 3), 7.5), np.array([[1.0, -2, 3]])], ids=["constant", "one sample"])
def test_without_variance_the_mean_is_all_there_is(rows: Floats) -> None:
    fitted = principal(moments_of(rows), 2)
    assert (fitted.error, fitted.explained) == (0, 1)
    assert np.allclose(fitted.decoder(fitted.encoder(rows)), rows, atol=1e-12)


def test_constant_channels_cost_nothing() -> None:
    rows = spread(80, 5, seed=6)
    rows[:, [1, 3]] = 4.0
    fitted = principal(moments_of(rows), 3)
    assert fitted.error == pytest.approx(0, abs=1e-12)
    assert np.allclose(fitted.encoder.weight[:, [1, 3]], 0, atol=1e-9)


@pytest.mark.parametrize("width", [0, 5, -1])
def test_widths_that_are_none(width: int) -> None:
    with pytest.raises(StudentError, match=f"4 channels cannot be amalgamated into {width}; allowed: 1 to 4"):
        principal(moments_of(np.ones((3, 4))), width)


def test_no_samples() -> None:
    with pytest.raises(StudentError, match="No features of 4 channels were seen"):
        principal(moments_of(np.ones((0, 4)), np.ones((2, 4, 0, 3))), 2)
    with pytest.raises(StudentError, match="No features of 4 channels were seen"):
        descended([np.ones((0, 4))], 4, 2, epochs=1, learning_rate=0.1, seed=0)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_measured_error_is_the_mean_over_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = spread(30, 4, seed)
    encoder = Affine(rng.normal(size=(2, 4)), rng.normal(size=2))
    decoder = Affine(rng.normal(size=(4, 2)), rng.normal(size=4))
    found = measured(encoder, decoder, moments_of(rows))
    assert found.error == pytest.approx(brute_error(found, rows), rel=1e-9)
    assert 0 <= found.explained <= 1


def test_maps_compose() -> None:
    rng = np.random.default_rng(0)
    one, other = (Affine(rng.normal(size=(3, 3)), rng.normal(size=3)) for _ in range(2))
    rows = rng.normal(size=(4, 3))
    assert np.allclose(other.after(one)(rows), other(one(rows)))
    assert np.allclose(one.beside(other)(np.hstack([rows, rows])), np.hstack([one(rows), other(rows)]))
    with pytest.raises(StudentError, match=r"allowed: \(n, 3\)"):
        one(np.ones((2, 4)))


@pytest.fixture(scope="module")
def steps() -> list[Floats]:
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(400, 6)) * [1.5, 1.2, 1.0, 0.2, 0.15, 0.1]
    rows = rows @ np.linalg.qr(rng.normal(size=(6, 6)))[0].T + 0.5
    return np.array_split(rows, 4)


def test_gradient_descent_finds_the_principal_subspace(steps: list[Floats]) -> None:
    """In full batches: the noise of small ones leaves a twentieth of a degree."""
    rows = np.concatenate(steps)
    best = principal(moments_of(rows), 3)
    found = descended([rows], 6, 3, epochs=1000, learning_rate=0.1, seed=0)
    assert np.degrees(subspace_angles(found.decoder.weight, best.decoder.weight)).max() < 0.01
    assert np.degrees(subspace_angles(found.encoder.weight.T, best.encoder.weight.T)).max() < 0.01
    assert best.error * (1 - 1e-9) <= found.error <= best.error * (1 + 1e-6)
    assert found.error == pytest.approx(brute_error(found, rows), rel=1e-6)


def test_gradient_descent_comes_nearer_each_time(steps: list[Floats]) -> None:
    errors = [descended(steps, 6, 3, epochs=e, learning_rate=0.05, seed=1).error for e in (0, 5, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 5


def test_gradient_descent_of_maps_is_that_of_their_rows(steps: list[Floats]) -> None:
    maps = [rows.reshape(-1, 5, 2, 6).transpose(0, 3, 1, 2) for rows in steps]
    of_maps, of_rows = (descended(each, 6, 2, epochs=2, learning_rate=0.05, seed=0) for each in (maps, steps))
    assert np.allclose(of_maps.encoder.weight, of_rows.encoder.weight, atol=1e-6)


def test_gradient_descent_too_fast(steps: list[Floats]) -> None:
    with pytest.raises(
        StudentError, match=r"failed in epoch \d+ of 200: .* learning rate 50.*autoencoder to principal"
    ):
        descended(steps, 6, 3, epochs=200, learning_rate=50, seed=0)


def test_a_stream_that_can_be_read_once(steps: list[Floats]) -> None:
    def stream() -> Iterator[Floats]:
        yield from steps

    with pytest.raises(StudentError, match="generator, which can be read only once"):
        descended(stream(), 6, 3, epochs=1, learning_rate=0.1, seed=0)
