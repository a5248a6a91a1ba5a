"""Pool samples on the page: each image with its soft label, the sites' answers and what the student says.

Lives here: which classes are shown beside an image, and images as data URIs. Does not live here: the choice of
samples (server/publishing).
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit

from consilience.common.pages.figures import BLUE, SITE_COLOURS, site_colour
from consilience.common.pages.numbers import listing, percent
from consilience.server.judge_tops import softmax
from consilience.server.report_findings import Findings, Samples

MOST_SAMPLES = 24
MOST_BARS = 5
"""Classes shown beside one image."""
LARGEST_SIDE = 160
"""Larger images are scaled down to this many pixels: the page is one file."""


def sample_views(findings: Findings) -> list[dict[str, Any]]:
    """Return what the page shows of each sample, in the order of the findings."""
    samples = findings.samples
    if samples is None:
        return []
    view = _labels_view if findings.space.multi else _view
    return [view(findings, samples, k) for k in range(min(len(samples.ids), MOST_SAMPLES))]


def png_data_uri(image: NDArray[np.uint8], side: int = LARGEST_SIDE) -> str:
    """Return an image (H, W), (H, W, 1) or (H, W, 3) uint8 as a PNG data URI, no side longer than `side` pixels."""
    pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _labels_view(findings: Findings, samples: Samples, k: int) -> dict[str, Any]:
    """Return what the page shows of a sample that may have any number of labels."""
    space, sites = findings.taught, findings.space.sites
    label = np.nan_to_num(np.asarray(samples.soft_labels[k], np.float64))
    student = np.exp(np.asarray(samples.student[k], np.float64))
    said, few = dict[int, list[dict[str, str]]](), len(sites) <= len(SITE_COLOURS)
    for site, (answers, known) in enumerate(zip(samples.answers, space.class_sets, strict=True)):
        if answers is None or not np.isfinite(answers[k]).any():
            continue
        for value, c in zip(expit(np.asarray(answers[k], np.float64)), known, strict=True):
            told = f"{space.sites[site]}: {percent(float(value))}"
            colour = site_colour(sites.index(space.sites[site])) if few else BLUE
            said.setdefault(c, []).append({"at": f"{value * 100:.1f}", "colour": colour, "title": told})
    found = set(np.flatnonzero(student > 0.5).tolist())
    true = None if samples.many is None else set(np.flatnonzero(samples.many[k] > 0).tolist())
    shown = set(np.argsort(-np.maximum(label, student), kind="stable")[:MOST_BARS].tolist())
    bars = [
        {
            "name": space.names[c],
            "value": percent(float(label[c])),
            "width": f"{label[c] * 100:.1f}",
            "dots": said.get(c, []),
            "predicted": c in found,
            "true": true is not None and c in true,
        }
        for c in np.argsort(-label, kind="stable").tolist()
        if c in shown
    ]
    return {
        "id": int(samples.ids[k]),
        "image": png_data_uri(samples.images[k]),
        "predicted": listing([space.names[c] for c in sorted(found)], MOST_BARS) if found else "no label",
        "sure": "",
        "truth": None if true is None else listing([space.names[c] for c in sorted(true)], MOST_BARS) or "no label",
        "right": None if true is None else true == found,
        "bars": bars,
    }


def _view(findings: Findings, samples: Samples, k: int) -> dict[str, Any]:
    space, sites = findings.taught, findings.space.sites
    label = np.asarray(samples.soft_labels[k], np.float64)
    student = softmax(np.asarray(samples.student[k : k + 1], np.float64))[0]
    predicted = int(student.argmax())
    truth = None if samples.truth is None or samples.truth[k] < 0 else int(samples.truth[k])
    said: dict[int, list[dict[str, str]]] = {}
    few = len(sites) <= len(SITE_COLOURS)
    for site, answers in enumerate(samples.answers):
        if answers is None or not np.isfinite(answers[k]).any():
            continue
        for value, entry in zip(
            softmax(np.asarray(answers[k : k + 1], np.float64))[0], space.entries(site), strict=True
        ):
            together = f" on {listing([space.names[c] for c in entry], 8)} together" if len(entry) > 1 else ""
            dot = {
                "at": f"{value / len(entry) * 100:.1f}",
                "colour": site_colour(sites.index(space.sites[site])) if few else BLUE,
                "title": f"{space.sites[site]}: {percent(float(value))}{together}",
            }
            for c in entry:
                said.setdefault(c, []).append(dot)
    must = {predicted} | (set() if truth is None else {truth})
    # The largest soft labels, but never without the student's class and the true one.
    order = [int(c) for c in np.argsort(-label, kind="stable")]
    chosen = set([c for c in order if c not in must][: max(0, min(MOST_BARS, len(space)) - len(must))]) | must
    bars = [
        {
            "name": space.names[c],
            "value": percent(float(label[c])),
            "width": f"{label[c] * 100:.1f}",
            "dots": said.get(c, []),
            "predicted": c == predicted,
            "true": c == truth,
        }
        for c in order
        if c in chosen
    ]
    return {
        "id": int(samples.ids[k]),
        "image": png_data_uri(samples.images[k]),
        "predicted": space.names[predicted],
        "sure": percent(float(student[predicted])),
        "truth": None if truth is None else space.names[truth],
        "right": None if truth is None else truth == predicted,
        "bars": bars,
    }
