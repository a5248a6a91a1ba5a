"""Learning coverage with a progress bar, and what the person at the terminal should know of the outcome.

Does not live here: the learning (learning).
"""

from __future__ import annotations

from consilience.client.coverage.learned import CoverageRecord
from consilience.client.coverage.learning import epochs_of, learn_coverage
from consilience.common.nets import epoch_task
from consilience.common.progress import Reporter
from consilience.common.settings import SiteSettings


def learn_and_show(settings: SiteSettings, reporter: Reporter) -> CoverageRecord:
    """Learn the site's coverage; arguments, result and errors as `learn_coverage`'s."""
    epochs = epochs_of(settings.coverage.fit, settings.coverage.prior)
    name = f"learning the coverage of {settings.name} ({settings.coverage.architecture})"
    record = learn_coverage(settings, epoch_task(reporter, name, epochs))
    if record.abstains is not None:
        reporter.say(f"{settings.name} gives no coverage: {record.abstains}")
    for warning in record.warnings:
        reporter.say(f"Warning: {settings.name}: {warning}")
    return record
