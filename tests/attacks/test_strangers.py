"""Whatever a stranger sends or a disk holds is either what it must be or one of our refusals: never a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilience.common.cards import SiteCard
from consilience.common.encoding import encode
from consilience.common.errors import ConsilienceError, PoolError, ProtocolError
from consilience.common.pool import Pool
from consilience.common.protocol import Answer, Contract, Question, Refusal, read_reply
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About

DIGEST, POLICY = "a" * 64, "c" * 16
QUESTION = Question(job="job", pool=DIGEST, start=0, stop=2, encoding="f32", teacher=DIGEST, policy=POLICY)
ROWS = np.log(np.full((2, 3), 1 / 3, np.float32))
GOOD = Answer(QUESTION, encode(ROWS, "f32"), 0.1)
ABOUT_COVERAGE = QUESTION.model_copy(update={"kind": "coverage", "encoding": "u8"})

scalars = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20), st.binary(max_size=20)
)
configs = st.dictionaries(st.sampled_from(["json", "seconds", "data", "code", "x"]), scalars, max_size=3).map(
    lambda held: ConfigRecord({**held})
)
metrics = st.dictionaries(st.sampled_from(["json", "seconds"]), st.floats(), max_size=2).map(
    lambda held: MetricRecord({**held})
)
arrays = st.builds(
    Array,
    dtype=st.sampled_from(["uint8", "float32", "object", "no such type", ""]),
    shape=st.lists(st.integers(-3, 2**40), max_size=3).map(tuple),
    stype=st.sampled_from(["numpy.ndarray", "pickle", ""]),
    data=st.binary(max_size=80),
)
array_records = st.dictionaries(st.sampled_from(["data", "x"]), arrays, max_size=2).map(ArrayRecord)
records = st.one_of(configs, metrics, array_records)
keys = st.sampled_from(["record", "refusal", "x"])


def content(base: RecordDict, changes: dict[str, Any], missing: set[str]) -> RecordDict:
    merged = {**{k: v for k, v in base.items() if k not in missing}, **changes}
    return RecordDict(merged)


@settings(max_examples=400)
@given(
    st.dictionaries(keys, records, max_size=4),
    st.sets(keys, max_size=2),
    st.sampled_from([GOOD, Answer(ABOUT_COVERAGE, b"\x00\xff", 0.1)]),
)
def test_a_reply_is_an_answer_or_refused(changes: dict[str, Any], missing: set[str], good: Answer) -> None:
    try:
        answer = Answer.from_content(content(good.to_content(), changes, missing), good.question)
    except ProtocolError:
        return
    assert answer.question == good.question
    assert isinstance(answer.data, bytes)
    assert 0 <= answer.seconds < float("inf")


@settings(max_examples=200)
@given(st.dictionaries(keys, records, max_size=4))
def test_a_card_a_contract_a_question_is_one_or_refused(changes: dict[str, Any]) -> None:
    for record in (SiteCard, Contract, Question):
        with pytest.raises(ProtocolError):
            read_reply(content(RecordDict(), changes, set()), record)


@given(st.text(max_size=60))
def test_refusals_never_repeat_a_stranger_s_text(text: str) -> None:
    marked = f"canary-{text}"
    for bad in (ConfigRecord({"json": marked}), ConfigRecord({"code": marked, "reason": marked})):
        with pytest.raises(ProtocolError) as caught:
            Refusal.find(RecordDict({"refusal": bad}))
        assert "canary" not in str(caught.value)


BOMBS = """
import resource, sys
from flwr.app import ConfigRecord, RecordDict
from consilience.common.errors import ProtocolError
from consilience.common.bounded import MOST_SPARE, MOST_TIMES
from consilience.common.protocol import Contract, Refusal

def lists():
    for value in ("[]", "{}", "0", "1234", '"a"'):
        yield value, '{"class_set": [' + ",".join([value] * (6_000_000 // (len(value) + 1))) + "]}"
    yield "fields", "{" + ",".join(f'"{k:x}" :0' for k in range(400_000)) + "}"


for value, text in lists():
    content = RecordDict({key: ConfigRecord({"json": text}) for key in ("record", "refusal")})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (Contract.from_content, Refusal.find):
        try:
            read(content)
        except ProtocolError:
            continue
        sys.exit(f"{value} was taken")
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if taken > MOST_TIMES * len(text) + MOST_SPARE:
        sys.exit(f"{value}: {taken:,} bytes for {len(text):,}")
"""


def test_a_record_of_very_many_values_does_not_fill_the_memory() -> None:
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_contract_of_a_hundred_thousand_classes_is_read() -> None:
    numbers = tuple(range(100_000))
    contract = Contract(
        job="job",
        labels=tuple(f"n{k}" for k in numbers),
        class_set=numbers,
        pools=(DIGEST,),
        teacher=DIGEST,
        encoding="f16",
    )
    assert Contract.from_content(contract.to_content()) == contract


lines = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda start, stop, offset, length: (
            f'{{"start": {start}, "stop": {stop}, "offset": {offset}, "bytes": {length}, '
            f'"sha256": "{DIGEST}", "seconds": 0.1}}'
        ).encode(),
        *(st.integers(-5, 100) for _ in range(4)),
    ),
)


KINDS = [
    {"encoding": "f32", "classes": 3},
    {"encoding": "u8", "classes": 3},
    {"encoding": "top-2", "classes": 3},
    {"encoding": "top-2-u8", "classes": 3},
    {"encoding": "votes", "classes": 3},
    {"kind": "coverage", "encoding": "u8", "classes": 1},
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, max_size=5), st.binary(max_size=100), st.booleans(), st.sampled_from(KINDS))
def test_a_store_opens_or_says_what_is_damaged(
    tmp_path_factory: pytest.TempPathFactory, index: list[bytes], data: bytes, ended: bool, kind: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    about = About(site="s", pool=DIGEST, size=10, teacher=DIGEST, policy=POLICY, **kind)
    AnswerStore(folder, about)
    (folder / "index.jsonl").write_bytes(b"\n".join(index) + (b"\n" if ended else b""))
    (folder / "answers.bin").write_bytes(data)
    try:
        store = AnswerStore(folder, about)
        store.read(0, 10)
    except ConsilienceError:
        return  # a refusal of ours
    assert len(store) == 10


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=30), st.sampled_from(["f16", "u8"]))
def test_bytes_about_coverage_are_coverage_or_not_stored(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, encoding: Any
) -> None:
    about = About(
        site="s", pool=DIGEST, size=10, teacher=DIGEST, policy=POLICY, kind="coverage", encoding=encoding, classes=1
    )
    store = AnswerStore(tmp_path_factory.mktemp("store"), about)
    question = ABOUT_COVERAGE.model_copy(update={"stop": 10, "encoding": encoding})
    try:
        store.append(Answer(question, data, 0.1))
    except ProtocolError:
        assert len(store) == 0
        return
    told = store.read(0, 10)
    assert np.all((told >= 0) & (told <= 1))


@given(st.binary(max_size=200))
def test_a_manifest_is_one_or_refused(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.mktemp("pool")
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(PoolError):
        Pool.open(folder)


def test_paths_of_a_manifest_stay_inside_the_pool(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"0123")
    (tmp_path / "pool").mkdir()
    for name in ("../secret", "/etc/hostname", "shard-00000.bin/../../secret", "shard-00000.bin\n"):
        shard = f'{{"file": {name!r}, "count": 1, "sha256": "{DIGEST}"}}'.replace("'", '"')
        text = f'{{"format": 1, "shape": [2, 2, 1], "size": 1, "shards": [{shard}]}}'
        (tmp_path / "pool" / "manifest.json").write_text(text)
        with pytest.raises(PoolError):
            Pool.open(tmp_path / "pool")
