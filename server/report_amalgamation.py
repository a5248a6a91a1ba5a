"""Learning from features in report and card: the sentences about it, and what the page shows.

Lives here: wording, warnings and views. Does not live here: the figures' values (server/student, by way of
server/feature_learning), pictures (server/plots_amalgamation), markup (templates/amalgamation.html.j2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from consilience.common.pages.figures import BAR, BLUE, GREY, INK, RUST, site_colour
from consilience.common.pages.numbers import listing, number_of, percent
from consilience.server import plots, plots_amalgamation
from consilience.server.report_findings import Findings, SiteFindings
from consilience.server.student.site_taps import FEW

LITTLE = 0.5
"""Below this share of a layer's variance amalgamated features are warned of."""
MOST_CURVES = 12
"""Layers whose losses are drawn, the last ones."""
MOST_LISTED = 40
"""Sites in the tables; report.json has all."""
_TERMS = (
    ("soft", "soft targets", BLUE),
    ("mmd", "distance in common", RUST),
    ("reconstruction", "reconstruction", GREY),
)
_METHODS = {
    "layer-wise": "layer-wise amalgamation (Shen et al., AAAI 2019)",
    "common-feature": "common-feature learning (Luo et al., IJCAI 2019)",
}
_TARGETS = {"unified": "unified soft labels", "concatenated": "the sites' scores side by side"}


def learning_words(findings: Findings) -> str:
    """Return the student's way of learning, and where it could take features, whether it did without."""
    learning = findings.student.learning
    return f"{learning}, from labels alone" if learning in _METHODS and findings.amalgamation is None else learning


def amalgamation_summary(findings: Findings) -> str:
    """Return in a sentence or two by which method features were learnt from, and whose; empty where none were."""
    told = findings.amalgamation
    if told is None:
        return ""
    sites = [site.name for site in findings.sites if _took_part(site, findings)]
    text = f"The student learned by {_METHODS[told['learning']]} from features of {listing(sites)}"
    text += f", its scores from {_TARGETS[told['target']]}."
    if told["without"]:
        text += f" Without features, by their labels alone: {listing(told['without'])}."
    return text


def amalgamation_warnings(findings: Findings) -> list[str]:
    """Return what is suspicious about features, in plain words."""
    found, told_of = [], findings.amalgamation or {}
    without = told_of.get("without", ())
    used = findings.pool.size - findings.pool.left_out
    for site in findings.sites:
        told = site.features
        if told is not None and told.missed and site.name in findings.space.sites:
            missing = number_of(told.missed, "sample")
            found.append(f"Site {site.name}: features of {missing} of {told.answers + told.missed:,} went unanswered.")
        if told is not None and told.answers and site.name in without:
            few = told_of.get("too_few", {}).get(site.name)
            why = (
                "it did not tell all of them of any two samples"
                if few is None
                else f"it told features of too few samples, {few:,} of {used:,}"
            )
            found.append(f"Site {site.name}: its features were left out: {why}. It took part by its labels alone.")
    samples = told_of.get("samples")
    if samples is not None and samples < FEW * used:
        found.append(
            f"Layers learned from {number_of(samples, 'sample')} of {used:,}: these alone every site whose features "
            "were taken told at every layer."
        )
    for layer in told_of.get("layers", ()):
        if layer.get("explained", 1.0) < LITTLE:
            found.append(
                f"At {layer['tap']} the amalgamated features keep {percent(layer['explained'])} of the variance of the "
                "sites': a wider student would keep more."
            )
    for at, space in enumerate(told_of.get("spaces", ())):
        found += [
            f"Site {site}: in common at the student's {space['student']} reconstruction misses {percent(missed)} of "
            "its features, more than there is: the common space tells nothing of them."
            for site, missed in space["missed"].items()
            if missed > 1 and told_of["weights"]["reconstruction"]
        ]
        found += [
            f"Site {site}: in common at the student's {space['student']} its features are the same for every sample: "
            "they had no part. It took part by its labels."
            for site in space.get("still", ())  # which runs of earlier versions do not tell
        ]
        if space["averaged"]:
            found.append(
                f"In common at the student's {space['student']}: maps of unequal size were averaged down to "
                f"{'×'.join(map(str, space['size']))}, the smallest; "
                f"student.common_feature.spaces.{at}.size asks for another."
            )
    return found


def amalgamation_views(findings: Findings) -> dict[str, Any] | None:
    """Return what the page shows of features; None where none were learnt from."""
    told = findings.amalgamation
    if told is None:
        return None
    colours = {site: site_colour(i) for i, site in enumerate(findings.space.sites)}
    sites = [site.name for site in findings.sites if _took_part(site, findings)][:MOST_LISTED]
    terms = {
        name: [(float(e["epoch"]), float(e["terms"][name])) for e in _epochs(findings, name)] for name, _, _ in _TERMS
    }
    curves = [(words, colour, terms[name]) for name, words, colour in _TERMS if terms[name]]
    return {
        "summary": amalgamation_summary(findings),
        "sites": sites,
        "layers": [_layer(layer, sites) for layer in told.get("layers", ()) if "explained" in layer],
        "samples": told.get("samples"),
        "spaces": [_space(space, colours) for space in told.get("spaces", ())],
        "terms": plots.learning_curves(curves, "Terms of the loss") if curves else None,
        "losses": _losses(told.get("layers", ())),
        "sent": any(layer.get("components") for layer in told.get("layers", ())),
        "picture": _picture(told.get("picture"), colours, "The last layer: amalgamated features and the student’s"),
    }


def _took_part(site: SiteFindings, findings: Findings) -> bool:
    told = findings.amalgamation or {}
    return site.features is not None and site.name in findings.space.sites and site.name not in told.get("without", ())


def _epochs(findings: Findings, term: str) -> list[Mapping[str, Any]]:
    return [epoch for epoch in findings.learning.get("student") or () if term in (epoch.get("terms") or {})]


def _layer(layer: Mapping[str, Any], sites: list[str]) -> dict[str, Any]:
    return {
        "tap": layer["tap"],
        "channels": " + ".join(str(layer["channels"].get(site, "–")) for site in sites),
        "width": layer["width"],
        "explained": layer["explained"],
        "by_site": [(layer["by_site"].get(site), layer["components"].get(site)) for site in sites],
        "first": layer["losses"][0],
        "last": layer["losses"][-1],
    }


def _losses(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Draw the losses of layers by epoch, each in units of its first: they are sums over as many channels as it has.

    The score layer, which has nothing to explain, in a colour of its own.
    """
    curves = []
    for at, layer in enumerate(layers[-MOST_CURVES:]):
        first = layer["losses"][0] or 1.0
        colour = RUST if "explained" not in layer else _between(BAR, BLUE, at / max(1, len(layers[-MOST_CURVES:]) - 2))
        curves.append((layer["tap"], colour, [(float(e), loss / first) for e, loss in enumerate(layer["losses"])]))
    return plots.learning_curves(curves, "Losses of the layers") if curves else None


def _between(first: str, last: str, share: float) -> str:
    """Return a colour between two, "#rrggbb" each."""
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (first, last)]
    return "#" + "".join(f"{round(a + (b - a) * min(share, 1.0)):02x}" for a, b in zip(*ends, strict=True))


def _space(space: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    measured = space.get("measured", {})  # which runs of earlier versions do not tell
    size = "×".join(map(str, space["size"])) if space["size"] else None
    return {
        "student": space["student"],
        "form": f"maps of {size} with {space['width']} channels" if size else f"vectors of {space['width']} numbers",
        "rows": [
            {"site": site, "tap": tap, "missed": space["missed"].get(site), "samples": measured.get(site)}
            for site, tap in list(space["sites"].items())[:MOST_LISTED]
        ],
        "picture": _picture(space["picture"], colours, f"The common space at the student’s {space['student']}"),
    }


def _picture(told: Mapping[str, Any] | None, colours: Mapping[str, str], label: str) -> Any:
    if told is None:
        return None
    owners = []
    for who, points in told["points"].items():
        site = who.removeprefix("site ")
        colour = INK if who == "student" else BLUE if who == "amalgamated" else colours.get(site, GREY)
        owners.append((site, colour, points))
    owners.sort(key=lambda owner: owner[1] == INK)  # the student is drawn last, on top
    return plots_amalgamation.scatter(owners, told["shown"], label)
