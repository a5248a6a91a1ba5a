"""The pool: one digest for every byte, random access, and what is found when bytes are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from consilience.common import pool as pool_module
from consilience.common.data import ImageData, from_arrays
from consilience.common.errors import PoolError
from consilience.common.pool import Pool


def images(n: int = 25, seed: int = 0, shape: tuple[int, int, int] = (4, 5, 3)) -> ImageData:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)
    return from_arrays(pixels, None, (), where="test")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SHARD_BYTES", 600)  # ten samples of 60 bytes


@pytest.mark.usefixtures("small_shards")
def test_every_way_of_reading_gives_the_same_pixels(tmp_path: Path) -> None:
    data = images()
    pool = Pool.build(data, tmp_path)
    assert [shard.count for shard in pool.manifest.shards] == [10, 10, 5]
    truth = data.read()
    assert np.array_equal(pool.read(0, 25), truth)
    for start, stop in [(0, 0), (3, 7), (9, 11), (10, 20), (5, 25), (25, 25)]:
        assert np.array_equal(pool.read(start, stop), truth[start:stop])
    ids = [24, 0, 10, 9, 10]
    assert np.array_equal(pool.take(ids), truth[ids])
    assert pool.take([]).shape == (0, 4, 5, 3)
    assert np.array_equal(np.concatenate([block for _, block in pool.blocks(7)]), truth)
    assert [start for start, _ in pool.blocks(7)] == [0, 7, 14, 21]
    pool.verify()


def test_the_digest_depends_on_pixels_alone(tmp_path: Path) -> None:
    one = Pool.build(images(), tmp_path / "one")
    again = Pool.build(images(), tmp_path / "two")
    other = Pool.build(images(seed=1), tmp_path / "three")
    fewer = Pool.build(images(24), tmp_path / "four")
    assert one.digest == again.digest
    assert len({one.digest, other.digest, fewer.digest}) == 3


def test_building_again_is_harmless_and_another_pool_is_refused(tmp_path: Path) -> None:
    first = Pool.build(images(), tmp_path)
    assert Pool.build(images(), tmp_path).digest == first.digest
    with pytest.raises(PoolError, match="already holds another pool"):
        Pool.build(images(seed=1), tmp_path)
    Pool.open(tmp_path).verify()


@pytest.mark.usefixtures("small_shards")
def test_one_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    pool = Pool.build(images(), tmp_path)
    shard = tmp_path / "shard-00001.bin"
    content = bytearray(shard.read_bytes())
    content[77] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PoolError, match=r"shard-00001\.bin"):
        pool.verify()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_shard_of_another_size_is_found_on_opening(tmp_path: Path, damage: str) -> None:
    Pool.build(images(), tmp_path)
    shard = tmp_path / "shard-00002.bin"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"\0" * (299 if damage == "short" else 301))
    with pytest.raises(PoolError, match=r"shard-00002\.bin"):
        Pool.open(tmp_path)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_building_again_mends_a_damaged_pool(tmp_path: Path, damage: str) -> None:
    digest = Pool.build(images(), tmp_path).digest
    shard = tmp_path / "shard-00001.bin"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(bytes(shard.stat().st_size))
    pool = Pool.build(images(), tmp_path)
    pool.verify()
    assert pool.digest == digest


@pytest.mark.parametrize(
    "change",
    [
        {"size": 26},
        {"format": 2},
        {"shape": [4, 5]},
        {"shape": [4, 5, 0]},
        {"extra": 1},
        {"shards": [{"file": "../../etc/passwd", "count": 25, "sha256": "0" * 64}]},
        {"shards": [{"file": "shard-00000.bin", "count": -25, "sha256": "0" * 64}]},
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    Pool.build(images(), tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PoolError, match=r"manifest\.json"):
        Pool.open(tmp_path)


def test_no_pool_no_ids_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="consilience pool build"):
        Pool.open(tmp_path)
    pool = Pool.build(images(), tmp_path)
    for start, stop in [(-1, 3), (3, 26), (7, 6)]:
        with pytest.raises(PoolError, match="allowed: 0 to 25"):
            pool.read(start, stop)
    for ids in ([25], [-1]):
        with pytest.raises(PoolError, match="allowed: 0 to 24"):
            pool.take(ids)


def test_an_empty_pool_is_a_pool(tmp_path: Path) -> None:
    pool = Pool.build(images(0), tmp_path)
    pool.verify()
    assert len(pool) == 0
    assert pool.read(0, 0).shape == (0, 4, 5, 3)


@pytest.mark.parametrize("flood", ['"shards": [' + "{}," * 1_000_000 + "{}]", '"x": 0,' * 20_000 + '"y": 0'])
def test_a_manifest_of_very_many_values_is_refused_before_it_is_read(tmp_path: Path, flood: str) -> None:
    (tmp_path / "manifest.json").write_text(f"{{{flood}}}")
    with pytest.raises(PoolError, match="more values than any manifest"):
        Pool.open(tmp_path)
