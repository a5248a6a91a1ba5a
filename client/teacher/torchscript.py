"""A teacher from a TorchScript file.

Lives here: the inspection of the archive and its loading. What such a file can do: it is a program for torch's own
interpreter, run at every batch, and its `__setstate__` methods already while it is loaded. That interpreter knows no
Python, no processes and no network, and the unpickler of torch.jit builds nothing but TorchScript's own values. But
the language has operators that read and write files (`aten::from_file`, `aten::save`), and libraries in the process
may bring operators and classes of their own. Therefore a file is refused, before torch sees it, when its code names
those operators, any namespace but aten, prim, prims and quantized, or any bound C++ class. What is left can compute,
print, use memory and never end; native kernels were not made for hostile shapes. torch.export, ONNX and state_dicts
say less.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import torch

from consilience.client.teacher.protocol import Scores, brief, refuse
from consilience.client.teacher.torch_modules import module_scores
from consilience.common.errors import TeacherError
from consilience.common.nets import default_device
from consilience.common.settings import TorchScriptTeacher

_HINT = "Save the model as a state_dict, by torch.export or as ONNX"
_FORBIDDEN = (
    (re.compile(rb"\b(from_file|save)\b"), "code that names the file operator"),
    (re.compile(rb"\b(ops)\b(?!\s*\.\s*(?:aten|prims?|quantized)\b)"), "code that uses operators beyond torch's own:"),
)
_CLASSES = re.compile(rb"torch\W{0,4}classes")


def scores_of(settings: TorchScriptTeacher, data: bytes) -> Scores:
    """Return the scoring function for a file's bytes. Raises `TeacherError`."""
    inspect(settings.path, data)
    device = default_device()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch wants its users to move to torch.export
            module = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise TeacherError(f"{settings.path}: not a TorchScript file: {brief(error)}", hint=_HINT) from error
    return module_scores(module.eval(), settings.preprocessing, device)


def inspect(path: Path, data: bytes) -> None:
    """Raise `TeacherError` when the archive could reach beyond arithmetic. Nothing in it is run or unpickled."""
    if not data.startswith(b"PK"):  # torch.jit also reads an older format, which holds byte code instead of source
        raise TeacherError(f"{path}: not a TorchScript archive", hint="Save it with torch.jit.save")
    try:
        archive = torch._C.PyTorchFileReader(io.BytesIO(data))
        held = {name: archive.get_record(name) for name in archive.get_all_records() if _is_text(name)}
    except RuntimeError as error:
        raise TeacherError(f"{path}: not a TorchScript archive: {brief(error)}", hint=_HINT) from error
    for name, content in held.items():
        if _CLASSES.search(content):
            refuse(path, f"a bound C++ class in {name}", _HINT)
        if name.startswith("code/"):
            for pattern, what in _FORBIDDEN:
                if found := pattern.search(content):
                    refuse(path, f"{what} {found[1].decode()} in {name}", _HINT)


def _is_text(name: str) -> bool:
    """Whether a record is source or a pickle of objects, and not a tensor's bytes."""
    return name.startswith("code/") or name.endswith(".pkl")
