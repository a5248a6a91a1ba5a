"""A SuperLink that reads, keeps, changes, swaps and replays what it carries, between real sites and a real job."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from pydantic import ValidationError
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.client.site import Site
from consilience.common.encoding import encode
from consilience.common.errors import AskingError, SettingsError
from consilience.common.files import canonical_json, read_json
from consilience.common.identity import key_fingerprint, key_line, words
from consilience.common.progress import Reporter
from consilience.common.protocol import ANSWER, CARD, CONTRACT, Question
from consilience.common.sealing import Secret, seal
from consilience.common.settings import JobSettings, Policy
from consilience.common.settings_file import parse_settings
from consilience.common.vouching import Signer
from consilience.deploy.local_grid import LocalGrid
from consilience.deploy.simulation import prepare, train_site
from consilience.server import signatures, trust
from consilience.server.authority import ensure_authority, make_job_key
from consilience.server.job import Job
from consilience.server.report import comparable
from consilience.server.settings import Home

Fields = dict[str, Any]
Change = Callable[[str, Fields], Fields]
"""Kind of question, a record's fields -> the fields that travel on instead."""
OWN_KEY = ec.generate_private_key(ec.SECP384R1())


FIT = {"epochs": 1, "precision": "f32", "augment": False}
SIMULATED = {
    "name": "small",
    "simulation": {
        "data": {"kind": "embedded"},
        "test": {"kind": "embedded", "split": "test"},
        "pool_share": 0.02,
        "partition": {"kind": "class-lists", "classes": [["Bag", "Coat", "Dress"], ["Dress", "Shirt", "Coat"]]},
        "teachers": [{"kind": "train", "architecture": "cnn3", "fit": FIT}],
    },
}
SEALED: dict[str, Any] = {"privacy": {"sealed": True}}
ROWS = np.full((25, 3), -np.log(3), np.float32)
"""An answer that says nothing, and is one."""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with trained teachers and kits, the server's folder that admitted them, and a pool of 100 images."""
    folder = tmp_path_factory.mktemp("sites")
    chosen = parse_settings(SIMULATED, JobSettings, source="job.yaml", folder=folder)
    assert chosen.simulation is not None
    with Reporter(quiet=True) as reporter:
        for path in prepare(chosen.simulation, chosen, folder, reporter):
            train_site(path, reporter)
    return folder / "simulation"


class Wire(LocalGrid):
    """Carries messages as the simulation's own grid does; `seen` holds the bytes of all that passes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen = bytearray()
        self.question: Change | None = None
        self.reply: Change | None = None

    def _deliver(self, message: Message, node: int) -> Message:
        kind = message.metadata.message_type
        self._pass(message, kind, self.question)
        reply = super()._deliver(message, node)
        reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id  # as if nothing had been changed
        self._pass(reply, kind, self.reply)
        return reply

    def _pass(self, message: Message, kind: str, change: Change | None) -> None:
        if change is not None and message.has_content() and "record" in message.content:
            fields = change(kind, dict(message.content.config_records["record"]))
            message.content = RecordDict({"record": ConfigRecord(fields)})
        for part in get_all_nested_objects(message).values():
            self.seen += part.deflate()


class World:
    """Runs of one job over a wire that a test changes."""

    def __init__(self, folder: Path, sites: Path) -> None:
        self.folder, self._sites = folder, sites

    def job(self, name: str, reporter: Reporter, *, home: bool = True, **changes: Any) -> Job:
        """Return the job of the folder `name`."""
        place = self.folder / name / "simulation"
        if not place.exists():
            shutil.copytree(self._sites, place)
        raw = {
            "name": "small",
            "pool": str(place / "pool"),
            "ask": {"question_size": 25, "retries": 1, "in_flight": 1},
            "student": {"architecture": "cnn3", "fit": FIT},
            **changes,
        }
        settings = parse_settings(raw, JobSettings, source="job.yaml", folder=self.folder)
        return Job(self.folder / name, settings, reporter, Home(place / "server") if home else None)

    def run(
        self,
        name: str,
        *,
        question: Change | None = None,
        reply: Change | None = None,
        policy: Any = None,
        whole: bool = False,
        **changes: Any,
    ) -> bytes:
        """Have every question of a job answered, and with `whole` do it to its end; return all that the wire saw."""
        forget_sites()
        with Reporter(quiet=True) as reporter:
            job = self.job(name, reporter, **changes)
            paths = sorted((self.folder / name / "simulation" / "sites").glob("*/site.yaml"))
            for path in paths:
                raw = yaml.safe_load(path.read_text())
                path.write_text(yaml.safe_dump({**raw, "policy": {**raw["policy"], **(policy or {})}}))
            with Wire(client_app, [{"site": str(path)} for path in paths], workers=2) as grid:
                grid.question, grid.reply = question, reply
                if whole:
                    job.do(grid)
                else:
                    job.participants(*job.answers(grid, False, 0.0))
            return bytes(grid.seen)

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Return what the stores of a run say of each answer."""
        indices = sorted((self.folder / name / "answers").glob("*/*/index.jsonl"))
        return [
            {**json.loads(line), "at": index.parent} for index in indices for line in index.read_text().splitlines()
        ]

    def records(self, name: str) -> list[bytes]:
        """Return the rows of every answer that a run stored."""
        held = [(entry, (entry["at"] / "answers.bin").read_bytes()) for entry in self.entries(name)]
        return [data[entry["offset"] : entry["offset"] + entry["bytes"]] for entry, data in held]

    def report(self, name: str) -> dict[str, Any]:
        """Return what a run found, but for the settings that say whether answers were sealed."""
        report = comparable(read_json(self.folder / name / "report.json"))
        report["settings"].pop("privacy")
        return report

    def failures(self, name: str) -> list[str]:
        """Return why questions failed."""
        lines = [json.loads(line) for line in (self.folder / name / "events.jsonl").read_text().splitlines()]
        return [line["reason"] for line in lines if line["event"] == "failed"]


@pytest.fixture
def world(tmp_path: Path, sites: Path) -> World:
    return World(tmp_path, sites)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, sites: Path) -> tuple[World, bytes]:
    """A world in which the run `open` is done, and what its wire saw."""
    world = World(tmp_path_factory.mktemp("finished"), sites)
    return world, world.run("open", whole=True)


def test_a_sealed_job_finds_what_an_open_one_does_and_shows_no_answer(finished: tuple[World, bytes]) -> None:
    world, seen_open = finished
    seen_sealed = world.run("sealed", whole=True, **SEALED)
    assert world.report("sealed") == world.report("open")
    rows = world.records("open")
    assert len(rows) == 2 * 4
    assert sorted(world.records("sealed")) == sorted(rows)
    assert all(row in seen_open for row in rows), "the search finds what is there"
    for row in rows:
        assert row not in seen_sealed
        assert row[:20] not in seen_sealed
    for entry in world.entries("open"):
        assert bytes.fromhex(entry["signature"]) in seen_open
    for entry in world.entries("sealed"):
        for secret in (entry["signature"], entry["salt"], entry["sha256"]):
            assert bytes.fromhex(secret) not in seen_sealed
            assert secret.encode() not in seen_sealed


def once(change: Callable[[Fields], Fields], kind: str = ANSWER) -> Change:
    """Change the first message of a kind alone."""
    done: list[bool] = []

    def changing(what: str, fields: Fields) -> Fields:
        if what != kind or done:
            return fields
        done.append(True)
        return change(fields)

    return changing


def test_a_sealed_job_about_a_part_of_the_pool_opens_and_is_vouched_for(world: World) -> None:
    """Real sites: what they sign, seal, keep and count is the part."""
    world.run("part", privacy={"sealed": True}, ask={"question_size": 25, "samples": 40}, whole=True)
    ids = np.load(world.folder / "part" / "asked.npy")
    assert [site["answers"] for site in world.report("part")["sites"]] == [40, 40]
    code, said = verify(world.folder / "part" / "student")
    assert code == 0, said
    for site in said["data"]["sites"]:
        assert (site["vouched"], site["compared"], site["unsigned"]) == (40, 40, 0)
    for path in sorted((world.folder / "part" / "simulation" / "sites").glob("*/site.yaml")):
        with contextlib.closing(Site.load(path)) as held_by:
            told = [tuple(held) for row in held_by.ledger.rows() for held in row.entry.body["ranges"]]
            assert held_by.ledger.spent.lifetime == 40
        assert [sample for low, high in sorted(told) for sample in range(low, high)] == ids.tolist()


def test_a_changed_answer_is_refused_and_asked_for_again(world: World) -> None:
    def flip(fields: Fields) -> Fields:
        data = bytearray(fields["data"])
        data[60] ^= 1
        return {**fields, "data": bytes(data)}

    world.run("run", reply=once(flip), **SEALED)
    assert world.failures("run") == ["An answer is not sealed for this question, this site and the job's key"]
    assert len(world.records("run")) == 2 * 4


def test_swapped_and_replayed_answers_are_refused(world: World) -> None:
    held: list[Fields] = []

    def swap(kind: str, fields: Fields) -> Fields:
        """Give each answer as the one to the next question of the same length."""
        if kind != ANSWER:
            return fields
        held.append(fields)
        before = held[-2] if len(held) in (3, 6) else fields
        return {**fields, "data": before["data"]}

    world.run("run", reply=swap, **SEALED)
    assert len(world.failures("run")) == 2
    earlier = {each["json"].split('"job_key"')[0]: each for each in held}

    def replay(fields: Fields) -> Fields:
        """Give the answer to the same question that another doing of the run got, under that one's key."""
        old = earlier[fields["json"].split('"job_key"')[0]]
        assert old["json"] != fields["json"]
        return {**fields, "data": old["data"]}

    shutil.rmtree(world.folder / "run" / "answers")
    world.run("run", reply=once(replay), **SEALED)
    assert world.failures("run")[2:] == ["An answer is not sealed for this question, this site and the job's key"]


def with_key(place: Path, made: Callable[[str, str], Any], kinds: tuple[str, ...]) -> Change:
    """Put another key into every question of these kinds."""
    public = Secret().public

    def change(kind: str, fields: Fields) -> Fields:
        if kind not in kinds:
            return fields
        record = json.loads(fields["json"])
        return {"json": json.dumps({**record, "job_key": made(record["job"], public)})}

    return change


@pytest.mark.parametrize("kinds", [(CONTRACT,), (ANSWER,)])
def test_a_key_of_the_superlink_s_own_is_refused_at_the_site(world: World, kinds: tuple[str, ...]) -> None:
    own = Home(world.folder / "superlink")
    ensure_authority(own)
    forge = with_key(world.folder, lambda job, key: make_job_key(own, job, key).model_dump(), kinds)
    with pytest.raises(AskingError, match="job-key, the authority in the site's kit does not vouch for the job's key"):
        world.run("run", question=forge, **SEALED)
    assert not world.records("run")


def test_a_site_that_answers_sealed_alone_is_not_talked_out_of_it(world: World) -> None:
    strip = with_key(world.folder, lambda job, key: None, (CONTRACT, ANSWER))
    with pytest.raises(AskingError, match="sealed-only, the site answers only jobs that have answers sealed"):
        world.run("run", question=strip, policy={"sealed_only": True}, **SEALED)
    with pytest.raises(SettingsError, match=r"'privacy.sealed' is False; site site-1 answers only jobs"):
        world.run("other", policy={"sealed_only": True})
    world.run("whole", policy={"sealed_only": True}, **SEALED)


def test_an_unsealed_reply_to_a_sealed_question_is_refused(world: World) -> None:
    """It could come from anybody who carries messages."""
    rows = encode(ROWS, "f16")
    with pytest.raises(AskingError, match="is not sealed for this question"):
        world.run("run", reply=lambda kind, f: {**f, "data": rows} if kind == ANSWER else f, **SEALED)
    assert not world.records("run")


def forged(kind: str, fields: Fields) -> Fields:
    """Answer in a site's place with rows that pass every other check, signed with a key of one's own."""
    if kind != ANSWER:
        return fields
    question = Question.model_validate_json(fields["json"])
    rows = encode(ROWS, question.encoding)
    vouch = Signer(OWN_KEY, "site-1", ("Bag", "Coat", "Dress")).vouch(question, rows)
    if question.job_key is None:
        return {**fields, "data": rows, "vouch": vouch}
    info = b"consilience sealed answer\n" + canonical_json(["site-1", question.model_dump(mode="json")])
    return {**fields, "data": seal(question.job_key.key, info, len(vouch).to_bytes(2, "big") + vouch + rows)}


@pytest.mark.parametrize("privacy", [{}, SEALED])
def test_answers_that_a_site_did_not_sign_are_refused(world: World, privacy: dict[str, Any]) -> None:
    with pytest.raises(AskingError, match=r"An answer does not carry its site's signature|is not sealed for this"):
        world.run("run", reply=forged, **privacy)
    assert not world.records("run")
    assert "An answer does not carry its site's signature" in world.failures("run")


def test_a_missing_signature_is_refused(world: World) -> None:
    with pytest.raises(AskingError, match="An answer does not carry its site's signature"):
        world.run("run", reply=lambda kind, f: {**f, "vouch": b""} if kind == ANSWER else f)
    assert not world.records("run")


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": key_fingerprint(OWN_KEY.public_key()), "public_key": key_line(OWN_KEY.public_key())},
        {"identity": None, "public_key": None},
        {"public_key": None},
    ],
)
def test_a_card_with_another_key_than_the_admitted_one_is_refused(world: World, changes: Fields) -> None:
    def change(kind: str, fields: Fields) -> Fields:
        return {"json": json.dumps({**json.loads(fields["json"]), **changes})} if kind == CARD else fields

    with pytest.raises(AskingError, match="does not name the key that it was admitted with"):
        world.run("run", reply=change)


def test_a_job_without_an_authority_cannot_be_sealed(world: World) -> None:
    with Reporter(quiet=True) as reporter, pytest.raises(SettingsError, match="no authority to sign the job's key"):
        world.job("run", reporter, home=False, **SEALED)


def test_a_run_that_lasts_longer_than_a_key_goes_on_with_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question is asked a day after the one before, by the server's clock; answers come after the next key."""
    real, now = trust.datetime.now, [trust.datetime.now(UTC)]

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            now[0] += timedelta(days=1)
            return now[0]

    monkeypatch.setattr(trust, "datetime", Later)
    keys: list[str] = []
    asked: dict[tuple[str, int], list[str]] = {}

    def look(kind: str, fields: Fields) -> Fields:
        if kind == ANSWER:
            question = json.loads(fields["json"])
            keys.append(question["job_key"]["key"])
            asked.setdefault((question["teacher"], question["start"]), []).append(keys[-1])
        return fields

    fail = once(lambda fields: {**fields, "data": b"nonsense"})
    world.run("run", question=look, reply=fail, **SEALED)
    assert len(world.records("run")) == 2 * 4
    assert len(world.failures("run")) == 1
    (again,) = (held for held in asked.values() if len(held) > 1)
    assert again[0] != again[1], "what failed is asked again for the key of that day"
    assert len(keys) == 2 * 4 + 1
    assert len(set(keys)) > 2
    assert real(UTC) < now[0] - timedelta(days=2)


def test_sums_and_seals_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="secure_sum and sealed exclude each other"):
        parse_settings(
            {"name": "small", "privacy": {"sealed": True, "secure_sum": True}},
            JobSettings,
            source="job.yaml",
            folder=tmp_path,
        )
    with pytest.raises(ValidationError, match="sums_only and sealed_only exclude each other"):
        Policy(sums_only=True, sealed_only=True)


def verify(student: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["student", "verify", "--student", str(student), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_anyone_can_check_who_vouched_for_what(finished: tuple[World, bytes], tmp_path: Path) -> None:
    run = finished[0].folder / "open"
    code, said = verify(run / "student")
    assert code == 0, said
    cards = read_json(run / "contract.json")["sites"]
    assert [(site["site"], site["key"]) for site in said["data"]["sites"]] == [
        (c["name"], c["identity"]) for c in cards
    ]
    for site in said["data"]["sites"]:
        assert (site["vouched"], site["compared"], site["unsigned"], site["problems"]) == (100, 100, 0, [])
        assert f"| {site['site']} | {words(site['key'])} | 100 of 100 |" in (run / "card.md").read_text()
    shutil.copytree(run / "student", tmp_path / "published")  # away from the answers
    code, said = verify(tmp_path / "published")
    assert code == 0, said
    assert [(site["vouched"], site["compared"]) for site in said["data"]["sites"]] == [(100, 0)] * 2
    shown = CliRunner().invoke(app, ["student", "verify", "--student", str(tmp_path / "published")])
    assert "site-1" in shown.stdout


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


def shift(shard: dict[str, Any]) -> None:
    shard["start"], shard["stop"] = shard["start"] + 1, shard["stop"] + 1


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "signature": lambda f: f["sites"][0]["answers"][0]["signed"][0].update(signature="3003020100"),
    "digest": lambda f: f["sites"][0]["answers"][0]["signed"][0].update(digest="0" * 64),
    "range": lambda f: shift(f["sites"][0]["answers"][0]["signed"][-1]),
    "twice": lambda f: f["sites"][0]["answers"][0]["signed"].append(f["sites"][0]["answers"][0]["signed"][0]),
    "kind": lambda f: f["sites"][0]["answers"][0].update(kind="coverage"),
    "encoding": lambda f: f["sites"][0]["answers"][0].update(encoding="u8"),
    "pool": lambda f: f["sites"][0]["answers"][0].update(pool="0" * 64),
    "policy": lambda f: f["sites"][0]["answers"][0].update(policy="0" * 16),
    "classes": lambda f: f["sites"][0]["classes"].reverse(),
    "site": lambda f: f["sites"][0].update(site="site-3"),
    "job": lambda f: f.update(job="large"),
    "key": lambda f: f["sites"][0].update(public_key=key_line(OWN_KEY.public_key())),
    "no key": lambda f: f["sites"][0].update(public_key="nonsense"),
    "key removed": lambda f: f["sites"][0].update(public_key=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_to_what_was_signed_is_found(finished: tuple[World, bytes], tmp_path: Path, name: str) -> None:
    shutil.copytree(finished[0].folder / "open" / "student", tmp_path / "student")
    changed(tmp_path / "student" / "signatures.json", CHANGES[name])
    code, said = verify(tmp_path / "student")
    assert code == 15, said
    assert "is wrong; site site-" in said["error"]["message"]
    first = said["data"]["sites"][0]
    assert first["problems"]
    if name in ("no key", "key removed"):
        assert (first["vouched"], first["unsigned"]) == (0, 100), "no signature of them could be checked"
    assert name == "job" or said["data"]["sites"][1]["problems"] == []


def test_changed_answers_and_missing_signatures_are_found(finished: tuple[World, bytes], tmp_path: Path) -> None:
    for part in ("answers", "student"):
        shutil.copytree(finished[0].folder / "open" / part, tmp_path / "run" / part)
    student = tmp_path / "run" / "student"
    (store,) = (tmp_path / "run" / "answers" / "site-2").iterdir()
    data = bytearray((store / "answers.bin").read_bytes())
    data[3] ^= 1
    (store / "answers.bin").write_bytes(data)
    code, said = verify(student)
    assert code == 15
    assert "site-2: log-probs of samples 0 to 25" in said["error"]["message"]
    assert "the answer here is not the one that was signed" in said["error"]["message"]
    assert said["data"]["sites"][1]["vouched"] == 100, "the signatures themselves are good"
    shutil.rmtree(tmp_path / "run" / "answers")
    changed(student / "signatures.json", lambda f: f["sites"][1]["answers"][0]["signed"].pop())
    code, said = verify(student)
    assert code == 15
    assert "Nobody vouches for 25 answers, of: site-2" in said["error"]["message"]
    (student / "signatures.json").write_text("{}")
    assert verify(student)[0] == 12
    (student / "signatures.json").unlink()
    assert verify(student)[0] == 12


@pytest.fixture
def copied(finished: tuple[World, bytes], tmp_path: Path) -> Path:
    """A copy of the run `open`: its answers and its student."""
    for part in ("answers", "student"):
        shutil.copytree(finished[0].folder / "open" / part, tmp_path / "run" / part)
    return tmp_path / "run"


HIDINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str, int]] = {
    "range": (
        lambda f: f["sites"][1]["answers"][0].update(answers=75, signed=f["sites"][1]["answers"][0]["signed"][1:]),
        "Nobody vouches for 25 answers, of: site-2",
        25,
    ),
    "part": (lambda f: f["sites"][1].update(answers=[]), "Nobody vouches for 100 answers, of: site-2", 100),
    "site": (lambda f: f["sites"].pop(), "site site-2: answers of it lie in the run's folder", 100),
}


@pytest.mark.parametrize("name", HIDINGS)
def test_answers_at_hand_that_the_file_does_not_claim_are_found(copied: Path, name: str) -> None:
    change, message, unsigned = HIDINGS[name]
    assert verify(copied / "student")[0] == 0
    changed(copied / "student" / "signatures.json", change)
    code, said = verify(copied / "student")
    assert code == 15, said
    assert message in said["error"]["message"]
    assert [(site["site"], site["unsigned"]) for site in said["data"]["sites"]] == [("site-1", 0), ("site-2", unsigned)]
    shutil.rmtree(copied / "answers")
    assert verify(copied / "student")[0] == 0, "away from the answers nobody can tell"


def test_a_record_at_hand_without_a_signature_is_not_the_signed_one(copied: Path) -> None:
    (store,) = (copied / "answers" / "site-2").iterdir()
    lines = [json.loads(line) for line in (store / "index.jsonl").read_text().splitlines()]
    lines[0] = {k: v for k, v in lines[0].items() if k not in ("salt", "signature")}
    (store / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = verify(copied / "student")
    assert code == 15
    assert "samples 0 to 25" in said["error"]["message"], "what was signed is not what lies here"


def test_an_empty_store_of_a_site_that_is_coming_is_no_answer(copied: Path) -> None:
    (copied / "answers" / "site-3" / "0123456789ab").mkdir(parents=True)
    (copied / "answers" / "site-3" / "0123456789ab" / "about.json").write_text("{}")
    assert verify(copied / "student")[0] == 0


def test_a_damaged_index_is_told_as_storage_and_a_torn_one_is_read(copied: Path) -> None:
    (store,) = (copied / "answers" / "site-2").iterdir()
    index = store / "index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # as a crash while it was appended leaves it
    code, said = verify(copied / "student")
    assert code == 0, said
    assert [site["compared"] for site in said["data"]["sites"]] == [100, 75]
    index.write_bytes(lines[0] + b"nonsense\n" + b"".join(lines[2:]))
    code, said = verify(copied / "student")
    assert code == 10, said
    assert "index.jsonl: line 2 is damaged" in said["error"]["message"]
    assert said["error"]["hint"].startswith(f"Remove {store} and run the same command again")
    second = said["data"]["sites"][1]
    assert (second["vouched"], second["compared"], second["unsigned"], second["problems"]) == (100, 0, 0, [])
    assert "line 2 is damaged" in second["damage"]


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "site twice": lambda f: f["sites"].append(f["sites"][0]),
    "part twice": lambda f: f["sites"][0]["answers"].append(f["sites"][0]["answers"][0]),
    "size": lambda f: f["sites"][0]["answers"][0].update(size=10**400),
    "answers": lambda f: f["sites"][0]["answers"][0].update(answers=10**400),
    "stop": lambda f: f["sites"][0]["answers"][0]["signed"][-1].update(stop=10**400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_counts_twice_or_beyond_all_pools_is_refused(copied: Path, name: str) -> None:
    changed(copied / "student" / "signatures.json", REFUSED[name])
    code, said = verify(copied / "student")
    assert code == 12, said
    assert "is not as it must be, or damaged" in said["error"]["message"]


def test_a_file_of_brackets_or_without_end_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / "student" / "signatures.json"
    whole = path.read_bytes()
    path.write_bytes(b"[" * 100_000)
    assert verify(copied / "student")[0] == 12
    monkeypatch.setattr(signatures, "MOST_BYTES", len(whole))
    path.write_bytes(whole)
    assert verify(copied / "student")[0] == 0
    path.write_bytes(whole + b" ")
    assert verify(copied / "student")[0] == 12


def test_a_run_that_began_before_sites_signed_goes_on_without(finished: tuple[World, bytes], tmp_path: Path) -> None:
    """Its contract knows no key; its records, and those that come, have no signature, and that is said."""
    world, run = World(tmp_path, tmp_path), tmp_path / "run"
    shutil.copytree(finished[0].folder / "open", run)
    changed(run / "contract.json", lambda f: [site.pop("public_key") for site in f["sites"]])
    for index in (run / "answers").glob("*/*/index.jsonl"):
        lines = [json.loads(line) for line in index.read_text().splitlines()][:-1]
        kept = [{k: v for k, v in line.items() if k not in ("salt", "signature")} for line in lines]
        index.write_text("".join(json.dumps(line) + "\n" for line in kept))
    world.run("run", whole=True)
    assert len(world.records("run")) == 2 * 4
    assert not any("signature" in entry for entry in world.entries("run"))
    assert world.report("run")["sites"][0]["signed"] == 0
    code, said = verify(run / "student")
    assert code == 12
    assert "No site vouched" in said["error"]["message"]
    assert "vouches" not in (run / "card.md").read_text()
