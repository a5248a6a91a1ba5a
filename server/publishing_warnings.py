"""What the report warns of in how labels were unified and learned.

Does not live here: what is warned of single sites, coverage or features (server/report_coverage and its neighbours).
"""

from __future__ import annotations

from consilience.server.contract import term_warnings
from consilience.server.coverage_check import believed
from consilience.server.outcome import Outcome
from consilience.server.robust import kept


def coverage_joins(outcome: Outcome) -> bool:
    """Whether coverage decides the odds between components: at most one has no site that gave all of it."""
    space = outcome.space
    keep = kept(space, outcome.diagnostics.trust, range(len(space.sites)))
    components, used = keep.components(space), believed(space, outcome.coverage, outcome.diagnostics.checks)
    told = [(classes, used[i]) for i, classes in zip(keep.sites, keep.class_sets(space), strict=True)]
    if outcome.settings.unify.method == "sd" and any(store is None or not store.complete for _, store in told):
        return False
    covered = {components[classes[0]] for classes, store in told if store is not None and store.complete}
    return bool(covered) and len(covered) >= max(components)


def learning_warnings(outcome: Outcome, *, joined: bool) -> list[str]:
    """Return them; `joined`: coverage decides the odds between components (`coverage_joins`)."""
    settings, space, diagnostics = outcome.settings, outcome.space, outcome.diagnostics
    warnings = [] if joined else list(space.warnings())
    if diagnostics.not_converged:
        warnings.append(
            f"Unification did not converge for {diagnostics.not_converged:,} of {diagnostics.samples:,} samples."
        )
    warnings += term_warnings(settings.student)
    learning, chosen = settings.student.learning, outcome.chosen
    settled = joined and learning == "direct-ce" and (chosen.everything or chosen.other)
    silent = learning not in ("concentration", "filtered") and not settings.student.learns_labels
    if max(chosen.taught.components) > 0 and settings.student.target == "concatenated":
        warnings.append(
            "The sites' scores stood side by side with equal means: what sites answer says nothing about the odds "
            f"between components; student.{learning.replace('-', '_')}.target: unified would follow unify.across."
        )
    elif max(chosen.taught.components) > 0 and silent and not settled:
        warnings.append(
            f"The student learnt by {learning}, which says nothing about the odds between components; "
            "student.learning: soft-labels would follow the rule unify.across."
        )
    if learning == "filtered" and not settings.student.learns_labels and not space.multi and len(chosen.sites) > 1:
        filtered = settings.student.filtered
        fields = [*(["joint: true"] * (not filtered.joint)), *(["target: unified"] * (filtered.target == "teachers"))]
        warnings.append(
            f"Nothing taught the student the odds between its branches, one for each of {len(chosen.sites):,} sites; "
            f"student.filtered: {{{', '.join(fields)}}} would learn them from unified labels."
        )
    if diagnostics.lacking:
        warnings.append(
            f"{diagnostics.lacking:,} labels of samples are left out of learning: no site that knows them answered "
            "about those samples."
        )
    if diagnostics.apart:
        warnings.append(
            f"For {diagnostics.apart:,} samples the sites that answered, and whose answers count, fall apart into more "
            "components than all sites do: about the odds between those the rule unify.across decides."
        )
    return warnings
