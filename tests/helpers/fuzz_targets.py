"""What faces the network, as functions of bytes: each decodes a stranger's bytes, which must be taken or refused.

Lives here: the targets, their first inputs, and what no input may do. Does not live here: how inputs are found
(benchmarks/fuzz_decoders.py) and the ones that are kept (tests/attacks/corpus). A target returns whether the bytes
were taken and raises only where a decoder is wrong: an exception that is no refusal of ours, or a value that is not
what it must be.
"""

from __future__ import annotations

import base64
import io
import math
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity
from pydantic import ValidationError

from consilience.client.bundle import APP, bundle_problem
from consilience.client.connection import Envelope, MalformedError
from consilience.client.fleet import inflate
from consilience.common.cards import BlockCard, ComponentsCard, FeaturesCard, SiteCard, SumNoiseCard, TailCard, TapCard
from consilience.common.components import components_info, opened
from consilience.common.encoding import (
    check,
    check_features,
    decode,
    encode,
    encode_features,
    feature_bytes,
    feature_values,
    row_bytes,
)
from consilience.common.encoding.coverage import coverage_bytes, decode_coverage, encode_coverage
from consilience.common.encoding.features import LARGEST, pack_basis
from consilience.common.encoding.odds import MOST_ODDS
from consilience.common.errors import ConsilienceError, ProtocolError
from consilience.common.files import sha256
from consilience.common.identity import Kit, PrivateKey, Request, key_fingerprint, key_line
from consilience.common.job_key import JobKey
from consilience.common.nets import build
from consilience.common.nets.blocks import LentTail, export_tail, rebuild_tail
from consilience.common.pool import Pool
from consilience.common.protocol import (
    Agreement,
    Answer,
    CardRequest,
    Contract,
    Enclosed,
    Question,
    Refusal,
    TailDemand,
    read_reply,
)
from consilience.common.records import Record
from consilience.common.sealing import Secret, info_of, seal_answer, unseal_answer
from consilience.common.sealing import seal as seal_hpke
from consilience.common.sums.masks import public_hex
from consilience.common.sums.messages import (
    Advert,
    Delivered,
    Delivery,
    MaskedRows,
    Member,
    Opened,
    OpenedShare,
    Roster,
    RowsQuestion,
    Sealed,
    SealedShares,
    Terms,
    Unmask,
)
from consilience.common.sums.shares import seal, unseal
from consilience.common.tails import BlocksQuestion, TailQuestion, answered, asked
from consilience.common.vouching import SALT_BYTES, KnownSigner, Signer, salted
from consilience.server.signatures import (
    Signatures,
    Signed,
    SignedAnswers,
    SignedSite,
    check_signatures,
    complaint,
)
from consilience.server.strangers import Strangers

DIGEST, POLICY = "a" * 64, "c" * 16
MOST_TIMES, MOST_SPARE = 4, 8 * 2**20
CLASSES = (1, 2, 5, 41, 256, 257, 70_000)
WIDTHS = (1, 3, 64, 1000, 70_000)
MOST_DECODED = 200_000
CORPUS = Path(__file__).parents[1] / "attacks" / "corpus"

_TEXT_END = b"\0"


@dataclass(frozen=True)
class Target:
    """A decoder under attack. `seeds` are inputs that it takes."""

    run: Callable[[bytes], bool]
    seeds: tuple[bytes, ...]


class DecoderError(Exception):
    """A decoder did what no decoder may do."""


def measured(target: Target, data: bytes) -> tuple[bool, int]:
    """Run a target; return whether the bytes were taken and the peak of memory beyond 4 times them.

    Raises whatever the target raises, and `DecoderError` where it takes more memory than that and 8 MiB: for the few
    kilobytes of a fuzzer that bounds the constant alone. tests/attacks/test_decoder_memory.py has megabytes, and sees
    what tracemalloc, which must be on, does not.
    """
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    taken = target.run(data)
    spare = tracemalloc.get_traced_memory()[1] - before - MOST_TIMES * len(data)
    if spare > MOST_SPARE:
        raise DecoderError(f"{spare:,} bytes more than {MOST_TIMES} times the {len(data):,} that arrived")
    return taken, spare


def kept(name: str) -> list[bytes]:
    """Return the inputs that are kept for a target."""
    path = CORPUS / f"{name}.txt"
    return [base64.b64decode(line) for line in path.read_text().split()] if path.exists() else []


def keep(name: str, inputs: list[bytes]) -> None:
    """Keep inputs for a target, one line each, in place of those before."""
    CORPUS.mkdir(parents=True, exist_ok=True)
    lines = sorted({base64.b64encode(data).decode() for data in inputs if data}, key=lambda line: (len(line), line))
    (CORPUS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def _chosen(data: bytes, widths: Sequence[int], encodings: Sequence[Any]) -> tuple[int, Any, bytes]:
    """Return the width and the encoding that the first byte stands for, and what follows it."""
    first = data[0] if data else 0
    return widths[first % len(widths)], encodings[first // len(widths) % len(encodings)], data[1:]


def _firsts(widths: Sequence[int], encodings: Sequence[Any]) -> Iterator[tuple[bytes, int, Any]]:
    """Yield the first byte for every encoding and every width but the largest, and what it stands for."""
    for number, encoding in enumerate(encodings):
        for place, width in enumerate(widths[:-1]):
            yield bytes([number * len(widths) + place]), width, encoding


def _rows(*encodings: Any) -> Target:
    """Encoded rows: the first byte says over how many classes, and in which of one codec's encodings."""

    def run(data: bytes) -> bool:
        classes, encoding, body = _chosen(data, CLASSES, encodings)
        rows = len(body) // row_bytes(classes, encoding)
        try:
            check(body, rows, classes, encoding)
        except ProtocolError:
            return False
        few = min(rows, MOST_DECODED // classes)  # the server too unpacks rows in blocks, not all at once
        found = decode(body[: few * row_bytes(classes, encoding)], few, classes, encoding)
        sums = np.exp(found.astype(np.float64)).sum(axis=1)
        if found.shape != (few, classes) or not np.all(np.isfinite(found)) or not np.all(np.abs(sums - 1) <= 0.0101):
            raise DecoderError("what was taken is no distribution")
        return True

    def seeds() -> Iterator[bytes]:
        random = np.random.default_rng(0)
        for first, classes, encoding in _firsts(CLASSES, encodings):
            logits = random.normal(0, 3, (2, classes))
            rows = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
            yield first + encode(rows, encoding)

    return Target(run, tuple(seeds()))


def _odds(*encodings: Any) -> Target:
    """Encoded log-odds: the first byte says of how many labels, and in which of one codec's encodings."""

    def run(data: bytes) -> bool:
        labels, encoding, body = _chosen(data, CLASSES, encodings)
        width = row_bytes(labels, encoding, odds=True)
        rows = len(body) // width
        try:
            check(body, rows, labels, encoding, odds=True)
        except ProtocolError:
            return False
        few = min(rows, MOST_DECODED // labels)
        found = decode(body[: few * width], few, labels, encoding, odds=True)
        if found.shape != (few, labels) or not np.all(np.abs(found) <= MOST_ODDS):
            raise DecoderError("what was taken is no log-odds")
        return True

    def seeds() -> Iterator[bytes]:
        random = np.random.default_rng(0)
        for first, labels, encoding in _firsts(CLASSES, encodings):
            yield first + encode(random.normal(0, 4, (2, labels)).astype(np.float32), encoding, odds=True)

    return Target(run, tuple(seeds()))


def _coverage(*encodings: Any) -> Target:
    """Encoded coverage: the first byte says in which encoding."""

    def run(data: bytes) -> bool:
        _, encoding, body = _chosen(data, (1,), encodings)
        rows = len(body) // coverage_bytes(encoding)
        try:
            found = decode_coverage(body, rows, encoding)
        except ProtocolError:
            return False
        if found.shape != (rows,) or (rows and not 0 <= found.min() <= found.max() <= 1):  # NaN is neither
            raise DecoderError("what was taken is no coverage")
        return True

    good = (bytes([at]) + encode_coverage(np.linspace(0, 1, 9), which) for at, which in enumerate(encodings))
    return Target(run, (*good, b""))


def _features(*encodings: Any) -> Target:
    """Encoded features: the first byte says of how many values a sample, and in which encoding."""

    def run(data: bytes) -> bool:
        width, encoding, body = _chosen(data, WIDTHS, encodings)
        rows = len(body) // feature_bytes(width, encoding)
        try:
            check_features(body, rows, width, encoding)
        except ProtocolError:
            return False
        few = min(rows, MOST_DECODED // width)  # the server too reads features in blocks
        raw = np.frombuffer(body, np.uint8).reshape(rows, feature_bytes(width, encoding))[:few]
        found = feature_values(raw, encoding)
        if found.shape != (few, width) or not np.all(np.abs(found) <= LARGEST * 1.00001):
            raise DecoderError("what was taken is no features")
        return True

    def seeds() -> Iterator[bytes]:
        random = np.random.default_rng(0)
        for first, width, encoding in _firsts(WIDTHS, encodings):
            yield first + encode_features(random.normal(0, 3, (2, width)).astype(np.float32), encoding)

    return Target(run, tuple(seeds()))


def _key(number: int) -> PrivateKey:
    return ec.derive_private_key(number + 2, ec.SECP384R1())


def _terms() -> Terms:
    members = tuple(
        Member(
            site=f"site-{k}",
            classes=(k, k + 1),
            teacher=DIGEST,
            policy=POLICY,
            identity=key_fingerprint(_key(k).public_key()),
            noise=SumNoiseCard(sigma=2.0, honest=2) if k else None,
        )
        for k in range(3)
    )
    return Terms(
        job="job",
        contract=DIGEST,
        pool=DIGEST,
        start=0,
        stop=4,
        labels=("cat", "dog", "hen", "owl"),
        synonyms=(("cat", "feline"),),
        threshold=2,
        members=members,
    )


TERMS = _terms()
_SEALS = [X25519PrivateKey.from_private_bytes(bytes([k + 1]) * 32) for k in range(3)]
ROSTER = Roster(
    terms=TERMS.digest,
    adverts=tuple(
        Advert.make(_key(k), TERMS, f"site-{k}", public_hex(X25519PrivateKey.from_private_bytes(bytes([k + 9]) * 32)),
                    public_hex(_SEALS[k]), DIGEST)
        for k in range(3)
    ),
)  # fmt: skip
QUESTION = Question(job="job", pool=DIGEST, start=0, stop=2, encoding="f32", teacher=DIGEST, policy=POLICY)
ROWS_QUESTION = RowsQuestion(terms=TERMS.digest, start=0, stop=2)
_BOX = seal(_SEALS[0], public_hex(_SEALS[1]), ROSTER.digest, "site-0", "site-1", (b"s" * 16, b"t" * 16))
_SEALED = tuple(Sealed(sender="site-0", holder=f"site-{k}", data=_BOX) for k in (1, 2))
_DELIVERED = Delivered.make(_key(0), ROSTER, "site-0", ("site-0", "site-1", "site-2"))


JOB_SECRET = Secret()
SEALED_QUESTION = QUESTION.model_copy(
    update={"job_key": JobKey(job="job", key=JOB_SECRET.public, not_after=1, signature="00")}
)
_SIGNER = KnownSigner(_key(0).public_key(), "site-0", ("a", "b", "c"))
_VOUCH = Signer(_key(0), "site-0", ("a", "b", "c")).vouch(SEALED_QUESTION, b"rows")
_SEALED_ANSWERS = (
    b"\0" + seal_answer(Answer(SEALED_QUESTION, b"rows", 0.1, vouch=_VOUCH), "site-0").data,
    b"\1" + len(_VOUCH).to_bytes(2, "big") + _VOUCH + b"rows",
)


def _content(key: str, text: bytes, data: bytes | None, seconds: float = 0.1) -> RecordDict:
    held: dict[str, Any] = {"json": text.decode("utf-8", "replace"), "seconds": seconds}
    return RecordDict({key: ConfigRecord(held if data is None else {**held, "data": data})})


def _records(*readers: tuple[Callable[[bytes, bytes | None], object], bytes]) -> Target:
    """Records: the first byte says which, the rest is its JSON text and, after a zero byte, its data."""

    def run(data: bytes) -> bool:
        if not data:
            return False
        text, end, rest = data[1:].partition(_TEXT_END)
        try:
            readers[data[0] % len(readers)][0](text, rest if end else None)
        except ProtocolError:
            return False
        return True

    return Target(run, tuple(bytes([place]) + seed for place, (_, seed) in enumerate(readers)))


def _plain(example: Record) -> tuple[Callable[[bytes, bytes | None], object], bytes]:
    kind = type(example)
    return lambda text, data: read_reply(_content("record", text, data), kind), example.model_dump_json().encode()


def _checked(example: Any, check_it: Callable[[Any], object]) -> tuple[Callable[[bytes, bytes | None], object], bytes]:
    read, seed = _plain(example)
    return lambda text, data: check_it(read(text, data)), seed


def _part_asked() -> tuple[Callable[[bytes, bytes | None], object], bytes]:
    """A question about a part of its range, as a site reads it."""

    def check_it(question: Question) -> None:
        if question.subset is None:  # of a whole range, however long, a site compares the end with its pool first
            return
        ids = question.ids
        if not len(ids) == len(question) == question.mask.sum() or [ids[0], ids[-1] + 1] != [
            question.start,
            question.stop,
        ]:
            raise DecoderError("what was taken is no part of its range")

    return _checked(QUESTION.model_copy(update={"stop": 10, "subset": "gEA="}), check_it)


def _refusal(text: bytes, data: bytes | None) -> object:
    return Refusal.find(_content("refusal", text, data))


def _answer(text: bytes, data: bytes | None) -> object:
    answer = Answer.from_content(_content("record", text, data), QUESTION)
    return decode(answer.data, len(QUESTION), 3, "f32")


def _masked(text: bytes, data: bytes | None) -> object:
    return MaskedRows.from_content(_content("record", text, data), ROWS_QUESTION).rows(2)


_ROWS = encode(np.log(np.full((2, 3), 1 / 3, np.float32)), "f32")
CARD = SiteCard(name="site-0", classes=("a", "b"), encodings=("f16", "u8"), teacher=DIGEST, description="cnn3",
                policy=POLICY, class_priors=(0.25, 0.75), identity=DIGEST)  # fmt: skip
BASIS = pack_basis(np.eye(2)[:1], np.ones(2))
TAP = TapCard(name="layer1", layout="conv3x3/1 norm", shape=(1, 2, 2), channels=2, fingerprint=DIGEST,
              components=ComponentsCard(number=1, kept=0.5, bytes=len(BASIS), digest=sha256(BASIS)))  # fmt: skip
FEATURED = CARD.model_copy(update={"features": FeaturesCard(taps=(TAP,), encodings=("f16", "u8"))})
CONTRACT = Contract(
    job="job", labels=("a", "b", "c"), class_set=(0, 1), pools=(DIGEST,), teacher=DIGEST, encoding="f16"
)
FOR_COMPONENTS = CONTRACT.model_copy(update={"features": ("layer1",), "components": ("layer1",)})
SEALED_COMPONENTS = FOR_COMPONENTS.model_copy(update={"job_key": SEALED_QUESTION.job_key})
_CLAIMS = [("layer1", DIGEST, sha256(BASIS))]
_PACKED = (
    len(_CLAIM := Signer(_key(0), "site-0", ()).vouch_components(FOR_COMPONENTS, _CLAIMS)).to_bytes(2) + _CLAIM + BASIS
)
ENCLOSED = Enclosed(taps=("layer1",), data=base64.b64encode(_PACKED).decode())

FROM_SITES = _records(
    _plain(CARD),
    _plain(Agreement(pools=(DIGEST,), samples=3, seconds=0.1)),
    (_refusal, Refusal(code="internal", reason="why").model_dump_json().encode()),
    (_answer, QUESTION.model_dump_json().encode() + _TEXT_END + _ROWS),
    _plain(FEATURED),
    _plain(Agreement(pools=(DIGEST,), enclosed=ENCLOSED)),
)
TO_SITES = _records(
    _plain(CardRequest(job="job")),
    _plain(CONTRACT),
    _plain(QUESTION),
    _plain(FOR_COMPONENTS),
    _plain(SEALED_COMPONENTS),
    _part_asked(),
    _plain(CONTRACT.model_copy(update={"subset": "gEA="})),
)
TAIL_QUESTION = TailQuestion(job="job", tail=DIGEST, policy=POLICY, block=1, samples=2, shape=(3, 1, 2), outputs=2)
PULLING = TAIL_QUESTION.model_copy(update={"gradient": True})
PIECE = BlocksQuestion(job="job", tail=DIGEST, policy=POLICY, start=4, stop=9)
_TAIL = TailCard(allow="questions", architecture="cnn3@0.2", first=1, fingerprint=DIGEST, bytes=5, digest=DIGEST,
                 blocks=(BlockCard(name="layer1", layout="conv3x3/1 norm", channels=6),
                         BlockCard(name="scores", layout="relu mean flatten linear", channels=2)))  # fmt: skip


def _tail_asked(text: bytes, data: bytes | None) -> None:
    question, given = asked(_content("record", text, data))
    if [each.shape for each in given] != list(question.sent) or not all(np.isfinite(each).all() for each in given):
        raise DecoderError("what was taken are no numbers that go with the question")


def _tail_answered(expected: TailQuestion | BlocksQuestion) -> tuple[Callable[[bytes, bytes | None], object], bytes]:
    size = 4 * math.prod(expected.answered) if isinstance(expected, TailQuestion) else 5
    seed = expected.model_dump_json().encode() + _TEXT_END + bytes(size)
    return lambda text, data: answered(_content("record", text, data), expected), seed


def _lent(data: bytes) -> bool:
    """A file of lent blocks."""
    try:
        blocks = rebuild_tail(LentTail("cnn3@0.2", 2, 2, data))
    except ProtocolError:
        return False
    if not all(bool(held.isfinite().all()) for held in blocks.state_dict().values()):
        raise DecoderError("what was taken has weights that are not finite")
    return True


TAILS = _records(
    (_tail_asked, TAIL_QUESTION.model_dump_json().encode() + _TEXT_END + bytes(48)),
    (_tail_asked, PULLING.model_dump_json().encode() + _TEXT_END + bytes(64)),
    _tail_answered(TAIL_QUESTION),
    _tail_answered(PULLING),
    _tail_answered(PIECE),
    _plain(PIECE),
    _plain(CARD.model_copy(update={"tail": _TAIL})),
    _plain(CONTRACT.model_copy(update={"tail": TailDemand(rounds=3, samples=6, bytes=500)})),
)
LENT = export_tail(build("cnn3@0.2", classes=2, channels=1, seed=0), "cnn3@0.2", 2)
SUMS_FROM_SITES = _records(
    _checked(ROSTER.adverts[0], lambda advert: advert.check(TERMS)),
    _checked(SealedShares(roster=ROSTER.digest, site="site-0", shares=_SEALED), lambda s: s.check(ROSTER, "site-0")),
    _checked(_DELIVERED, lambda delivered: delivered.check(ROSTER)),
    (_masked, ROWS_QUESTION.model_dump_json().encode() + _TEXT_END + bytes(16)),
    _plain(Opened(terms=TERMS.digest, site="site-0", shares=(OpenedShare(of="site-1", kind="self", share="ab" * 16),))),
)
SUMS_TO_SITES = _records(
    _plain(TERMS),
    _checked(ROSTER, lambda roster: roster.check(TERMS)),
    _plain(Delivery(terms=TERMS.digest, roster=ROSTER.digest, site="site-0", shares=_SEALED)),
    _plain(ROWS_QUESTION),
    _plain(Unmask(terms=TERMS.digest, survivors=("site-0",), signatures=(_DELIVERED.signature,))),
)


def _unseal(data: bytes) -> bool:
    """A sealed share: a public key in hexadecimal, a zero byte, the share in hexadecimal."""
    theirs, _, box = data.partition(_TEXT_END)
    try:
        unseal(_SEALS[1], theirs.decode("utf-8", "replace"), ROSTER.digest, "site-0", "site-1",
               box.decode("utf-8", "replace"))  # fmt: skip
    except ProtocolError:
        return False
    return True


def _sealed_answer(data: bytes) -> bool:
    """A sealed answer: after a first byte that is odd, what its seal holds, since a site may seal anything."""
    sealed = data[1:]
    if data[:1] and data[0] % 2:
        sealed = seal_hpke(JOB_SECRET.public, info_of(SEALED_QUESTION, "site-0"), sealed)
    try:
        answer = unseal_answer(Answer(SEALED_QUESTION, sealed, 0.1), "site-0", JOB_SECRET)
        salt, signature = answer.vouch[:SALT_BYTES], answer.vouch[SALT_BYTES:]
        _SIGNER.check(SEALED_QUESTION, salted(salt, sha256(answer.data)), signature)
    except ProtocolError:
        return False
    return True


def _components(data: bytes) -> bool:
    """What comes with an agreement. By the first byte: 0 base64, 1 what base64 holds, 2 what its seal holds."""
    which, body = (data[0] % 3 if data else 0), memoryview(data)[1:]  # a copy would count as the decoder's
    contract = SEALED_COMPONENTS if which == 2 else FOR_COMPONENTS
    if which == 0:
        text = str(body, "utf-8", "replace")
    else:
        info = components_info(contract, "site-0")
        text = base64.b64encode(seal_hpke(JOB_SECRET.public, info, bytes(body)) if which == 2 else body).decode()
    try:
        enclosed = Enclosed(taps=("layer1",), data=text)
        found = opened(enclosed, contract, "site-0", (TAP,), None if which == 1 else _SIGNER, JOB_SECRET)
    except (ProtocolError, ValidationError):
        return False
    if found != {"layer1": BASIS}:
        raise DecoderError("what was taken are not the components whose digest the card tells")
    return True


def _file(read: Callable[[Path], object], name: str) -> Callable[[bytes], bool]:
    folder = Path(tempfile.mkdtemp(prefix="consilience-fuzz-"))
    (folder / "shard-00000.bin").write_bytes(bytes(4))
    (folder / "answers" / "site-0" / DIGEST[:12]).mkdir(parents=True)

    def run(data: bytes) -> bool:
        (folder / name).write_bytes(data)
        try:
            read(folder / name)
        except ConsilienceError:
            return False
        return True

    return run


def _check_signatures(path: Path) -> None:
    """Read a student's signatures, with answers at hand that are none of its own, and check them."""
    verdicts = check_signatures(Signatures.read(path.parent), path.parent / "answers")
    complaint(verdicts)
    if any(min(found.vouched, found.unsigned, found.compared) < 0 for found in verdicts):
        raise DecoderError("a number of samples is negative")
    if any(found.key is None and found.vouched for found in verdicts):
        raise DecoderError("samples are vouched for without a key")


def _signatures_file() -> bytes:
    """Return the file of a site that signed one answer; another answer of it, and another site's, were not signed."""
    signed = Signed(
        start=0, stop=2, digest=salted(_VOUCH[:SALT_BYTES], sha256(b"rows")), signature=_VOUCH[SALT_BYTES:].hex()
    )
    about = QUESTION.model_dump(include={"pool", "kind", "encoding", "teacher", "policy"})
    several = signed.model_copy(update={"start": 3, "stop": 13, "subset": "gEA="})  # not what was signed
    part = SignedAnswers(**about, size=20, answers=5, signed=(signed, several))
    first = SignedSite(
        site="site-0", classes=("a", "b", "c"), public_key=key_line(_key(0).public_key()), answers=(part,)
    )
    second = SignedSite(
        site="site-1", classes=("d",), public_key=None, answers=(part.model_copy(update={"signed": ()}),)
    )
    return Signatures(job="job", sites=(first, second)).model_dump_json().encode()


def _bundle(data: bytes) -> bool:
    return bundle_problem(data) is None


def _good_bundle(compression: int) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", compression) as archive:
        archive.writestr("pyproject.toml", f'[tool.flwr.app.components]\nclientapp = "{APP}"\n')
    return held.getvalue()


def _paper_targets() -> dict[str, Target]:
    request = Request.make(_key(0), "site-0", "someone")
    pem = _certificate()
    kit = Kit(site="site-0", site_fingerprint=request.fingerprint, address="server:9092", ca=pem)
    shard = {"file": "shard-00000.bin", "count": 1, "sha256": DIGEST}
    manifest = f'{{"format": 1, "shape": [2, 2, 1], "size": 1, "shards": [{str(shard).replace(chr(39), chr(34))}]}}'
    return {
        "request": Target(_file(Request.read, "request.json"), (request.model_dump_json().encode(),)),
        "kit": Target(_file(Kit.read, "kit.json"), (kit.model_dump_json().encode(),)),
        "signatures": Target(_file(_check_signatures, "signatures.json"), (_signatures_file(),)),
        "manifest": Target(_file(lambda path: Pool.open(path.parent), "manifest.json"), (manifest.encode(),)),
    }


def _certificate() -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(_key(0).public_key())
    built = built.serial_number(1).not_valid_before(start).not_valid_after(start + timedelta(days=1))
    return built.sign(_key(0), hashes.SHA384()).public_bytes(serialization.Encoding.PEM).decode()


AUTHORITY = _certificate()


def _keyed(record: Contract | Question) -> tuple[Callable[[bytes, bytes | None], object], bytes]:
    """A record with a job's key, which a site checks against the authority in its kit."""
    signature = _key(0).sign(JobKey.signed("job", JOB_SECRET.public, 2**40), ec.ECDSA(hashes.SHA256())).hex()
    key = JobKey(job="job", key=JOB_SECRET.public, not_after=2**40, signature=signature)

    def check_it(found: Any) -> None:
        if found.job_key is None:
            raise ProtocolError("no key to check")
        found.job_key.check(found.job, AUTHORITY)

    return _checked(record.model_copy(update={"job_key": key}), check_it)


def _vouched(question: Question, rows: bytes) -> tuple[Callable[[bytes, bytes | None], object], bytes]:
    """An answer with a signature. After its text: one byte that tells how long that is, itself, and the rows."""
    vouch = Signer(_key(0), "site-0", ("a", "b", "c")).vouch(question, rows)

    def read(text: bytes, data: bytes | None) -> None:
        length, held = (data or b"\0")[0], (data or b"\0")[1:]
        record = {"json": text.decode("utf-8", "replace"), "seconds": 0.1}
        content = RecordDict({"record": ConfigRecord({**record, "data": held[length:], "vouch": held[:length]})})
        answer = Answer.from_content(content, question)
        salt, signature = answer.vouch[:SALT_BYTES], answer.vouch[SALT_BYTES:]
        _SIGNER.check(question, salted(salt, sha256(answer.data)), signature)
        if question.kind == "coverage":
            decode_coverage(answer.data, len(question), "f16")
        else:
            check_features(answer.data, len(question), 3, "f16")

    return read, question.model_dump_json().encode() + _TEXT_END + bytes([len(vouch)]) + vouch + rows


COVERAGE_QUESTION = QUESTION.model_copy(update={"kind": "coverage", "encoding": "f16"})
FEATURES_QUESTION = QUESTION.model_copy(update={"kind": "features", "encoding": "f16"})
JOB_KEYS = _records(_keyed(CONTRACT), _keyed(QUESTION))
VOUCHED = _records(
    _vouched(COVERAGE_QUESTION, encode_coverage(np.array([0.0, 0.5]), "f16")),
    _vouched(FEATURES_QUESTION, encode_features(np.ones((2, 3), np.float32), "f16")),
)


def _fleet() -> Target:
    """A message's objects as a SuperLink gives them, each after four bytes that tell how long it is.

    Objects keep the names by which others refer to them, as if whoever changed them had named them anew.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(CONTRACT.to_content(), 7, "query.contract")
    message.metadata.__dict__["_message_id"] = message.object_id
    with no_object_id_recompute():
        tree = get_object_tree(message)
        parts = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    announced = Envelope(message, tree)

    def run(data: bytes) -> bool:
        contents, left = {}, data
        for name in parts:
            size = int.from_bytes(left[:4], "big")
            contents[name], left = left[4 : 4 + size], left[4 + size :]
        try:
            Contract.from_content(inflate(announced, contents).content)
        except (MalformedError, ProtocolError):
            return False
        return True

    return Target(run, (b"".join(len(part).to_bytes(4, "big") + part for part in parts.values()),))


def _stranger() -> Target:
    """The public key of whom the SuperLink turns away, PEM."""
    folder = Path(tempfile.mkdtemp(prefix="consilience-fuzz-"))

    def run(data: bytes) -> bool:
        strangers = Strangers(folder)
        strangers.path.unlink(missing_ok=True)
        strangers.turned_away(data, "unknown")
        return len(strangers.since(0)) == 1

    public = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = _key(0).public_key().public_bytes(serialization.Encoding.PEM, public)
    return Target(run, (pem,))


_CODECS = {
    "floats": ("f32", "f16"),
    "squares": ("u8",),
    "largest": ("top-1", "top-3", "top-40"),
    "shares": ("top-1-u8", "top-3-u8", "top-40-u8"),
    "votes": ("votes",),
}
"""Encodings by the codec that reads them."""
TARGETS: dict[str, Target] = {
    **{f"rows-{name}": _rows(*encodings) for name, encodings in _CODECS.items()},
    **{f"odds-{name}": _odds(*encodings) for name, encodings in _CODECS.items()},
    "coverage": _coverage("f16", "u8"),
    "features": _features("f16", "u8"),
    "records-from-sites": FROM_SITES,
    "records-to-sites": TO_SITES,
    "tails": TAILS,
    "lent-blocks": Target(_lent, (LENT.tensors,)),
    "sums-from-sites": SUMS_FROM_SITES,
    "sums-to-sites": SUMS_TO_SITES,
    "sealed-share": Target(_unseal, (public_hex(_SEALS[0]).encode() + _TEXT_END + _BOX.encode(),)),
    "sealed-answer": Target(_sealed_answer, _SEALED_ANSWERS),
    "components": Target(_components, (b"\0" + base64.b64encode(_PACKED), b"\1" + bytes(2) + BASIS, b"\2" + _PACKED)),
    "bundle": Target(_bundle, (_good_bundle(zipfile.ZIP_DEFLATED), _good_bundle(zipfile.ZIP_STORED))),
    **_paper_targets(),
    "job-key": JOB_KEYS,
    "answers-vouched": VOUCHED,
    "fleet-message": _fleet(),
    "stranger-key": _stranger(),
}
"""Every decoder of bytes that strangers may send, by a list that was made by hand."""
