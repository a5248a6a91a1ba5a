"""The student as one file that needs no code of ours: a torch.export program with its preprocessing inside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from consilience.common.files import atomic
from consilience.server.learning import StudentModel, log_probs_of


class _Program(nn.Module):
    """uint8 images in, log-probabilities out; resizing is left to the caller, who must bring (H, W, C) right."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: StudentModel) -> None:
        super().__init__()
        self.network, self.multi = student.model, student.multi
        self.channels = student.preprocessing.channels or student.shape[2]
        self.register_buffer("mean", torch.tensor(student.preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(student.preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        logits = self.network((pixels / 255 - self.mean) / self.std)
        return log_probs_of(logits, multi=self.multi)


def export_student(student: StudentModel, path: Path) -> None:
    """Write `student` to `path` by torch.export, any batch size. Raises `StorageError`."""
    program = _Program(student).eval()
    example = torch.zeros((2, *student.shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(program, (example,), dynamic_shapes=({0: batch},))
    with atomic(path) as file:
        torch.export.save(exported, file)
