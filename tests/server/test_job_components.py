"""A job that needs sites' principal components: they come with agreements, are kept, and hostile ones are refused."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.client.features import learn_bases
from consilience.client.teacher import load_teacher
from consilience.common.cards import TapCard
from consilience.common.components import enclose
from consilience.common.encoding import feature_bytes
from consilience.common.encoding.features import basis_bytes, pack_basis
from consilience.common.errors import AskingError, RunError, SettingsError
from consilience.common.files import read_json, write_json
from consilience.common.identity import make_key
from consilience.common.progress import Reporter
from consilience.common.protocol import Contract, Enclosed
from consilience.common.settings import JobSettings
from consilience.common.settings_file import dump_settings
from consilience.common.vouching import Signer
from consilience.deploy.local_grid import LocalGrid
from consilience.deploy.simulation import NOWHERE, admit
from consilience.server.authority import ensure_authority
from consilience.server.job import Job
from consilience.server.settings import Home
from helpers.commands import call
from helpers.feature_answers import features_card, images, in_components, tap_cards, teacher, telling
from helpers.feature_site import PREPROCESSING, make_pool, make_settings, network
from helpers.jobs import build_home, job_settings, run_job
from helpers.sites import Enclosing, Sites

SAMPLES = 48
PIXELS = images(SAMPLES)
CLASSES = {"east": ("a", "b", "c"), "north": ("c", "d", "e"), "west": ("e", "f", "a")}
LAYERS = {"east": "cnn3@0.2", "north": "cnn3@0.15", "west": "cnn3@0.2"}
NUMBER = 4
"""Principal components of each layer of east."""

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    about = (PIXELS[..., 0], images(12, 5)[..., 0], np.arange(12) % 6, "abcdef")
    return build_home(tmp_path, *about, test_pool=False)


EAST, BASES = in_components(teacher(LAYERS["east"], 1), PIXELS, tap_cards(teacher(LAYERS["east"], 1), "east"), NUMBER)
WEST = tap_cards(teacher(LAYERS["west"], 1), "west")


def honest(contract: Contract) -> Enclosed | None:
    """What comes with east's agreement."""
    taps = {tap.name: tap for tap in EAST}
    held = [(taps[name], pack_basis(*BASES[name])) for name in contract.components]
    return enclose(contract, "east", held, None) if held else None


def sites_of(enclosing: Enclosing = honest, east: tuple[TapCard, ...] = EAST) -> Sites:
    handlers = {
        "east": telling(teacher(LAYERS["east"], 1), PIXELS, east, BASES),
        "north": telling(teacher(LAYERS["north"], 1), PIXELS, ()),
        "west": telling(teacher(LAYERS["west"], 1), PIXELS, WEST),
    }
    features = {"east": features_card(east), "west": features_card(WEST)}
    return Sites(handlers, classes=CLASSES, features=features, enclosing={"east": enclosing})


def settings(home: Path, learning: str, **changes: Any) -> JobSettings:
    own = {
        "architecture": "cnn3@0.15",
        "learning": learning,
        "fit": {"epochs": 1, "batch_size": 16, "precision": "f32", "learning_rate": 0.05},
        "layer_wise": {"epochs": 1},
        "common_feature": {"spaces": [{"width": 4}]},
    }
    return job_settings(home, {"student": own}, changes)


def do(home: Path, sites: Sites, reporter: Reporter, learning: str = "layer-wise", **changes: Any) -> dict[str, Any]:
    submission = changes.pop("submission", 1.0)
    return run_job(home, sites, settings(home, learning, **changes), reporter, submission=submission)


def asked(sites: Sites, site: str = "east") -> list[tuple[str, ...]]:
    """Of which taps a site was asked for components, contract by contract."""
    return [contract.components for name, contract in sites.contracts if name == site]


def test_components_come_with_the_agreement_and_are_kept(home: Path, reporter: Reporter) -> None:
    sites = sites_of()
    report = do(home, sites, reporter)
    layers = report["amalgamation"]["layers"][:3]
    assert [layer["components"] for layer in layers] == [{"east": 0.9}] * 3
    assert layers[0]["channels"] == {"east": 6, "west": 6}
    assert asked(sites) == [("layer1", "layer2", "layer3")]
    assert asked(sites, "west") == asked(sites, "north") == [()]
    held = sorted((home / "run" / "components" / "east").iterdir())
    assert {path.read_bytes() for path in held} == {pack_basis(*basis) for basis in BASES.values()}
    assert b"components" in (home / "run" / "contract.json").read_bytes()
    assert max(len(line) for line in (home / "run" / "contract.json").read_text().splitlines()) < 200


def test_common_features_need_no_components(home: Path, reporter: Reporter) -> None:
    sites = sites_of()
    do(home, sites, reporter, "common-feature")
    assert asked(sites) == [()]
    assert not (home / "run" / "components").exists()


def test_a_resumed_run_has_them_or_asks_again(home: Path, reporter: Reporter) -> None:
    sites = sites_of()
    whole = sites.handlers["west"]

    def lost(question: Any, attempt: int) -> Any:
        raise KeyError("lost")

    sites.handlers["west"] = lost
    with pytest.raises(AskingError, match="west lacks 48 samples and features of 144 samples"):
        do(home, sites, reporter)
    east = home / "run" / "components" / "east"
    when = {path.name: path.stat().st_mtime_ns for path in east.iterdir()}
    assert len(when) == 3
    sites.handlers["west"] = whole
    expected = do(home, sites, reporter, submission=2.0)["amalgamation"]
    assert {path.name: path.stat().st_mtime_ns for path in east.iterdir()} == when
    assert asked(sites) == [("layer1", "layer2", "layer3")]  # east had answered all: it was not needed again
    first = sorted(when)[0]
    (east / first).write_bytes((east / first).read_bytes()[:-1])
    answered = dict(sites.asked_features)
    assert do(home, sites, reporter, submission=3.0)["amalgamation"] == expected
    lacked = next(tap.name for tap in EAST if tap.fingerprint[:12] == first[:12])
    assert asked(sites)[1:] == [(lacked,)]
    assert sites.asked_features == answered
    sites.enclosing.clear()
    (east / first).unlink()
    with pytest.raises(AskingError, match=f"It sent principal components of: none; asked for were: {lacked}"):
        do(home, sites, reporter, submission=4.0)


def test_a_site_whose_components_are_not_there_does_not_count_as_complete(home: Path, reporter: Reporter) -> None:
    sites = sites_of()
    do(home, sites, reporter)
    for path in (home / "run" / "components" / "east").iterdir():
        path.unlink()
    with pytest.raises(AskingError, match="east lacks its principal components"):
        do(home, sites, reporter)  # of the same submission: nobody is looked for


def sealed_with(**changes: Any) -> Enclosing:
    """What an honest site encloses, with other fields."""

    def enclosing(contract: Contract) -> Enclosed | None:
        held = honest(contract)
        assert held is not None
        return held.model_copy(update=changes)

    return enclosing


def altered(change: Callable[[bytes], bytes]) -> Enclosing:
    """What an honest site encloses, with other bytes."""

    def enclosing(contract: Contract) -> Enclosed | None:
        held = honest(contract)
        assert held is not None
        return held.model_copy(update={"data": base64.b64encode(change(base64.b64decode(held.data))).decode()})

    return enclosing


def not_finite() -> tuple[TapCard, ...]:
    """East's cards, with the digest of components of which one is NaN; `poisoned` gives those."""
    digest = hashlib.sha256(poisoned(pack_basis(*BASES["layer1"]))).hexdigest()
    held = EAST[0].components
    assert held is not None
    return (EAST[0].model_copy(update={"components": held.model_copy(update={"digest": digest})}), *EAST[1:])


def poisoned(data: bytes) -> bytes:
    return data[:8] + np.array([np.nan], "<f4").tobytes() + data[12:]


SIZE = sum(tap.components.bytes for tap in EAST if tap.components is not None)
HOSTILE: dict[str, tuple[Enclosing, str]] = {
    "none": (lambda contract: None, "sent principal components of: none; asked for were: layer1, layer2, layer3"),
    "another tap": (
        sealed_with(taps=("layer1", "layer2", "penultimate")),
        "of: layer1, layer2, penultimate; asked for were: layer1, layer2, layer3",
    ),
    "a tap more": (sealed_with(taps=("layer1", "layer2", "layer3", "penultimate")), "asked for were"),
    "a tap less": (sealed_with(taps=("layer1", "layer2")), "asked for were"),
    "another order": (sealed_with(taps=("layer2", "layer1", "layer3")), "asked for were"),
    "another digest": (
        altered(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "components of its tap layer3 are not those whose digest its card tells",
    ),
    "another shape": (
        altered(lambda data: data[:-4]),
        f"components are {SIZE - 4:,} bytes; its card tells of {SIZE:,}",
    ),
    "too large": (altered(lambda data: data + bytes(1000)), f"are {SIZE + 1000:,} bytes; its card tells of {SIZE:,}"),
    "far too large": (altered(lambda data: data + bytes(9 * 2**20)), "Agreement is not as it must be: enclosed"),
    "a signature too long": (altered(lambda data: b"\xff\xff" + data[2:]), "bytes; its card tells of"),
    "nothing": (altered(lambda data: b""), "0 bytes; its card tells of"),
    "no base64": (sealed_with(data="no base64!"), "are no base64"),
    "not ASCII": (sealed_with(data="é" * 8), "are no base64"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_components_leave_their_site_out_alone(home: Path, reporter: Reporter, case: str) -> None:
    enclosing, words = HOSTILE[case]
    sites = sites_of(enclosing)
    report = do(home, sites, reporter, ask={"min_sites": 2})
    assert words in report["left_out"]["east"]
    assert {site["name"] for site in report["sites"]} == {"north", "west"}
    assert report["amalgamation"]["without"] == ["north"]
    assert not (home / "run" / "components").exists()
    assert not any(site == "east" for site, _, _ in sites.asked_features)


def test_components_that_are_not_finite_are_refused_whatever_the_card_tells(home: Path, reporter: Reporter) -> None:
    east = not_finite()
    sites = sites_of(altered(lambda data: data[:2] + poisoned(data[2:])), east)
    report = do(home, sites, reporter, ask={"min_sites": 2})
    assert "a direction above 1 or a mean that no feature has" in report["left_out"]["east"]


def test_a_hostile_site_stops_a_job_that_needs_it_by_name(home: Path, reporter: Reporter) -> None:
    with pytest.raises(AskingError, match="Site east cannot take part: The principal components of its tap layer3"):
        do(home, sites_of(HOSTILE["another digest"][0]), reporter)


def test_components_that_nobody_asked_for_are_refused(home: Path, reporter: Reporter) -> None:
    pushed = Enclosed(taps=("layer3",), data="AAAA")
    report = do(home, sites_of(lambda contract: pushed), reporter, "common-feature", ask={"min_sites": 2})
    assert "of: layer3; asked for were: none" in report["left_out"]["east"]


def test_a_site_with_a_key_signs_its_components(home: Path, reporter: Reporter) -> None:
    keys = {site: make_key(home / f"{site}.key") for site in CLASSES}

    def signed(by: str) -> Enclosing:
        def enclosing(contract: Contract) -> Enclosed | None:
            taps = {tap.name: tap for tap in EAST}
            held = [(taps[name], pack_basis(*BASES[name])) for name in contract.components]
            return enclose(contract, "east", held, Signer(keys[by], "east", CLASSES["east"]))

        return enclosing

    for enclosing in (honest, signed("west")):
        sites = sites_of(enclosing)
        sites.keys = keys
        with pytest.raises(AskingError, match="Its principal components do not carry its signature"):
            do(home, sites, reporter)
    sites = sites_of(signed("east"))
    sites.keys = keys
    assert do(home, sites, reporter)["amalgamation"]["without"] == ["north"]


def test_components_count_towards_the_bytes_that_a_job_takes(home: Path, reporter: Reporter) -> None:
    rows = SAMPLES * sum(feature_bytes(tap.values, "f16") for tap in EAST)
    west = SAMPLES * sum(feature_bytes(tap.values, "f16") for tap in WEST)
    assert west < rows + SIZE or rows < west  # else the test would be of west alone
    sites = sites_of()
    sites.features.pop("west")
    with pytest.raises(SettingsError, match=rf"site east declares {rows + SIZE:,} bytes"):
        do(home, sites, reporter, ask={"feature_bytes": rows + SIZE - 1})


def test_a_run_of_an_older_version_is_refused_in_words_where_its_cards_told_components(
    home: Path, reporter: Reporter
) -> None:
    do(home, sites_of(), reporter)
    path = home / "run" / "contract.json"
    held = read_json(path)
    for card in held["sites"]:
        card["protocol"] = 1
    write_json(path, held)
    do(home, sites_of(), reporter)  # what its cards tell is as now
    held["sites"][0]["features"]["taps"][0]["basis"] = "AAAA"
    write_json(path, held)
    with pytest.raises(RunError, match="another version of Consilience began"):
        do(home, sites_of(), reporter)


def federation(home: Path) -> tuple[Home, list[Path]]:
    """Two real sites of one architecture, of which the first needs approvals and the second seals only."""
    server = Home(home / "server")
    ensure_authority(server)
    make_pool(home / "pool")
    paths = []
    for at, policy in enumerate(({"approval": True}, {"sealed_only": True})):
        folder = home / f"site-{at}"
        chosen = make_settings(
            folder,
            {"*": {"channels": 4}},
            model=network("cnn3@0.25", seed=at),
            architecture="cnn3@0.25",
            name=f"site-{at}",
            pools=[str(home / "pool")],
            key="site.key",
            kit="kit.json",
            policy=policy,
        )
        admit(server, chosen, NOWHERE)
        learn_bases(chosen, load_teacher(chosen))
        paths.append(folder / "site.yaml")
    return server, paths


def test_layers_are_amalgamated_over_components_with_approval_and_sealed(tmp_path: Path, reporter: Reporter) -> None:
    forget_sites()
    server, paths = federation(tmp_path)
    np.savez(tmp_path / "test.npz", x=images(12, 5)[..., 0], y=np.arange(12) % 3, names=np.array(["cat", "dog", "cow"]))
    run = tmp_path / "run"
    run.mkdir()
    student = {
        "architecture": "cnn3@0.25",
        "learning": "layer-wise",
        "preprocessing": PREPROCESSING,
        "fit": {"epochs": 1, "batch_size": 16, "precision": "f32"},
        "layer_wise": {"epochs": 1},
    }
    job = settings(tmp_path, "layer-wise", student=student, privacy={"sealed": True}, ask={"encoding": "f16"})
    dump_settings(job, run / "job.yaml")

    def attempt(submission: float) -> dict[str, Any]:
        with LocalGrid(client_app, [{"site": str(path)} for path in paths], workers=1) as grid:
            Job.open(run, reporter, server).do(grid, submission=submission)
        told: dict[str, Any] = read_json(run / "report.json")
        return told

    with pytest.raises(AskingError, match=r"site-0 cannot take part: .*nobody at the site has approved"):
        attempt(1.0)
    assert call("ledger", "show", paths[0])["rows"] == 0
    call("approve", run / "job.yaml", paths[0])
    report = attempt(2.0)
    layers = report["amalgamation"]["layers"][:3]
    assert [layer["components"].keys() for layer in layers] == [{"site-0", "site-1"}] * 3
    forget_sites()
    expected = {f"layer{at}": basis_bytes(4, width) for at, width in ((1, 8), (2, 16), (3, 32))}
    for path in paths:
        shown = call("ledger", "show", path)["features"]
        assert {entry["tap"]: entry["bytes"] for entry in shown["components"]} == expected
        rows = 50 * sum(feature_bytes(4 * side * side, "f16") for side in (16, 8, 4))
        assert shown["jobs"] == {"job": rows + sum(expected.values())}
