"""What a site with a multi-label teacher cannot have, found when its settings are read.

Does not live here: what such a teacher is (teacher), doing anything with it (client/teacher).
"""

from __future__ import annotations

from consilience.common.settings.policy import Policy
from consilience.common.settings.privacy import Mechanism
from consilience.common.settings.teacher import TeacherSettings


def refuse_for_labels(
    privacy: Mechanism, policy: Policy, calibration: str, teachers: tuple[TeacherSettings, ...]
) -> None:
    """Raise `ValueError` for what is made for one label an image, where a teacher is multi-label."""
    if all(teacher.labels == "single" for teacher in teachers):
        return
    if privacy.mechanism != "none":
        raise ValueError(
            f"privacy.mechanism is {privacy.mechanism}, whose noise and accounts are those of one label an image; with "
            "teacher.labels: multi set it to none"
        )
    if policy.sums_only:
        raise ValueError(
            "policy.sums_only is true, and secure sums add up answers of one label an image; with teacher.labels: "
            "multi set it to false"
        )
    if policy.class_priors:
        raise ValueError(
            "policy.class_priors is true, and labels that do not exclude one another have no shares that sum to 1; "
            "with teacher.labels: multi set it to false"
        )
    if calibration == "dirichlet":
        raise ValueError(
            "calibration is dirichlet, a map over classes that exclude one another; with teacher.labels: multi set it "
            "to temperature, which is then one number for each label"
        )
