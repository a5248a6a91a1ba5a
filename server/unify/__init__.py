"""Unification: answers of sites that know different classes -> soft labels over all classes (UHC).

Lives here: the public surface. Does not live here: anything that trains, or that talks to a site.
"""

from __future__ import annotations

from consilience.server.unify.coverage import Coverage
from consilience.server.unify.groups import GroupUnifier
from consilience.server.unify.recalibrate import Recalibration, recalibrate
from consilience.server.unify.result import ACROSS, METHODS, Across, Answers, Method, Prior, UnifiedLabels
from consilience.server.unify.sums import unify_sums
from consilience.server.unify.unifier import Unifier, unify

__all__ = [
    "ACROSS",
    "METHODS",
    "Across",
    "Answers",
    "Coverage",
    "GroupUnifier",
    "Method",
    "Prior",
    "Recalibration",
    "UnifiedLabels",
    "Unifier",
    "recalibrate",
    "unify",
    "unify_sums",
]
