"""A policy's taps against a teacher that is yet to be trained: a wrong name costs no training.

Does not live here: what taps are (taps), and the check of a teacher that is there (client/check).
"""

from __future__ import annotations

import torch

from consilience.client.features.taps import find
from consilience.client.teacher.protocol import ScoringTeacher
from consilience.client.teacher.torch_modules import NetworkScores
from consilience.client.teacher.trained import as_used
from consilience.common.nets import build
from consilience.common.nets.tapped import tap_layouts
from consilience.common.pool import Pool
from consilience.common.settings import DpSgd, SiteSettings


def check_untrained(settings: SiteSettings) -> None:
    """Refuse a tap that the teacher will not have, where the site trains one of our architectures and has pools.

    Does nothing elsewhere: by DP-SGD a network's layers are others than the architecture's. Raises `SettingsError`,
    `TeacherError`, `PoolError`, `MissingExtraError`.
    """
    teacher = settings.teacher
    if not settings.policy.features.taps or not settings.pools or isinstance(settings.privacy, DpSgd):
        return
    if teacher.kind != "train":
        return
    used = as_used(teacher.preprocessing, Pool.open(settings.pools[0]).shape)
    network = build(teacher.architecture, classes=2, channels=used.channels or 1, seed=0).eval()
    if tap_layouts(network):
        scores = NetworkScores(network, 2, used, torch.device("cpu"))
        find(settings, ScoringTeacher(("", ""), "", "logits", settings.name, scores))
