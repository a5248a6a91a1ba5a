"""What the person at the terminal sees of coverage: its learning, with a progress bar, and what came of it.

Does not live here: the learning (learning).
"""

from __future__ import annotations

from consilience.client.coverage.learned import CoverageRecord, read_record
from consilience.common.epochs import epoch_task
from consilience.common.progress import Reporter, Task
from consilience.common.settings import SiteSettings


def learn_and_show(settings: SiteSettings, reporter: Reporter) -> CoverageRecord:
    """Learn the site's coverage; arguments, result and errors as `learn_coverage`'s."""
    from consilience.client.coverage.by_network import epochs_of  # which bring torch
    from consilience.client.coverage.learning import learn_coverage

    chosen = settings.coverage
    how = chosen.architecture if chosen.family == "network" else f"heads on the teacher's {chosen.family}"
    name = f"learning the coverage of {settings.name} ({how})"
    tasks: list[Task] = []

    def on_images(count: int, total: int) -> None:
        if not tasks:
            tasks.append(reporter.start(name, total))
        tasks[0].advance(count)

    on_epoch = epoch_task(reporter, name, epochs_of(settings.coverage_fit, chosen.prior))
    before = f"learning the classes of {settings.name} ({how})"
    on_pretraining = epoch_task(reporter, before, chosen.fit.pretrain)
    record = learn_coverage(settings, on_epoch, on_images, on_pretraining)
    if record.abstains is not None:
        reporter.say(f"{settings.name} gives no coverage: {record.abstains}")
    for warning in record.warnings:
        reporter.say(f"Warning: {settings.name}: {warning}")
    return record


def tell_coverage(settings: SiteSettings) -> str:
    """Return in one line how the site's coverage is, or why there is none. Raises what `read_record` raises."""
    if settings.policy.coverage == "off":
        return "none (the policy lets none out)"
    record = read_record(settings)
    return "none (not learned yet: run `consilience site train`)" if record is None else record.told
