"""Noise is the same for the same image, another for any other, and normal; the secret stays one and is its owner's."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from consilience.client.privacy.noise import GRID, Secret, Stream, load_secret, on_grid
from consilience.common.errors import IdentityError, StorageError
from consilience.common.settings import CallableTeacher, Preprocessing, SiteSettings

ONE, TWO = Secret(b"1" * 32), Secret(b"2" * 32)
PURPOSE = ["pate", 40.0, "f" * 64]


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), np.uint8)


def settings_at(folder: Path) -> SiteSettings:
    hosted = CallableTeacher(kind="callable", callable="a:b", classes=("a",), preprocessing=Preprocessing())
    return SiteSettings(name="site-1", teacher=hosted, state=folder)


@settings(max_examples=30)
@given(st.permutations(list(range(12))), st.integers(1, 12))
def test_noise_follows_the_image_wherever_it_is_asked_about(order: list[int], cut: int) -> None:
    images = pictures(12)
    whole = ONE.normal(PURPOSE, images, 3)
    parts = [ONE.normal(PURPOSE, images[order][first : first + cut], 3) for first in range(0, 12, cut)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[order])


def test_equal_images_have_equal_noise_and_one_pixel_makes_another() -> None:
    images = np.repeat(pictures(1), 3, axis=0)
    images[2, 0, 0, 0] ^= 1
    rows = ONE.normal(PURPOSE, images, 5)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.intersect1d(rows[0], rows[2]).size
    # the same bytes in another shape are another image
    assert not np.intersect1d(rows, ONE.normal(PURPOSE, images.reshape(3, 2, 8, 1), 5)).size


def test_noise_is_normal_and_independent_between_sites_purposes_and_samples() -> None:
    images = pictures(20_000)
    rows = ONE.normal(PURPOSE, images, 3)
    assert kstest(rows.ravel(), "norm").pvalue > 0.01
    others = {
        "another site": TWO.normal(PURPOSE, images, 3),
        "another scale": ONE.normal(["pate", 41.0, "f" * 64], images, 3),
        "another teacher": ONE.normal(["pate", 40.0, "e" * 64], images, 3),
        "the next sample": np.roll(rows, 1, axis=0),
        "the next class": np.roll(rows, 1, axis=1),
    }
    for what, other in others.items():
        assert abs(np.mean(rows * other)) < 4 / np.sqrt(rows.size), what
        assert abs(np.mean(np.abs(rows) * np.abs(other)) - 2 / np.pi) < 4 / np.sqrt(rows.size), what


def test_shapes_without_rows_or_columns() -> None:
    assert ONE.normal(PURPOSE, pictures(0), 3).shape == (0, 3)
    assert np.isfinite(ONE.normal(PURPOSE, pictures(4), 1)).all()


def test_digests_and_streams_are_under_the_secret() -> None:
    other = [*PURPOSE, "more"]
    found = {ONE.digest(PURPOSE), TWO.digest(PURPOSE), ONE.digest([]), ONE.digest(other)}
    assert len(found) == 4
    assert all(len(digest) == 64 for digest in found)
    drawn = [secret.stream(purpose).words(4).tobytes() for secret in (ONE, TWO) for purpose in (PURPOSE, [], other)]
    assert len(set(drawn)) == 6
    assert ONE.stream(PURPOSE).words(4).tobytes() == drawn[0]
    assert "1111" not in repr(ONE)


def test_a_stream_is_one_however_it_is_cut_and_follows_from_each_bit_of_its_key() -> None:
    key = bytes(range(32))
    whole = Stream(key).words(2**18 + 5)
    cut = Stream(key)
    again = np.concatenate([cut.words(count) for count in (1, 2**17, 0, 3, 2**17 + 1)])
    assert np.array_equal(again, whole)
    assert len(np.unique(whole)) == len(whole)
    flipped = (int.from_bytes(key, "big") ^ 1 << bit for bit in range(256))
    first = {Stream(other.to_bytes(32, "big")).words(1)[0] for other in flipped}
    assert len(first) == 256


def test_the_grid_hides_the_last_bits() -> None:
    values = np.random.default_rng(0).normal(0, 3, 1000)
    rounded = on_grid(values)
    assert np.array_equal(rounded / GRID, np.round(rounded / GRID))
    assert np.abs(rounded - values).max() <= GRID / 2


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    first = load_secret(settings_at(tmp_path))
    path = tmp_path / "privacy" / "noise.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(settings_at(tmp_path)) == first
    assert load_secret(settings_at(tmp_path / "other")) != first
    assert [p.name for p in path.parent.iterdir()] == ["noise.key"]


def test_a_secret_that_others_may_read_or_that_is_damaged_is_refused(tmp_path: Path) -> None:
    load_secret(settings_at(tmp_path))
    path = tmp_path / "privacy" / "noise.key"
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="0640"):
        load_secret(settings_at(tmp_path))
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(IdentityError, match="holds 5 bytes; a secret for noise has 32"):
        load_secret(settings_at(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        load_secret(settings_at(tmp_path / "file"))


def test_threads_that_need_the_secret_at_once_get_one(tmp_path: Path) -> None:
    found: list[Secret] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        found.append(load_secret(settings_at(tmp_path)))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({secret.key for secret in found}) == 1
