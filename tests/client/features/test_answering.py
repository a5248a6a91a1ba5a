"""A site that answers about features: through the in-process grid, within the policy, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from consilience.client import app as app_module
from consilience.client.features import learn_bases
from consilience.client.ledger import Ledger
from consilience.client.ledger_head import head_path, read_head
from consilience.client.ledger_restart import restart
from consilience.client.ledger_rows import Approval, approval
from consilience.client.policy import RefusedError
from consilience.client.site import Site
from consilience.client.teacher import load_teacher
from consilience.common.cards import SiteCard
from consilience.common.encoding import check_features, encode_features, feature_bytes, feature_values
from consilience.common.errors import SettingsError
from consilience.common.nets.tapped import Tapped
from consilience.common.pool import Pool
from consilience.common.protocol import FINAL_REFUSALS, Agreement, Answer, CardRequest, Contract, Question, Refusal
from consilience.common.settings import FeatureEncoding
from consilience.deploy.local_grid import LocalGrid
from helpers.feature_site import CALLABLE, CLASSES, SIZE, fed, hosted, make_pool, make_settings, network

LAYER2 = 64 * 4 * 4
"""Numbers of a sample's features of layer2, averaged to 4 x 4."""


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path / "pool")


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "feature_model.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("feature_model", None)
    app_module.forget_sites()


Opening = Callable[..., Site]


@pytest.fixture
def opening(tmp_path: Path, pool: Pool) -> Iterator[Opening]:
    """opening(taps, ...) makes a site of `make_settings`."""
    sites = []

    def make(taps: dict[str, Any] | None = None, **changes: Any) -> Site:
        settings = make_settings(tmp_path, {"layer2": {"size": 4}} if taps is None else taps, **changes)
        learn_bases(settings, load_teacher(settings))
        sites.append(Site.load(tmp_path / "site.yaml"))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


def contract(site: Site, pool: Pool, **changes: Any) -> Contract:
    fields = {"job": "job", "labels": CLASSES, "class_set": (0, 1, 2), "pools": (pool.digest,), "encoding": "f16"}
    return Contract(**{**fields, "teacher": site.teacher.fingerprint, "features": ("layer2",), **changes})


def about(site: Site, pool: Pool, start: int = 0, stop: int = SIZE, tap: int = 0, **changes: Any) -> Question:
    fields: dict[str, Any] = {"job": "job", "pool": pool.digest, "start": start, "stop": stop, "kind": "features"}
    fields |= {"encoding": "f16", "teacher": site.taps[tap].card.fingerprint, "policy": site.settings.policy.version}
    return Question(**{**fields, **changes})


def values(data: bytes, width: int, encoding: FeatureEncoding = "f16") -> NDArray[np.float32]:
    rows = len(data) // feature_bytes(width, encoding)
    check_features(data, rows, width, encoding)
    return feature_values(np.frombuffer(data, np.uint8).reshape(rows, -1), encoding)


def code(action: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        action()
    return caught.value.code


def test_coarser_features_tell_nothing_that_the_finest_do_not(pool: Pool, opening: Opening) -> None:
    site = opening()
    finest, coarser = (site.answer(about(site, pool, encoding=encoding)).data for encoding in ("f16", "u8"))
    assert coarser == encode_features(values(finest, LAYER2), "u8")


@pytest.mark.parametrize("encoding", ["f16", "u8"])
def test_features_come_over_the_grid(tmp_path: Path, pool: Pool, opening: Opening, encoding: FeatureEncoding) -> None:
    opening({"layer2": {"size": 4}, "penultimate": {"channels": 6}})
    with LocalGrid(app_module.app, [{"site": str(tmp_path / "site.yaml")}], workers=1) as grid:
        (node,) = grid.get_node_ids()

        def ask(kind: str, content: RecordDict) -> RecordDict:
            (reply,) = grid.send_and_receive([Message(content, dst_node_id=node, message_type=f"query.{kind}")])
            return reply.content

        card = SiteCard.from_content(ask("card", CardRequest(job="job").to_content()))
        assert card.features is not None
        assert [(tap.name, tap.shape) for tap in card.features.taps] == [("layer2", (64, 4, 4)), ("penultimate", (6,))]
        names = tuple(tap.name for tap in card.features.taps)
        agreed = Contract(
            job="job", labels=CLASSES, class_set=(0, 1, 2), pools=(pool.digest,), teacher=card.teacher,
            encoding="f16", features=names, feature_encoding=encoding,
        )  # fmt: skip
        assert Agreement.from_content(ask("contract", agreed.to_content())).pools == (pool.digest,)
        for tap in card.features.taps:
            question = Question(
                job="job", pool=pool.digest, start=3, stop=40, kind="features", encoding=encoding,
                teacher=tap.fingerprint, policy=card.policy,
            )  # fmt: skip
            answer = Answer.from_content(ask("answer", question.to_content()), question)
            assert values(answer.data, tap.values, encoding).shape == (37, tap.values)
    with torch.no_grad():
        _, (maps,) = Tapped(network(), ["layer2"])(fed(pool)[3:40])
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, 4).flatten(1).numpy()
    answer_again = Site.load(tmp_path / "site.yaml")
    told = values(answer_again.answer(about(answer_again, pool, 3, 40, encoding=encoding)).data, LAYER2, encoding)
    answer_again.close()
    allowed = np.ptp(expected, axis=1).max() / 255 if encoding == "u8" else np.abs(expected).max() / 1024
    np.testing.assert_allclose(told, expected, atol=allowed)


def test_a_sample_s_features_are_the_same_bytes_however_questions_are_cut(pool: Pool, opening: Opening) -> None:
    site = opening({"layer2": {"size": 4, "channels": 5}})
    width = feature_bytes(5 * 16, "f16")
    parts = b"".join(site.answer(about(site, pool, at, at + 10)).data for at in (20, 40, 0, 30, 10))
    whole = site.answer(about(site, pool)).data
    assert whole[20 * width : 30 * width] == parts[: 10 * width]
    assert site.ledger.spent.lifetime == SIZE  # nothing is counted twice
    assert site.ledger.spent.features["job"] == SIZE * width


def test_a_policy_without_features_tells_none(pool: Pool, opening: Opening) -> None:
    site = opening({})
    assert site.card.features is None
    assert code(lambda: site.agree(contract(site, pool))) == "bad-question"
    question = Question(
        job="job", pool=pool.digest, start=0, stop=1, kind="features", encoding="f16",
        teacher=site.teacher.fingerprint, policy=site.settings.policy.version,
    )  # fmt: skip
    assert code(lambda: site.answer(question)) == "other-teacher"


def test_a_tap_that_the_policy_does_not_name_is_refused(pool: Pool, opening: Opening) -> None:
    site = opening()
    for features in (("layer3",), ("layer2", "penultimate"), ("nothing",)):
        with pytest.raises(RefusedError, match="names a tap that the site does not tell") as caught:
            site.agree(contract(site, pool, features=features))
        assert caught.value.code == "bad-question"
        assert "policy.features.taps lets out: layer2" in caught.value.told_here
        assert caught.value.reason in Refusal(code=caught.value.code, reason=caught.value.reason).model_dump_json()
    site.agree(contract(site, pool))
    assert code(lambda: site.answer(about(site, pool, teacher="d" * 64))) == "other-teacher"
    assert code(lambda: site.answer(about(site, pool, kind="log-probs"))) == "other-teacher"
    assert site.ledger.spent.lifetime == 0


def test_a_finer_encoding_than_the_policy_s_is_refused(pool: Pool, opening: Opening) -> None:
    site = opening(features={"precision": "u8"})
    assert site.card.features is not None
    assert site.card.features.encodings == ("u8",)
    assert code(lambda: site.agree(contract(site, pool))) == "encoding-not-allowed"
    assert code(lambda: site.answer(about(site, pool))) == "encoding-not-allowed"
    site.agree(contract(site, pool, feature_encoding="u8"))
    assert site.answer(about(site, pool, encoding="u8")).data


def test_a_job_for_more_bytes_than_the_policy_allows_is_refused(pool: Pool, opening: Opening) -> None:
    width = feature_bytes(LAYER2, "f16")
    site = opening(features={"bytes": SIZE * width - 1})
    with pytest.raises(RefusedError, match="more bytes of features") as caught:
        site.agree(contract(site, pool))
    assert caught.value.code == "too-many-bytes"
    assert caught.value.code in FINAL_REFUSALS
    assert "set ask.features to u8, take fewer taps, or a smaller pool" in caught.value.reason, "the next step"
    assert f"{SIZE * width:,}; policy.features.bytes is {SIZE * width - 1:,}" in caught.value.told_here
    site.agree(contract(site, pool, features=()))
    site.agree(contract(site, pool, feature_encoding="u8"))
    assert opening(features={"bytes": SIZE * width}).agree(contract(site, pool))


def test_bytes_of_all_taps_and_encodings_count_for_a_job_by_itself(pool: Pool, opening: Opening) -> None:
    width, last = feature_bytes(LAYER2, "f16"), feature_bytes(128, "f16")
    site = opening({"layer2": {"size": 4}, "penultimate": {}}, features={"bytes": 30 * width + 5 * last})
    assert code(lambda: site.agree(contract(site, pool, features=("layer2", "penultimate")))) == "too-many-bytes"
    site.answer(about(site, pool, 0, 30))  # a server may ask without a contract
    assert code(lambda: site.answer(about(site, pool, 30, 31))) == "too-many-bytes"
    assert code(lambda: site.answer(about(site, pool, 0, 30, encoding="u8"))) == "too-many-bytes"
    site.answer(about(site, pool, 0, 5, tap=1))
    assert code(lambda: site.answer(about(site, pool, 5, 6, tap=1))) == "too-many-bytes"
    assert site.answer(about(site, pool, 0, 30)).data  # what left leaves again
    site.answer(about(site, pool, 30, 31, job="another"))
    site.close()
    assert site.ledger.spent.features == {"job": 30 * width + 5 * last, "another": width}
    assert code(lambda: site.answer(about(site, pool, 31, 32))) == "too-many-bytes"


def test_a_job_s_bytes_are_those_that_it_asks_for_whoever_got_them_before(pool: Pool, opening: Opening) -> None:
    most = SIZE * feature_bytes(LAYER2, "f16")
    site = opening({"layer2": {"size": 4}, "penultimate": {}}, features={"bytes": most})
    site.answer(about(site, pool, job="first"))
    site.answer(about(site, pool, tap=1, job="second"))
    site.agree(contract(site, pool))
    assert code(lambda: site.agree(contract(site, pool, features=("layer2", "penultimate")))) == "too-many-bytes"


def test_bytes_of_all_jobs_count_for_the_lifetime(pool: Pool, opening: Opening) -> None:
    width = feature_bytes(LAYER2, "f16")
    site = opening(features={"bytes": 20 * width, "bytes_lifetime": 45 * width})
    for at, job in enumerate(("job0", "job1")):
        site.answer(about(site, pool, 20 * at, 20 * at + 20, job=job))
    with pytest.raises(RefusedError, match="more bytes of features") as caught:
        site.answer(about(site, pool, 40, 46, job="job2"))
    assert caught.value.code == "too-many-bytes"
    assert (
        f"features, lifetime: {6 * width:,} bytes more, {5 * width:,} left of {45 * width:,}" in caught.value.told_here
    )
    assert code(lambda: site.answer(about(site, pool, 0, 10, job="job3", encoding="u8"))) == "too-many-bytes"
    assert site.answer(about(site, pool, 0, 40, job="job4")).data  # what left leaves again, to whoever asks
    site.answer(about(site, pool, 40, 45, job="job2"))
    assert site.ledger.spent.features.total() == 45 * width
    assert site.agree(contract(site, pool, features=()))


def test_another_ledger_carries_over_the_bytes_of_features(pool: Pool, opening: Opening) -> None:
    width = feature_bytes(LAYER2, "f16")
    limits = {"bytes_lifetime": 50 * width}
    site = opening(features=limits)
    site.answer(about(site, pool, 0, 30))
    site.answer(about(site, pool, 30, 35, job="another"))
    site.close()
    head = read_head(head_path(site.settings))
    assert head is not None
    assert (head["samples"], head["features"]) == (35, 35 * width)

    def again(*least: int) -> tuple[int, int]:
        aside, samples, features, *_ = restart(site.settings, *least)
        aside.rename(aside.with_name(f"aside-{samples}-{len(least)}"))  # one second has room for one
        return samples, features

    assert again() == (35, 35 * width)
    site = opening(features=limits)
    assert site.ledger.spent.features.total() == 35 * width
    assert code(lambda: site.answer(about(site, pool, 0, 16))) == "too-many-bytes"  # those that left are put aside
    assert site.answer(about(site, pool, 0, 15)).data
    site.close()
    (site.settings.state / "ledger.db").write_bytes(b"damaged" * 1000)
    assert again() == (50, 50 * width)  # by the head
    head_path(site.settings).unlink()
    assert again(60, 70 * width) == (60, 70 * width)


def test_limits_on_features_do_not_touch_other_answers(pool: Pool, opening: Opening) -> None:
    site = opening()
    site.answer(about(site, pool))
    site.close()
    site = opening(features={"bytes": 1, "bytes_lifetime": 1})
    assert code(lambda: site.answer(about(site, pool, 0, 1))) == "too-many-bytes"
    asked = about(site, pool, kind="log-probs", teacher=site.teacher.fingerprint)
    assert site.answer(asked).data
    assert site.agree(contract(site, pool, features=()))


def test_features_count_towards_the_limits_on_samples(pool: Pool, opening: Opening) -> None:
    site = opening(policy={"limits": {"per_job": SIZE + 10}})
    assert code(lambda: site.agree(contract(site, pool))) == "budget-exhausted"
    site.answer(about(site, pool))
    assert site.ledger.spent.jobs["job"] == SIZE


def test_an_approval_is_of_the_taps_that_were_asked_for(tmp_path: Path, pool: Pool, opening: Opening) -> None:
    taps: dict[str, Any] = {"layer2": {"size": 4}, "penultimate": {}}
    site = opening(taps, policy={"approval": True})
    demand = site.demand("job", [pool], "f16", coverage=False, summed=False, taps=site.taps[:1])
    with closing(Ledger.open(site.settings)) as person, person.alone():
        person.append(approval("job", site.settings.policy.version, Approval(dict.fromkeys(demand.asked, SIZE))))
    site.agree(contract(site, pool))
    assert code(lambda: site.agree(contract(site, pool, features=("layer2", "penultimate")))) == "not-approved"
    assert site.answer(about(site, pool)).data
    assert code(lambda: site.answer(about(site, pool, tap=1))) == "not-approved"
    assert code(lambda: site.answer(about(site, pool, encoding="u8"))) == "not-approved"


def test_a_question_for_more_than_one_answer_holds_is_refused(
    pool: Pool, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = opening()
    monkeypatch.setattr("consilience.client.site.MOST_ANSWER_BYTES", 10 * feature_bytes(LAYER2, "f16"))
    assert code(lambda: site.answer(about(site, pool, 0, 11))) == "bad-question"
    assert site.answer(about(site, pool, 0, 10)).data


@pytest.mark.parametrize(
    "gives",
    [
        {"maps": np.full((16, 3, 16, 16), np.nan, np.float32)},
        {"maps": np.full((16, 3, 16, 16), 1e9, np.float32)},
        {"maps": np.zeros((16, 3, 8, 8), np.float32)},
    ],
)
def test_a_teacher_that_gives_no_features_is_found_before_anybody_counts_on_it(
    pool: Pool, opening: Opening, monkeypatch: pytest.MonkeyPatch, gives: dict[str, Any]
) -> None:
    site = opening({"maps": {}}, teacher=hosted("model"))
    agreed = contract(site, pool, features=("maps",))
    site.agree(agreed)
    monkeypatch.setattr(sys.modules["feature_model"].Model, "gives", gives)
    for action in (lambda: site.agree(agreed), lambda: site.answer(about(site, pool))):
        with pytest.raises(RefusedError) as caught:
            action()
        assert caught.value.code == "teacher-failed"
        assert caught.value.reason == "the site's tap maps gave no usable answer"
        assert "Tap 'maps' gives" in caught.value.told_here
    assert site.ledger.spent.lifetime == 0
    assert site.agree(contract(site, pool, features=()))  # by its labels it still takes part


def test_features_go_with_no_secure_sum_and_pass_by_no_mechanism(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"sums_only is true, and features leave openly"):
        make_settings(tmp_path, {"layer2": {}}, policy={"sums_only": True})
    with pytest.raises(SettingsError, match=r"policy\.features lets out what the private data say"):
        make_settings(tmp_path, {"layer2": {}}, privacy={"mechanism": "output-noise", "sigma": 1.0})
