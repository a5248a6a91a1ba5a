"""card.md: what is published beside the student, for whoever meets it later.

Lives here: the card's words and tables. Does not live here: the numbers (server/report). Names come from sites and are
untrusted: none of them can break out of its place in the Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from consilience.common.identity import words
from consilience.common.labels import LabelSpace
from consilience.common.pages.numbers import MISSING, count, decimal, number_of, percent, size
from consilience.common.settings import largest_sent, sent_in_bytes
from consilience.server.grouped import groups_summary
from consilience.server.judge_labels import LabelJudgement
from consilience.server.report_amalgamation import amalgamation_summary, learning_words
from consilience.server.report_chosen import chosen_summary, unwanted_words
from consilience.server.report_concentration import concentration_summary
from consilience.server.report_coverage import coverage_summary
from consilience.server.report_filtered import filtered_summary
from consilience.server.report_findings import Findings, SiteFindings
from consilience.server.report_multi import multi_lines
from consilience.server.report_page import CONTENDERS
from consilience.server.report_privacy import privacy_summary, sealing_line, what_left
from consilience.server.report_quality import quality_summary

_SPECIAL = re.compile(
    r"[\\`*\[\]<>|~&$@]"  # emphasis, code, links, HTML, entities, cells of a table, formulas, mentions
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word means nothing
    r"|:(?=//)|(?<=\bwww)\."  # addresses that a reader would turn into links
    r"|^[#+=-]"  # headings and lists, at the start only
)
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f\u2028\u2029]+")
PRECISION = {"f32": "32-bit", "f16": "16-bit", "u8": "8-bit", "votes": "the largest class alone"}


def card_markdown(findings: Findings, report: Mapping[str, Any]) -> str:
    """Return card.md. `report` is `report_dict(findings)`; scores in the card are the report's.

    `findings.card` is the coordinator's own Markdown and goes in as it is; every other text is escaped. Two runs of
    one seed, one software and the same keys of sites have the same card: no time stands in it.
    """
    parts = [
        _about(findings, report),
        _labels(findings),
        _use(findings),
        _made_of(findings, report),
        _scores(findings, report),
        _privacy(findings),
        *_signatures(findings),
        _how_to(findings),
    ]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return an untrusted text as one line of Markdown that reads as itself: no markup, link or HTML in it."""
    line = _SPECIAL.sub(r"\\\g<0>", _BREAKS.sub(" ", text).strip())
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", line)


def code(text: str) -> str:
    """Return an untrusted text as a code span, whatever backticks it holds."""
    line = _BREAKS.sub(" ", text).strip()
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """Return a Markdown table; the last `right` columns are aligned right. Cells are escaped already."""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _about(findings: Findings, report: Mapping[str, Any]) -> str:
    space, student = findings.space, findings.student
    what = f"{number_of(len(findings.taught), 'label')} that do not exclude one another" if space.multi else ""
    lent = (findings.filtered or {}).get("lent")
    without = "without their data" if lent else "without their data or weights"
    about = findings.card.about.strip() or (
        f"An image classifier for {what or number_of(len(findings.taught), 'class', 'classes')}. It was trained from "
        f"the answers of {number_of(len(space.sites), 'private classifier')} about a public pool of unlabelled images, "
        f"{without} (UHC: Unifying Heterogeneous Classifiers, Vongkulbhisal et al., CVPR 2019)."
    )
    shape = " × ".join(map(str, findings.pool.shape))
    facts = [
        f"* Architecture: {escape(student.architecture)}"
        + (f", {number_of(student.parameters, 'parameter')}" if student.parameters is not None else ""),
        f"* Input: one image, as the pool's: {shape} (height × width × channels), 8 bits a value",
        f"* Learning: {escape(learning_words(findings))}",
    ]
    if told := chosen_summary(findings):
        facts.append(f"* Classes: {escape(told)}")
    if told := amalgamation_summary(findings):
        facts.append(f"* Features: {escape(told)}")
    if told := concentration_summary(findings):
        facts.append(f"* Specialists: {escape(told)}")
    if told := filtered_summary(findings):
        facts.append(f"* Made of: {escape(told)}")
    if findings.card.licence.strip():
        facts.append(f"* Licence: {escape(findings.card.licence)}")
    lines = [f"# {escape(findings.job)}", about, escape(str(report["headline"])), "\n".join(facts)]
    return "\n\n".join(lines)


def _labels(findings: Findings) -> str:
    space, synonyms = findings.taught, findings.synonyms()
    rows = []
    for index, (name, owners) in enumerate(zip(space.names, space.owners, strict=True)):
        others = sorted(set(synonyms.get(name, {}).values()))
        known = ", ".join(_knower(space, i, index) for i in owners[:6])
        more = f" and {len(owners) - 6:,} more" if len(owners) > 6 else ""
        rows.append([str(index), escape(name), ", ".join(map(escape, others)), known + more])
    components = max(space.components) + 1
    text = f"## Labels\n\n{table(('Index', 'Class', 'Also called', 'Known by'), rows)}"
    if told := groups_summary(findings.groups()):
        text += f"\n\n{escape(told)}"
    if components > 1:
        rule = f"the rule {code(findings.unify.across)}, not by answers"
        by = "the sites' coverage" if findings.unify.joined else rule
        text += (
            f"\n\nThe class sets fall apart into {components:,} components that share no class: how likely a class of "
            f"one is against a class of another was settled by {by}."
        )
    return text


def _knower(space: LabelSpace, site: int, label: int) -> str:
    """Return a site's name in the list of those that know a class, with a word where it does so in a group alone."""
    return escape(space.sites[site]) + ("" if site in space.tellers[label] else " (in a group)")


def _use(findings: Findings) -> str:
    use = findings.card.intended_use.strip() or (
        "Classifying images like those of the pool into the classes above, where a wrong answer does no harm or a "
        "person looks at it. Measure it on labelled images of your own before you rely on it."
    )
    odd = (
        "What is none of the other classes it should call other, as far as the pool showed such images."
        if findings.student.other
        else "It always chooses one of the classes above, also for an image of none of them."
    )
    if findings.space.multi:
        odd = "It says of each label by itself how likely it applies, and nothing of labels not above."
    limits = findings.card.limits.strip() or (
        f"{odd} It has learned what the "
        "sites' classifiers say, their mistakes included. On images unlike the pool nothing is known about it. Its "
        "probabilities are not to be taken as frequencies without looking at the calibration error below."
    )
    return f"## Intended use and limits\n\n{use}\n\n{limits}"


def _made_of(findings: Findings, report: Mapping[str, Any]) -> str:
    rows = [
        [
            escape(site["name"]) + ("" if site["took_part"] else " (left out)"),
            escape(site["teacher"]),
            count(len(site["classes"])),
            *_on_its_classes(site, multi=findings.space.multi),
            _calibration(site["calibration"]),
        ]
        for site in report["sites"]
    ]
    head = ("Site", "Teacher", "Classes", "Teacher on its classes", "Student on the same images", "Calibration error")
    pool, unify = findings.pool, findings.unify
    facts = [
        f"* Pool: {escape(pool.words)}, digest {code(pool.digest)}",
        "* Unification: each label by itself, the mean of the log-odds of the sites that know it"
        if findings.space.multi
        else f"* Unification: {escape(unify.method)}, {number_of(unify.components, 'component')}, across components: "
        f"{escape(unify.across)}",
        f"* Seed: {findings.seed}",
    ]
    if told := coverage_summary(findings):
        facts.append(f"* Coverage: {escape(told)}")
    if told := quality_summary(findings):
        facts.append(f"* Estimate: {escape(told)}")
    warnings = [f"* {escape(str(warning))}" for warning in report["warnings"]]
    known = ["Worth knowing:\n\n" + "\n".join(warnings)] if warnings else []
    return "\n\n".join(["## What it was made of", table(head, rows, right=4), "\n".join(facts), *known])


def _on_its_classes(site: Mapping[str, Any], *, multi: bool) -> tuple[str, str]:
    """Teacher and student on the site's own classes: accuracy, or mean average precision of labels."""
    if multi:
        return decimal(site["teacher_ap"]), decimal(site["student_ap"])
    return percent(site["teacher_accuracy"]), percent(site["student_accuracy"])


def _calibration(told: Mapping[str, Any] | None) -> str:
    """The calibration error of a site's teacher, as it is told: before and after the site's own map."""
    return MISSING if told is None else f"{decimal(told['ece_before'])} → {decimal(told['ece_after'])}"


def _scores(findings: Findings, report: Mapping[str, Any]) -> str:
    judged = findings.judgement
    if findings.labelled is not None:
        return _label_scores(findings.labelled, report)
    if judged is None:
        return "## Scores\n\nThere was no labelled test set: nothing is known about the accuracy of this student."
    rows = []
    for key, name, about in CONTENDERS:
        score = report["student"] if key == "student" else report["baselines"][key]
        if score["accuracy"] is not None:
            low, high = score["interval"]
            who = f": {escape(score['site'])}" if key == "best_site" else ""
            label = f"**{name}**" if key == "student" else name
            rows.append([f"{label} ({about}{who})", percent(score["accuracy"]), f"{percent(low)} to {percent(high)}"])
    scores = table(("", "Accuracy", "95 % interval"), rows, right=2)
    classes = table(
        ("Class", "Test images", "Recall", "Precision"),
        [[escape(c.name), count(c.support), percent(c.recall), percent(c.precision)] for c in judged.classes],
        right=3,
    )
    outside = f" {number_of(judged.outside, 'image')} of classes that no site knows count as wrong." * bool(
        judged.outside
    )
    apart = f" {unwanted_words(findings)}".rstrip()
    return "\n\n".join(
        [
            f"## Scores\n\nOn {number_of(judged.count, 'labelled test image')}, used for judging only.{outside}{apart}",
            scores,
            f"Expected calibration error: {decimal(judged.calibration_error)}.",
            classes,
        ]
    )


def _label_scores(judged: LabelJudgement, report: Mapping[str, Any]) -> str:
    scores = table(
        ("", "Mean average precision"), [[escape(name), value] for name, value in multi_lines(report)], right=1
    )
    labels = table(
        ("Label", "Test images that have it", "Average precision"),
        [[escape(score.name), count(score.support), decimal(score.student)] for score in judged.labels],
        right=2,
    )
    error = "" if judged.calibration_error is None else decimal(judged.calibration_error)
    return "\n\n".join(
        [
            f"## Scores\n\nOn {number_of(judged.count, 'labelled test image')}, used for judging only.",
            scores,
            f"Expected calibration error over all labels: {error or MISSING}.",
            labels,
        ]
    )


def _privacy(findings: Findings) -> str:
    rows = [
        [escape(s.name), count(s.answers), count(_numbers(s)), _precision(s.precision), _bytes(s.bytes)]
        for s in findings.sites
    ]
    told = [(s.name, s.coverage) for s in findings.sites if s.coverage.encoding is not None]
    rows += [
        [f"{escape(name)} (coverage)", count(c.answers), "1", _precision(c.encoding or ""), _bytes(c.bytes)]
        for name, c in told
    ]
    featured = [(s.name, s.features) for s in findings.sites if s.features is not None]
    rows += [
        [
            f"{escape(name)} (features of {escape(', '.join(f.taps))})",
            count(f.answers),
            MISSING,
            _precision(f.encoding),
            _bytes(f.bytes),
        ]
        for name, f in featured
    ]
    tails = findings.filtered or {"lent": {}, "asked": {}}
    rows += [
        [f"{escape(name)} (last blocks, lent)", MISSING, MISSING, "f32", _bytes(size)]
        for name, size in tails["lent"].items()
    ]
    rows += [
        [f"{escape(name)} (last blocks, asked)", count(spent["samples"]), MISSING, "f32", _bytes(spent["received"])]
        for name, spent in tails["asked"].items()
    ]
    features = (
        "Some sites also told features of their teachers' layers, which say far more about an image than an answer "
        "does. "
    ) * bool(featured)
    coverage = (
        "Sites that offered coverage also told, in one number an image, how likely the image is of one of their "
        "classes. "
    ) * bool(told)
    head = ("Site", "Answers", "Numbers an answer", "Precision", "Bytes")
    return "\n\n".join(
        [
            "## Privacy",
            f"{escape(privacy_summary(findings))} Soft labels over the pool left the sites. "
            f"{escape(what_left(findings))} No code of the server ran at a site. {sealing_line(findings)} "
            f"{_answer(findings)}; answers can tell something about the data that a teacher was trained on, and so can "
            f"this student, which was trained from them. {coverage}{features}Beside its site card (name, class names, "
            "the teacher in words and its fingerprint, the policy's version; where the policy allows it, the teacher's "
            "accuracy and calibration on held-out private images and the shares of the classes) each site let out:",
            table(head, rows, right=4),
        ]
    )


def _signatures(findings: Findings) -> list[str]:
    """Say who vouched for how many answers; nothing where nobody signed any."""
    rows = [
        [escape(site.name), words(site.key), f"{site.signed:,} of {_vouched(site):,}"]
        for site in findings.sites
        if site.signed and site.key is not None
    ]
    if not rows:
        return []
    return [
        "## Who vouches for the answers\n\nEach site signed its answers with its own key. `signatures.json`, beside "
        "the weights, holds the signatures, and `consilience student verify` checks them. A key is a site's if the "
        "site says that its words are these:",
        table(("Site", "Words of its key", "Answers signed"), rows, right=1),
    ]


def _vouched(site: SiteFindings) -> int:
    return site.answers + site.coverage.answers + (site.features.answers if site.features is not None else 0)


def _answer(findings: Findings) -> str:
    """Say what an answer is; every site is asked for the same."""
    encoding = findings.sites[0].precision if findings.sites else "f32"
    if findings.space.multi:
        most = largest_sent(encoding)
        if encoding == "votes":
            return "An answer is which of the site's labels are likelier than not"
        if most is not None:
            return (
                f"An answer is the log-odds of the site's likeliest labels, at most {most:,}, and of the others' mean"
            )
        return "An answer is the log-odds of each label of the site"
    if encoding == "votes":
        return "An answer is which of the site's classes is the likeliest"
    most = largest_sent(encoding)
    if most is not None:
        return (
            f"An answer is the site's likeliest classes, at most {most:,}, with their log-probabilities, and what the "
            "others have together"
        )
    return "An answer is one log-probability for each class of the site"


def _numbers(site: SiteFindings) -> int:
    """Return how many numbers an answer has: ids count too."""
    most, classes = largest_sent(site.precision), len(site.classes)
    if most is not None and most < classes:
        return 2 * most + (not sent_in_bytes(site.precision))
    return 1 if site.precision == "votes" else classes * (1 if most is None else 2)


def _precision(encoding: str) -> str:
    most = largest_sent(encoding)
    if most is not None:
        return f"the {most} largest, {'8' if sent_in_bytes(encoding) else '16'}-bit ({encoding})"
    return f"{PRECISION[encoding]} ({encoding})" if encoding in PRECISION else escape(encoding)


def _bytes(number: int) -> str:
    return f"{number:,} ({size(number)})"


def _how_to(findings: Findings) -> str:
    versions = ", ".join(escape(f"{name} {value}") for name, value in findings.versions.items())
    return (
        "## How to use it\n\n```\nconsilience student predict IMAGE...\n```\n\n"
        "The folder holds `model.safetensors` (weights), `labels.json` (class names in the order of the outputs) and "
        f"`preprocessing.json` (what an image must go through).\n\nMade with {versions or 'unknown versions'}."
    )
