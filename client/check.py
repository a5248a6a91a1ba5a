"""What `consilience site check` looks at before an agent starts: this machine, the papers, the way to the server.

Lives here: the checks, in the order in which one needs another. Does not live here: how they are shown (client/cli).
Nothing of the site leaves the machine but what every connection sends: the public key and a signed time.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np

from consilience.client.agent_cli import papers
from consilience.client.connection import DroppedError, LostError
from consilience.client.coverage import load_coverage, tell_coverage
from consilience.client.explain import tell_policy
from consilience.client.features import open_taps, tell_taps
from consilience.client.fleet import open_fleet
from consilience.client.ledger import Ledger, utc_now
from consilience.client.ledger_head import comes_back_with_state
from consilience.client.policy import limits
from consilience.client.privacy import describe_privacy
from consilience.client.reach import certificate_end, connect, resolve
from consilience.client.tails import tell_tail
from consilience.client.teacher import AnyTeacher, CalibratedMulti, load_any
from consilience.common.data import open_data
from consilience.common.encoding import feature_bytes
from consilience.common.errors import (
    AdmissionError,
    ClockError,
    ConsilienceError,
    RunError,
    StorageError,
    TeacherError,
    UnreachableError,
    VersionError,
)
from consilience.common.files import lock, make_private, storage_error
from consilience.common.identity import Kit, PrivateKey, key_fingerprint, load_key, words
from consilience.common.pool import Pool
from consilience.common.settings import DpSgd, Pate, SiteSettings, encoding_names
from consilience.common.settings_file import load_settings

LEAST_SPACE = 100 * 2**20
"""Bytes that the folder of state should have room for."""
PASSED = ("ok", "warning")
"""Results after which other checks go on."""


@dataclass(frozen=True)
class Row:
    """One check: what was found, and what to do when that is a problem."""

    check: str
    result: Literal["ok", "warning", "problem", "skipped"]
    found: str
    fix: str = ""
    error: ConsilienceError | None = field(default=None, compare=False)


class SkippedError(Exception):
    """A check that has nothing to look at; the text says why."""


class WarnedError(Exception):
    """What a check found that hinders nothing, and what would mend it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


class Preflight:
    """The checks of one site; `rows` fills as `run` goes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        self._settings: SiteSettings
        self._teacher: AnyTeacher
        self._pools: list[Pool] = []
        self._key: PrivateKey
        self._kit: Kit

    def run(self) -> None:
        """Make every check whose prerequisites hold."""
        steps: list[tuple[str, tuple[str, ...], Callable[[], str]]] = [
            ("settings", (), self._load_settings),
            ("policy", ("settings",), self._tell_policy),
            ("private data", ("settings",), self._open_data),
            ("teacher", ("settings",), self._load_teacher),
            ("coverage", ("teacher",), self._load_coverage),
            ("pools", ("settings",), self._verify_pools),
            ("features", ("teacher", "pools"), self._open_taps),
            ("blocks", ("teacher",), self._open_tail),
            ("answer", ("teacher", "pools"), self._answer),
            ("state folder", ("settings",), self._look_at_state),
            ("ledger", ("state folder",), self._verify_ledger),
            ("key", ("settings",), self._load_key),
            ("kit", ("key",), self._load_kit),
            ("name", ("kit",), lambda: ", ".join(resolve(self._kit))),
            ("port", ("name",), self._connect),
            ("certificate", ("port",), self._shake_hands),
            ("call", ("certificate",), self._call),
            ("version", ("call",), self._compare_version),
            ("clock", ("version",), self._compare_clock),
            ("admission", ("clock",), self._look_up_key),
            ("agent", ("state folder",), self._look_for_agent),
        ]
        for name, needs, action in steps:
            self.rows.append(self._step(name, needs, action))

    @property
    def error(self) -> ConsilienceError | None:
        """The first problem's error."""
        return next((row.error for row in self.rows if row.error is not None), None)

    def _step(self, name: str, needs: tuple[str, ...], action: Callable[[], str]) -> Row:
        missing = [row.check for row in self.rows if row.check in needs and row.result not in PASSED]
        if missing:
            return Row(name, "skipped", f"needs: {', '.join(missing)}")
        try:
            return Row(name, "ok", action())
        except SkippedError as reason:
            return Row(name, "skipped", str(reason))
        except WarnedError as warning:
            return Row(name, "warning", str(warning), warning.fix)
        except ConsilienceError as error:
            return Row(name, "problem", error.message, error.hint, error)

    def _load_settings(self) -> str:
        self._settings = load_settings(self._path, SiteSettings)
        return f"site {self._settings.name}"

    def _tell_policy(self) -> str:
        policy = self._settings.policy
        told = ["name, classes, kind and fingerprint of the teacher"]
        behind = describe_privacy(self._settings)
        what = "log-odds" if self._settings.teacher.labels == "multi" else "log-probabilities"
        told += [f"{what} as {' or '.join(encoding_names(policy.encodings))}"]
        told[-1] += f" behind {behind}" if behind else ""
        if policy.coverage_encodings:
            told += [f"coverage, if the site has learned it, as {' or '.join(policy.coverage_encodings)}"]
        if policy.features.taps:
            encodings = " or ".join(policy.features.encodings)
            told += [f"features of the taps {', '.join(policy.features.taps)} as {encodings}"]
        told += ["the class shares of the private data"] if policy.class_priors else []
        told += ["accuracy and calibration on private images kept out of training"] if policy.holdout_accuracy else []
        return f"lets out: {', '.join(told)}; nothing else. {'; '.join(tell_policy(policy))}"

    def _open_data(self) -> str:
        if self._settings.data is None:
            raise SkippedError("the settings name none")
        data = open_data(self._settings.data)
        if self._settings.teacher.kind == "train":
            need = data.need_many if self._settings.teacher.labels == "multi" else data.need_labels
            need("Training the teacher")
        told, private = f"{len(data):,} images of {len(data.class_names)} classes", self._settings.privacy
        if isinstance(private, Pate | DpSgd) and private.delta * len(data) >= 1:
            raise WarnedError(
                f"{told}; privacy.delta is {private.delta:g}: a record may be given away whole with that chance",
                f"Set privacy.delta well below {1 / len(data):.2g}, one in the number of records",
            )
        return told

    def _load_teacher(self) -> str:
        self._teacher = load_any(self._settings)
        teacher = self._teacher
        return f"{len(teacher.classes)} classes, fingerprint {teacher.fingerprint[:12]}, calibration: {teacher.told}"

    def _load_coverage(self) -> str:
        load_coverage(self._settings, self._teacher)
        told = tell_coverage(self._settings)
        if self._settings.policy.coverage == "off":
            raise SkippedError(told)
        return told

    def _verify_pools(self) -> str:
        if not self._settings.pools:
            raise SkippedError("the settings name none; every question will be refused until they do")
        for folder in self._settings.pools:
            pool = Pool.open(folder)
            pool.verify()
            self._pools.append(pool)
        return ", ".join(f"{len(pool):,} samples, digest {pool.digest[:12]}" for pool in self._pools)

    def _open_tail(self) -> str:
        if told := tell_tail(self._settings, self._teacher):
            return told
        raise SkippedError("the policy opens none (policy.tail)")

    def _open_taps(self) -> str:
        taps = open_taps(self._settings, self._teacher)
        if not taps:
            raise SkippedError(tell_taps(self._settings, taps))
        for pool in (pool for pool in self._pools if len(pool)):
            for tap in taps:
                try:
                    tap.values(pool.read(0, 1))  # checks shape and values itself
                except TeacherError as error:
                    raise TeacherError(f"{pool.folder}: {error.message}", hint=error.hint) from error
        total = sum(feature_bytes(tap.card.values, self._settings.policy.features.encodings[0]) for tap in taps)
        most, asked = self._settings.policy.features.bytes, total * len(self._pools[0])
        asked += sum(tap.card.components.bytes for tap in taps if tap.card.components is not None)
        if asked > most:
            raise WarnedError(
                f"{tell_taps(self._settings, taps)}. Of the first pool that is {asked:,} bytes, and "
                f"policy.features.bytes allows a job {most:,}: one that asks for every tap is refused",
                "Let taps leave smaller or with fewer channels, name fewer, or raise policy.features.bytes",
            )
        return f"{tell_taps(self._settings, taps)}; {asked:,} bytes of the first pool"

    def _answer(self) -> str:
        for pool in self._pools:
            shown = pool.read(0, min(1, len(pool))) if len(pool) else np.zeros((1, *pool.shape), np.uint8)
            if isinstance(self._teacher, CalibratedMulti):  # both check shape and values themselves
                self._teacher.log_odds(shown)
            else:
                self._teacher.log_probs(shown)
        return "one finite row over its classes for a sample of every pool"

    def _look_at_state(self) -> str:
        folder = self._settings.state
        make_private(folder)
        try:
            free, mode = shutil.disk_usage(folder).free, stat.S_IMODE(folder.stat().st_mode)
        except OSError as error:
            raise storage_error(error, folder, "write") from error
        if free < LEAST_SPACE:
            raise StorageError(
                f"{folder} has {free / 2**20:.0f} MB left; advised are {LEAST_SPACE / 2**20:.0f} MB",
                hint="Make room on that disk",
            )
        if mode & 0o077:
            raise WarnedError(
                f"{folder}: its mode is {mode:04o}, so that others on this machine may reach what was trained and what "
                "left; advised is 0700",
                f"Type `chmod 700 {folder}`",
            )
        return f"{free / 2**30:.1f} GB left"

    def _verify_ledger(self) -> str:
        with closing(Ledger.open(self._settings)) as ledger:
            for limit in limits(self._settings.policy, ledger, ""):
                if limit.left is not None and limit.left <= 0:
                    raise WarnedError(
                        f"{limit.name}: {limit.spent:,} samples are released, and the policy allows {limit.most:,}: "
                        "nothing new is answered",
                        "Raise policy.limits if more may leave",
                    )
            if ledger.now[:13] > utc_now().isoformat()[:13]:  # by the hour: clocks are compared elsewhere
                raise WarnedError(
                    f"{ledger.head}: the last row is of {ledger.last}, after now: the clock was ahead once, and months "
                    "and the policy's end are counted by that row until the clock has come as far",
                    "Raise `policy.limits.per_month`, or let `policy.ends` be later, if more may leave before",
                )
            if comes_back_with_state(self._settings):
                raise WarnedError(
                    f"{ledger.head} lies in the folder `state`: an older copy of that, put back, brings the head back "
                    "too, and is not noticed",
                    "Move the file elsewhere while the agent is stopped, and name that place as `ledger_head`",
                )
            return f"{ledger.count:,} rows as they were written; {ledger.spent.lifetime:,} samples released so far"

    def _load_key(self) -> str:
        self._key = load_key(self._settings.key)
        return f"words: {words(key_fingerprint(self._key.public_key()))}"

    def _load_kit(self) -> str:
        self._key, self._kit = papers(self._settings)
        return f"server {self._kit.address}, words: {self._kit.words}"

    def _connect(self) -> str:
        connect(self._kit).close()
        return f"{self._kit.address} takes connections"

    def _shake_hands(self) -> str:
        end = certificate_end(self._kit)
        left = (end - datetime.now(UTC)).days
        return f"the kit's authority signed it; it ends on {end:%Y-%m-%d}, in {left} days"

    @cached_property
    def _admitted(self) -> bool | Exception:
        """What one call to the server gives."""
        fleet = open_fleet(self._kit, self._key)
        try:
            return fleet.admitted()
        except (ConsilienceError, LostError, DroppedError) as error:
            return error
        finally:
            fleet.close()

    def _call(self) -> str:
        if isinstance(self._admitted, LostError | DroppedError):
            raise UnreachableError(
                f"{self._kit.address} does not answer calls: {self._admitted}",
                hint="Something between may let only web pages through; ask the coordinator",
            )
        return "the server answers"

    def _compare_version(self) -> str:
        if isinstance(self._admitted, VersionError):
            raise self._admitted
        return f"flwr {metadata.version('flwr')}; the server takes it"

    def _compare_clock(self) -> str:
        if isinstance(self._admitted, ClockError):
            raise self._admitted
        return "near enough to the server's"

    def _look_up_key(self) -> str:
        if isinstance(self._admitted, Exception):
            raise self._admitted
        if not self._admitted:
            raise AdmissionError(
                "The server does not know this site's key", hint="Send the request to the coordinator, or ask them"
            )
        return "the server knows this site's key"

    def _look_for_agent(self) -> str:
        try:
            with lock(self._settings.state / "agent"):
                raise SkippedError("none is running here; `consilience site start` starts it")
        except RunError:
            return "one is running here"
