"""What progress looks like: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from consilience.common import progress
from consilience.common.progress import Reporter


def shown(*, terminal: bool, quiet: bool = False) -> str:
    file = io.StringIO()
    with Reporter(
        quiet=quiet, console=Console(file=file, force_terminal=terminal, width=100, highlight=False, no_color=True)
    ) as reporter:
        task = reporter.start("asking site-1", 200)
        task.advance(50)
        task.advance(150, note="loss 0.1")
        reporter.say("a plain line")
    return file.getvalue()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)


def test_a_terminal_shows_a_bar_and_no_lines() -> None:
    text = shown(terminal=True)
    assert "200/200" in text
    assert "asking site-1  loss 0.1" in text
    assert "asking site-1: 50/200" not in text
    assert "a plain line" in text


def test_elsewhere_every_step_is_a_plain_line_with_the_time_left() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("asking site-1: 50/200, ")
    assert lines[0].endswith(" s left")
    assert lines[1:] == ["asking site-1  loss 0.1: 200/200", "a plain line"]


def test_quiet_shows_nothing() -> None:
    assert shown(terminal=True, quiet=True) == shown(terminal=False, quiet=True) == ""
