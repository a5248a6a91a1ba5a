"""Questions and answers: what is sent arrives, and nothing else is taken for it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from consilience.common.cards import CoverageCard, SiteCard
from consilience.common.encoding.features import basis_bytes
from consilience.common.errors import ProtocolError
from consilience.common.protocol import (
    MOST_SPAN,
    Agreement,
    Answer,
    CardRequest,
    Contract,
    Enclosed,
    Question,
    Refusal,
    read_reply,
)
from consilience.common.records import Record
from consilience.common.subsets import subset_text

DIGEST, OTHER, POLICY = "a" * 64, "b" * 64, "c" * 16
TAP: dict[str, Any] = {
    "name": "layer1",
    "layout": "conv3x3/1 norm",
    "shape": (2, 4, 4),
    "channels": 3,
    "components": {"number": 2, "kept": 0.9, "bytes": 36, "digest": DIGEST},
    "fingerprint": OTHER,
}
FEATURES: dict[str, Any] = {"taps": (TAP,), "encodings": ("f16", "u8")}
COVERAGE = {"fingerprint": OTHER, "encodings": ["f16", "u8"], "description": "a forest"}


def question(**changes: Any) -> Question:
    fields: dict[str, Any] = {"job": "job", "pool": DIGEST, "start": 3, "stop": 5, "encoding": "f16"}
    return Question(**{**fields, "teacher": OTHER, "policy": POLICY, **changes})


def card(**changes: Any) -> dict[str, Any]:
    fields = {"name": "site-1", "classes": ("cat", "dog"), "encodings": ("f32", "f16"), "teacher": DIGEST}
    return {**fields, "description": "trained cnn3", "policy": POLICY, **changes}


CALIBRATION: dict[str, Any] = {"method": "temperature", "samples": 100, "ece_before": 0.25, "ece_after": 0.125}
CALIBRATION |= {"nll_before": 1.5, "nll_after": 0.75}
RECORDS: list[Record] = [
    CardRequest(job="job"),
    SiteCard(**card(class_priors=(0.25, 0.75), holdout_accuracy=0.5, calibration=CALIBRATION)),
    Contract(job="job", labels=("cat", "dog"), class_set=(1, 0), pools=(DIGEST,), teacher=OTHER, encoding="f16"),
    Agreement(pools=(DIGEST, OTHER)),
    Agreement(pools=(DIGEST,), enclosed=Enclosed(taps=("layer1",), data="AAAA")),
    question(),
    SiteCard(**card(coverage=CoverageCard(fingerprint=OTHER, encodings=("f16", "u8"), description="a forest"))),
    question(encoding="u8"),
    question(encoding="top-12"),
    question(encoding="votes"),
    SiteCard(**card(encodings=("top-3", "votes"))),
    question(kind="coverage", encoding="u8"),
    question(kind="coverage", encoding="f16"),
    SiteCard(**card(features=FEATURES)),
    Contract(
        job="job", labels=("cat",), class_set=(0,), pools=(DIGEST,), teacher=OTHER, encoding="f16",
        features=("layer1", "features.3"), feature_encoding="u8", components=("features.3",),
    ),
    question(kind="features", encoding="f16"),
    question(kind="features", encoding="u8"),
    question(stop=16, subset=subset_text(np.array([True, False] * 6 + [True]))),
    question(stop=3 + MOST_SPAN, subset=subset_text(np.arange(MOST_SPAN) % (MOST_SPAN - 1) == 0)),
    Contract(
        job="job", labels=("cat",), class_set=(0,), pools=(DIGEST,), teacher=OTHER, encoding="f16", subset="gAA="
    ),
]  # fmt: skip


SUBSETS = (
    "//4=",  # 16 bits, for a range of 10 samples
    "//A=",  # as many bits as samples, and some beyond
    "/8A=",  # all of them
    "gAA=",  # without the last
    "AEA=",  # without the first
    "AAA=",
    "gEA",
    "gEA==",
    "gEB=",  # the same bytes as gEA=, written otherwise
    "gEA=gEA=",
    "gE A=",
    "gé==",
    "gEAA",
    "A" * 200_000,
)
"""None of them is a part of samples 3 to 12, of which `gEA=` is the first and the last."""


def test_a_question_about_a_part_has_its_first_and_last_sample_and_counts_what_it_asks() -> None:
    asked = question(stop=13, subset="gEA=")
    assert len(asked) == 2
    assert asked.ids.tolist() == [3, 12]
    assert len(question(stop=13)) == 10
    assert question(stop=13).ids.tolist() == list(range(3, 13))


def reduced(number: int, channels: int) -> dict[str, Any]:
    held = {"number": number, "kept": 1.0, "bytes": basis_bytes(number, channels), "digest": DIGEST}
    return {**TAP, "shape": (number,), "channels": channels, "components": held}


def test_the_components_of_all_taps_are_no_more_than_a_message_holds() -> None:
    wide = reduced(127, 2**12)
    taps = tuple({**wide, "name": f"t{k}", "fingerprint": f"{k:064x}"[::-1]} for k in range(5))
    SiteCard(**card(features={**FEATURES, "taps": taps[:4]}))
    with pytest.raises(ValueError, match="components are more than 8,388,608 bytes"):
        SiteCard(**card(features={**FEATURES, "taps": taps}))


def test_the_largest_taps_are_taken() -> None:
    tap = {**reduced(2, 2**14), "shape": (2, 2**10, 2**11)}
    held = SiteCard(**card(features={**FEATURES, "taps": (tap,)}))
    assert SiteCard.from_content(held.to_content()) == held


def test_a_record_of_another_protocol_is_refused_in_so_many_words() -> None:
    """A card of protocol 1 told what components are; what it says is not looked at."""
    text = json.dumps({**card(), "protocol": 1, "features": {"taps": [{**TAP, "basis": "AAAA"}]}})
    with pytest.raises(ProtocolError, match=r"SiteCard is of another protocol than this version's, 3: site and server"):
        SiteCard.from_content(RecordDict({"record": ConfigRecord({"json": text})}))


@pytest.mark.parametrize("components", [("layer2",), ("layer1", "layer1")])
def test_a_contract_asks_for_components_of_its_features_alone(components: tuple[str, ...]) -> None:
    fields: dict[str, Any] = {"job": "job", "labels": ("cat",), "class_set": (0,), "pools": (DIGEST,)}
    fields |= {"teacher": OTHER, "encoding": "f16", "features": ("layer1",)}
    Contract(**fields, components=("layer1",))
    with pytest.raises(ValueError, match="components are not of taps"):
        Contract(**fields, components=components)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert type(record).from_content(record.to_content()) == record
    assert read_reply(record.to_content(), type(record)) == record


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../site"},
        {"name": "Site"},
        {"name": ""},
        {"classes": ()},
        {"classes": ("",)},
        {"classes": ("x" * 201,)},
        {"classes": ("\x1b[2Jowned",)},
        {"description": "one\ntwo"},
        {"encodings": ("f64",)},
        {"encodings": ("votes", "top-x")},
        {"encodings": ("votes",) * 5},
        {"teacher": "abc"},
        {"policy": "x" * 16},
        {"holdout_accuracy": 1.5},
        {"calibration": {}},
        {"calibration": [CALIBRATION]},
        {"calibration": CALIBRATION | {"method": "magic"}},
        {"calibration": CALIBRATION | {"method": "\x1b[2Jowned"}},
        {"calibration": CALIBRATION | {"samples": 0}},
        {"calibration": CALIBRATION | {"samples": 10**30}},
        {"calibration": CALIBRATION | {"samples": 1.5}},
        {"calibration": CALIBRATION | {"ece_before": -0.1}},
        {"calibration": CALIBRATION | {"ece_after": 1.01}},
        {"calibration": CALIBRATION | {"ece_after": float("nan")}},
        {"calibration": CALIBRATION | {"ece_after": None}},
        {"calibration": CALIBRATION | {"nll_before": float("inf")}},
        {"calibration": CALIBRATION | {"nll_before": 1e300}},
        {"calibration": CALIBRATION | {"nll_after": -1.0}},
        {"calibration": CALIBRATION | {"nll_after": "0.5"}},
        {"calibration": CALIBRATION | {"matrix": [[1.0]]}},
        {"class_priors": (0.5,)},
        {"class_priors": (0.5, 0.6)},
        {"surprise": 1},
        {"coverage": {}},
        {"coverage": 1},
        {"coverage": {**COVERAGE, "fingerprint": "abc"}},
        {"coverage": {**COVERAGE, "encodings": []}},
        {"coverage": {**COVERAGE, "encodings": ["f32"]}},
        {"coverage": {**COVERAGE, "encodings": ["u8"] * 3}},
        {"coverage": {**COVERAGE, "description": "\x1b[2Jowned"}},
        {"coverage": {**COVERAGE, "description": "x" * 501}},
        {"coverage": {**COVERAGE, "surprise": 1}},
        {"features": {}},
        {"features": {**FEATURES, "taps": []}},
        {"features": {**FEATURES, "taps": [TAP, TAP]}},
        {"features": {**FEATURES, "taps": [TAP, {**TAP, "name": "layer2"}]}},  # one fingerprint for two
        {"features": {**FEATURES, "taps": [TAP, {**TAP, "name": "layer2", "fingerprint": OTHER[:12] + "0" * 52}]}},
        {"features": {**FEATURES, "taps": [{**TAP, "name": f"t{k}", "fingerprint": f"{k:064d}"} for k in range(2)]}},
        {
            "features": {
                **FEATURES,
                "taps": [{**TAP, "name": f"t{k}", "fingerprint": f"{k:012d}{k:052d}"} for k in range(257)],
            }
        },
        {"features": {**FEATURES, "encodings": []}},
        {"features": {**FEATURES, "encodings": ["f32"]}},
        {"features": {**FEATURES, "surprise": 1}},
        *(
            {"features": {**FEATURES, "taps": [{**TAP, **wrong}]}}
            for wrong in (
                {"name": "../layer"},
                {"name": ""},
                {"name": "x" * 101},
                {"layout": "\x1b[2Jowned"},
                {"shape": []},
                {"shape": [2, 4]},
                {"shape": [2, 4, 4, 4]},
                {"shape": [0, 4, 4]},
                {"shape": [2, 4, 2**21]},
                {"shape": [2, 2**10, 2**11 + 1]},
                {**reduced(2, 2**14 + 1), "shape": [2, 4, 4]},
                {"shape": [2**14 + 1, 4, 4], "channels": 2**14 + 1, "components": None},
                {"shape": [2.5, 4, 4]},
                {"shape": [3, 4, 4]},  # all of its channels, and components
                {"shape": [4, 4, 4], "components": None},  # more than its channels
                {"components": None},
                {"basis": "AAAA"},  # as cards once told what components are
                *(
                    {"components": {**TAP["components"], **other}}
                    for other in (
                        {"number": 1},
                        {"bytes": 35},
                        {"bytes": 2**40},
                        {"kept": 1.5},
                        {"kept": float("nan")},
                        {"digest": "abc"},
                        {"data": "AAAA"},
                    )
                ),
                {"channels": 4},
                {"channels": 0},
                {"channels": 2**40},
                {"kept": 0.9},
                {"fingerprint": "abc"},
                {"surprise": 1},
            )
        ),
        {"protocol": 1},
    ],
)
def test_a_card_with_one_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    import json

    whole = {
        **card(calibration=CALIBRATION),
        "coverage": COVERAGE,
        "features": FEATURES,
    }  # without the change it is fine
    SiteCard.from_content(RecordDict({"record": ConfigRecord({"json": json.dumps(whole)})}))
    content = RecordDict({"record": ConfigRecord({"json": json.dumps({**card(), **changes})})})
    with pytest.raises(ProtocolError, match="SiteCard"):
        SiteCard.from_content(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": -1},
        {"stop": 3},
        {"stop": 2},
        {"encoding": "u1"},
        {"kind": "weights"},
        {"encoding": "top-0"},
        {"encoding": 3},
        {"kind": "coverage", "encoding": "f32"},
        {"kind": "coverage", "encoding": "top-3"},
        {"kind": "coverage", "encoding": "votes"},
        {"kind": "features", "encoding": "f32"},
        {"kind": "features", "encoding": "votes"},
        {"subset": ""},
        {"subset": 5},
        *({"stop": 13, "subset": subset} for subset in SUBSETS),
        {"start": 0, "stop": MOST_SPAN + 8, "subset": subset_text(np.arange(MOST_SPAN + 8) % (MOST_SPAN + 7) == 0)},
    ],
)
def test_a_question_with_one_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    import json

    fields = {**question().model_dump(mode="json"), **changes}
    with pytest.raises(ProtocolError, match="Question"):
        Question.from_content(RecordDict({"record": ConfigRecord({"json": json.dumps(fields)})}))


def test_an_answer_comes_back_as_it_was() -> None:
    answer = Answer(question(), b"\x00\x01\xff", 0.25)
    assert Answer.from_content(answer.to_content(), question()) == answer


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "other"},
        {"pool": OTHER},
        {"start": 2},
        {"stop": 6},
        {"encoding": "f32"},
        {"teacher": DIGEST},
        {"policy": "d" * 16},
        {"kind": "coverage"},
        {"stop": 13, "subset": "gEA="},
    ],
)
def test_an_answer_to_another_question_is_refused(changes: dict[str, Any]) -> None:
    content = Answer(question(**changes), b"", 0.0).to_content()
    with pytest.raises(ProtocolError, match=f"answer's {next(iter(changes))}"):
        Answer.from_content(content, question())


def replaced(key: str, value: Any) -> RecordDict:
    content = Answer(question(), b"ab", 0.0).to_content()
    if value is None:
        del content[key]
    else:
        content[key] = value
    return content


def changed(**fields: Any) -> RecordDict:
    held = {**Answer(question(), b"ab", 0.0).to_content().config_records["record"], **fields}
    return RecordDict({"record": ConfigRecord({key: value for key, value in held.items() if value is not None})})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        replaced("record", None),
        replaced("record", ConfigRecord({"json": "{"})),
        replaced("record", ConfigRecord({"json": 7})),
        replaced("record", MetricRecord({"json": 1.0})),
        changed(seconds=None),
        changed(seconds="1"),
        changed(seconds=1),
        changed(seconds=float("nan")),
        changed(seconds=-1.0),
        changed(data=None),
        changed(data="ab"),
        changed(data=[1, 2]),
        replaced("more", ConfigRecord({"data": b"ab"})),
        replaced("record", ArrayRecord({"data": Array(np.zeros(2, np.uint8))})),
        replaced("refusal", ConfigRecord({"json": "{}"})),
        replaced("refusal", ConfigRecord({"json": '{"code": "rm -rf", "reason": ""}'})),
    ],
)
def test_anything_else_is_refused_without_its_words(content: RecordDict) -> None:
    with pytest.raises(ProtocolError) as caught:
        Answer.from_content(content, question())
    assert "rm -rf" not in str(caught.value)


def test_a_refusal_says_its_code_and_reason() -> None:
    content = Refusal(code="unknown-pool", reason="the site has no copy of this pool").to_content()
    for read in (lambda: Answer.from_content(content, question()), lambda: read_reply(content, SiteCard)):
        with pytest.raises(ProtocolError, match="unknown-pool, the site has no copy"):
            read()


def test_a_name_that_a_stranger_gave_a_field_is_not_repeated() -> None:
    fields = {**json.loads(question().model_dump_json()), "\x1b]0;owned\x07\x1b[2J": 1}
    with pytest.raises(ProtocolError) as caught:
        Question.from_content(RecordDict({"record": ConfigRecord({"json": json.dumps(fields)})}))
    assert str(caught.value) == "A message's Question is not as it must be: a field it has not"


@given(st.text(max_size=200))
def test_random_text_is_never_a_record(text: str) -> None:
    for record in (SiteCard, Contract, Question):
        with pytest.raises(ProtocolError):
            record.from_content(RecordDict({"record": ConfigRecord({"json": text})}))
