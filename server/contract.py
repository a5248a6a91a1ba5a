"""contract.json: what the sites and the server agreed on before the first question.

Lives here: the label space, the site cards and the pools of a run; written once, and again when a site is folded in.
Does not live here: sending it, and who takes part (server/enrolment).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from consilience.common.cards import PRIVATE, SiteCard
from consilience.common.errors import NEW_RUN, LabelError, RunError, SettingsError
from consilience.common.files import read_json, write_json
from consilience.common.job_key import JobKey
from consilience.common.labels import Entries, LabelSpace
from consilience.common.protocol import Contract, TailDemand
from consilience.common.settings import JobSettings, LabelKind, Student, allowed_by, encoding_names
from consilience.common.subsets import subset_text
from consilience.common.taps_asked import taps_asked
from consilience.server.answers_about import coverage_encoding
from consilience.server.asked_pool import AskedPool
from consilience.server.chosen import Chosen
from consilience.server.grouped import align, group_warnings
from consilience.server.multi_label import check_multi, kind_of


class RunContract(BaseModel):
    """The whole agreement of a run; sites sorted by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    labels: tuple[str, ...]
    class_sets: tuple[tuple[int, ...], ...]
    grouped: tuple[Entries | None, ...] = ()
    """For each site that answers on groups what its answers are about, as in `LabelSpace`."""
    sites: tuple[SiteCard, ...]
    pools: tuple[str, ...]
    """Digests: the pool, then the test pool where there is one."""
    owners: dict[str, tuple[str, ...]]
    """Class -> the sites that know it."""
    components: tuple[int, ...]
    warnings: tuple[str, ...]
    left_out: dict[str, str] = {}
    """Who was there and does not take part (a site, or a node that presented no card) -> reason."""

    @classmethod
    def build(cls, job: JobSettings, cards: Iterable[SiteCard], pools: tuple[str, ...]) -> RunContract:
        """Align the cards' classes.

        Raises `LabelError`, also where some sites are single-label and some multi-label; `SettingsError` for settings
        of unknown sites or classes, and for those that multi-label sites do not fit.
        """
        sites = sorted(cards, key=lambda card: card.name)
        multi = kind_of(sites) == "multi"
        if multi:
            check_multi(job)
        space = align(job.labels, sites, job.labels.classes, multi=multi)
        fields: list[tuple[str, Mapping[str, object]]] = [
            ("unify.weights", job.unify.weights),
            ("unify.strengths", job.unify.strengths),
        ]
        if job.student.learning == "common-feature":
            spaces = enumerate(job.student.common_feature.spaces)
            fields += [(f"student.common_feature.spaces.{at}.sites", held.sites) for at, held in spaces]
        for field, named in fields:
            if unknown := sorted(named.keys() - set(space.sites)):
                raise SettingsError(
                    f"job.yaml: field '{field}.{unknown[0]}' names no connected site; "
                    f"connected: {', '.join(space.sites)}",
                    hint="Correct the name or start that site",
                )
        for card in sites:
            _check_policy(job, card)
        Chosen.of(job, space)
        _check_features(job, sites, space)
        owners = {
            name: tuple(space.sites[i] for i in owned) for name, owned in zip(space.names, space.owners, strict=True)
        }
        return cls(
            job=job.name,
            labels=space.names,
            class_sets=space.class_sets,
            grouped=space.grouped,
            sites=tuple(sites),
            pools=pools,
            owners=owners,
            components=space.components,
            warnings=(*space.warnings(), *group_warnings(job.labels, space), *term_warnings(job.student)),
        )

    @property
    def space(self) -> LabelSpace:
        """The label space."""
        names = tuple(card.name for card in self.sites)
        return LabelSpace(self.labels, names, self.class_sets, self.kind == "multi", self.grouped)

    @property
    def kind(self) -> LabelKind:
        """Whether an image has one label, or any number of them."""
        return kind_of(self.sites)

    def for_site(
        self,
        name: str,
        job: JobSettings,
        job_key: JobKey | None = None,
        components: tuple[str, ...] = (),
        tail: TailDemand | None = None,
        part: AskedPool | None = None,
    ) -> Contract:
        """Return the part that site `name` is asked to agree to, and how `job` will ask.

        `job_key`: what its answers are to be sealed for; `components`: taps whose principal components are lacking;
        `tail`: what will be asked of its teacher's last blocks; `part`: what of the pool it will be asked about, where
        not all. Groups that the site answers on, by its own names, come after the classes, so that each of its answers
        has one place.
        """
        at = [card.name for card in self.sites].index(name)
        labels, class_set = list(self.labels), list(self.class_sets[at])
        if self.grouped and (entries := self.grouped[at]) is not None:
            class_set = []
            for own, entry in zip(self.sites[at].classes, entries, strict=True):
                class_set.append(entry[0] if len(entry) == 1 else len(labels))
                labels += [own] * (len(entry) > 1)
        return Contract(
            job=self.job,
            labels=tuple(labels),
            class_set=tuple(class_set),
            pools=self.pools,
            subset=None if part is None else subset_text(part.mask),
            more=0 if part is None else len(part) - part.known,
            teacher=self.sites[at].teacher,
            encoding=job.ask.encoding,
            coverage=coverage_encoding(job, self.sites[at]) is not None,
            features=tuple(tap.name for tap in taps_asked(job, self.sites[at])),
            feature_encoding=job.ask.features,
            components=components,
            tail=tail,
            secure_sum=job.privacy.secure_sum,
            job_key=job_key,
        )

    def write(self, path: Path) -> None:
        """Write contract.json. Raises `StorageError`."""
        write_json(path, self.model_dump(mode="json"))

    def check_same(self, other: RunContract, path: Path) -> None:
        """Compare with what the job would agree on now for the same sites and pools.

        Raises `RunError` when that is something else: a pool or how the job names classes has changed.
        """
        for name in type(self).model_fields:
            if name != "left_out" and getattr(self, name) != getattr(other, name):
                raise _changed(path, name)

    def differs(self, card: SiteCard) -> bool:
        """Whether a site of this contract presents another card now."""
        return any(
            held.name == card.name
            # `identity` tells the key; runs that began before cards held it go on unsigned
            and held != card.model_copy(update={name: getattr(held, name) for name in ("public_key", *PRIVATE)})
            for held in self.sites
        )

    def check_unchanged(self, cards: Iterable[SiteCard], path: Path) -> None:
        """Compare cards with those of the same sites here. Raises `RunError` when one has changed."""
        changed = sorted(card.name for card in cards if self.differs(card))
        if changed:
            raise _changed(path, f"site {', '.join(changed)}")

    @classmethod
    def load(cls, path: Path) -> RunContract:
        """Read contract.json. Raises `StorageError`, and `RunError` where another version of Consilience wrote it."""
        held = read_json(path)
        try:
            for card in held["sites"]:
                card.pop("protocol", None)  # that of the messages then; the run goes on in that of now
            return cls.model_validate(held, strict=False)
        except (ValidationError, AttributeError, KeyError, TypeError):
            raise RunError(
                f"{path} is damaged, or of a run that another version of Consilience began",
                hint=f"Go on with that version, or start {NEW_RUN}",
            ) from None


def objection(job: JobSettings, card: SiteCard) -> str:
    """Say why a site cannot take part in a job whoever else does: its classes or its policy; empty when it can."""
    try:
        space = align(job.labels, [card])
        _check_policy(job, card)
    except (LabelError, SettingsError) as error:
        return error.message
    if job.labels.classes is None:
        return ""
    wanted = {unicodedata.normalize("NFC", name).strip() for name in job.labels.classes}
    strange = [name for name in space.names if name not in wanted]
    return f"labels.classes lacks {', '.join(strange[:20])}, which it knows" if strange else ""


def _check_policy(job: JobSettings, card: SiteCard) -> None:
    if card.sums_only and not job.privacy.secure_sum:
        raise SettingsError(
            f"job.yaml: field 'privacy.secure_sum' is False; site {card.name} answers in secure sums only",
            hint="Set privacy.secure_sum: true, or leave that site out with ask.min_sites",
        )
    if card.sealed_only and not job.privacy.sealed:
        raise SettingsError(
            f"job.yaml: field 'privacy.sealed' is False; site {card.name} answers only jobs that have answers sealed",
            hint="Set privacy.sealed: true, or leave that site out with ask.min_sites",
        )
    if not allowed_by(card.encodings, job.ask.encoding):
        raise SettingsError(
            f"job.yaml: field 'ask.encoding' is {job.ask.encoding!r}; site {card.name} allows: "
            f"{', '.join(encoding_names(card.encodings))}",
            hint="Choose an encoding that every site allows",
        )
    taps_asked(job, card)


def _check_features(job: JobSettings, cards: Sequence[SiteCard], space: LabelSpace) -> None:
    """Raise `SettingsError` where features are to be learnt from and no site tells any, or scores cannot be joined."""
    if job.asks_features and not any(taps_asked(job, card) for card in cards):
        raise SettingsError(
            f"job.yaml: field 'student.learning' is {job.student.learning!r}, and no site tells features",
            hint="Ask sites to set policy.features, or set student.learning to soft-labels",
        )
    shared = [name for name, owners in zip(space.names, space.owners, strict=True) if len(owners) > 1]
    if job.student.target == "concatenated" and shared:
        field = f"student.{job.student.learning.replace('-', '_')}.target"
        raise SettingsError(
            f"job.yaml: field {field!r} is 'concatenated', which takes classes that one site each knows; several know: "
            f"{', '.join(shared[:10])}",
            hint="Set it to unified",
        )


def term_warnings(student: Student) -> list[str]:
    """Return what common-feature learning with a term switched off does not do, in plain words."""
    if student.learning != "common-feature":
        return []
    found, terms = [], student.common_feature
    if not terms.mmd:
        found.append(
            "student.common_feature.mmd is 0, and nothing else of sites' features would reach the student: none are "
            "asked for, and it learns from labels alone."
        )
    if not terms.soft:
        found.append(
            "student.common_feature.soft is 0: nothing teaches the student's scores, and its last layer stays at "
            "random. Such a student is for its features, not for its answers."
        )
    return found


def _changed(path: Path, what: str) -> RunError:
    return RunError(
        f"{path.parent}: this run began under another contract; changed: {what}",
        hint=f"Start {NEW_RUN}",
    )
