"""What of sites' features fits a job's student: looked at before anything is asked.

Lives here: the checks of site cards against the student's own taps. Does not live here: those taps
(server/student/own_taps), what sites allow (common/taps_asked), and learning from features (server/feature_learning).
"""

from __future__ import annotations

from collections.abc import Sequence

from consilience.common.cards import SiteCard, TapCard
from consilience.common.encoding import feature_bytes
from consilience.common.errors import SettingsError, StudentError
from consilience.common.nets.tapped import PENULTIMATE
from consilience.common.nets.taps import Tap, one_layout
from consilience.common.pages.numbers import listing, size
from consilience.common.pool import Pool
from consilience.common.settings import CommonSpace, JobSettings
from consilience.common.taps_asked import components_asked, tap_in, taps_asked
from consilience.server.learning import build_student
from consilience.server.student.own_taps import own_taps

MOST_JOINED = 4_096
"""Channels of a layer that are amalgamated together: a matrix of them squared is 134 MB, and several are held."""
MOST_MET = 4_096
"""Channels of a tap that meets in a common space: its decoder has them squared as weights, 67 MB, held three times."""


class StudentTaps:
    """The taps of a job's student, and what it needs of sites that tell features."""

    def __init__(self, job: JobSettings, pool: Pool) -> None:
        """Build the student for the images of the pool that features are asked of. Raises as `own_taps`."""
        self._job, self._samples, settings = job, len(pool), job.student
        network = build_student(settings.architecture, 2, pool.shape, settings.preprocessing, seed=0)
        self.shapes, self.layouts = own_taps(network, settings, pool.shape)

    def check(self, card: SiteCard) -> None:
        """Raise `SettingsError` where what a site tells cannot be joined with this student, or is too much."""
        declared, most = self._declared(card), self._job.ask.feature_bytes
        if declared > most:
            raise SettingsError(
                f"job.yaml: field 'ask.feature_bytes' is {most:,}; site {card.name} declares {declared:,} bytes of "
                f"features of the pool's {self._samples:,} samples",
                hint="Ask that site to let taps leave smaller or with fewer channels; or raise ask.feature_bytes where "
                "the disk has room",
            )
        if self._job.student.learning == "layer-wise" and card.features is not None:
            self._check_layers(card.name, taps_asked(self._job, card))
        elif self._job.student.learning == "common-feature":
            for tap in taps_asked(self._job, card):
                if tap.shape[0] > MOST_MET:
                    raise SettingsError(
                        f"job.yaml: field 'student.learning' is 'common-feature'; site {card.name}'s tap {tap.name} "
                        f"has {tap.shape[0]:,} channels, and a common space takes {MOST_MET:,} of a site at most",
                        hint=f"Ask that site to let principal components leave (policy.features.taps.{tap.name}."
                        "channels), or name another of its taps in student.common_feature.spaces",
                    )

    def announced(self, cards: Sequence[SiteCard]) -> str:
        """Say how many bytes of features each site is about to be asked for; empty where none is."""
        declared = {card.name: held for card in cards if (held := self._declared(card))}
        told = listing([f"{size(held)} from site {name}" for name, held in declared.items()])
        return f"Features of {self._samples:,} samples: {told}; {size(sum(declared.values()))} in all" if told else ""

    def tail(self, card: SiteCard) -> None:
        """Nothing is asked of a site's last blocks."""

    def objection(self, card: SiteCard) -> str:
        """Say why a site's features do not fit; empty where they do."""
        try:
            self.check(card)
        except SettingsError as error:
            return error.message
        return ""

    def check_all(self, cards: Sequence[SiteCard]) -> None:
        """Raise `SettingsError` as `check` for each, and where the sites' taps together do not fit the job."""
        for card in cards:
            self.check(card)
        if self._job.student.learning != "layer-wise":
            self._check_sizes(cards)
            return
        told = [{tap.name: tap.channels for tap in taps_asked(self._job, card)} for card in cards]
        for name, own in self.layouts.items():
            channels = [taps[name] for taps in told if name in taps]
            if sum(channels) > MOST_JOINED:
                raise SettingsError(
                    "job.yaml: field 'student.learning' is 'layer-wise'; the sites have "
                    f"{' + '.join(map(str, channels))} channels at {name}; allowed are {MOST_JOINED:,} together",
                    hint="Take fewer sites, or set student.learning to common-feature",
                )
            if channels and own.channels > sum(channels):
                raise SettingsError(
                    f"job.yaml: field 'student.architecture' is {self._job.student.architecture!r}, with "
                    f"{own.channels} channels at {name}; the sites' have {' + '.join(map(str, channels))} there, and "
                    "amalgamated features can only be fewer",
                    hint="Choose a narrower student, such as NAME@1",
                )

    def tap_for(self, space: CommonSpace, taps: Sequence[TapCard]) -> str:
        """Return the student's tap of a common space where the sites bring `taps`."""
        if space.student is not None:
            return space.student
        if any(len(tap.shape) == 1 for tap in taps) and PENULTIMATE in self.shapes:
            return PENULTIMATE
        maps = [name for name, shape in self.shapes.items() if len(shape) == 3 and shape[1] * shape[2] > 1]
        return maps[-1] if maps else list(self.shapes)[-1]

    def _declared(self, card: SiteCard) -> int:
        """Return the bytes of features and principal components that the job would take of a site."""
        told, sent = taps_asked(self._job, card), components_asked(self._job, card)
        bytes_of_all = self._samples * sum(feature_bytes(tap.values, self._job.ask.features) for tap in told)
        return bytes_of_all + sum(tap.components.bytes for tap in sent if tap.components is not None)

    def _check_sizes(self, cards: Sequence[SiteCard]) -> None:
        """Raise `SettingsError` for a space of vectors with a size of maps."""
        for at, space in enumerate(self._job.student.common_feature.spaces):
            if space.size is None:
                continue
            met = [(card.name, tap) for card in cards for tap in taps_asked(self._job, card)]
            names = {card.name: tap_in(space, card) for card in cards}
            taps = {site: tap for site, tap in met if tap.name == names[site]}
            own = self.tap_for(space, list(taps.values()))
            vectors = [f"site {site}'s {tap.name}" for site, tap in taps.items() if len(tap.shape) == 1]
            if len(self.shapes[own]) == 1:
                vectors.append(f"the student's {own}")
            if taps and vectors:
                raise SettingsError(
                    f"job.yaml: field 'student.common_feature.spaces.{at}.size' is {space.size}, of maps; in this "
                    f"space vectors meet: {', '.join(vectors[:10])}",
                    hint="Leave size out, or name taps that are maps in sites and student",
                )

    def _check_layers(self, site: str, told: Sequence[TapCard]) -> None:
        if not told:
            return  # penultimate alone, or another network's taps: it takes part by its labels
        held = {tap.name: tap for tap in told}
        layouts = {
            f"site {site}": [Tap(tap.name, tap.layout, tap.channels) for tap in told],
            f"the student ({self._job.student.architecture})": list(self.layouts.values()),
        }
        missing = [name for name in self.layouts if name not in held]
        if missing and set(held) < set(self.layouts):
            raise SettingsError(
                f"job.yaml: field 'student.learning' is 'layer-wise', which takes every layer; site {site} does not "
                f"tell: {', '.join(missing)}",
                hint="Ask that site to allow every layer in policy.features.taps, or none; or set student.learning to "
                "common-feature",
            )
        try:
            one_layout(layouts)
        except StudentError as error:
            raise SettingsError(
                f"job.yaml: field 'student.learning' is 'layer-wise': {error.message}", hint=error.hint
            ) from error
        for name, tap in held.items():
            own = self.shapes[name]
            if tap.shape[1:] != own[1:]:
                raise SettingsError(
                    f"job.yaml: field 'student.learning' is 'layer-wise', which takes maps as they are: at {name} site "
                    f"{site} tells maps of {_size(tap.shape)}, and the student's are of {_size(own)}",
                    hint=f"Ask that site to leave policy.features.taps.{name}.size out and to have the student's "
                    "preprocessing.size, or set student.learning to common-feature",
                )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:])) or "one value a channel"
