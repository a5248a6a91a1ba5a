"""The answer store: nothing that was stored is lost, whatever moment the process dies at."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.common.encoding import decode, encode, encode_coverage
from consilience.common.errors import ProtocolError, RunError, StorageError
from consilience.common.protocol import Answer, Question
from consilience.common.settings import CoverageEncoding, Encoding
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About

DIGEST, POLICY, SIZE, CLASSES = "a" * 64, "c" * 16, 100, 3


def about(**changes: Any) -> About:
    fields = {"site": "site-1", "pool": DIGEST, "size": SIZE, "teacher": DIGEST, "policy": POLICY}
    return About(**{**fields, "encoding": "f32", "classes": CLASSES, **changes})


WIDTHS = {"f32": 12, "f16": 6, "u8": 3, "top-2": 8, "top-9": 9, "top-2-u8": 2, "votes": 1}


def exact() -> np.ndarray:
    return log_softmax(np.random.default_rng(0).normal(0, 2, (SIZE, CLASSES)), axis=1).astype(np.float32)


def truth(encoding: Encoding = "f32") -> np.ndarray:
    return decode(encode(exact(), encoding), SIZE, CLASSES, encoding)


def answer(start: int, stop: int, encoding: Encoding = "f32", rows: np.ndarray | None = None) -> Answer:
    question = Question(
        job="job", pool=DIGEST, start=start, stop=stop, encoding=encoding, teacher=DIGEST, policy=POLICY
    )
    return Answer(question, encode(exact()[start:stop] if rows is None else rows, encoding), 0.5)


@pytest.mark.parametrize("encoding", WIDTHS)
def test_answers_in_any_order_are_read_back_in_the_pool_s(tmp_path: Path, encoding: Encoding) -> None:
    store = AnswerStore(tmp_path, about(encoding=encoding))
    assert list(store.missing()) == [(0, SIZE)]
    for start, stop in [(40, 70), (0, 10), (95, 100), (10, 40)]:
        store.append(answer(start, stop, encoding))
    assert list(store.missing()) == [(70, 95)]
    assert not store.complete
    store.append(answer(70, 95, encoding))
    for opened in (store, AnswerStore(tmp_path, about(encoding=encoding))):
        assert opened.complete
        assert list(opened.missing()) == []
        assert (len(opened), opened.bytes, opened.seconds) == (100, 100 * WIDTHS[encoding], 2.5)
        for start, stop in [(0, 100), (5, 6), (39, 41), (0, 0), (60, 97)]:
            assert np.array_equal(opened.read(start, stop), truth(encoding)[start:stop])


def test_reading_what_is_not_there_says_which_sample(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, about())
    store.append(answer(10, 20))
    for start, stop, first in [(0, 5, 0), (5, 15, 5), (15, 25, 20)]:
        with pytest.raises(StorageError, match=f"no answer for sample {first}"):
            store.read(start, stop)


@pytest.mark.parametrize(("start", "stop"), [(10, 20), (0, 11), (19, 25), (12, 13), (95, 101), (100, 101)])
def test_a_sample_is_answered_once(tmp_path: Path, start: int, stop: int) -> None:
    store = AnswerStore(tmp_path, about())
    store.append(answer(10, 20))
    rows = np.full((stop - start, CLASSES), -np.log(CLASSES), np.float32)
    with pytest.raises(ProtocolError, match="answered already or do not exist"):
        store.append(answer(start, stop, rows=rows))
    assert np.array_equal(AnswerStore(tmp_path, about()).read(10, 20), truth()[10:20])


def test_bad_rows_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, about())
    rows = np.full((5, CLASSES), np.nan, np.float32)
    with pytest.raises(ProtocolError, match="NaN"):
        store.append(answer(0, 5, rows=rows))
    with pytest.raises(ProtocolError, match="bytes"):
        store.append(Answer(answer(0, 5).question, b"\0" * 7, 0.0))
    assert len(store) == 0
    assert not (tmp_path / "answers.bin").exists()


def stored(folder: Path) -> AnswerStore:
    store = AnswerStore(folder, about())
    for start in range(0, 40, 10):
        store.append(answer(start, start + 10))
    return store


def test_whatever_byte_the_crash_stops_at_complete_answers_stay(tmp_path: Path) -> None:
    """Replay: cut both files at every point that a crash during the fourth append can leave."""
    stored(tmp_path / "whole")
    data = (tmp_path / "whole" / "answers.bin").read_bytes()
    index = (tmp_path / "whole" / "index.jsonl").read_bytes()
    before = index.rindex(b"\n", 0, -1) + 1
    states = [(cut, before) for cut in range(360, 481, 7)] + [(480, cut) for cut in range(before, len(index) + 1, 5)]
    for number, (data_cut, index_cut) in enumerate([*states, (480, len(index))]):
        folder = tmp_path / f"crash-{number}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "answers.bin").write_bytes(data[:data_cut])
        (folder / "index.jsonl").write_bytes(index[:index_cut])
        store = AnswerStore(folder, about())
        answered = 40 if index_cut == len(index) else 30
        assert len(store) == answered
        assert np.array_equal(store.read(0, answered), truth()[:answered])
        if answered == 30:
            store.append(answer(30, 40))
        assert (folder / "answers.bin").read_bytes() == data
        assert len(AnswerStore(folder, about())) == 40


@pytest.mark.parametrize("failing", ["answers.bin", "index.jsonl"])
def test_a_full_disk_loses_only_the_answer_it_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store = stored(tmp_path)
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        store.append(answer(40, 50))
    monkeypatch.undo()
    assert len(store) == 40
    store.append(answer(40, 50))
    store.append(answer(50, 60))
    for opened in (store, AnswerStore(tmp_path, about())):
        assert np.array_equal(opened.read(0, 60), truth()[:60])


def test_changed_bytes_are_found_when_read(tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "answers.bin"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    store = AnswerStore(tmp_path, about())
    assert np.array_equal(store.read(0, 10), truth()[:10])
    with pytest.raises(StorageError, match="samples 10 to 20 has changed"):
        store.read(0, 20)


def test_a_damaged_line_in_the_middle_of_the_index_is_found(tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "index.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + b"".join(lines[2:]))
    with pytest.raises(StorageError, match="line 2 is damaged"):
        AnswerStore(tmp_path, about())


@pytest.mark.parametrize(
    "changes", [{"teacher": "b" * 64}, {"policy": "d" * 16}, {"encoding": "f16"}, {"size": 101}, {"pool": "b" * 64}]
)
def test_a_store_is_about_one_thing(tmp_path: Path, changes: dict[str, Any]) -> None:
    stored(tmp_path)
    with pytest.raises(RunError, match=f"another {next(iter(changes))}"):
        AnswerStore(tmp_path, about(**changes))


@given(st.permutations(range(10)), st.integers(0, 10))
def test_missing_and_stored_share_out_the_pool(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], n: int
) -> None:
    store = AnswerStore(tmp_path_factory.mktemp("store"), about())
    for block in order[:n]:
        store.append(answer(block * 10, block * 10 + 10))
    missing = {i for start, stop in store.missing() for i in range(start, stop)}
    assert missing == set(range(SIZE)) - {i for b in order[:n] for i in range(b * 10, b * 10 + 10)}
    assert len(store) == n * 10


def about_coverage(**changes: Any) -> About:
    return about(kind="coverage", encoding="f16", classes=1, **changes)


def coverage_answer(data: bytes, start: int, stop: int, encoding: CoverageEncoding = "f16") -> Answer:
    question = Question(
        job="job",
        pool=DIGEST,
        start=start,
        stop=stop,
        kind="coverage",
        encoding=encoding,
        teacher=DIGEST,
        policy=POLICY,
    )
    return Answer(question, data, 0.5)


@pytest.mark.parametrize("encoding", ["f16", "u8"])
def test_coverage_is_kept_as_numbers_from_0_to_1(tmp_path: Path, encoding: CoverageEncoding) -> None:
    told = np.linspace(0, 1, 40).astype(np.float32)
    store = AnswerStore(tmp_path, about_coverage().model_copy(update={"encoding": encoding}))
    for start, stop in ((20, 40), (0, 10)):
        store.append(coverage_answer(encode_coverage(told[start:stop], encoding), start, stop, encoding))
    for opened in (store, AnswerStore(tmp_path, store.about)):
        assert len(opened) == 30
        assert opened.bytes == 30 * (2 if encoding == "f16" else 1)
        assert opened.read(22, 33).shape == (11, 1)
        assert np.allclose(opened.read(22, 33)[:, 0], told[22:33], atol=1 / 512 + 1e-7)
        expected = np.where((np.arange(40) < 10) | (np.arange(40) >= 20), told, 0)
        assert np.allclose(opened.read_answered(0, 40)[:, 0], expected, atol=1 / 512 + 1e-7)


@pytest.mark.parametrize(
    "data",
    [
        np.array([0.5, np.nan], "<f2").tobytes(),
        np.array([0.5, 2.0], "<f2").tobytes(),
        np.array([0.5, -0.5], "<f2").tobytes(),
        b"",
        bytes(3),
        bytes(5),
    ],
)
def test_what_is_no_coverage_is_not_stored(tmp_path: Path, data: bytes) -> None:
    store = AnswerStore(tmp_path, about_coverage())
    with pytest.raises(ProtocolError):
        store.append(coverage_answer(data, 0, 2))
    assert len(AnswerStore(tmp_path, about_coverage())) == 0
    assert not (tmp_path / "answers.bin").exists()


def test_a_store_of_one_kind_is_not_opened_as_another(tmp_path: Path) -> None:
    AnswerStore(tmp_path, about_coverage())
    with pytest.raises(RunError, match="another kind"):
        AnswerStore(tmp_path, about(encoding="f16", classes=1))


def test_numbers_come_as_they_are_stored(tmp_path: Path) -> None:
    """Halves stay halves, in the pool's order; whatever else is stored comes as float32."""
    for encoding, dtype in (("f16", np.float16), ("u8", np.float32)):
        store = AnswerStore(tmp_path / encoding, about(encoding=encoding))
        for start, stop in ((SIZE // 2, SIZE), (0, SIZE // 2)):
            store.append(answer(start, stop, encoding))
        found = store.read_numbers(1, SIZE - 1)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float32), store.read(1, SIZE - 1))


def test_what_was_sent_of_the_largest_is_read_back_across_records(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "store", about(encoding="top-2"))
    for start, stop in ((SIZE // 2, SIZE), (0, SIZE // 2)):
        store.append(answer(start, stop, "top-2"))
    sent, full = store.read_sent(1, SIZE - 1), store.read(1, SIZE - 1)
    np.testing.assert_array_equal(np.take_along_axis(full, sent.ids, axis=1), sent.values)
    np.testing.assert_array_equal(np.sort(full, axis=1)[:, 0], sent.other)
