"""Secure sums over a Grid: real sites behind the real ClientApp, some of which go away, refuse or come back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from scipy.special import log_softmax

from consilience.client import app as app_module
from consilience.client.audit.answers import single_teacher
from consilience.client.privacy import account, event_from
from consilience.client.privacy.spending import loss_of
from consilience.client.site import Site
from consilience.common import bounded
from consilience.common.data import from_arrays
from consilience.common.errors import AskingError
from consilience.common.files import read_json
from consilience.common.identity import make_key, words
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import CallableTeacher, JobSettings, Policy, Preprocessing, SiteSettings, SumNoise
from consilience.common.settings_file import parse_settings
from consilience.common.sums.messages import DELIVERY, ROSTER, ROWS, TERMS, UNMASK, Terms, default_threshold
from consilience.deploy.local_grid import LocalGrid
from consilience.server import summing
from consilience.server.contract import RunContract
from consilience.server.job import Job
from consilience.server.secure_sums import SecureSum
from consilience.server.summed_pool import SummedPool
from consilience.server.summing import members_of, sum_over
from consilience.server.unify import unify
from consilience.server.unmasking import unify_summed
from helpers.summing import open_sums

SIZE = 60
CLASSES = {
    "ant": ("cat", "dog", "cow"),
    "bee": ("dog", "cow", "hen"),
    "elk": ("hen", "cat", "dog"),
    "fox": ("cow", "cat", "hen"),
}

pytestmark = pytest.mark.usefixtures("unsynced")


class Linear:
    """A teacher of its own for each site."""

    def __init__(self, name: str) -> None:
        self.classes = CLASSES[name]
        self.fingerprint = name[0] * 64 if name[0] in "abef" else "0" * 64
        self.weights = np.random.default_rng(ord(name[0])).normal(0, 1, (768, 3))

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(log_softmax(images.reshape(len(images), -1) @ self.weights / 2000, axis=1), np.float32)


@dataclass
class World:
    """Four sites, and what happens to their messages: `hinder` may raise."""

    sites: dict[str, Site]
    pool: Pool
    terms: Terms
    folder: Path
    nodes: dict[str, int]
    grid: LocalGrid | None = None
    hinder: Callable[[str, str], None] = lambda site, kind: None

    def answers(self) -> dict[str, np.ndarray]:
        images = self.pool.read(0, SIZE)
        return {name: single_teacher(site).log_probs(images) for name, site in self.sites.items()}

    def sum(self, patience: float = 60.0, **changes: Any) -> Any:
        assert self.grid is not None
        secure = SecureSum(self.folder / "sum", self.terms)
        return sum_over(self.grid, changes.get("nodes", self.nodes), secure, patience=patience)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 16, 16, 3), np.uint8)
    pool = Pool.build(from_arrays(pixels, None, (), where="test"), tmp_path / "pool")
    sites = {}
    for name, classes in CLASSES.items():
        make_key(tmp_path / name / "site.key")
        settings = SiteSettings(
            name=name,
            teacher=CallableTeacher(kind="callable", callable="a:b", classes=classes, preprocessing=Preprocessing()),
            pools=(pool.folder,),
            batch_size=16,
            state=tmp_path / name / "state",
            key=tmp_path / name / "site.key",
            policy=Policy(precision="f32"),
        )
        sites[name] = Site(settings, Linear(name))
    contract = RunContract.build(JobSettings(name="job"), [site.card for site in sites.values()], (pool.digest,))
    terms = Terms(
        job="job",
        contract="d" * 64,
        pool=pool.digest,
        start=0,
        stop=SIZE,
        labels=contract.labels,
        threshold=default_threshold(len(sites)),
        members=members_of(contract, {}),
    )
    names = list(CLASSES)
    made = World(sites, pool, terms, tmp_path, {name: 100 + i for i, name in enumerate(names)})
    monkeypatch.setattr(app_module, "site_of", lambda context: sites[str(context.node_config["site"])])
    monkeypatch.setattr(summing, "PIECE_BYTES", 200)  # several pieces a site
    monkeypatch.setattr(summing, "RETRY_SECONDS", 0.01)

    def app(message: Message, context: Any) -> Message:
        made.hinder(str(context.node_config["site"]), message.metadata.message_type)
        return app_module.app(message, context)

    hindered: Any = app
    with LocalGrid(hindered, [{"site": name} for name in names], workers=2) as made.grid:
        yield made


def run_job(world: World, more: dict[str, Any] | None = None, **ask: Any) -> dict[str, Any]:
    """Do the whole job over the world's pool; returns the report."""
    raw = {
        "name": "job",
        "pool": str(world.pool.folder),
        "privacy": {"secure_sum": True},
        "ask": {"encoding": "f32", **ask},
        "student": {"architecture": "cnn3", "fit": {"epochs": 1, "precision": "f32", "augment": False}},
        **(more or {}),
    }
    (world.folder / "run").mkdir(exist_ok=True)
    settings = parse_settings(raw, JobSettings, source="job.yaml", folder=world.folder)
    assert world.grid is not None
    with Reporter(quiet=True) as reporter:
        Job(world.folder / "run", settings, reporter).do(world.grid)
    report: dict[str, Any] = read_json(world.folder / "run" / "report.json")
    return report


def after(count: int, site: str, kind: str) -> Callable[[str, str], None]:
    """Break a site at its `count`-th message of a kind."""
    seen = [0]

    def hinder(name: str, message: str) -> None:
        if (name, message) == (site, kind):
            seen[0] += 1
            if seen[0] > count:
                raise RuntimeError("the power is off")

    return hinder


def test_sums_and_labels_are_those_of_open_answers(world: World) -> None:
    summed, lost = world.sum()
    assert lost == {}
    answers = world.answers()
    np.testing.assert_allclose(summed.sums, open_sums(world.terms, answers), atol=1e-8)
    found = unify_summed(world.folder / "q.npy", summed)
    members = world.terms.members
    expected = unify([answers[m.site] for m in members], [list(m.classes) for m in members])
    np.testing.assert_allclose(found.probs, expected.probs, atol=1e-6)


@pytest.mark.parametrize(("kind", "count"), [(TERMS, 0), (ROWS, 1)])
def test_a_site_is_lost_on_the_way(world: World, kind: str, count: int) -> None:
    world.hinder = after(count, "elk", kind)
    summed, lost = world.sum()
    assert list(lost) == ["elk"]
    left = [name for name in CLASSES if name != "elk"]
    assert [member.site for member in summed.survivors] == left
    np.testing.assert_allclose(summed.sums, open_sums(world.terms, world.answers(), left), atol=1e-8)


@pytest.mark.parametrize("kind", [TERMS, ROSTER, DELIVERY, ROWS, UNMASK])
@pytest.mark.parametrize("failures", [2, 3])
def test_what_passes_costs_no_site_its_place(world: World, kind: str, failures: int) -> None:
    """A full disk, or a teacher that stumbled, is asked again as often as openly."""
    seen = [0]

    def hinder(name: str, message: str) -> None:
        if (name, message) == ("elk", kind):
            seen[0] += 1
            if seen[0] <= failures:
                raise RuntimeError("the disk is full")

    world.hinder = hinder
    summed, lost = world.sum()
    assert list(lost) == (["elk"] if failures == 3 else [])
    assert len(summed.survivors) == (3 if failures == 3 and kind != UNMASK else 4)


def test_a_refusal_that_stays_is_asked_once(world: World) -> None:
    asked: list[str] = []
    world.hinder = lambda site, kind: asked.append(site)
    (world.folder / "ant" / "site.key").unlink()
    _, lost = world.sum()
    assert "sum-refused" in lost["ant"]
    assert asked.count("ant") == 1


def test_a_site_that_is_not_there_is_lost(world: World) -> None:
    summed, lost = world.sum(nodes={name: node for name, node in world.nodes.items() if name != "bee"})
    assert lost == {"bee": "it is not there"}
    assert len(summed.survivors) == 3


def test_a_job_learns_from_those_who_are_left(world: World) -> None:
    world.hinder = after(1, "bee", ROWS)
    report = run_job(world, min_sites=3)
    answers, left = world.answers(), [name for name in CLASSES if name != "bee"]
    labels = np.load(world.folder / "run" / "labels" / "q.npy")
    names = read_json(world.folder / "run" / "student" / "labels.json")["labels"]
    sets = [[names.index(name) for name in CLASSES[site]] for site in left]
    np.testing.assert_allclose(labels, unify([answers[site] for site in left], sets).probs, atol=1e-5)
    missed = {site["name"]: (site["answers"], site["missed"]) for site in report["sites"]}
    assert missed == {"ant": (SIZE, 0), "bee": (0, SIZE), "elk": (SIZE, 0), "fox": (SIZE, 0)}
    assert next(site["reason"] for site in report["sites"] if site["name"] == "bee")
    assert [site["bytes"] for site in report["sites"]] == [4 * 3 * SIZE, 0, 4 * 3 * SIZE, 4 * 3 * SIZE]
    run = world.folder / "run"
    assert not [*run.rglob("answers.bin"), *run.rglob("rows.bin")]


def test_a_job_that_needs_every_site_releases_nothing_without_one(world: World) -> None:
    world.hinder = after(1, "bee", ROWS)
    with pytest.raises(AskingError, match="3 of 4 sites have sent all their masked answers, 4 are needed; not: bee"):
        run_job(world)
    run = world.folder / "run"
    assert not (run / "labels").exists()
    assert not [*run.rglob("opened*")]  # masks are still on all that is here
    opened = [read_json(path)["opened"] for path in world.folder.glob("*/state/sums/*.json")]
    assert opened
    assert not any(opened)
    world.hinder = lambda site, kind: None
    assert len(run_job(world)["sites"]) == 4  # the same run goes on
    assert [*run.rglob("q.npy")]


def test_the_same_command_goes_on_after_a_failure(world: World) -> None:
    bee, elk = after(0, "bee", UNMASK), after(0, "elk", UNMASK)
    world.hinder = both(bee, elk)
    with pytest.raises(AskingError, match="2 of 4 sites have opened their shares, 3 are needed; not: bee, elk"):
        world.sum()
    asked: list[str] = []
    world.hinder = lambda site, kind: asked.append(kind)
    summed, lost = world.sum()
    assert lost == {}
    assert set(asked) == {UNMASK}  # nothing is asked twice but this
    np.testing.assert_allclose(summed.sums, open_sums(world.terms, world.answers()), atol=1e-8)


def test_another_attempt_has_other_keys_and_takes_back_who_was_lost(world: World) -> None:
    """The sites hold a sum to the roster that it had."""
    for name in ("bee", "elk"):
        world.hinder = both(after(0, name, DELIVERY), world.hinder)
    with pytest.raises(AskingError, match="2 of 4 sites have sent all their masked answers") as caught:
        run_job(world, min_sites=3)
    (folder,) = (world.folder / "run" / "sums").iterdir()
    assert f"Remove {folder} and run the same command again" in (caught.value.hint or "")
    first = read_json(folder / "terms.json")["attempt"]
    with pytest.raises(AskingError, match="2 of 4 sites have sent all"):  # the same run goes on with its attempt
        run_job(world, min_sites=3)
    assert read_json(folder / "terms.json")["attempt"] == first
    # Another roster: one site less has sent keys.
    shutil.rmtree(folder)
    world.hinder = after(0, "fox", TERMS)
    report = run_job(world, min_sites=3)
    assert {site["name"]: site["missed"] for site in report["sites"]} == {"ant": 0, "bee": 0, "elk": 0, "fox": SIZE}
    assert read_json(folder / "terms.json")["attempt"] != first


def both(first: Callable[[str, str], None], second: Callable[[str, str], None]) -> Callable[[str, str], None]:
    return lambda site, kind: (first(site, kind), second(site, kind), None)[2]


def test_another_sum_of_the_same_samples_is_refused_by_the_sites(world: World) -> None:
    world.sum()
    again = Terms.model_validate_json(world.terms.model_copy(update={"attempt": 2}).model_dump_json())
    secure = SecureSum(world.folder / "again", again)
    assert world.grid is not None
    with pytest.raises(AskingError, match=r"0 of 4 sites have sent keys.*ant: The site refused: sum-refused"):
        sum_over(world.grid, world.nodes, secure, patience=60)


def test_images_of_another_pool_that_were_summed_are_refused_by_the_sites(world: World) -> None:
    """One image in common is enough."""
    world.sum()
    images = np.concatenate([world.pool.read(7, 8), 255 - world.pool.read(0, 5)])
    pool = Pool.build(from_arrays(images, None, (), where="test"), world.folder / "other-pool")
    for name, site in world.sites.items():
        world.sites[name] = Site(site.settings.model_copy(update={"pools": (pool.folder,)}), Linear(name))

    def about(start: int) -> SecureSum:
        fields = {"pool": pool.digest, "start": start, "stop": 6}
        terms = Terms.model_validate_json(world.terms.model_copy(update=fields).model_dump_json())
        return SecureSum(world.folder / f"other-{start}", terms)

    assert world.grid is not None
    with pytest.raises(AskingError, match=r"0 of 4 sites have sent keys.*ant: The site refused: sum-refused"):
        sum_over(world.grid, world.nodes, about(0), patience=60)
    assert len(sum_over(world.grid, world.nodes, about(1), patience=60)[0].sums) == 5


def test_a_site_gives_sums_no_finer_than_its_policy(world: World) -> None:
    settings = world.sites["ant"].settings
    coarse = settings.model_copy(update={"policy": Policy(precision="f16")})
    world.sites["ant"] = Site(coarse, Linear("ant"))
    card = world.sites["ant"].card
    members = tuple(m.model_copy(update={"policy": card.policy}) if m.site == "ant" else m for m in world.terms.members)
    world.terms = Terms.model_validate_json(world.terms.model_copy(update={"members": members}).model_dump_json())
    summed, lost = world.sum()
    assert lost == {}
    answers = world.answers()
    fine = open_sums(world.terms, answers)
    answers["ant"] = answers["ant"].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(summed.sums, open_sums(world.terms, answers), atol=1e-8)
    assert np.abs(summed.sums - fine).max() > 1e-5


def trusting(world: World, name: str, peers: dict[str, str]) -> None:
    """Start a site anew that knows these peers."""
    world.sites[name] = Site(world.sites[name].settings.model_copy(update={"peers": peers}), Linear(name))


def words_of(world: World, *names: str) -> dict[str, str]:
    return {name: words(world.terms.by_name[name].identity) for name in names}


def test_a_site_makes_sums_with_the_peers_that_it_knows_alone(world: World) -> None:
    trusting(world, "ant", words_of(world, "bee", "elk", "fox"))
    asked: list[tuple[str, str]] = []
    world.hinder = lambda site, kind: asked.append((site, kind))
    trusting(world, "bee", words_of(world, "ant", "elk"))  # has not heard of fox
    trusting(world, "elk", {**words_of(world, "ant", "bee"), "fox": words("0" * 64)})  # has heard of another key
    with pytest.raises(AskingError, match=r"2 of 4 sites have sent keys") as caught:
        world.sum()
    for name in ("bee", "elk"):
        assert f"{name}: The site refused: unknown-peer" in caught.value.message
        assert world.sites[name].ledger.spent.lifetime == 0
    assert {kind for _, kind in asked} == {TERMS}
    for name in ("bee", "elk"):
        trusting(world, name, words_of(world, *(other for other in CLASSES if other != name)))
    summed, lost = world.sum()
    assert lost == {}
    np.testing.assert_allclose(summed.sums, open_sums(world.terms, world.answers()), atol=1e-8)


def test_a_peer_that_is_not_known_any_more_is_noticed_before_rows_leave(world: World) -> None:
    def forget(site: str, kind: str) -> None:
        if kind == DELIVERY:
            trusting(world, "bee", words_of(world, "ant", "elk"))

    world.hinder = forget
    _, lost = world.sum()
    assert lost.keys() == {"bee"}
    assert "unknown-peer" in lost["bee"]
    assert world.sites["bee"].ledger.spent.lifetime == 0


def test_a_site_without_a_key_cannot_take_part(world: World) -> None:
    card = world.sites["ant"].card.model_copy(update={"identity": None, "public_key": None})
    cards = [card, *(site.card for name, site in world.sites.items() if name != "ant")]
    contract = RunContract.build(JobSettings(name="job"), cards, (world.pool.digest,))
    with pytest.raises(AskingError, match="Site ant has no key to sign with"):
        members_of(contract, {})
    (world.folder / "ant" / "site.key").unlink()
    summed, lost = world.sum()
    assert "sum-refused" in lost["ant"]
    assert len(summed.survivors) == 3


def test_synonyms_of_the_job_are_in_the_terms(world: World) -> None:
    other = Linear("bee")
    other.classes = ("hound", "cow", "hen")
    world.sites["bee"] = Site(world.sites["bee"].settings, other)
    report = run_job(world, {"labels": {"synonyms": {"dog": ["hound"]}}})
    assert sorted(report["labels"]["names"]) == ["cat", "cow", "dog", "hen"]
    assert [site["missed"] for site in report["sites"]] == [0] * 4


# Noise in sums


def with_noise(world: World, privacy: dict[str, SumNoise]) -> None:
    """Let the sites add noise to sums, and the world's terms say so."""
    for name, mechanism in privacy.items():
        settings = world.sites[name].settings
        policy = settings.policy.model_copy(update={"sums_only": True})
        changed = settings.model_copy(update={"privacy": mechanism, "policy": policy})
        world.sites[name] = Site(changed, Linear(name))
    cards = [site.card for site in world.sites.values()]
    contract = RunContract.build(JobSettings(name="job", privacy={"secure_sum": True}), cards, (world.pool.digest,))  # type: ignore[arg-type]
    members = members_of(contract, {})
    world.terms = Terms.model_validate_json(
        world.terms.model_copy(update={"members": members, "threshold": 4}).model_dump_json()
    )


def sum_noise(sigma: float, honest: int) -> SumNoise:
    return SumNoise(mechanism="sum-noise", sigma=sigma, honest=honest)


def test_a_noisy_sum_is_accounted_before_it_leaves(world: World) -> None:
    with_noise(world, dict.fromkeys(CLASSES, sum_noise(40.0, 3)))
    summed, lost = world.sum()
    assert lost == {}
    assert np.abs(summed.sums - open_sums(world.terms, world.answers())).std() > 20
    for site in world.sites.values():
        events = [row.entry for row in site.ledger.rows() if row.entry.kind == "mechanism"]
        assert {(entry.subject, tuple(entry.body["parameters"].items())) for entry in events} == {
            ("sum-noise", (("honest", 3), ("sigma", 40.0)))
        }
        assert sum(entry.body["count"] for entry in events) == SIZE
        told = account([event_from("sum-noise", {"sigma": 40.0, "honest": 3}, SIZE)], 1e-5)
        assert loss_of(site.settings, site.ledger) == told


def test_a_job_with_noise_tells_its_guarantee(world: World) -> None:
    with_noise(world, dict.fromkeys(CLASSES, sum_noise(40.0, 4)))
    report = run_job(world)
    expected = account([event_from("sum-noise", {"sigma": 40.0, "honest": 4}, SIZE)], 1e-5)
    for site in report["sites"]:
        assert site["guarantee"]["epsilon"] == pytest.approx(expected.epsilon)
        assert site["guarantee"]["unit"] == "model"
        assert "if 4 of the sites are honest" in site["guarantee"]["mechanism"]
    assert "noise 40 in sums" in (world.folder / "run" / "card.md").read_text()


def test_limits_of_epsilon_bind_noise_in_sums(world: World) -> None:
    with_noise(world, dict.fromkeys(CLASSES, sum_noise(40.0, 3)))
    ant = world.sites["ant"].settings
    limited = ant.policy.model_copy(update={"limits": ant.policy.limits.model_copy(update={"epsilon_lifetime": 0.5})})
    world.sites["ant"] = Site(ant.model_copy(update={"policy": limited}), Linear("ant"))
    with pytest.raises(AskingError, match="ant cannot take part: The site refused: budget-exhausted"):
        run_job(world)
    assert world.sites["ant"].ledger.count == 0


def test_too_few_sites_for_the_honest_count_are_refused_on_both_sides(world: World) -> None:
    with_noise(world, dict.fromkeys(CLASSES, sum_noise(1.0, 4)))
    part = "site ant trusts that 4 sites add their noise; 4 of 4 add any, and 3 of these need to stay"
    with pytest.raises(AskingError, match=f"too little noise: {part}.* Set ask.min_sites higher"):
        run_job(world, min_sites=3)
    assert not (world.folder / "run" / "sums").exists()
    # A server that asks all the same is refused by each site.
    world.terms = Terms.model_validate_json(world.terms.model_copy(update={"threshold": 3}).model_dump_json())
    with pytest.raises(AskingError, match=r"0 of 4 sites have sent keys.*ant: The site refused: sum-refused"):
        world.sum()
    assert all(site.ledger.count == 0 for site in world.sites.values())


@pytest.mark.parametrize(
    ("sigmas", "part"),
    [
        ({"ant": 0.01, "bee": 100.0}, "ant: 0.01, bee: 100"),  # too far apart
        (dict.fromkeys(CLASSES, 1e8), "ant: 1e+08, bee: 1e+08, elk: 1e+08, fox: 1e+08"),  # no step is left
    ],
)
def test_noise_that_does_not_fit_is_told_before_anybody_is_asked(
    world: World, sigmas: dict[str, float], part: str
) -> None:
    for name, sigma in sigmas.items():
        settings = world.sites[name].settings
        policy = settings.policy.model_copy(update={"sums_only": True})
        noisy = settings.model_copy(update={"privacy": sum_noise(sigma, 1), "policy": policy})
        world.sites[name] = Site(noisy, Linear(name))
    asked: list[str] = []
    world.hinder = lambda site, kind: asked.append(kind)
    with pytest.raises(AskingError, match="shares of noise between") as caught:
        run_job(world)
    assert f"privacy.sigma of the sites: {part}" in caught.value.message
    assert "privacy.sigma and privacy.honest more alike" in (caught.value.hint or "")
    assert TERMS not in asked
    assert not (world.folder / "run" / "sums").exists()


def test_terms_that_do_not_hold_together_are_told_with_the_next_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = world.pool
    card = world.sites["ant"].card
    many = [card.model_copy(update={"name": f"site-{number}"}) for number in range(256)]  # one more than may be
    settings = {"name": "job", "pool": str(pool.folder), "privacy": {"secure_sum": True}}
    job = parse_settings(settings, JobSettings, source="job.yaml", folder=world.folder)
    contract = RunContract.build(job, many, (pool.digest,))
    with pytest.raises(AskingError, match="256 sites take part; a secure sum has at most 255"):
        SummedPool(world.folder / "run", job, contract, pool)
    cards = [site.card for site in world.sites.values()]
    contract = RunContract.build(job, cards, (pool.digest,)).model_copy(update={"labels": ("cat",) * 4})
    with pytest.raises(AskingError, match=r"are not as they must be: .*a class is named twice.*Nothing was asked"):
        SummedPool(world.folder / "run", job, contract, pool)
    contract = RunContract.build(job, cards, (pool.digest,))
    monkeypatch.setattr(bounded, "MOST_SPARE", -(10**9))  # as terms of a million classes would be
    with pytest.raises(AskingError, match=r"with \d+ classes in all, fit into no message"):
        SummedPool(world.folder / "run", job, contract, pool)


def test_a_site_may_add_noise_among_others_that_add_none(world: World) -> None:
    with_noise(world, {"ant": sum_noise(5.0, 1)})
    summed, lost = world.sum()
    assert lost == {}
    wrong = np.abs(summed.sums - open_sums(world.terms, world.answers())).max(axis=0)
    own = list(world.terms.by_name["ant"].classes)
    assert (wrong[own] > 5).all()
    assert np.delete(wrong, own).max() < 0.1


def test_the_site_s_log_says_what_sums_tell_of_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.sum()
    assert not [record for record in caplog.records if "own answers" in record.message]
    alone = Linear("ant")
    alone.classes, alone.fingerprint = ("owl", *CLASSES["ant"][1:]), "9" * 64
    site = world.sites["ant"] = Site(world.sites["ant"].settings, alone)
    cards = [one.card for one in world.sites.values()]
    contract = RunContract.build(JobSettings(name="job"), cards, (world.pool.digest,))
    fields = {"labels": contract.labels, "members": members_of(contract, {}), "pool": world.pool.digest, "job": "other"}
    terms = Terms.model_validate_json(world.terms.model_copy(update=fields).model_dump_json())
    site.summing.keys(terms)
    assert "tells this site's own answers for 1 of its 3 classes" in caplog.text
