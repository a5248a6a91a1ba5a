"""job.yaml: how sites are asked, and about which samples.

Does not live here: asking (server/asking), choosing (server/choosing).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from consilience.common.settings.base import Encoding, FeatureEncoding, Settings

Choose = Literal["random", "uncertainty", "disagreement", "k-centre"]
"""How samples of the pool are chosen."""
MOST_ROUNDS = 20
"""In which samples are chosen."""


class Ask(Settings):
    """How the pool is asked about."""

    samples: int | None = Field(default=None, ge=1, le=2**27)
    """How many samples of the pool are asked about; by default all. The student learns from these alone
    ([which samples](choosing.md)). The test pool is always asked about as a whole."""
    choose: Choose = "random"
    """Which samples: drawn by `seed`, or, after a first round that is, in each further round those of which a student
    that learnt from the answers so far is least certain (`uncertainty`), on which sites are expected to differ most
    (`disagreement`), or which lie farthest in its features from all that were asked about (`k-centre`)."""
    rounds: int | None = Field(default=None, ge=1, le=MOST_ROUNDS)
    """In how many rounds of about equal size they are chosen: 1 where they are drawn, else 2 or more; by default 2."""
    encoding: Encoding = "f16"
    """How sites' log-probabilities come: `f32`, `f16`, `u8`, `top-K` such as `top-3`, `top-K-u8` such as `top-1-u8`,
    or `votes`; every site's policy must allow it. [Encodings](encodings.md) says what each costs and loses."""
    coverage: bool = True
    """Ask the sites that offer coverage for it, each in the finest encoding that it allows. Only the methods `sd` and
    `ce` make use of coverage, `sd` where every site that answered a sample gave it: with another `unify.method` no
    site is asked."""
    features: FeatureEncoding = "f16"
    """How features come, where `student.learning` takes them; every site that tells some must allow it."""
    feature_bytes: int = Field(default=2**34, ge=1, le=2**53)
    """Most bytes of features that one site may bring, over all taps and samples, principal components among them; a
    site whose card declares more does not fit the job."""
    tail_bytes: int = Field(default=2**28, ge=1, le=2**32)
    """Most bytes of blocks that one site may lend, for `student.learning: filtered`; a site whose card declares more
    does not fit the job."""
    question_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Pool samples a question speaks of; by default tuned for each site, to about two seconds of its teacher's work."""
    in_flight: int = Field(default=4, ge=1, le=64)
    """Questions on their way to one site at a time."""
    retries: int = Field(default=2, ge=0, le=100)
    """How often a failed question is sent again. A site that is away uses none of them up."""
    wait_for: int | None = Field(default=None, ge=1)
    """How many sites must be there before the job begins; by default it begins with whoever is there, at least one and
    at least `min_sites`."""
    wait: float = Field(default=3600.0, ge=0)
    """Seconds the job waits for sites that are not there yet, and, without a deadline, for one that has gone silent."""
    deadline: float | None = Field(default=None, gt=0)
    """Seconds after asking began at which it ends, with whatever was answered; by default it ends when all is asked.
    It runs on while the server is down; a run that is submitted again has all of it again."""
    min_sites: int | None = Field(default=None, ge=1)
    """With fewer sites that answered every question, but for those about coverage, the job stops; by default it
    needs them all. With this or `wait_for`, a site that cannot present itself, does not fit the job or does not
    agree to the contract is left out as long as enough others remain; with neither it stops the job."""

    @property
    def parts(self) -> int:
        """In how many rounds samples are chosen."""
        return self.rounds or (1 if self.choose == "random" else 2)

    @model_validator(mode="after")
    def _choice_fits(self) -> Ask:
        if self.choose == "random" and self.parts > 1:
            raise ValueError(
                f"rounds is {self.rounds}, and choose is 'random', which draws all samples at once; leave rounds out, "
                "or set choose to uncertainty, disagreement or k-centre"
            )
        if self.choose != "random" and self.samples is None:
            raise ValueError(
                f"choose is {self.choose!r}, and samples is not given: all of the pool is asked about; give samples, "
                "or leave choose out"
            )
        if self.choose != "random" and self.parts < 2:
            raise ValueError(
                f"rounds is 1, and choose is {self.choose!r}, whose first round is drawn at random; set rounds to 2 or "
                "more, or choose to random"
            )
        if self.samples is not None and self.samples < self.parts:
            raise ValueError(
                f"samples is {self.samples}, fewer than rounds, {self.parts}; raise samples, or lower rounds"
            )
        return self


PATIENCE_FIELDS = frozenset({"wait_for", "wait", "deadline", "min_sites", "retries", "in_flight", "question_size"})
"""Fields of `ask` that say how many sites are enough and how long they have: a run may go on under others."""
