"""Who is admitted: approving, suspending, resuming and rotating sites; requests of strangers."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from consilience.common.errors import ConsilienceError, IdentityError
from consilience.common.files import canonical_json
from consilience.common.identity import Kit, PrivateKey, Request, key_fingerprint, key_line
from consilience.server.admission import Register
from consilience.server.authority import authority_pem, ensure_authority
from consilience.server.settings import Home, ServerSettings

SETTINGS = ServerSettings(address="learn.example.org:9092")


def new_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def request(name: str, key: PrivateKey | None = None, contact: str = "Ada, +41 44 000 00 00") -> Request:
    return Request.make(key or new_key(), name, contact)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "server")


@pytest.fixture
def register(home: Home) -> Register:
    return Register(home)


def files(home: Home) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in home.folder.rglob("*") if path.is_file()}


def test_an_approved_site_is_known_by_its_key(register: Register) -> None:
    asked = request("hospital-a")
    record = register.approve(asked)
    assert (record.name, record.contact, record.status) == ("hospital-a", asked.contact, "approved")
    assert (record.fingerprint, record.words) == (asked.fingerprint, asked.words)
    assert record.approved == record.changed
    assert record.approved.utcoffset() is not None
    assert register.records() == [record]
    assert register.keys() == {"hospital-a": asked.public_key}
    assert Register(Home(register._home.folder)).records() == [record]


def test_the_same_request_again_changes_nothing(home: Home, register: Register) -> None:
    asked = request("hospital-a")
    first = register.approve(asked)
    before = files(home)
    assert register.approve(asked) == first
    assert register.approve(asked, rotate=True) == first
    assert files(home) == before


def test_a_damaged_record_touches_that_site_alone(
    home: Home, register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = request("bad"), request("good")
    register.approve(bad)
    register.approve(good)
    path = home.sites / "bad.json"
    path.write_text(path.read_text()[:-20])
    for _ in range(2):
        assert register.keys() == {"good": good.public_key}
    (warning,) = caplog.messages
    assert "site bad is not admitted" in warning
    assert str(path) in warning
    assert register.suspend("good").status == "suspended"
    assert register.keys() == {}
    assert register.resume("good").status == "approved"
    for change in (lambda: register.suspend("bad"), lambda: register.approve(request("new"))):
        with pytest.raises(IdentityError, match=r"bad\.json is no admission record"):
            change()
    assert not (home.sites / "new.json").exists()


def test_a_new_contact_of_the_same_key_is_taken(register: Register) -> None:
    key = new_key()
    first = register.approve(request("hospital-a", key))
    second = register.approve(request("hospital-a", key, "Bob"))
    assert (second.contact, second.approved, second.fingerprint) == ("Bob", first.approved, first.fingerprint)
    assert second.history == ()


def test_another_key_needs_rotation_and_the_old_one_never_comes_back(register: Register) -> None:
    old_key = new_key()
    old = register.approve(request("hospital-a", old_key))
    new = request("hospital-a")
    with pytest.raises(IdentityError, match=r"'hospital-a' is known with another key.*--rotate"):
        register.approve(new)
    assert register.records() == [old]
    record = register.approve(new, rotate=True)
    assert record.fingerprint == new.fingerprint
    assert [(key.fingerprint, key.approved) for key in record.history] == [(old.fingerprint, old.approved)]
    assert record.history[0].replaced == record.approved
    assert register.keys() == {"hospital-a": new.public_key}
    for name in ("hospital-a", "hospital-b"):
        with pytest.raises(IdentityError, match="was replaced at site 'hospital-a' before"):
            register.approve(request(name, old_key), rotate=name == "hospital-a")


def test_one_key_is_one_site(register: Register) -> None:
    key = new_key()
    register.approve(request("hospital-a", key))
    register.suspend("hospital-a")
    with pytest.raises(IdentityError, match="that of site 'hospital-a'"):
        register.approve(request("hospital-b", key))
    register.approve(request("hospital-b"))
    with pytest.raises(IdentityError, match="that of site 'hospital-a'"):
        register.approve(request("hospital-b", key), rotate=True)


def test_rotation_is_for_a_site_that_is_known(register: Register) -> None:
    with pytest.raises(IdentityError, match="no site 'hospitl-a'"):
        register.approve(request("hospitl-a"), rotate=True)
    assert register.records() == []


def test_a_suspended_site_is_not_admitted_until_resumed(register: Register) -> None:
    asked = request("hospital-a")
    register.approve(asked)
    assert register.suspend("hospital-a").status == "suspended"
    assert register.keys() == {}
    with pytest.raises(IdentityError, match=r"suspended.*consilience server resume hospital-a"):
        register.approve(asked)
    assert register.keys() == {}
    assert register.resume("hospital-a").status == "approved"
    assert register.keys() == {"hospital-a": asked.public_key}
    register.suspend("hospital-a")
    register.approve(request("hospital-a"), rotate=True)  # the answer to a copied key: suspend it, then approve another
    assert list(register.keys()) == ["hospital-a"]
    for change in (register.suspend, register.resume):
        with pytest.raises(IdentityError, match=r"no site '\.\./hospital-a'; known: hospital-a"):
            change("../hospital-a")


def test_a_change_of_one_site_touches_no_other_file(home: Home, register: Register) -> None:
    ensure_authority(home)
    register.approve(request("hospital-a"))
    changes = [
        lambda: register.approve(request("hospital-b")),
        lambda: register.suspend("hospital-b"),
        lambda: register.resume("hospital-b"),
        lambda: register.approve(request("hospital-b"), rotate=True),
    ]
    for change in changes:
        before = files(home)
        change()
        after = files(home)
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        assert changed == {home.sites / "hospital-b.json"}


def test_a_refused_request_leaves_the_folder_as_it_was(home: Home, register: Register) -> None:
    register.approve(request("hospital-a"))
    before = files(home)
    forged = request("hospital-b").model_copy(update={"name": "hospital-c"})
    for refused in (forged, request("hospital-a")):
        with pytest.raises(IdentityError):
            register.approve(refused)
    assert files(home) == before


def test_a_kit_is_for_the_site_and_holds_no_secret(home: Home, register: Register, tmp_path: Path) -> None:
    key = new_key()
    asked = request("hospital-a", key)
    ca_pem = ensure_authority(home)
    kit = register.kit(register.approve(asked), SETTINGS, authority_pem(home))
    assert (kit.site, kit.site_fingerprint, kit.address, kit.ca) == (
        "hospital-a",
        asked.fingerprint,
        "learn.example.org:9092",
        ca_pem,
    )
    kit.write(tmp_path / "kit.json")
    asked.write(tmp_path / "request.json")
    assert Kit.read(tmp_path / "kit.json") == kit
    authority = serialization.load_pem_private_key(home.ca_key.read_bytes(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    for path in (tmp_path / "kit.json", tmp_path / "request.json", home.sites / "hospital-a.json"):
        for private in (key, authority):
            assert_without_key(path.read_bytes(), private)


def assert_without_key(data: bytes, key: PrivateKey) -> None:
    """Look for the private number, and for any encoding of a private key, in what is sent."""
    assert b"PRIVATE" not in data
    number = key.private_numbers().private_value
    size = (key.key_size + 7) // 8
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for secret in (number.to_bytes(size, "big"), f"{number:x}".encode(), str(number).encode(), der):
        assert secret not in data


def test_a_changed_record_is_refused_and_named(home: Home, register: Register) -> None:
    register.approve(request("hospital-a"))
    path = home.sites / "hospital-a.json"
    held = json.loads(path.read_text())
    changes: list[dict[str, Any]] = [
        {"public_key": key_line(new_key().public_key())},
        {"fingerprint": "0" * 64},
        {"name": "hospital-b"},
        {"status": "welcome"},
        {"more": 1},
    ]
    for change in changes:
        path.write_text(json.dumps({**held, **change}))
        with pytest.raises(IdentityError, match=r"hospital-a\.json is no admission record"):
            register.records()
        assert register.keys() == {}
    path.write_text("")
    with pytest.raises(IdentityError, match=r"hospital-a\.json is no admission record"):
        register.approve(request("hospital-b"))


def test_commands_at_once_all_take_effect(home: Home, register: Register) -> None:
    key = new_key()  # four names, one key: exactly one may win
    asked = [request(f"own-{i}") for i in range(4)] + [request(f"same-{i}", key) for i in range(4)]

    def command(one: Request) -> bool:
        try:
            Register(Home(home.folder)).approve(one)
        except IdentityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(command, asked))
    assert done[:4] == [True] * 4
    assert sum(done[4:]) == 1
    assert [record.name for record in register.records()] == sorted(
        one.name for one, taken in zip(asked, done, strict=True) if taken
    )


# Requests of strangers


def signed(key: Any, algorithm: Any, **fields: Any) -> bytes:
    """A request as a stranger may make it, rightly signed."""
    body = {"consilience_request": 1, "name": "evil", "contact": "Eve", "made": "2026-01-01T00:00:00Z", **fields}
    body.setdefault("public_key", key_line(key.public_key()))
    signature = key.sign(b"consilience request\n" + canonical_json(body), *algorithm)
    return json.dumps({**body, "signature": signature.hex()}).encode()


ECDSA = (ec.ECDSA(hashes.SHA384()),)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../../evil"},
        {"name": "evil/../../x"},
        {"name": ".lock"},
        {"name": ""},
        {"name": "a" * 64},
        {"name": "evil\n"},
        {"name": "evil\x1b[2J"},
        {"contact": "Eve\x1b[2J"},
        {"contact": "Eve\nWords: abandon"},
        {"contact": "Eve\u202ekcart"},
        {"contact": "E" * 201},
        {"made": "yesterday"},
        {"consilience_request": 2},
        {"\x1b[2Jmore": 1},
    ],
)
def test_a_rightly_signed_request_with_a_hostile_field_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(signed(new_key(), ECDSA, **fields))
    with pytest.raises(IdentityError, match="is no request") as caught:
        Request.read(path)
    assert str(caught.value).isprintable()


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        path.write_bytes(signed(ec.generate_private_key(curve), ECDSA))
        with pytest.raises(IdentityError, match="another kind"):
            Request.read(path)
    edwards = ed25519.Ed25519PrivateKey.generate()
    formats = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    path.write_bytes(signed(edwards, (), public_key=edwards.public_key().public_bytes(*formats).decode()))
    with pytest.raises(IdentityError, match="another kind"):
        Request.read(path)


def test_a_key_line_is_kept_without_what_was_written_behind_it(home: Home, register: Register, tmp_path: Path) -> None:
    key = new_key()
    path = tmp_path / "request.json"
    path.write_bytes(signed(key, ECDSA, public_key=key_line(key.public_key()) + " \x1b[2J"))
    register.approve(Request.read(path))
    assert register.keys() == {"evil": key_line(key.public_key())}
    assert b"\\u001b" not in (home.sites / "evil.json").read_bytes()


def test_a_huge_or_odd_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte: reading it would not end
    with pytest.raises(IdentityError, match="is no request"):
        Request.read(path)
    good = signed(new_key(), ECDSA, name="good")
    for data in (b"", b"[]", b"null", b"[" * 60_000, b"\xff\xfe", good[:-1]):
        path.write_bytes(data)
        with pytest.raises(IdentityError, match="is no request"):
            Request.read(path)
    with pytest.raises(ConsilienceError):
        Request.read(tmp_path)


GOOD = signed(new_key(), ECDSA, name="good")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_request_is_refused_or_the_same(tmp_path: Path, at: int, damage: bytes) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(GOOD)
    good = Request.read(path)
    path.write_bytes(GOOD[:at] + damage + GOOD[at + len(damage) :])
    try:
        read = Request.read(path)
    except ConsilienceError as error:
        said = str(error)
    else:
        said = ""
        assert read == good
    assert said.isprintable()


class Admissions(RuleBasedStateMachine):
    """Any order of commands, against a model that is a dictionary."""

    names = st.sampled_from(["a", "b", "c"])
    numbers = st.integers(0, 3)
    keys = tuple(new_key() for _ in range(4))

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.register = Register(Home(Path(self.folder.name)))
        self.current: dict[str, int] = {}
        self.suspended: set[str] = set()
        self.replaced: set[int] = set()

    @rule(name=names, number=numbers, rotate=st.booleans())
    def approve(self, name: str, number: int, rotate: bool) -> None:
        asked = request(name, self.keys[number])
        elsewhere = any(held == number for other, held in self.current.items() if other != name)
        same = self.current.get(name) == number
        known = name in self.current
        allowed = number not in self.replaced and not elsewhere
        allowed &= name not in self.suspended if same else rotate == known
        if not allowed:
            with pytest.raises(IdentityError):
                self.register.approve(asked, rotate=rotate)
            return
        self.register.approve(asked, rotate=rotate)
        if known and not same:
            self.replaced.add(self.current[name])
            self.suspended.discard(name)
        self.current[name] = number

    @rule(name=names, stop=st.booleans())
    def change(self, name: str, stop: bool) -> None:
        change = self.register.suspend if stop else self.register.resume
        if name not in self.current:
            with pytest.raises(IdentityError, match="There is no site"):
                change(name)
            return
        change(name)
        (self.suspended.add if stop else self.suspended.discard)(name)

    def teardown(self) -> None:
        self.folder.cleanup()

    @invariant()
    def the_files_say_so(self) -> None:
        expected = {name: key_fingerprint(self.keys[number].public_key()) for name, number in self.current.items()}
        records = self.register.records()
        assert {record.name: record.fingerprint for record in records} == expected
        assert set(self.register.keys()) == set(self.current) - self.suspended
        gone = {earlier.fingerprint for record in records for earlier in record.history}
        assert gone == {key_fingerprint(self.keys[number].public_key()) for number in self.replaced}


class TestAdmissions(Admissions.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=25, stateful_step_count=20)
