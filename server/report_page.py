"""The page report.html: what is shown, in which order, and how much of it.

Lives here: turning findings into the values that the templates lay out, and where long lists are cut. Does not live
here: markup and style (templates/), figures (server/plots), the pool samples (server/report_samples), coverage
(server/report_coverage), features (server/report_amalgamation), verticals (server/report_concentration), branches
(server/report_filtered).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup, escape

from consilience.common.pages import page_templates
from consilience.common.pages.figures import BLUE, GREY, SITE_COLOURS, legend, site_colour
from consilience.common.pages.numbers import listing, number_of, percent
from consilience.server import plots
from consilience.server.grouped import groups_summary
from consilience.server.judge import Judgement
from consilience.server.report_amalgamation import amalgamation_views, learning_words
from consilience.server.report_chosen import chosen_summary, unwanted_words
from consilience.server.report_concentration import concentration_views
from consilience.server.report_coverage import coverage_views
from consilience.server.report_filtered import filtered_views
from consilience.server.report_findings import Findings
from consilience.server.report_multi import multi_view
from consilience.server.report_privacy import sealing_line, what_left
from consilience.server.report_quality import quality_views
from consilience.server.report_samples import sample_views

CONTENDERS = (
    ("student", "Student", "the one classifier of this run"),
    ("unified_ensemble", "Unified ensemble", "all sites asked each time, answers unified"),
    ("naive", "Naive ensemble", "zero-padded mean of the sites’ probabilities"),
    ("hard_vote", "Majority vote", "each site votes for one of its classes"),
    ("max_confidence", "Most confident site", "the class of the largest probability"),
    ("least_uncertain", "Least uncertain site", "the class of the answer with the least relative entropy"),
    ("best_site", "Best single site", "the best of the sites on its own"),
    ("oracle", "Oracle", "the student’s architecture, trained with the pool’s true labels"),
)
MOST_SITES, MOST_CLASSES, MOST_SETS = 40, 40, 10
"""Rows of the tables of sites, of classes and of owner sets; what is beyond stands in report.json."""
LOWEST_CLASSES = 20
"""Classes still listed when there are more than `MOST_CLASSES`: those with the lowest recall."""
MOST_DRAWN = 150
"""Columns up to which a matrix of classes is drawn; sites are drawn up to `MOST_SITES`."""
_KNOWN = "Who knows which class"


def render_page(findings: Findings, report: Mapping[str, Any]) -> str:
    """Return the page. Names come from sites and are untrusted: the templates escape all but our own figures."""
    environment = page_templates("consilience.server")
    environment.filters["backticks"] = backticks
    judged = findings.judgement or findings.labelled
    views = {
        "contenders": contenders(report),
        "multi": multi_view(report),
        "overlap": overlap(findings),
        "partition": partition(findings),
        "classes": classes(report),
        "confusion": confusion(findings.judgement, findings.taught.names),
        "reliability": plots.reliability(judged.reliability) if judged and judged.reliability else None,
        "agreement": agreement(findings),
        "learning": learning(findings),
        "samples": sample_views(findings),
        "coverage": coverage_views(findings),
        "quality": quality_views(findings),
        "amalgamation": amalgamation_views(findings),
        "learning_words": learning_words(findings),
        "concentration": concentration_views(findings),
        "filtered": filtered_views(findings),
        "stages": bars([(name, seconds) for name, seconds in report["timing"].items()]),
        "bytes": bars([(site["name"], site["bytes"]) for site in report["sites"]], most=12),
        "totals": {name: sum(site[name] for site in report["sites"]) for name in ("answers", "bytes", "seconds")},
        "legend": legend(findings.space.sites),
        "coloured": len(findings.space.sites) <= len(SITE_COLOURS),
        "colours": {site: site_colour(i) for i, site in enumerate(findings.space.sites)},
        "chosen": chosen_summary(findings),
        "groups": groups_summary(report["labels"]["groups"]),
        "unwanted": unwanted_words(findings),
        "left": what_left(findings),
        "sealing": sealing_line(findings),
        "settings": yaml.safe_dump(report["settings"], sort_keys=False, allow_unicode=True),
        "most_sites": MOST_SITES,
    }
    return environment.get_template("report.html.j2").render(r=report, listing=listing, **views)


def backticks(text: str) -> Markup:
    """Return an untrusted text, escaped, with what stands in backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def contenders(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the bars of the first figure: those contenders of which something is known."""
    found = []
    for key, name, about in CONTENDERS:
        score = report["student"] if key == "student" else report["baselines"][key]
        if score["accuracy"] is None:
            continue
        low, high = score["interval"]
        words = f"{about}: {score['site']}" if key == "best_site" else about
        found.append(
            {
                "kind": key if key in ("student", "oracle") else "other",
                "name": name,
                "about": words,
                "value": percent(score["accuracy"]),
                "interval": f"{low * 100:.1f}–{percent(high)}",
                "width": f"{score['accuracy'] * 100:.2f}",
                "low": f"{low * 100:.2f}",
                "span": f"{(high - low) * 100:.2f}",
            }
        )
    return found


def overlap(findings: Findings) -> dict[str, Any]:
    """Return the picture of who knows what: joined boxes while they are few, else a ring and a table."""
    space = findings.space
    sets = sorted(space.owner_sets.items(), key=lambda item: (-len(item[1]), item[1]))
    boxes = len(space.sites) <= 8 and len(sets) <= 14
    figure: Markup | None = None
    if len(space.sites) > 1:
        figure = plots.overlap(space) if boxes else plots.overlap_ring(space)
    rows = [
        {
            "owners": listing([space.sites[i] for i in owners], 5),
            "classes": listing([space.names[c] for c in labels], 8),
            "count": len(labels),
            "component": space.components[labels[0]] + 1,
        }
        for owners, labels in sets
    ]
    return {
        "figure": figure,
        "ring": not boxes,
        "left_out": max(0, len(space.sites) - 40) if not boxes else 0,
        "sets": [] if boxes else rows[:MOST_SETS],
        "more_sets": 0 if boxes else max(0, len(rows) - MOST_SETS),
        "count": len(rows),
        "single": sum(len(labels) for owners, labels in sets if len(owners) == 1),
        "components": max(space.components) + 1,
    }


def partition(findings: Findings) -> dict[str, Any]:
    """Return the matrix of sites and classes: private images where a simulation counted them, else who knows what.

    A class that a site knows in a group alone has its tick in brackets.
    """
    space, part = findings.space, findings.partition
    if part is not None:
        counts = np.asarray(part.counts, np.int64)
        # An image of several labels is counted for each.
        total = None if findings.space.multi else int(counts.sum())
        sites, names = part.sites, part.classes
        # The square root keeps small counts visible beside large ones.
        values = np.sqrt(counts / max(1, counts.max(initial=0)))
        title = "Private images by site and class"
    else:
        counts = np.zeros((len(space.sites), len(space)), np.int64)
        for site, known in enumerate(space.class_sets):
            counts[site, list(known)] = 1
            for entry in space.entries(site):
                counts[site, list(entry)] += len(entry) > 1
        names, total, values, title = space.names, None, np.where(counts == 1, 0.7, counts * 0.15), _KNOWN
        sites = space.sites
    rows, columns = min(len(sites), MOST_SITES), min(len(names), MOST_DRAWN)
    figure = plots.matrix(
        values[:rows, :columns],
        sites[:rows],
        names[:columns],
        title,
        shown=counts[:rows, :columns],
        text=(lambda v: f"{v:,.0f}") if part is not None else (lambda v: "✓" if v == 1 else "(✓)"),
    )
    left_out = [number_of(len(sites) - rows, "site")] if rows < len(sites) else []
    left_out += [number_of(len(names) - columns, "class", "classes")] if columns < len(names) else []
    return {"figure": figure, "title": title, "total": total, "left_out": " and ".join(left_out)}


def classes(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of the table of classes: all, or the least recalled when there are too many."""
    rows = report["student"]["per_class"]
    if len(rows) <= MOST_CLASSES:
        return {"rows": rows, "left_out": 0}
    tested = sorted((row for row in rows if row["support"]), key=lambda row: (row["recall"], row["name"]))
    return {"rows": tested[:LOWEST_CLASSES], "left_out": len(rows) - len(tested[:LOWEST_CLASSES])}


def confusion(judged: Judgement | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the confusion matrix and the most common confusions; None without a test set."""
    if judged is None:
        return None
    figure = None
    if judged.confusion is not None and len(names) <= MOST_DRAWN:
        counts = np.asarray(judged.confusion, np.int64)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        figure = plots.matrix(
            share,
            names,
            names,
            "Confusion matrix of the student",
            shown=counts,
            text=lambda v: f"{v:,.0f}",
            diagonal=True,
            axes=("true class", "student’s class"),
        )
    pairs = [
        {"true": names[t], "taken": names[p], "count": count, "share": count / judged.classes[t].support}
        for t, p, count in judged.mistakes
    ]
    return {"figure": figure, "pairs": pairs}


def agreement(findings: Findings) -> dict[str, Any] | None:
    """Return the matrix of agreement; None with a single site or where no two sites can be compared."""
    matrix = findings.agreement
    if matrix is None or not np.isfinite(matrix).any():
        return None
    shown = min(len(matrix), MOST_SITES)
    sites = findings.space.sites[:shown]
    upper = matrix[np.triu_indices(len(matrix), 1)]
    pairs = upper[np.isfinite(upper)]
    part = matrix[:shown, :shown]
    return {
        "figure": plots.matrix(part, sites, sites, "Agreement between sites", text=lambda v: f"{v * 100:.0f}"),
        "pairs": len(pairs),
        "mean": float(pairs.mean()),
        "lowest": float(pairs.min()),
        "left_out": len(matrix) - shown,
    }


def learning(findings: Findings) -> Markup | None:
    """Return the learning curves of student and oracle; None when there is none."""
    kinds = (("student", "student", BLUE), ("oracle", "oracle", GREY))
    curves = [
        (name, colour, [(float(e["epoch"]), float(e["loss"])) for e in findings.learning.get(key) or ()])
        for key, name, colour in kinds
    ]
    drawn = [(name, colour, [p for p in curve if np.isfinite(p[1])]) for name, colour, curve in curves]
    drawn = [curve for curve in drawn if curve[2]]
    return plots.learning_curves(drawn) if drawn else None


def bars(items: list[tuple[str, float]], most: int = 30) -> list[dict[str, Any]]:
    """Return horizontal bars, the largest as wide as the track; beyond `most` the smallest are added up in one."""
    if len(items) > most:
        items = sorted(items, key=lambda item: (-item[1], item[0]))
        rest = items[most - 1 :]
        items = [*items[: most - 1], (f"{len(rest):,} others", sum(value for _, value in rest))]
    largest = max((value for _, value in items), default=0) or 1
    return [{"name": name, "value": value, "width": f"{100 * value / largest:.2f}"} for name, value in items]
