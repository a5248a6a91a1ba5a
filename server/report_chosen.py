"""What reports and cards say of a student that learnt some classes alone.

Does not live here: which classes those are (server/chosen), and how it was judged (server/judge).
"""

from __future__ import annotations

from consilience.common.pages.numbers import listing, number_of, percent
from consilience.server.report_findings import Findings


def chosen_words(findings: Findings) -> str:
    """Say how many classes the student tells apart, and of how many."""
    space, student = findings.space, findings.student
    every = number_of(len(space), "label") if space.multi else number_of(len(space), "class", "classes")
    if student.taught is None:
        return every
    words = f"{len(student.taught) - student.other:,} of {every}"
    return f"{words}, and “other”" if student.other else words


def chosen_summary(findings: Findings) -> str:
    """Say which classes were wanted, and how much of the pool is of others; empty where all were."""
    student = findings.student
    if student.taught is None:
        return ""
    names = list(student.taught.names)[: len(student.taught) - student.other]
    words = f"{listing(names, 20)}; wanted of {number_of(len(findings.space), 'class', 'classes')} that the sites know"
    if findings.space.multi:
        return f"{words}."
    if student.other_share is not None:
        words += f". {percent(student.other_share)} of the pool, by its unified labels, is of others"
    return f"{words}; such images {_rest(findings)}."


def _rest(findings: Findings) -> str:
    """Say what becomes of images of no wanted class."""
    if findings.student.other:
        return "are the output “other”"
    specialists, branches = findings.concentration, findings.filtered
    if specialists is not None and specialists["target"] == "specialist":
        return "are learned as of no wanted class"
    by_mass = "count in training by how likely they are of a wanted class"
    if branches is None:
        return by_mass
    if branches["together"] and branches["target"] == "unified":
        return f"{by_mass}, but when blocks are trained one by one: there they count as any"
    return "count in training as any"


def unwanted_words(findings: Findings) -> str:
    """Say how many test images nobody was judged by; empty where there are none."""
    judged = findings.judgement
    if judged is None or not judged.unwanted:
        return ""
    return f"{number_of(judged.unwanted, 'more image')} of classes that were not wanted are left out."
