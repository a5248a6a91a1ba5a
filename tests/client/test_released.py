"""What left leaves again as it did, and what is counted as spent is never less than what left, whatever is interrupted.

The teacher of these tests says something else each time: equal bytes are kept bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from consilience.client import ledger as ledger_module
from consilience.client import released as module
from consilience.client.ledger import Ledger
from consilience.client.policy import RefusedError
from consilience.client.released import Released, subject_of
from consilience.client.site import Site
from consilience.common.encoding import encode
from consilience.common.errors import ConsilienceError, LedgerError, StorageError
from consilience.common.pool import Pool
from consilience.common.protocol import MOST_ANSWER_BYTES
from consilience.common.settings import NoPrivacy, OutputNoise
from helpers.disk import Disk
from helpers.small_site import ROW, SIZE, Fickle, about, make_pool, make_site


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


@pytest.fixture
def site(tmp_path: Path, pool: Pool) -> Iterator[Site]:
    held = make_site(tmp_path, coverage="f16")
    yield held
    held.close()


def spent(site: Site) -> int:
    return site.ledger.spent.lifetime


def test_asked_again_the_same_bytes_leave_at_no_cost_and_without_the_teacher(
    site: Site, pool: Pool, tmp_path: Path
) -> None:
    first = site.answer(about(site, pool, 5, 30)).data
    assert spent(site) == 25
    batches = site.teacher.batches  # type: ignore[attr-defined]
    assert site.answer(about(site, pool, 10, 20)).data == first[5 * ROW : 15 * ROW]
    assert site.answer(about(site, pool, 5, 30, job="another")).data == first
    assert site.teacher.batches == batches  # type: ignore[attr-defined]
    assert spent(site) == 25
    site.close()
    again = make_site(tmp_path, coverage="f16")
    assert again.answer(about(again, pool, 5, 30)).data == first
    whole = again.answer(about(again, pool, 0, SIZE)).data
    assert whole[5 * ROW : 30 * ROW] == first
    assert spent(again) == SIZE
    assert [row.entry.body["ranges"] for row in again.ledger.rows()] == [[[5, 30]], [[0, 5], [30, 50]]]
    again.close()


def test_only_batches_with_something_new_are_shown_to_the_teacher(site: Site, pool: Pool) -> None:
    site.answer(about(site, pool, 16, 32))
    assert site.teacher.batches == 1  # type: ignore[attr-defined]
    site.answer(about(site, pool, 0, SIZE))
    assert site.teacher.batches == 1 + 3  # type: ignore[attr-defined]


def test_every_kind_and_encoding_counts_for_itself(site: Site, pool: Pool) -> None:
    site.answer(about(site, pool, 0, 10))
    site.answer(about(site, pool, 0, 10, encoding="f16"))
    coverage = about(site, pool, 0, 10, kind="coverage", encoding="u8", teacher=site.coverage.fingerprint)  # type: ignore[union-attr]
    assert len(site.answer(coverage).data) == 10
    assert site.answer(coverage).data == site.answer(coverage).data
    assert spent(site) == 30
    body = next(iter(site.ledger.rows(2))).entry.body
    assert {name: body[name] for name in ("pool", "kind", "encoding", "policy", "ranges")} == {
        "pool": pool.digest,
        "kind": "coverage",
        "encoding": "u8",
        "policy": site.settings.policy.version,
        "ranges": [[0, 10]],
    }


def test_another_policy_or_teacher_counts_anew(site: Site, pool: Pool, tmp_path: Path) -> None:
    first = site.answer(about(site, pool, 0, 10)).data
    site.close()
    other = make_site(tmp_path, decimals=2)
    assert other.answer(about(other, pool, 0, 10)).data != first
    assert spent(other) == 20
    other.close()
    teacher = Fickle()
    teacher.fingerprint = "a" * 64
    third = make_site(tmp_path, teacher, decimals=2)
    third.answer(about(third, pool, 0, 10, teacher="a" * 64))
    assert spent(third) == 30
    third.close()


def test_two_processes_give_the_same_bytes(tmp_path: Path, pool: Pool) -> None:
    one, two = make_site(tmp_path), make_site(tmp_path)
    two.teacher.random.random(100)  # type: ignore[attr-defined]
    first = one.answer(about(one, pool, 0, 20)).data
    assert two.answer(about(two, pool, 10, 30)).data[: 10 * ROW] == first[10 * ROW :]
    assert one.answer(about(one, pool, 0, SIZE)).data[: 20 * ROW] == first
    assert spent(one) == SIZE
    one.close()
    two.close()


def test_what_another_process_released_while_this_one_worked_is_given(tmp_path: Path, pool: Pool) -> None:
    class Slow(Fickle):
        def log_probs(self, images: Any) -> Any:
            given.append(other.answer(about(other, pool, 5, 10)).data)
            return super().log_probs(images)

    given: list[bytes] = []
    other, slow = make_site(tmp_path), make_site(tmp_path, Slow())
    answered = slow.answer(about(slow, pool, 0, 12)).data
    assert answered[5 * ROW : 10 * ROW] == given[0]
    assert [row.entry.samples for row in slow.ledger.rows()] == [5, 7]
    other.close()
    slow.close()


def test_a_limit_that_another_process_used_up_meanwhile_holds(tmp_path: Path, pool: Pool) -> None:
    class Slow(Fickle):
        def log_probs(self, images: Any) -> Any:
            other.answer(about(other, pool, 30, 40))
            return super().log_probs(images)

    other, slow = make_site(tmp_path, limits={"lifetime": 15}), make_site(tmp_path, Slow(), limits={"lifetime": 15})
    with pytest.raises(RefusedError) as caught:
        slow.answer(about(slow, pool, 0, 10))
    assert caught.value.code == "budget-exhausted"
    assert (spent(slow), spent(other)) == (10, 10)
    other.close()
    slow.close()


def test_released_bytes_that_are_cut_off_while_the_site_runs_are_not_given(site: Site, pool: Pool) -> None:
    site.answer(about(site, pool, 0, 30))
    (path,) = (site.settings.state / "released").rglob("*.bin")
    os.truncate(path, 29 * ROW + 1)
    with pytest.raises(LedgerError, match="lost or changed"):
        site.answer(about(site, pool, 20, 30))
    assert len(site.answer(about(site, pool, 20, 29)).data) == 9 * ROW


@pytest.mark.parametrize("damage", ["removed", "shorter", "changed", "exchanged"])
def test_released_bytes_that_are_lost_or_changed_are_not_given(
    site: Site, pool: Pool, tmp_path: Path, damage: str
) -> None:
    site.answer(about(site, pool, 0, 30))
    site.close()
    (path,) = (site.settings.state / "released").rglob("*.bin")
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        changed = bytes([content[0] ^ 1]) + content[1:]
        swapped = content[ROW : 2 * ROW] + content[:ROW] + content[2 * ROW :]
        path.write_bytes({"shorter": content[:-1], "changed": changed, "exchanged": swapped}[damage])
    with pytest.raises(LedgerError, match="that were released are lost or changed") as caught:
        site.answer(about(site, pool, 10, 30))
    assert str(path) in caught.value.message
    path.write_bytes(content)
    assert site.answer(about(site, pool, 10, 30)).data == content[10 * ROW : 30 * ROW]


def test_a_question_about_too_much_is_refused_before_any_work(
    site: Site, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.client.site.MOST_ANSWER_BYTES", 10 * ROW)
    with pytest.raises(RefusedError, match="more samples than one answer can hold"):
        site.answer(about(site, pool, 0, 11))
    with pytest.raises(RefusedError, match="not in the pool"):
        site.answer(about(site, pool, 0, 2**60))
    assert site.teacher.batches == 0  # type: ignore[attr-defined]
    assert len(site.answer(about(site, pool, 0, 10)).data) == 10 * ROW
    assert MOST_ANSWER_BYTES == 64 * 2**20


def as_names_once_were(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "subject_of", lambda question, use="", digits=64: subject_of(question, use, 16))


def test_answers_kept_under_a_short_name_are_found(
    site: Site, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        as_names_once_were(patch)
        before = site.answer(about(site, pool, 0, 10)).data
    site.close()
    again = make_site(tmp_path, coverage="f16")
    whole = again.answer(about(again, pool, 0, 20)).data
    assert whole[: 10 * ROW] == before
    assert spent(again) == 20
    (path,) = (again.settings.state / "released").rglob("*.bin")  # they stay together
    assert path.parent.name == pool.digest[:16]
    other = again.answer(about(again, pool, 0, 10, encoding="f16"))
    assert len(other.data) == 10 * ROW // 2
    assert {path.parent.name for path in (again.settings.state / "released").rglob("*-f16-*.bin")} == {pool.digest}
    again.close()


@pytest.mark.parametrize("once", ["", "one", "both"])
@pytest.mark.parametrize("field", ["pool", "teacher"])
def test_digests_that_begin_alike_share_no_answers(
    site: Site, pool: Pool, monkeypatch: pytest.MonkeyPatch, field: str, once: str
) -> None:
    released = Released(site.settings.state / "released", site.ledger)

    def give(end: str, size: int) -> bytes:
        question = about(site, pool, 0, size).model_copy(update={field: "a" * 16 + end * 48})
        return released.give(
            question,
            size=size,
            width=1,
            score=lambda new: end.encode() * int(new.sum()),
            permit=lambda _: None,
            costs=lambda _: (),
        )

    with monkeypatch.context() as patch:
        if once:
            as_names_once_were(patch)
        assert give("b", 4) == b"bbbb"
        if once == "both":
            patch.setattr(module, "_is_of", lambda row, question: True)
            released = Released(released.folder, released.ledger)
            assert give("c", 9) == b"bbbbccccc"  # as it once was
    released = Released(released.folder, released.ledger)
    assert give("b", 9) == b"b" * 9
    assert give("c", 9) == b"c" * 9
    assert give("b", 9) == b"b" * 9
    assert spent(site) == (23 if once == "both" else 18)


class Stop(BaseException):
    """The process ends here."""


class Steps:
    """Counts what a release does to the disk, and stops it, or lets the disk fail, before or after one step of it."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.error: Callable[[], BaseException] = Stop

    def __call__(self, real: Any) -> Any:
        def step(*arguments: Any) -> Any:
            self._maybe_stop()
            result = real(*arguments)
            self._maybe_stop()
            return result

        return step

    def _maybe_stop(self) -> None:
        if self.left is not None:
            if self.left == 0:
                self.left = None
                raise self.error()
            self.left -= 1

    def install(self, patch: pytest.MonkeyPatch) -> None:
        class Watched:
            pwrite, fsync = staticmethod(self(os.pwrite)), staticmethod(self(os.fsync))

            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

        patch.setattr(module, "os", Watched())
        patch.setattr(Ledger, "_commit", self(Ledger._commit))
        patch.setattr(ledger_module, "write_json", self(ledger_module.write_json))


STEPS = 8
"""Before and after: the bytes written, secured, the row committed, the head written."""


def made(folder: Path, *, noisy: bool, **policy: Any) -> Site:
    """A site that says its answers are behind noise, if `noisy`; what they are does not matter here."""
    settings = make_site(folder, **policy).settings
    noise = OutputNoise(mechanism="output-noise", sigma=40.0) if noisy else NoPrivacy()
    return Site(settings.model_copy(update={"privacy": noise}), Fickle())


class Near:
    """Two rows that are the same in 16 bits and in a byte a class, of which one prefers the other class."""

    classes, fingerprint = ("cat", "dog", "cow"), Fickle.fingerprint
    rows = np.log(np.array([[0.400005, 0.399995, 0.2], [0.399995, 0.400005, 0.2]]))

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.rows[np.arange(len(images)) % 2], np.float32)


class Between:
    """Coverage of 1/2 in 16 bits, a little more or less."""

    fingerprint, description = "e" * 64, "between"

    def scores(self, images: np.ndarray) -> np.ndarray:
        return np.asarray([0.5 + 1e-5, 0.5 - 1e-5] * len(images), np.float32)[: len(images)]


@pytest.mark.parametrize(
    ("precision", "coarser"), [("u8", ["top-2-u8", "votes"]), ("f16", ["u8", "top-2", "top-2-u8", "votes"])]
)
def test_a_coarser_answer_tells_nothing_that_the_finest_does_not(
    pool: Pool, tmp_path: Path, precision: str, coarser: list[str]
) -> None:
    settings = make_site(tmp_path, precision=precision, coverage="f16").settings
    with contextlib.closing(Site(settings, Near(), Between())) as site:
        kinds = [("log-probs", Near.fingerprint, encodings) for encodings in ([precision], coarser)]
        kinds += [("coverage", Between.fingerprint, ["f16", "u8"])]
        for kind, teacher, encodings in kinds:
            for encoding in encodings:
                data = site.answer(about(site, pool, 0, 2, kind=kind, teacher=teacher, encoding=encoding)).data
                assert data[: len(data) // 2] == data[len(data) // 2 :], encoding
    raw = np.asarray(Near.rows, np.float32)
    assert encode(raw[:1], "votes") != encode(raw[1:], "votes")  # of the rows themselves they would


@pytest.mark.parametrize("killed", [False, True])
def test_the_power_takes_no_answer_that_was_counted(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    disk, unsure = Disk(monkeypatch), list[set[Path]]()
    commit = Ledger._commit

    def committing(self: Ledger, *given: Any) -> Any:
        unsure.append(set(disk.unsure))
        return commit(self, *given)

    monkeypatch.setattr(Ledger, "_commit", committing)
    site = make_site(tmp_path)
    if killed:  # a process that made the folders and had no time to say so
        site.ledger.refresh()
        (tmp_path / "state" / "released" / pool.digest).mkdir(parents=True)
        assert len(disk.unsure) == 2
    site.answer(about(site, pool, 0, 5))
    assert unsure[-1] == disk.unsure == set()
    path = tmp_path / "state" / "released" / subject_of(about(site, pool, 0, 5))
    assert path.stat().st_size == 5 * ROW
    site.close()


def uses(site: Site) -> dict[str, int]:
    """How often each mechanism was used by the ledger."""
    found: Counter[str] = Counter()
    for (_, _, name, _), count in site.ledger.spent.mechanisms.items():
        found[name] += count
    return found


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("left", range(STEPS + 1))
def test_a_crash_at_any_step_leaves_nothing_uncounted(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, noisy: bool
) -> None:
    site, name = made(tmp_path, noisy=noisy), "output-noise" if noisy else "none"
    before = site.answer(about(site, pool, 0, 10)).data
    steps = Steps()
    with monkeypatch.context() as patch:
        steps.install(patch)
        steps.left = left
        if left == STEPS:  # there are no more
            site.answer(about(site, pool, 5, 25))
            assert steps.left == 0
        else:
            with pytest.raises(Stop):
                site.answer(about(site, pool, 5, 25))
    again = made(tmp_path, noisy=noisy)  # the first one is left as a process that was killed leaves it
    assert spent(again) == (10 if left < 5 else 25)
    assert uses(again) == {name: spent(again)}
    after = again.answer(about(again, pool, 0, 25)).data
    assert after[: 10 * ROW] == before
    assert again.answer(about(again, pool, 0, 25)).data == after
    assert spent(again) == 25
    assert uses(again) == {name: 25}
    again.close()


@pytest.mark.parametrize("left", range(STEPS))
@pytest.mark.parametrize(
    "error",
    [
        lambda: OSError(errno.ENOSPC, "No space left on device"),
        lambda: sqlite3.OperationalError("database or disk is full"),
        lambda: StorageError("Cannot write"),
    ],
)
def test_a_full_disk_refuses_and_the_same_site_goes_on(
    site: Site, pool: Pool, monkeypatch: pytest.MonkeyPatch, left: int, error: Any
) -> None:
    site.answer(about(site, pool, 0, 10))
    steps = Steps()
    steps.error = error
    with monkeypatch.context() as patch:
        steps.install(patch)
        steps.left = left
        with pytest.raises((ConsilienceError, OSError, sqlite3.Error)):
            site.answer(about(site, pool, 5, 25))
    after = site.answer(about(site, pool, 0, 25)).data
    assert site.answer(about(site, pool, 0, 25)).data == after
    assert spent(site) == 25


class Life(RuleBasedStateMachine):
    """A site that is asked, killed and started again at any time; what left is written down here."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=_scratch[-1]))
        self.left: dict[tuple[str, int], bytes] = {}
        self.patch, self.steps = pytest.MonkeyPatch(), Steps()
        self.steps.install(self.patch)

    @initialize(noisy=st.booleans())
    def begin(self, noisy: bool) -> None:
        self.noisy = noisy
        self.pool = make_pool(self.folder)
        self.start()

    def start(self) -> None:
        self.site = made(self.folder, noisy=self.noisy, limits={"lifetime": 60})

    @rule(
        start=st.integers(0, SIZE - 1),
        count=st.integers(1, 20),
        encoding=st.sampled_from(["f32", "f16"]),
        stop=st.one_of(st.none(), st.integers(0, STEPS - 1)),
        again=st.booleans(),
    )
    def ask(self, start: int, count: int, encoding: str, stop: int | None, again: bool) -> None:
        question = about(self.site, self.pool, start, min(SIZE, start + count), encoding=encoding)
        self.steps.left = stop
        with contextlib.suppress(RefusedError, Stop):
            data = self.site.answer(question).data
            width = len(data) // len(question)
            for i in range(len(question)):
                row = data[i * width : (i + 1) * width]
                assert self.left.setdefault((encoding, start + i), row) == row
        stopped = stop is not None and self.steps.left is None
        self.steps.left = None
        if stopped or again:
            self.start()

    @invariant()
    def spent_is_never_lower_than_released(self) -> None:
        if hasattr(self, "site"):
            self.site.ledger.refresh()
            assert len(self.left) <= spent(self.site) <= 60
            assert set(uses(self.site)) <= {"output-noise" if self.noisy else "none"}
            assert sum(uses(self.site).values()) == spent(self.site)

    def teardown(self) -> None:
        self.patch.undo()
        if hasattr(self, "site"):
            rows = list(Ledger.open(self.site.settings).rows())
            answers = [row.entry for row in rows if row.entry.kind == "answer"]
            held = [(entry.subject, i) for entry in answers for a, b in entry.body["ranges"] for i in range(a, b)]
            assert len(held) == len(set(held)) == sum(r.entry.samples for r in rows)


_scratch: list[Path] = []


def test_a_life_of_questions_and_crashes(tmp_path: Path) -> None:
    _scratch.append(tmp_path)
    case = Life.TestCase
    case.settings = profile(max_examples=12, stateful_step_count=12)
    case("runTest").runTest()
