"""A site's side of the contract: equal bytes for equal samples, a code and nothing else for everything wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from consilience.client import app as app_module
from consilience.client.policy import RefusedError
from consilience.client.privacy.spending import loss_of
from consilience.client.site import Site
from consilience.common.cards import CoverageCard, SiteCard
from consilience.common.data import from_arrays
from consilience.common.encoding import decode, decode_coverage, encode, encode_coverage, row_bytes
from consilience.common.errors import DataError, TeacherError
from consilience.common.pool import Pool
from consilience.common.protocol import Answer, CardRequest, Contract, Question, Refusal
from consilience.common.settings import CallableTeacher, NpzData, Policy, Preprocessing, SiteSettings
from consilience.deploy.local_grid import LocalGrid

SIZE = 50
FINGERPRINT = "f" * 64


class Linear:
    """A teacher whose rounding depends on the batch it is shown, as a real network's does."""

    classes = ("cat", "dog", "cow")
    fingerprint = FINGERPRINT

    def __init__(self) -> None:
        self.weights = np.random.default_rng(1).normal(0, 1, (12, 3))
        self.batches: list[int] = []
        self.fails = False

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        if self.fails:
            raise TeacherError("secret path /data/patients")
        self.batches.append(len(images))
        logits = images.reshape(len(images), -1) @ self.weights / 100 + len(images) * 1e-4
        return np.asarray(log_softmax(logits * [1, 2, 3], axis=1), np.float32)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 2, 2, 3), np.uint8)
    return Pool.build(from_arrays(pixels, None, (), where="test"), tmp_path / "pool")


@pytest.fixture
def teacher() -> Linear:
    return Linear()


@pytest.fixture
def site(tmp_path: Path, pool: Pool, teacher: Linear) -> Site:
    hosted = CallableTeacher(kind="callable", callable="a:b", classes=Linear.classes, preprocessing=Preprocessing())
    return Site(
        SiteSettings(
            name="site-1",
            teacher=hosted,
            pools=(tmp_path / "none", pool.folder),
            batch_size=16,
            state=tmp_path / "state",
            policy=Policy(precision="f32"),
        ),
        teacher,
    )


def question(site: Site, pool: Pool, start: int, stop: int, **changes: Any) -> Question:
    fields = {"job": "job", "pool": pool.digest, "start": start, "stop": stop, "encoding": "f32"}
    return Question(
        **{**fields, "teacher": FINGERPRINT, "policy": site.settings.policy.version, **changes}  # type: ignore[arg-type]
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, SIZE - 1), st.integers(1, SIZE), st.sampled_from(["f32", "f16", "u8", "top-2", "top-2-u8", "votes"])
)
def test_a_sample_s_answer_is_the_same_bytes_however_questions_are_cut(
    site: Site, pool: Pool, start: int, stop: int, encoding: str
) -> None:
    if stop <= start:
        return
    whole = site.answer(question(site, pool, 0, SIZE, encoding=encoding)).data
    part = site.answer(question(site, pool, start, stop, encoding=encoding)).data
    width = row_bytes(3, encoding)
    assert part == whole[start * width : stop * width]


def test_the_teacher_sees_aligned_batches_and_answers_are_its_own(site: Site, pool: Pool, teacher: Linear) -> None:
    answer = site.answer(question(site, pool, 16, 32))
    assert teacher.batches == [16]
    assert np.array_equal(decode(answer.data, 16, 3, "f32"), teacher.log_probs(pool.read(16, 32)))
    assert site.answer(question(site, pool, 16, 32, encoding="f16")).data == encode(
        teacher.log_probs(pool.read(16, 32)), "f16"
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"stop": SIZE + 1}, "bad-question"),
        ({"pool": "0" * 64}, "unknown-pool"),
        ({"teacher": "0" * 64}, "other-teacher"),
        ({"policy": "0" * 16}, "other-teacher"),
    ],
)
def test_questions_it_cannot_answer_are_refused(site: Site, pool: Pool, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        site.answer(question(site, pool, 0, 5).model_copy(update=changes))
    assert caught.value.code == code


def test_the_policy_bounds_the_encoding(site: Site, pool: Pool, teacher: Linear) -> None:
    strict = Site(site.settings.model_copy(update={"policy": Policy(precision="f16")}), teacher)
    assert strict.card.encodings == ("f16", "u8", "votes")
    policy = strict.settings.policy.version
    with pytest.raises(RefusedError, match="policy does not allow"):
        strict.answer(question(site, pool, 0, 5, policy=policy))
    assert strict.answer(question(site, pool, 0, 5, policy=policy, encoding="f16")).data
    coarse = Site(site.settings.model_copy(update={"policy": Policy(precision="top-2")}), teacher)
    policy = coarse.settings.policy.version
    for encoding in ("f16", "u8", "top-3"):
        with pytest.raises(RefusedError, match="policy does not allow"):
            coarse.answer(question(site, pool, 0, 5, policy=policy, encoding=encoding))
    for encoding, width in (("top-2", 8), ("top-1", 5), ("top-2-u8", 2), ("top-1-u8", 1), ("votes", 1)):
        assert len(coarse.answer(question(site, pool, 0, 5, policy=policy, encoding=encoding)).data) == 5 * width


def test_by_another_name_of_the_same_bytes_nothing_is_drawn_anew(site: Site, pool: Pool) -> None:
    """A teacher that never says the same twice could be averaged over as many names as there are numbers."""
    random = np.random.default_rng(0)

    class Fickle(Linear):
        def log_probs(self, images: np.ndarray) -> np.ndarray:
            return np.asarray(log_softmax(random.normal(0, 1, (len(images), 3)), axis=1), np.float32)

    fickle = Site(site.settings, Fickle())
    for number, end in enumerate(("", "-u8"), start=1):
        named = [question(fickle, pool, 0, 5, encoding=f"top-{many}{end}") for many in (3, 4, 300, 3)]
        assert len({fickle.answer(one).data for one in named}) == 1
        assert fickle.ledger.spent.lifetime == 5 * number
    demand = fickle.demand("other", [pool], "top-7", coverage=False, summed=False)
    assert fickle.new_of(demand) == [SIZE - 5]


def test_class_priors_are_told_only_if_the_policy_says_so(site: Site, tmp_path: Path, teacher: Linear) -> None:
    assert site.card.class_priors is None
    labels = np.array([0, 1, 1, 2])
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2, 2), np.uint8), y=labels, names=np.array(["cow", "cat", "dog"]))
    open_minded = site.settings.model_copy(
        update={"policy": Policy(class_priors=True), "data": NpzData(kind="npz", path=tmp_path / "d.npz")}
    )
    assert Site(open_minded, teacher).card.class_priors == (0.5, 0.25, 0.25)


@pytest.mark.parametrize("policy", [{"ends": "2020-01-01"}, {"approval": True}])
def test_a_job_that_is_not_allowed_is_told_nothing_of_private_data(
    ask_app: Any, site: Site, tmp_path: Path, policy: dict[str, Any]
) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2, 2), np.uint8), y=[0, 1, 1, 2], names=["cow", "cat", "dog"])
    site.settings = site.settings.model_copy(
        update={
            "policy": Policy(class_priors=True, **policy),
            "data": NpzData(kind="npz", path=tmp_path / "d.npz"),
        }
    )
    card = SiteCard.from_content(ask_app("query.card", CardRequest(job="job").to_content()))
    assert site.card.class_priors is not None
    assert card == site.card.model_copy(update={"class_priors": None})
    assert site.ledger.count == 0


def test_shares_of_classes_are_told_in_hundredths(site: Site, tmp_path: Path, teacher: Linear) -> None:
    labels = np.repeat([1, 0, 2], (812, 407, 3))
    np.savez(tmp_path / "d.npz", x=np.zeros((len(labels), 2, 2), np.uint8), y=labels, names=["cow", "cat", "dog"])
    policy = Policy(class_priors=True)
    data = NpzData(kind="npz", path=tmp_path / "d.npz")
    settings = site.settings.model_copy(update={"policy": policy, "data": data})
    told = np.array(Site(settings, teacher).card.class_priors)
    np.testing.assert_allclose(told, np.array([0.66, 0.01, 0.33]), atol=1e-12)
    assert abs(told.sum() - 1) < 1e-12


def test_what_a_card_tells_of_private_data_is_in_the_ledger_before_it_leaves(
    ask_app: Any, site: Site, tmp_path: Path, teacher: Linear
) -> None:
    """So that a site that takes a mechanism later does not tell a guarantee for all that left."""
    ask = CardRequest(job="job").to_content()
    ask_app("query.card", ask)
    assert site.ledger.count == 0
    labels = np.array([0, 1, 1, 2])
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2, 2), np.uint8), y=labels, names=np.array(["cow", "cat", "dog"]))
    site.settings = site.settings.model_copy(
        update={"policy": Policy(class_priors=True), "data": NpzData(kind="npz", path=tmp_path / "d.npz")}
    )
    del site.card
    for job in ("job", "other"):
        assert SiteCard.from_content(ask_app("query.card", CardRequest(job=job).to_content())).class_priors
    (row,) = site.ledger.rows()
    assert (row.entry.kind, row.entry.job, row.entry.body["told"]) == ("card", "job", ["class_priors"])
    assert loss_of(site.settings, site.ledger).epsilon is None
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((4, 2, 2), np.uint8),
        y=np.array([0, 1, 2, 2]),
        names=np.array(["cow", "cat", "dog"]),
    )
    del site.card
    ask_app("query.card", ask)
    assert site.ledger.count == 2


def test_priors_of_other_names_are_an_error_and_accuracy_is_told_only_if_allowed(
    site: Site, tmp_path: Path, teacher: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 2, 2), np.uint8), y=np.array([0]), names=np.array(["Cat"]))
    data = NpzData(kind="npz", path=tmp_path / "d.npz")
    other = site.settings.model_copy(update={"policy": Policy(class_priors=True), "data": data})
    with pytest.raises(DataError, match="no class 'cat'; they have: Cat"):
        Site(other, teacher).card.class_priors  # noqa: B018
    monkeypatch.setattr("consilience.client.card.describe_teacher", lambda settings: ("a teacher", 0.75))
    told = site.settings.model_copy(update={"policy": Policy(holdout_accuracy=True)})
    assert Site(site.settings, teacher).card.holdout_accuracy is None
    assert Site(told, teacher).card.holdout_accuracy == 0.75


def contract(pool: Pool, **changes: Any) -> Contract:
    fields = {"job": "job", "labels": ("cat", "dog", "cow", "hen"), "class_set": (0, 1, 2), "teacher": FINGERPRINT}
    return Contract(**{**fields, "pools": (pool.digest,), "encoding": "f16", **changes})  # type: ignore[arg-type]


def test_it_agrees_to_a_contract_about_what_it_has(site: Site, pool: Pool) -> None:
    agreement = site.agree(contract(pool))
    assert agreement.pools == (pool.digest,)
    assert agreement.samples == min(len(pool), site.settings.batch_size)
    assert agreement.seconds > 0


def test_a_teacher_that_does_not_work_is_known_before_the_first_question(site: Site, pool: Pool) -> None:
    class Broken:
        classes, fingerprint = site.teacher.classes, site.teacher.fingerprint

        def log_probs(self, images: Any) -> Any:
            raise TeacherError("it gave NaN")

    with pytest.raises(RefusedError) as caught:
        Site(site.settings, Broken()).agree(contract(pool))
    assert caught.value.code == "teacher-failed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"teacher": "0" * 64}, "other-teacher"),
        ({"class_set": (0, 1)}, "bad-question"),
        ({"class_set": (0, 1, 4)}, "bad-question"),
        ({"pools": ("0" * 64,)}, "unknown-pool"),
    ],
)
def test_it_agrees_to_nothing_else(site: Site, pool: Pool, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        site.agree(contract(pool, **changes))
    assert caught.value.code == code


def test_a_damaged_pool_is_refused(site: Site, pool: Pool) -> None:
    shard = pool.folder / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RefusedError) as caught:
        site.agree(contract(pool))
    assert caught.value.code == "pool-damaged"


@pytest.fixture
def ask_app(site: Site, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send content to the real ClientApp as one site, get content back."""
    monkeypatch.setattr(app_module.Site, "load", classmethod(lambda cls, path: site))
    app_module.forget_sites()
    app: ClientApp = app_module.app

    def send(kind: str, content: RecordDict) -> RecordDict:
        with LocalGrid(app, [{"site": "site.yaml"}], workers=1) as grid:
            (node,) = grid.get_node_ids()
            (reply,) = grid.send_and_receive([Message(content, dst_node_id=node, message_type=kind)])
        return reply.content

    yield send
    app_module.forget_sites()


def test_the_app_answers_the_three_queries(ask_app: Any, site: Site, pool: Pool) -> None:
    assert SiteCard.from_content(ask_app("query.card", CardRequest(job="job").to_content())) == site.card
    assert ask_app("query.contract", contract(pool).to_content())["record"]
    asked = question(site, pool, 3, 9)
    answer = Answer.from_content(ask_app("query.answer", asked.to_content()), asked)
    assert answer.data == site.answer(asked).data


def test_a_failing_teacher_is_a_code_without_its_words(ask_app: Any, site: Site, pool: Pool, teacher: Linear) -> None:
    teacher.fails = True
    reply = ask_app("query.answer", question(site, pool, 0, 5).to_content())
    refusal = Refusal.find(reply)
    assert refusal is not None
    assert refusal.code == "teacher-failed"
    assert "secret" not in refusal.model_dump_json()


def test_unforeseen_failures_are_a_code_too(
    ask_app: Any, site: Site, pool: Pool, teacher: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("secret path /data/patients")

    monkeypatch.setattr(teacher, "log_probs", crash)
    refusal = Refusal.find(ask_app("query.answer", question(site, pool, 0, 5).to_content()))
    assert refusal is not None
    assert refusal.code == "internal"
    assert "secret" not in refusal.model_dump_json()


def test_nobody_can_ask_for_features_of_a_site_that_tells_none(
    ask_app: Any, site: Site, pool: Pool, teacher: Linear
) -> None:
    def asked(raw: dict[str, Any]) -> RecordDict:
        return RecordDict({"record": ConfigRecord({"json": json.dumps(raw)})})

    raw = question(site, pool, 0, 5).model_dump(mode="json")
    assert Refusal.find(ask_app("query.answer", asked(raw))) is None
    seen = teacher.batches[:]
    hostile: list[tuple[dict[str, Any], str]] = [
        ({"kind": "features"}, "bad-question"),
        ({"features": True}, "bad-question"),
        ({"kind": "features", "encoding": "f16"}, "other-teacher"),
    ]
    for changes, code in hostile:
        refusal = Refusal.find(ask_app("query.answer", asked({**raw, **changes, "start": 5, "stop": 9})))
        assert refusal is not None
        assert refusal.code == code
    assert (teacher.batches, site.ledger.spent.lifetime) == (seen, 5)


@pytest.mark.parametrize("kind", ["query.card", "query.contract", "query.answer"])
def test_malformed_questions_are_refused(ask_app: Any, kind: str) -> None:
    for content in (RecordDict(), Refusal(code="internal", reason="x").to_content()):
        refusal = Refusal.find(ask_app(kind, content))
        assert refusal is not None
        assert refusal.code == "bad-question"


class Familiar:
    """Coverage whose rounding depends on the batch it is shown; `gives` replaces what it says."""

    fingerprint = "e" * 64
    description = "a forest of familiarity"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gives: Any = None

    def scores(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        if self.gives is not None:
            return self.gives(len(images))  # type: ignore[no-any-return]
        means = images.reshape(len(images), -1).mean(axis=1) / 256
        return np.asarray(means * (1 - len(images) * 1e-4), np.float32)


@pytest.fixture
def familiar() -> Familiar:
    return Familiar()


@pytest.fixture
def covering(site: Site, teacher: Linear, familiar: Familiar) -> Site:
    return Site(site.settings.model_copy(update={"policy": Policy(precision="f32", coverage="f16")}), teacher, familiar)


def about_coverage(site: Site, pool: Pool, start: int, stop: int, **changes: Any) -> Question:
    fields = {"kind": "coverage", "teacher": Familiar.fingerprint, "encoding": "f16"}
    return question(site, pool, start, stop, **{**fields, **changes})


def test_the_card_offers_coverage_as_far_as_the_policy_allows(site: Site, teacher: Linear, familiar: Familiar) -> None:
    def offered(**policy: Any) -> CoverageCard | None:
        settings = site.settings.model_copy(update={"policy": Policy(**policy)})
        return Site(settings, teacher, familiar).card.coverage

    assert offered(coverage="f16") == CoverageCard(
        fingerprint="e" * 64, encodings=("f16", "u8"), description="a forest of familiarity"
    )
    coarse = offered(coverage="u8")
    assert coarse is not None
    assert coarse.encodings == ("u8",)
    assert offered(coverage="off") is None
    assert offered() is None
    assert site.card.coverage is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_a_sample_s_coverage_is_the_same_bytes_however_questions_are_cut(
    covering: Site, pool: Pool, start: int, stop: int
) -> None:
    if stop <= start:
        return
    whole = covering.answer(about_coverage(covering, pool, 0, SIZE)).data
    assert covering.answer(about_coverage(covering, pool, start, stop)).data == whole[start * 2 : stop * 2]


def test_coverage_is_its_own_in_the_same_batches_as_the_teacher_s(
    covering: Site, pool: Pool, teacher: Linear, familiar: Familiar
) -> None:
    covering.answer(question(covering, pool, 5, 40))
    answer = covering.answer(about_coverage(covering, pool, 5, 40))
    assert familiar.batches == teacher.batches == [16, 16, 16]
    expected = np.concatenate([familiar.scores(pool.read(start, start + 16)) for start in (0, 16, 32)])[5:40]
    assert np.allclose(decode_coverage(answer.data, 35, "f16"), expected, atol=2**-12)
    coarse = covering.answer(about_coverage(covering, pool, 5, 40, encoding="u8")).data
    assert coarse == encode_coverage(decode_coverage(answer.data, 35, "f16"), "u8")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"stop": SIZE + 1}, "bad-question"),
        ({"pool": "0" * 64}, "unknown-pool"),
        ({"teacher": "0" * 64}, "other-teacher"),
        ({"teacher": FINGERPRINT}, "other-teacher"),
        ({"policy": "0" * 16}, "other-teacher"),
        ({"encoding": "f32"}, "encoding-not-allowed"),
        ({"kind": "log-probs"}, "other-teacher"),
    ],
)
def test_questions_about_coverage_that_it_cannot_answer_are_refused(
    covering: Site, pool: Pool, familiar: Familiar, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        covering.answer(about_coverage(covering, pool, 0, 5).model_copy(update=changes))
    assert caught.value.code == code
    assert familiar.batches == []


def test_a_question_about_coverage_for_a_site_that_has_none_is_refused(site: Site, pool: Pool) -> None:
    with pytest.raises(RefusedError) as caught:
        site.answer(about_coverage(site, pool, 0, 5))
    assert caught.value.code == "other-teacher"


@pytest.mark.parametrize(("policy", "encoding"), [("off", "f16"), ("off", "u8"), ("u8", "f16")])
def test_the_policy_bounds_coverage(
    covering: Site, pool: Pool, teacher: Linear, familiar: Familiar, policy: Any, encoding: str
) -> None:
    changed = covering.settings.model_copy(update={"policy": Policy(precision="f32", coverage=policy)})
    strict = Site(changed, teacher, familiar)
    with pytest.raises(RefusedError) as caught:
        strict.answer(about_coverage(strict, pool, 0, 5, encoding=encoding))
    assert caught.value.code == "encoding-not-allowed"
    assert familiar.batches == []


def raising(n: int) -> np.ndarray:
    raise TeacherError("secret path /data/patients")


@pytest.mark.parametrize(
    "gives",
    [
        lambda n: np.full(n, np.nan, np.float32),
        lambda n: np.append(np.zeros(n - 1), 2.0),
        lambda n: np.append(np.zeros(n - 1), -1e-6),
        lambda n: np.zeros(n + 1),
        lambda n: np.zeros((n, 1)),
        lambda n: np.zeros(n, int),
        lambda n: None,
        lambda n: ["0.5"] * n,
        raising,
    ],
)
def test_coverage_that_is_none_is_a_failed_teacher_and_log_probs_go_on(
    covering: Site, pool: Pool, familiar: Familiar, gives: Any
) -> None:
    familiar.gives = gives
    with pytest.raises(RefusedError) as caught:
        covering.answer(about_coverage(covering, pool, 0, 5))
    assert caught.value.code == "teacher-failed"
    assert "coverage" in caught.value.reason
    assert "secret" not in caught.value.reason
    assert covering.answer(question(covering, pool, 0, 5)).data


def test_a_loaded_site_has_the_coverage_that_it_learned(
    site: Site, familiar: Familiar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.client.site.load_settings", lambda path, kind: site.settings)
    monkeypatch.setattr("consilience.client.site.load_any", lambda settings: site.teacher)
    assert Site.load(tmp_path / "site.yaml").coverage is None
    monkeypatch.setattr("consilience.client.site.load_coverage", lambda settings, teacher: familiar)
    assert Site.load(tmp_path / "site.yaml").coverage is familiar
