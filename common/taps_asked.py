"""Which taps' features a job asks a site for: one rule, for the server that asks and for the site that explains.

Does not live here: what a tap is (common/cards.TapCard), asking (server), what a policy lets out (client/features).
"""

from __future__ import annotations

import re

from consilience.common.cards import SiteCard, TapCard
from consilience.common.errors import SettingsError
from consilience.common.settings import CommonSpace, JobSettings

_LAYER = re.compile("layer[1-9][0-9]*")
"""Names of the taps of our architectures (common/nets/taps)."""


def taps_asked(job: JobSettings, card: SiteCard) -> tuple[TapCard, ...]:
    """Return the taps whose features a site is asked for, none where the job wants none or the site tells none.

    Layer-wise amalgamation takes every layer of ours; common-feature learning those that the job names for the site, by
    default the last. Raises `SettingsError` for a tap or an encoding that the site's policy does not allow.
    """
    if not job.asks_features:
        return ()
    named = [space.sites.get(card.name) for space in job.student.common_feature.spaces]
    told: tuple[TapCard, ...] = () if card.features is None else card.features.taps
    if job.student.learning == "common-feature":
        for at, name in enumerate(named):
            if name is not None and name not in {tap.name for tap in told}:
                raise SettingsError(
                    f"job.yaml: field 'student.common_feature.spaces.{at}.sites.{card.name}' is {name!r}; site "
                    f"{card.name} tells the features of: {', '.join(tap.name for tap in told) or 'no tap'}",
                    hint="Name one of these, or ask the site to allow it in policy.features.taps",
                )
    if card.features is None:
        return ()
    if job.ask.features not in card.features.encodings:
        raise SettingsError(
            f"job.yaml: field 'ask.features' is {job.ask.features!r}; site {card.name} allows: "
            f"{', '.join(card.features.encodings)}",
            hint="Choose an encoding that every site allows",
        )
    if job.student.learning == "layer-wise":
        return tuple(tap for tap in told if _LAYER.fullmatch(tap.name))
    wanted = {tap_in(space, card) for space in job.student.common_feature.spaces}
    return tuple(tap for tap in told if tap.name in wanted)


def components_asked(job: JobSettings, card: SiteCard) -> tuple[TapCard, ...]:
    """Return those of `taps_asked` whose principal components a job needs, as layer-wise amalgamation does.

    Raises as `taps_asked`.
    """
    if job.student.learning != "layer-wise":
        return ()
    return tuple(tap for tap in taps_asked(job, card) if tap.components is not None)


def tap_in(space: CommonSpace, card: SiteCard) -> str:
    """Return the name of the site's tap that meets in a common space, by default its last; "" where it tells none."""
    return space.sites.get(card.name) or ("" if card.features is None else card.features.taps[-1].name)
