"""The ledger only grows: whatever is edited, put back, killed or done at once, it is noticed or nothing is lost."""

from __future__ import annotations

import datetime
import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilience.client import ledger as module
from consilience.client.ledger import Ledger
from consilience.client.ledger_head import comes_back_with_state, head_path
from consilience.client.ledger_restart import restart
from consilience.client.ledger_rows import Approval, Asked, Entry, approval, chain_of, mechanism
from consilience.common.errors import LedgerError, RunError, StorageError
from consilience.common.files import canonical_json, lock, read_json, write_json
from consilience.common.settings import SiteSettings
from helpers.small_site import make_site

ASKED = Asked("", "a" * 64, "log-probs", "f16", "b" * 64)
APPROVED = Approval({ASKED: 7}, sealed=True, tail=(1, 2, 3))


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    return make_site(tmp_path).settings


def add(ledger: Ledger, *entries: Entry) -> None:
    with ledger.alone():
        ledger.append(*entries)


def answer(samples: int, job: str = "job") -> Entry:
    return Entry("answer", job, "shelf", samples, {"ranges": [[0, samples]]})


def filled(settings: SiteSettings) -> Ledger:
    ledger = Ledger.open(settings)
    for samples in (3, 4, 5):
        add(ledger, answer(samples))
    return ledger


def set_clock(patch: pytest.MonkeyPatch, text: str) -> None:
    patch.setattr(module, "utc_now", lambda: datetime.datetime.fromisoformat(text))


def test_what_was_added_is_there_after_it_is_opened_again(settings: SiteSettings) -> None:
    ledger = filled(settings)
    add(ledger, answer(2, "other"), mechanism("other", "gaussian", {"sigma": 2.5, "sensitivity": 1}, 2))
    add(ledger, approval("other", "c" * 16, APPROVED))
    ledger.close()
    again = Ledger.open(settings)
    assert (again.count, again.chain, again.last) == (ledger.count, ledger.chain, ledger.last)
    assert again.spent == ledger.spent
    assert again.spent.jobs == {"job": 12, "other": 2}
    assert {(job, name, told): n for (job, _, name, told), n in again.spent.mechanisms.items()} == {
        ("job", "none", "{}"): 12,
        ("other", "none", "{}"): 2,
        ("other", "gaussian", '{"sensitivity":1,"sigma":2.5}'): 2,
    }
    assert again.spent.lifetime == sum(again.spent.months.values()) == 14
    row = again.row(5)
    assert (row.entry.kind, row.entry.subject) == ("mechanism", "gaussian")
    assert row.entry.body == {"parameters": {"sigma": 2.5, "sensitivity": 1}, "count": 2}
    assert again.approved("other", "c" * 16) == APPROVED
    assert again.approved_under("other") == ("c" * 16,)
    assert again.approved("other", "d" * 16) is None
    add(again, approval("other", "c" * 16, None))
    assert again.approved("other", "c" * 16) is None


def test_rows_cannot_be_changed_or_removed_by_accident(settings: SiteSettings) -> None:
    filled(settings).close()
    with sqlite3.connect(settings.state / "ledger.db") as database:
        for statement in ("DELETE FROM rows WHERE seq = 1", "UPDATE rows SET samples = 0"):
            with pytest.raises(sqlite3.IntegrityError, match="rows stay"):
                database.execute(statement)
    database.close()


def edit(settings: SiteSettings, statement: str) -> None:
    database = sqlite3.connect(settings.state / "ledger.db")
    with database:
        database.execute("DROP TRIGGER rows_stay")
        database.execute("DROP TRIGGER rows_stay_so")
        database.execute(statement)
    database.close()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        *(
            (f"UPDATE rows SET {column} WHERE seq = 2", "row 2 is not as it was written")
            for column in (
                "samples = 0",
                "job = 'another'",
                "time = '2020-01-01T00:00:00+00:00'",
                "kind = 'mechanism'",
                "subject = 'x'",
                "body = '{\"ranges\":[[0,9]]}'",
                "body = '{'",
                "body = '{\"a\": NaN}'",
                "chain = 'x'",
                "job = CAST(x'ff00' AS TEXT)",
            )
        ),
        ("DELETE FROM rows WHERE seq = 2", "row 2 is missing"),
        ("DELETE FROM rows WHERE seq = 1", "row 1 is missing"),
        ("DELETE FROM rows WHERE seq = 3", "row 3 and later ones are missing"),
        ("DELETE FROM rows", "row 1 and later ones are missing"),
        ("UPDATE rows SET seq = 9 WHERE seq = 3", "row 3 is missing"),
    ],
)
def test_a_row_that_was_edited_is_named(settings: SiteSettings, statement: str, words: str) -> None:
    filled(settings).close()
    edit(settings, statement)
    with pytest.raises(LedgerError, match=words) as caught:
        Ledger.open(settings)
    assert str(settings.state / "ledger.db") in caught.value.message
    assert "ledger restart" in caught.value.hint


def test_a_row_with_a_hash_made_anew_is_noticed_by_the_head(settings: SiteSettings) -> None:
    ledger = filled(settings)
    body, before = ledger.row(3).body, ledger.row(2).chain
    ledger.close()
    forged = chain_of(before, 3, ledger.last, answer(1), body)
    edit(settings, f"UPDATE rows SET samples = 1, chain = '{forged}' WHERE seq = 3")
    with pytest.raises(LedgerError, match=r"row 3 is not the one that .*ledger\.head"):
        Ledger.open(settings)


@pytest.mark.parametrize(
    ("samples", "when"), [(-5, None), (5, "2020-01-01T00:00:00+00:00"), (5, None)], ids=["negative", "early", "fine"]
)
def test_not_even_a_chain_that_was_made_anew_counts_down(
    settings: SiteSettings, samples: int, when: str | None
) -> None:
    ledger = filled(settings)
    body, before, when = ledger.row(3).body, ledger.row(2).chain, when or ledger.last
    ledger.close()
    forged = chain_of(before, 3, when, answer(samples), body)
    edit(settings, f"UPDATE rows SET samples = {samples}, time = '{when}', chain = '{forged}' WHERE seq = 3")
    write_json(ledger.head, {"rows": 3, "chain": forged, "samples": 1})
    if samples == 5 and when == ledger.last:
        assert Ledger.open(settings).spent.lifetime == 12
    else:
        with pytest.raises(LedgerError, match="row 3 is not as it was written"):
            Ledger.open(settings)


def test_an_older_copy_that_was_put_back_is_noticed(settings: SiteSettings, tmp_path: Path) -> None:
    ledger = filled(settings)
    ledger.close()
    shutil.copy(ledger.path, tmp_path / "backup.db")
    again = Ledger.open(settings)
    add(again, answer(100))
    again.close()
    shutil.copy(tmp_path / "backup.db", ledger.path)
    with pytest.raises(LedgerError, match="row 4 and later ones are missing"):
        Ledger.open(settings)
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="row 1 and later ones are missing"):
        Ledger.open(settings)


def put_back(backup: Path, state: Path) -> None:
    shutil.rmtree(state)
    shutil.copytree(backup, state)


def test_an_older_copy_of_the_whole_state_is_noticed_by_default(settings: SiteSettings, tmp_path: Path) -> None:
    filled(settings).close()
    shutil.copytree(settings.state, tmp_path / "backup")
    again = Ledger.open(settings)
    add(again, answer(1))
    again.close()
    put_back(tmp_path / "backup", settings.state)
    with pytest.raises(LedgerError, match="row 4 and later ones are missing"):
        Ledger.open(settings)
    shutil.rmtree(settings.state)
    with pytest.raises(LedgerError, match="row 1 and later ones are missing"):
        Ledger.open(settings)
    assert restart(settings)[1] == 13  # the head still tells it


def test_a_copy_of_the_whole_state_is_not_noticed_where_the_head_is_in_it(
    settings: SiteSettings, tmp_path: Path
) -> None:
    """Why it is elsewhere by default, and what `site check` warns of."""
    within = settings.model_copy(update={"ledger_head": settings.state / "ledger.head"})
    assert (comes_back_with_state(within), comes_back_with_state(settings)) == (True, False)
    filled(within).close()
    shutil.copytree(settings.state, tmp_path / "backup")
    again = Ledger.open(within)
    add(again, answer(1))
    again.close()
    put_back(tmp_path / "backup", settings.state)
    assert Ledger.open(within).spent.lifetime == 12


def test_where_the_head_lies_by_default(
    settings: SiteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert head_path(settings) == tmp_path / "state-ledger.head"
    monkeypatch.chdir(tmp_path)
    for state in ("other", "sub/..", "."):
        assert not comes_back_with_state(settings.model_copy(update={"state": Path(state)}))
    elsewhere = tmp_path / "other" / "head"
    assert head_path(settings.model_copy(update={"ledger_head": elsewhere})) == elsewhere
    (tmp_path / "link").symlink_to(settings.state)
    linked = settings.model_copy(update={"ledger_head": tmp_path / "link" / "head"})
    assert comes_back_with_state(linked)


def as_it_once_was(settings: SiteSettings) -> tuple[Path, Path]:
    """Fill a ledger whose head lies where it once did; return that place and its place now."""
    old = settings.state / "ledger.head"
    filled(settings.model_copy(update={"ledger_head": old})).close()
    return old, head_path(settings)


def test_a_head_in_the_state_is_moved_and_the_ledger_goes_on(settings: SiteSettings, tmp_path: Path) -> None:
    old, new = as_it_once_was(settings)
    shutil.copytree(settings.state, tmp_path / "backup")
    ledger = Ledger.open(settings)
    assert ledger.spent.lifetime == 12
    assert not old.exists()
    assert read_json(new)["rows"] == 3
    add(ledger, answer(1))
    ledger.close()
    assert Ledger.open(settings).spent.lifetime == 13
    put_back(tmp_path / "backup", settings.state)  # with the old head
    with pytest.raises(LedgerError, match="row 4 and later ones are missing"):
        Ledger.open(settings)


@pytest.mark.parametrize("step", ["write", "remove"])
def test_a_move_of_the_head_that_is_stopped_loses_nothing(
    settings: SiteSettings, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old, new = as_it_once_was(settings)

    def stop(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", stop) if step == "write" else patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            Ledger.open(settings)
    assert old.exists()
    assert new.exists() == (step == "remove")
    assert Ledger.open(settings).spent.lifetime == 12
    assert not old.exists()


def test_of_two_heads_the_one_that_tells_of_more_counts(settings: SiteSettings) -> None:
    """As an earlier version leaves it that was put in again for a while."""
    old, new = as_it_once_was(settings)
    Ledger.open(settings).close()
    write_json(old, {**read_json(new), "rows": 4, "samples": 20})
    with pytest.raises(LedgerError, match=r"state/ledger\.head tells of 4 rows"):
        Ledger.open(settings)
    assert restart(settings)[1] == 20
    assert Ledger.open(settings).spent.lifetime == 20


def test_a_place_where_no_head_can_be_written_is_said(settings: SiteSettings, tmp_path: Path) -> None:
    old, _ = as_it_once_was(settings)
    (tmp_path / "file").write_text("")
    nowhere = settings.model_copy(update={"ledger_head": tmp_path / "file" / "head"})
    with pytest.raises(StorageError, match="Cannot write") as caught:
        Ledger.open(nowhere)
    assert "ledger_head" in caught.value.hint
    assert old.exists()


@pytest.mark.parametrize("trace", ["released/aa/answers.bin", "ledger-20300101T000000Z/ledger.db", "sums/index.sqlite"])
def test_no_ledger_begins_where_one_was_lost(settings: SiteSettings, trace: str) -> None:
    filled(settings).close()
    path = settings.state / trace
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    for left in (*settings.state.glob("ledger.db*"), head_path(settings)):
        left.unlink()
    for _ in range(2):  # the first look leaves an empty database
        with pytest.raises(LedgerError, match=r"all rows of .*ledger\.db are missing, and .* is there") as caught:
            Ledger.open(settings)
        assert "ledger restart" in caught.value.hint
        with pytest.raises(LedgerError, match="tells how many samples were released"):
            restart(settings)
    shutil.rmtree(settings.state / "sums", ignore_errors=True)  # without its index no ledger begins at all
    assert restart(settings, 40)[1] == Ledger.open(settings).spent.lifetime == 40


def test_a_first_start_that_was_stopped_early_is_a_first_start(settings: SiteSettings) -> None:
    ledger = Ledger.open(settings)
    ledger.close()
    ledger.head.unlink()
    (settings.state / "released").mkdir()
    (settings.state / "sums").mkdir()
    assert Ledger.open(settings).count == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"rows": "x", "chain": "", "samples": 0}'])
def test_a_head_that_is_lost_or_damaged_is_noticed(settings: SiteSettings, content: str) -> None:
    ledger = filled(settings)
    ledger.close()
    ledger.head.write_text(content)
    with pytest.raises(LedgerError, match=r"ledger\.head is damaged"):
        Ledger.open(settings)
    ledger.head.unlink()
    with pytest.raises(LedgerError, match=r"ledger\.head is missing, and the ledger has 3 rows"):
        Ledger.open(settings)


def test_where_the_head_is_to_lie_elsewhere_the_user_is_told_to_move_it(settings: SiteSettings, tmp_path: Path) -> None:
    ledger = filled(settings)
    ledger.close()
    moved = settings.model_copy(update={"ledger_head": tmp_path / "disk" / "site.head"})
    with pytest.raises(LedgerError, match="is missing") as caught:
        Ledger.open(moved)
    assert f"move {ledger.head} there while the agent is stopped" in caught.value.hint
    (tmp_path / "disk").mkdir()
    ledger.head.rename(tmp_path / "disk" / "site.head")
    assert Ledger.open(moved).count == 3


@pytest.mark.parametrize("body", [{"state": "begun", "teacher": "x"}, {"teacher": "x"}, {}])
def test_a_row_of_a_sum_that_is_not_as_ours_are_is_a_bad_row(settings: SiteSettings, body: dict[str, str]) -> None:
    ledger = filled(settings)
    with ledger.alone(), pytest.raises(LedgerError, match="row 4 is not as it was written"):
        ledger.append(Entry("sum", "job", "a" * 64, body=body))


@pytest.mark.parametrize(
    "changes",
    [
        {"tail": [1, 2]},
        {"tail": [1, 2, "x"]},
        {"tail": 3},
        {"asked": [{"samples": 1}]},
        {"asked": "x"},
        {"tail": [1, 2, -1]},
    ],
)
def test_a_row_of_an_approval_that_is_not_as_ours_are_is_a_bad_row(settings: SiteSettings, changes: Any) -> None:
    ledger, entry = filled(settings), approval("job", "c" * 16, APPROVED)
    with ledger.alone(), pytest.raises(LedgerError, match="row 4 is not as it was written"):
        ledger.append(Entry("approval", "job", entry.subject, body={**entry.body, **changes}))


def test_an_approval_that_does_not_say_all_is_none(settings: SiteSettings) -> None:
    ledger, old = filled(settings), {"given": True, "asked": [ASKED._asdict()]}
    add(ledger, Entry("approval", "job", "c" * 16, body=old))
    assert ledger.approved("job", "c" * 16) is None


def test_a_file_that_is_no_database_is_damaged(settings: SiteSettings) -> None:
    filled(settings).close()
    (settings.state / "ledger.db").write_bytes(b"x" * 8192)
    with pytest.raises(LedgerError, match="is damaged"):
        Ledger.open(settings)


def test_what_happens_to_the_file_while_it_is_in_use_is_noticed(settings: SiteSettings, tmp_path: Path) -> None:
    ledger = filled(settings)
    edit(settings, "DELETE FROM rows WHERE seq = 3")
    with pytest.raises(LedgerError, match="row 3 is missing"):
        add(ledger, answer(1))
    ledger.close()
    other = make_site(tmp_path / "other").settings
    ledger = filled(other)
    replaced = tmp_path / "copy.db"
    shutil.copy(ledger.path, replaced)
    replaced.rename(ledger.path)
    with pytest.raises(LedgerError, match="was replaced while it was in use"):
        add(ledger, answer(1))


def test_a_head_that_tells_of_more_rows_is_noticed_before_anything_leaves(settings: SiteSettings) -> None:
    ledger = filled(settings)
    write_json(ledger.head, {**read_json(ledger.head), "rows": 9})
    with pytest.raises(LedgerError, match="tells of 9 rows"):
        add(ledger, answer(1))


def test_time_never_goes_back(settings: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(settings)
    set_clock(monkeypatch, "2030-05-31T23:59:59+00:00")
    add(ledger, answer(1))
    set_clock(monkeypatch, "2029-01-01T00:00:00+00:00")
    assert ledger.now == "2030-05-31T23:59:59+00:00"
    add(ledger, answer(2))
    ledger.close()
    ledger = Ledger.open(settings)
    assert ledger.spent.months == {"2030-05": 3}
    set_clock(monkeypatch, "2030-06-01T00:00:00+00:00")
    add(ledger, answer(4))
    assert ledger.spent.months == {"2030-05": 3, "2030-06": 4}


def test_rows_are_added_all_or_none(settings: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(settings)

    def full(self: Ledger) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_commit", full)
        with pytest.raises(StorageError, match="disk is full"):
            add(ledger, answer(7), answer(8))
    assert (ledger.count, ledger.spent.lifetime) == (3, 12)
    add(ledger, answer(1))
    assert ledger.count == 4


def test_a_head_that_could_not_be_written_is_written_before_anything_else_leaves(
    settings: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(settings)

    def full(path: Path, value: Any) -> None:
        raise StorageError("Cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(StorageError):
            add(ledger, answer(1))
    assert (read_json(ledger.head)["rows"], ledger.count) == (3, 4)
    with ledger.alone():
        pass
    told = {"rows": 4, "chain": ledger.chain, "last": ledger.last, "samples": 13, "features": 0, "tail": 0}
    assert read_json(ledger.head) == told


def in_processes(count: int, work: Callable[[int], None]) -> None:
    """Do `work` in so many processes at once; fails when it fails in one."""
    children = []
    for number in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that this process may have
            child = os.fork()
        if child == 0:
            try:
                work(number)
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def test_processes_that_write_at_once_lose_no_row(settings: SiteSettings) -> None:
    def work(number: int) -> None:
        ledger = Ledger.open(settings)
        for _ in range(5):
            add(ledger, answer(number + 1))

    in_processes(6, work)
    ledger = Ledger.open(settings)
    assert ledger.count == 30
    assert ledger.spent.lifetime == 5 * (1 + 2 + 3 + 4 + 5 + 6)
    assert read_json(ledger.head)["rows"] == 30


def test_who_waits_too_long_for_the_ledger_is_told(settings: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, other = filled(settings), Ledger.open(settings)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with ledger.alone(), pytest.raises(StorageError, match="Another process"):
        add(other, answer(1))
    assert ledger.count == 3


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda ledger: ledger.path.write_bytes(b"x" * 5000), False),
        (lambda ledger: ledger.path.unlink(), False),
        (lambda ledger: ledger.head.unlink(), False),
        (lambda ledger: ledger.head.write_text("x"), False),
        (lambda ledger: None, True),
    ],
)
def test_another_ledger_begins_with_all_that_was_spent(settings: SiteSettings, damage: Any, whole: bool) -> None:
    ledger = filled(settings)
    ledger.close()
    (settings.state / "released").mkdir()
    damage(ledger)
    rows_tell = ledger.path.exists() and ledger.path.read_bytes()[:6] == b"SQLite"
    if not ledger.head.exists() or ledger.head.read_text() == "x":  # the rows may be those of an older copy
        with pytest.raises(LedgerError, match="may be an older copy: it tells of 12") as caught:
            restart(settings)
        assert "--spent" in caught.value.hint
        aside, carried, _, of_no_job, sums_known = restart(settings, 12)
    else:
        aside, carried, _, of_no_job, sums_known = restart(settings)
    assert sums_known == whole
    assert (carried, of_no_job) == (12, (0 if rows_tell else 12, 0))
    again = Ledger.open(settings)
    assert again.spent.lifetime == sum(again.spent.months.values()) == 12
    assert [row.entry.kind for row in again.rows()] == ["carried"] + ["sum"] * (not sums_known)
    assert again.spent.jobs == {"job" if rows_tell else "": 12}
    assert (aside / "released").exists()
    assert not (settings.state / "released").exists()
    add(again, answer(1))
    again.close()
    assert Ledger.open(settings).spent.lifetime == 13


def test_rows_without_a_head_may_be_an_older_copy_and_do_not_say_how_much_was_spent(
    settings: SiteSettings, tmp_path: Path
) -> None:
    """A disk is lost, head and all, and the copy of a night before is put back."""
    filled(settings).close()
    shutil.copytree(settings.state, tmp_path / "backup")
    ledger = Ledger.open(settings)
    add(ledger, answer(30), Entry("answer", "job", "taps", 3, {"ranges": [[0, 3]], "kind": "features", "width": 10}))
    ledger.close()
    put_back(tmp_path / "backup", settings.state)
    head_path(settings).unlink()
    for spent in (None, 45):
        if spent is None:
            with pytest.raises(LedgerError, match="may be an older copy: it tells of 12"):
                restart(settings)
        else:
            assert restart(settings, spent)[1:3] == (45, 0)
    set_aside(settings)
    ledger = Ledger.open(settings)
    add(ledger, Entry("answer", "job", "taps", 3, {"ranges": [[0, 3]], "kind": "features", "width": 10}))
    ledger.close()
    head_path(settings).unlink()
    with pytest.raises(LedgerError, match="how many bytes of features were released") as caught:
        restart(settings, 48)
    assert "--spent-bytes" in caught.value.hint
    assert restart(settings, 48, 30)[1:3] == (48, 30)


def test_a_clock_that_was_set_back_is_held_against_another_ledger_too(
    settings: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, "2040-06-15T00:00:00+00:00")
    filled(settings).close()
    set_clock(monkeypatch, "2040-05-01T00:00:00+00:00")
    restart(settings)
    ledger = Ledger.open(settings)
    assert ledger.now == "2040-06-15T00:00:00+00:00"
    assert ledger.spent.months == {"2040-06": 12}
    ledger.close()
    set_aside(settings)
    (settings.state / "ledger.db").unlink()  # now the head alone tells
    restart(settings)
    assert Ledger.open(settings).now == "2040-06-15T00:00:00+00:00"


@pytest.mark.parametrize("kind", ["tail", "sum", "card"])
def test_another_ledger_knows_of_no_mechanism_whatever_left(settings: SiteSettings, kind: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "tail": {"what": "blocks", "teacher": "f" * 64, "policy": "c" * 16, "first": 1, "bytes": 9},
        "sum": {"state": "given", "teacher": "f" * 64},
        "card": {"told": ["class_priors"], "teacher": "f" * 64, "policy": "c" * 16},
    }
    ledger = Ledger.open(settings)
    add(ledger, Entry(kind, "job", "x" * 64, body=bodies[kind]))  # type: ignore[arg-type]
    ledger.close()
    restart(settings)
    again = Ledger.open(settings)
    assert again.spent.lifetime == 0
    assert [key[2] for key in again.spent.mechanisms] == ["none"]
    again.close()


def test_where_nothing_tells_what_was_spent_a_person_must(settings: SiteSettings) -> None:
    ledger = filled(settings)
    ledger.close()
    ledger.path.write_bytes(b"x" * 5000)
    ledger.head.write_text("x")
    with pytest.raises(LedgerError, match="tells how many samples were released"):
        restart(settings)
    assert ledger.path.read_bytes() == b"x" * 5000
    assert restart(settings, 40)[1] == Ledger.open(settings).spent.lifetime == 40


@pytest.mark.parametrize("body", [{}, [], "x", {"count": "1", "parameters": {}}, {"count": 0, "parameters": {}}])
def test_a_row_of_another_make_is_a_bad_row_even_if_its_hash_fits(settings: SiteSettings, body: Any) -> None:
    ledger = filled(settings)
    row = ledger.row(ledger.count)
    entry = Entry("mechanism", "job", "output-noise", 0, body)
    text = canonical_json(body).decode()
    chain = chain_of(ledger.chain, row.seq + 1, row.time, entry, text)
    ledger.close()
    with sqlite3.connect(ledger.path) as database:
        values = (row.seq + 1, row.time, "mechanism", "job", 0, "output-noise", text, chain)
        database.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    database.close()
    with pytest.raises(LedgerError, match=f"row {row.seq + 1} is not as it was written"):
        Ledger.open(settings)


@pytest.mark.parametrize("step", range(5))
def test_a_restart_that_is_stopped_loses_nothing(
    settings: SiteSettings, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    filled(settings).close()
    real_rename, real_write, steps = Path.rename, write_json, iter(range(100))

    def stop() -> None:
        if next(steps) == step:
            raise KeyboardInterrupt

    def rename(self: Path, target: Any) -> Path:
        stop()
        return real_rename(self, target)

    def write(path: Path, value: Any) -> None:
        real_write(path, value)
        stop()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr("consilience.client.ledger_restart.write_json", write)
        patch.setattr(module, "write_json", write)
        try:
            restart(settings)
        except KeyboardInterrupt:
            with pytest.raises(LedgerError):
                Ledger.open(settings)
            set_clock(patch, "2040-01-01T00:00:00+00:00")  # another folder to put it aside in
            patch.setattr("consilience.client.ledger_restart.utc_now", module.utc_now)
            steps = iter(range(50, 100))
            restart(settings)
    assert Ledger.open(settings).spent.lifetime == 12
    assert Ledger.open(settings).spent.jobs == {"job": 12}


def test_a_job_takes_no_more_than_before_from_another_ledger(settings: SiteSettings, tmp_path: Path) -> None:
    ledger = filled(settings)
    add(ledger, answer(2, "other"), mechanism("other", "gaussian", {"sigma": 2.5, "sensitivity": 1}, 2))
    add(ledger, Entry("answer", "other", "taps", 3, {"ranges": [[0, 3]], "kind": "features", "width": 10}))
    ledger.close()
    assert restart(settings, 20, 35)[1:4] == (20, 35, (3, 5))  # a person knows of more than the rows
    again = Ledger.open(settings)
    assert (again.spent.jobs, again.spent.features) == ({"": 3, "job": 12, "other": 5}, {"": 5, "other": 30})
    assert {key[2]: n for key, n in again.spent.mechanisms.items() if key[0] == "other"} == {"none": 5}
    add(again, answer(1, "other"))
    again.close()
    set_aside(settings)
    assert restart(settings)[1:4] == (21, 35, (3, 5))  # what was carried over is carried on
    assert Ledger.open(settings).spent.jobs == {"": 3, "job": 12, "other": 6}


def test_samples_sent_to_the_tail_are_carried_over(settings: SiteSettings, tmp_path: Path) -> None:
    ledger = filled(settings)
    asked = {"what": "outputs", "samples": 7, "bytes": 90}
    add(ledger, Entry("tail", "job", "t" * 64, body=asked), Entry("tail", "job", "t" * 64, body=asked))
    add(ledger, Entry("tail", "other", "t" * 64, body={**asked, "what": "gradient"}))
    assert ledger.spent.tails == {
        ("job", "rounds"): 2,
        ("job", "samples"): 14,
        ("job", "bytes"): 180,
        ("other", "rounds"): 1,
        ("other", "samples"): 7,
        ("other", "bytes"): 90,
    }
    ledger.close()
    restart(settings)
    again = Ledger.open(settings)
    assert again.spent.tails == {("job", "samples"): 14, ("other", "samples"): 7}
    again.close()
    set_aside(settings)
    (settings.state / "ledger.db").unlink()  # now the head alone tells
    restart(settings)
    again = Ledger.open(settings)
    assert again.spent.tails == {("", "samples"): 21}
    again.close()


@pytest.mark.parametrize("body", [{"samples": 0, "bytes": 9}, {"samples": 3, "bytes": -9}, {"bytes": 9}])
def test_a_question_about_the_tail_that_counts_down_is_a_bad_row(settings: SiteSettings, body: dict[str, int]) -> None:
    ledger = filled(settings)
    with pytest.raises(LedgerError, match="row 4"):
        add(ledger, Entry("tail", "job", "t" * 64, body={"what": "outputs", **body}))


def set_aside(settings: SiteSettings) -> None:
    """Rename the folders of earlier restarts: a second has room for one."""
    for number, folder in enumerate(sorted(settings.state.glob("ledger-*T*"))):
        folder.rename(folder.with_name(f"ledger-{number}"))


def test_jobs_are_told_by_the_rows_that_can_still_be_read(settings: SiteSettings) -> None:
    ledger = filled(settings)
    add(ledger, answer(7, "other"))
    ledger.close()
    edit(settings, "DELETE FROM rows WHERE seq = 4")
    assert restart(settings).of_no_job == (7, 0)
    assert Ledger.open(settings).spent.jobs == {"": 7, "job": 12}


def test_no_other_ledger_begins_while_an_agent_runs(settings: SiteSettings) -> None:
    filled(settings).close()
    with lock(settings.state / "agent"), pytest.raises(RunError):
        restart(settings)
    assert Ledger.open(settings).spent.lifetime == 12
