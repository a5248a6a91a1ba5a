"""job.yaml: how a student of chosen tasks is made by filtered amalgamation.

Does not live here: what of it needs a site's blocks (policy), the training of the whole student (`student.fit`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import Settings


class Filtered(Settings):
    """Filtered amalgamation (Ye et al., IJCAI 2019): a shared trunk, filters, and branches made of teachers' blocks."""

    epochs: int = Field(default=10, ge=1, le=10_000)
    """Of each block's own training."""
    learning_rate: float = Field(default=0.05, gt=0, le=10)
    """Of each block's own training."""
    order: Literal["in-turn", "sampled"] = "in-turn"
    """Blocks one after another, each on top of those before it, or all at once: each step trains a block that is
    drawn, for as many epochs in all."""
    filters: Literal["teacher", "task"] = "teacher"
    """One filter for each teacher, or a second one for each of its tasks."""
    branches: Literal["teacher", "random"] = "teacher"
    """What branches begin with: the weights of the teachers' blocks, where these are lent, or random ones."""
    held_out: float = Field(default=0.1, gt=0, le=0.5)
    """Share of the pool, drawn by the seed, that chooses where branches leave the trunk. It is learnt from afterwards,
    when the whole student is trained."""
    hard: bool = False
    """Whether labels that do not exclude one another are learnt as yes or no, as in the authors' code, and not as
    likely as the teachers hold them."""
    joint: bool = True
    """Whether trunk, filters and branches are trained together at the end, by `student.fit`."""
    tasks: Literal["site", "label"] = "site"
    """What has a branch: all that is wanted of one site, or each label, where labels do not exclude one another."""
    target: Literal["teachers", "unified"] | None = None
    """What all together learn: each branch its teacher's answers, or the scores together the unified labels. By default
    the unified labels where classes exclude one another, for answers say nothing of the odds between branches."""

    @model_validator(mode="after")
    def _branches_learn(self) -> Filtered:
        if self.branches == "random" and not self.joint:
            raise ValueError(
                "branches is 'random' and joint is false, so that nothing would teach the branches; set joint to true, "
                "or branches to teacher"
            )
        return self
