"""`consilience site`: what the engineer at a site types.

Does not live here: any of its commands.
"""

from __future__ import annotations

from typing import ClassVar

import typer

from consilience.common.cli import LateCommands


class _Site(LateCommands):
    """The group's commands, in the order in which a site needs them."""

    parts: ClassVar = {
        "init": ("consilience.client.init_cli:init", "Make the site's key pair and the request to be admitted."),
        "start": ("consilience.client.agent_cli:start", "Answer the server's questions until interrupted."),
        "approve": ("consilience.client.policy_cli:approve", "Approve a job, where the policy asks for that."),
        "explain": ("consilience.client.policy_cli:explain", "Say what a job would take, before it takes it."),
        "plan": ("consilience.client.privacy.plan_cli:plan", "Say what a wanted epsilon costs, by each mechanism."),
        "audit": ("consilience.client.audit.cli:audit", "Attack the site's own answers, and show what they give away."),
        "taps": ("consilience.client.features:taps", "List the teacher's layers, and what of them may leave."),
        "train": ("consilience.client.site_cli:train", "Train the teacher, calibrate it and learn coverage."),
        "show": ("consilience.client.site_cli:show", "Show the site card: all that the server learns first."),
        "check": ("consilience.client.site_cli:check", "Look at everything that an agent needs, and say what to mend."),
        "ledger": ("consilience.client.ledger_cli:app", "Show, verify or export what left."),
    }


app = typer.Typer(cls=_Site, help="A data owner's side.", no_args_is_help=True, add_completion=False)


@app.callback()
def _site() -> None:
    pass
