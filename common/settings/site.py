"""site.yaml: one site's settings.

Does not live here: its parts (teacher, policy, privacy).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from consilience.common.settings.base import OFF_IS_A_WORD, Name, Settings
from consilience.common.settings.data import DataSource
from consilience.common.settings.multi_label import refuse_for_labels
from consilience.common.settings.policy import Policy
from consilience.common.settings.privacy import NoPrivacy, Privacy, refuse_what_passes_by
from consilience.common.settings.teacher import Coverage, Fit, TeacherSettings


def _key_words(value: str) -> str:
    from consilience.common.identity import WORDS, unknown_words  # which imports this package

    given = value.lower().split()
    if len(given) != WORDS or unknown_words(given):
        raise PydanticCustomError("words", "Input should be a key's 8 words, as `consilience site init` shows them")
    return " ".join(given)


PRETRAINING_BATCH = 64
"""Private images are few: in larger batches a network would learn from them in too few steps."""
KeyWords = Annotated[str, AfterValidator(_key_words)]
"""The words of a key's fingerprint (common/identity)."""


class SiteSettings(Settings):
    """site.yaml: one site's name, private data, teacher and policy."""

    name: Name
    data: DataSource | None = None
    teacher: TeacherSettings
    policy: Policy = Policy()
    privacy: Privacy = NoPrivacy()
    """The mechanism behind which the teacher answers, and how strong it is."""
    coverage: Coverage = Coverage()
    calibration: Annotated[Literal["temperature", "dirichlet", "off"], OFF_IS_A_WORD] = "temperature"
    """How the teacher's probabilities are made as good as they claim to be, by `consilience site train`: by one number
    for all classes (of a multi-label teacher, one for each label), by a matrix over them (which needs 20 held-out
    samples of every class), or not at all. What is fitted on: the part that `teacher.holdout` keeps out of training;
    for a hosted teacher `data`, which should be images that it was not trained on."""
    pools: tuple[Path, ...] = ()
    """Folders of public pools the site holds a copy of; a question names one by its digest."""
    state: Path = Path("state")
    """Folder of the site's own: the trained teacher, the ledger and the released answers live there."""
    ledger_head: Path | None = None
    """File with the ledger's length and last hash, by which an older copy of `state` that was put back is noticed. By
    default `state-ledger.head` beside `state`; never put it within `state`, nor back with an older copy of that."""
    key: Path = Path("site.key")
    """The site's private key (`consilience site init` makes it). It never leaves the site."""
    kit: Path = Path("kit.json")
    """What the coordinator sent back: the server's address and certificate authority. No secret."""
    peers: dict[Name, KeyWords] = Field(default={})
    """Site -> the words of its key, which `consilience site init` shows there and which you were told by another way
    than the coordinator's. Where any are given, secure sums are made with these sites alone, under these keys: a server
    can then invent no site. By default any site that the coordinator names."""
    health_port: int | None = Field(default=None, ge=1, le=65_535)
    """Port on 127.0.0.1 where a running agent says how it is (GET /health); none by default."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=256, ge=1, le=65_536)
    """Pool samples the teacher scores at once."""

    @property
    def coverage_fit(self) -> Fit:
        """How a coverage network is trained, with `mirror` decided."""
        fit = self.coverage.fit
        teachers = self.teacher.fit.mirror if self.teacher.kind == "train" else True
        held = fit.model_dump(exclude={"mirror", "pretrain"})
        return Fit(**held, mirror=teachers if fit.mirror is None else fit.mirror)

    @property
    def coverage_pretraining(self) -> Fit | None:
        """How a coverage network learns the site's classes before; None where it does not."""
        fit, epochs = self.coverage_fit, self.coverage.fit.pretrain
        if not epochs:
            return None
        return fit.model_copy(update={"epochs": epochs, "batch_size": min(fit.batch_size, PRETRAINING_BATCH)})

    @model_validator(mode="after")
    def _training_needs_data(self) -> SiteSettings:
        if self.teacher.kind == "train" and self.data is None:
            raise ValueError("teacher.kind is train, so data must name the private data to train on")
        return self

    @model_validator(mode="after")
    def _features_need_a_network(self) -> SiteSettings:
        if self.coverage.family == "features" and self.teacher.kind not in ("train", "state_dict"):
            raise ValueError(
                f"coverage.family is features, which needs a teacher of kind train or state_dict, not "
                f"{self.teacher.kind}; take coverage.family: outputs, which works with any teacher"
            )
        return self

    @model_validator(mode="after")
    def _nothing_passes_by_the_mechanism(self) -> SiteSettings:
        refuse_what_passes_by(self.privacy, self.policy, self.calibration, (self.teacher,))
        return self

    @model_validator(mode="after")
    def _nothing_takes_one_label_an_image(self) -> SiteSettings:
        refuse_for_labels(self.privacy, self.policy, self.calibration, (self.teacher,))
        return self
