"""One class per kind of failure: one exit code, one paragraph of explanation.

Lives here: the registry of failures a user can meet, and how they read. Does not live here: catching them
(the command line does) or crossing the wire (`protocol` maps them to codes without text of ours).
"""

from __future__ import annotations

from typing import ClassVar

NEW_RUN = "a new run with --out (simulate) or --token (server submit)"
"""How a user begins another run of a job, for hints."""


class ConsilienceError(Exception):
    """A failure the user can act on. Exit code 1 is kept for failures we did not foresee.

    The message says what is wrong, where, the value, what is allowed; `hint` says the next step.
    """

    exit_code: ClassVar[int] = 1
    name: ClassVar[str] = "internal"
    explanation: ClassVar[str] = (
        "Something failed that the program did not foresee. Nothing that had arrived is lost: run the same "
        "command again to continue. If it fails again, report the last lines of the run's events.jsonl."
    )

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class SettingsError(ConsilienceError):
    """A job.yaml, site.yaml or command-line value is not allowed."""

    exit_code = 3
    name = "settings"
    explanation = (
        "A settings file could not be used: a field is unknown, missing or has a value that is not allowed. "
        "The message names the file, the field, the value and what is allowed. Correct the file and run the "
        "same command again."
    )


class DataError(ConsilienceError):
    """Images or labels cannot be read, have another shape, or labels are out of range."""

    exit_code = 4
    name = "data"
    explanation = (
        "Images or labels could not be used: a file is missing or damaged, an image has another shape than "
        "the rest, or a label is not one of the declared classes. The message names the file and the first "
        "offending sample."
    )


class PoolError(ConsilienceError):
    """The public pool is not the one the job speaks of, or its bytes have changed."""

    exit_code = 5
    name = "pool"
    explanation = (
        "The public pool's bytes do not give the digest that was agreed on, or the pool is incomplete. Every "
        "site and the server must hold the same bytes: build the pool again from the same source, or copy the "
        "shards that `consilience pool verify` names."
    )


class LabelError(ConsilienceError):
    """Class names do not form a label space."""

    exit_code = 6
    name = "labels"
    explanation = (
        "The class names of the sites do not fit together: a class is named twice, a synonym points to two "
        "classes, a class is asked for that no site knows, or a group of classes (`labels.groups`) does not fit the "
        "classes. Correct the names in the site's or the job's settings; `labels.synonyms` in the job joins different "
        "names of one class."
    )


class TeacherError(ConsilienceError):
    """A site's private classifier cannot be loaded, or does not answer as declared."""

    exit_code = 7
    name = "teacher"
    explanation = (
        "The site's private classifier could not be loaded or gave something else than one finite row of "
        "scores per image over its declared classes. The message names the file or the callable. Files that "
        "would run code when loaded are refused on purpose."
    )


class ProtocolError(ConsilienceError):
    """A question or an answer is not what the contract between site and server says."""

    exit_code = 8
    name = "protocol"
    explanation = (
        "A message between server and site did not keep the contract: wrong job, pool, sample ids, shape, "
        "encoding, or values that are no log-probabilities. It was refused; what had arrived before is kept."
    )


class AskingError(ConsilienceError):
    """Too few sites answered enough for the job to go on."""

    exit_code = 9
    name = "asking"
    explanation = (
        "Too few sites were there in time, agreed to the contract, or answered every question within the job's "
        "retries and deadline. The answers that arrived are in the run folder and are not asked for again: mend the "
        "sites that the message names and run the same command again."
    )


class StorageError(ConsilienceError):
    """The disk is full, not writable, or what is on it is damaged."""

    exit_code = 10
    name = "storage"
    explanation = (
        "A file of the run could not be written or read back as it was written: the disk is full, the folder "
        "is not writable, or a file was changed. Complete answers that were stored are still there: make "
        "room and run the same command again."
    )


class UnifyError(ConsilienceError):
    """The answers cannot be unified."""

    exit_code = 11
    name = "unify"
    explanation = (
        "Unification was asked for something it cannot do: a class set is empty or out of range, log-"
        "probabilities hold NaN, weights are not positive, or the sums do not belong to the class sets."
    )


class StudentError(ConsilienceError):
    """The student cannot be built, trained, loaded or used."""

    exit_code = 12
    name = "student"
    explanation = (
        "The student could not be built, trained or loaded: an unknown architecture, a training loss that is "
        "not finite, or a student folder that lacks a file. The message says which."
    )


class MissingExtraError(ConsilienceError):
    """An optional library is needed that is not installed."""

    exit_code = 13
    name = "extra"
    explanation = (
        "What was asked for needs a library that is optional. The message names the extra: for example "
        "`pip install 'consilience[onnx]'`."
    )


class RunError(ConsilienceError):
    """The run folder belongs to another job, or another process is using it."""

    exit_code = 14
    name = "run"
    explanation = (
        "A run is one doing of one job in one folder. The folder given already holds a run of another job, or "
        "another process is working in it. Start a new run with --out (simulate) or --token (server submit), or wait "
        "for the other process."
    )


class IdentityError(ConsilienceError):
    """A key, certificate, request or kit cannot be used."""

    exit_code = 15
    name = "identity"
    explanation = (
        "A key, a certificate, a request or a kit could not be used: the file is missing or damaged, its signature is "
        "not the site's, its words are not the ones that were compared, or other users of the machine may read a "
        "private key; or what sites are said to have signed of their answers is not what they signed. The message "
        "names the file; `chmod 600` mends a key that is open too wide."
    )


class UnreachableError(ConsilienceError):
    """The server cannot be reached."""

    exit_code = 16
    name = "connection"
    explanation = (
        "The server's name could not be resolved or its port could not be reached. `consilience site check` says which "
        "of the two; a firewall must let the site open a TCP connection to the address in its kit."
    )


class CertificateError(ConsilienceError):
    """The server's certificate was not signed by the authority in the kit, or is not for this address or time."""

    exit_code = 17
    name = "certificate"
    explanation = (
        "Whoever answered at the server's address could not show a certificate of the authority that the site's kit "
        "names, or the certificate is for another address or another time. Nothing was sent. Ask the coordinator, by "
        "telephone, for a new kit and compare its words; do not go on otherwise."
    )


class AdmissionError(ConsilienceError):
    """The server does not admit this site's key."""

    exit_code = 18
    name = "admission"
    explanation = (
        "The server does not know this site's key: the request was not approved yet, the site was suspended, or the "
        "key was changed since. Send the request file to the coordinator, or ask what happened to the admission, and "
        "start the agent again. The coordinator sees the site in `consilience server sites`."
    )


class DuplicateError(ConsilienceError):
    """Another agent is connected with this site's key."""

    exit_code = 19
    name = "duplicate"
    explanation = (
        "Another agent is connected with this key, and one key is one agent. Stop the other one. If there should be "
        "none, the key may have been copied: make a new one with `consilience site init --rotate` and tell the "
        "coordinator to suspend the old one."
    )


class VersionError(ConsilienceError):
    """Site and server run versions that do not go together."""

    exit_code = 20
    name = "version"
    explanation = (
        "Site and server must run the same minor version of Flower (flwr 1.39) and the same protocol of Consilience. "
        "The message names this site's version; ask the coordinator for theirs, and install one for both."
    )


class ClockError(ConsilienceError):
    """The machine's clock differs from the server's by more than authentication allows."""

    exit_code = 21
    name = "clock"
    explanation = (
        "A site proves its identity by signing the time, so its clock may differ from the server's by a few minutes at "
        "most. Let the machine take its time from a time server (chrony, systemd-timesyncd) and start again."
    )


class ServerError(ConsilienceError):
    """The server's processes cannot be started or reached."""

    exit_code = 22
    name = "server"
    explanation = (
        "The server's own processes could not be started or reached: a port is in use, `consilience server start` is "
        "not running, or Flower's SuperLink failed. The message says which; the SuperLink's own log is superlink.log "
        "in the server's folder."
    )


class CoverageError(ConsilienceError):
    """A site's coverage cannot be learned or loaded."""

    exit_code = 23
    name = "coverage"
    explanation = (
        "A site's coverage, its estimate of which images are of its classes, could not be learned from the private "
        "data and the pool, or what was learned does not fit the settings any more. The message names the reason. A "
        "site can always take part without it: set policy.coverage: off."
    )


class LedgerError(ConsilienceError):
    """A site's ledger, or the answers that it speaks of, are not as they were written."""

    exit_code = 24
    name = "ledger"
    explanation = (
        "A site's record of what it released is not as it was written: a row was changed or is missing, an older copy "
        "was put back, or the record, or an answer that was given before, is lost. The site answers nothing until it "
        "is in order, for it could release more than its policy allows. The message names the row or the file. Put the "
        "newest copy back; if there is none, `consilience site ledger restart` puts the ledger aside and begins "
        "another, which counts as spent all that its head and rows still tell of; where the head is lost, say with "
        "--spent how much there was at most."
    )


REGISTRY: dict[int, type[ConsilienceError]] = {
    cls.exit_code: cls
    for cls in (
        ConsilienceError,
        SettingsError,
        DataError,
        PoolError,
        LabelError,
        TeacherError,
        ProtocolError,
        AskingError,
        StorageError,
        UnifyError,
        StudentError,
        MissingExtraError,
        RunError,
        IdentityError,
        UnreachableError,
        CertificateError,
        AdmissionError,
        DuplicateError,
        VersionError,
        ClockError,
        ServerError,
        CoverageError,
        LedgerError,
    )
}
"""Every exit code in use. 0 is success, 2 a wrong command line, 130 an interruption. Codes are never reused."""
