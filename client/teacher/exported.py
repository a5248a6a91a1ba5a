"""A teacher from a `torch.export` file (.pt2).

Lives here: running one. Does not live here: making the file safe to load (exported_archive), since torch.export.load by
itself unpickles whatever a file says.
"""

from __future__ import annotations

import io

import torch
from torch.export.passes import move_to_device_pass

from consilience.client.teacher.exported_archive import cleaned
from consilience.client.teacher.protocol import Scores, brief
from consilience.client.teacher.torch_modules import module_scores
from consilience.common.errors import TeacherError
from consilience.common.nets import default_device
from consilience.common.settings import ExportTeacher


def scores_of(settings: ExportTeacher, data: bytes) -> Scores:
    """Return the scoring function for a file's bytes. Raises `TeacherError`."""
    safe = cleaned(settings.path, data)
    device = default_device()
    try:
        program = torch.export.load(io.BytesIO(safe))
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise TeacherError(
            f"{settings.path}: torch.export cannot load it: {brief(error)}",
            hint=f"Export the model again with torch {torch.__version__.partition('+')[0]}",
        ) from error
    return module_scores(module, settings.preprocessing, device)
