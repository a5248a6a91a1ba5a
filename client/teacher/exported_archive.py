"""Make a `torch.export` archive safe to load: refuse what would execute, rebuild the rest.

torch.export.load runs what a file brings in five ways (torch 2.13, torch/export/pt2_archive, torch/_export/serde): it
unpickles weights and constants marked `use_pickle`, opaque constants and, when the restricted unpickler fails, sample
inputs; it loads compiled libraries from data/aotinductor; it evaluates shape expressions by sympy, hence by Python's
eval; it compiles `guards_code`; and it writes the names of inputs into Python source as they are. Operator names are
resolved by getattr from `torch` downwards, so that only a check after the fact keeps `torch.os.system` away.

Therefore nothing of a file reaches torch unseen. Records are read by torch's own reader, the graph is checked string by
string against what may stand there, and a new archive is written of the checked graph and the raw tensors alone; sample
inputs, guards, metadata and extra files are left out. Only aten operators without file names may be called. Such a
program can compute, use memory and take long; native kernels were not made for hostile shapes.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch

from consilience.client.teacher.protocol import brief, refuse
from consilience.common.errors import TeacherError

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}
_TENSOR_FILE = {"data/weights/": re.compile(r"weight_\d+"), "data/constants/": re.compile(r"tensor_\d+")}
_HINT = "Export it with torch.export.save, from plain tensors and torch's own operators"

_DROPPED: dict[str, Any] = {"metadata": {}, "guards_code": [], "treespec_namedtuple_fields": {}}
"""Fields that say nothing about the arithmetic: emptied."""
_REFUSED = {"as_custom_obj", "custom_obj", "token", "as_graph"}
"""Kinds of values that bring objects or nested programs."""

_NAMED = {"config", "tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints"}
"""Mappings whose keys are the file's own names, and not fields."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|")
_PLAIN = re.compile(r"[A-Za-z0-9_.+\-]*")
_TEXT = re.compile(r"[A-Za-z0-9_.,> \-]*")
_ATEN = re.compile(r"torch\.ops\.aten\.(_?[a-z][a-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")
_SCALAR = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_)|torch\.sym_[a-z]+"
)
_TOKEN = re.compile(
    r"\s*(?:Symbol\('[su][0-9]+'(?:, (?:positive|nonnegative|integer)=True)*\)|[su][0-9]+\b|Integer\b|[0-9]{1,12}\b"
    r"|(?:Max|Min|Mod|Add|Mul|FloorDiv|CleanDiv|PythonMod|ModularIndexing|Eq|Ne|Lt|Le|Gt|Ge)\b"
    r"|[-+/(),]|\*(?!\*)|[<>=!]=|[<>])\s*"
)
_TREE_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


def cleaned(path: Path, data: bytes) -> bytes:
    """Return an archive of the checked graph and tensors. Raises `TeacherError` for anything that would execute."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        held = set(reader.get_all_records())
    except RuntimeError as error:
        raise TeacherError(f"{path}: not a torch.export archive: {brief(error)}", hint=_HINT) from error
    if not {_MODEL, _SAMPLES, "archive_format", "archive_version"} <= held:
        raise TeacherError(f"{path}: not a torch.export archive of this version of torch", hint=_HINT)
    for name in sorted(held):
        if name.startswith(("models/", "data/aotinductor/")) and name != _MODEL:
            refuse(path, f"{name}, which is no plain model", _HINT)
    out = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(out)
    writer.set_min_version(6)  # as torch's own writer of these archives does

    def write(name: str, content: bytes) -> None:
        writer.write_record(name, content, len(content))

    try:
        write("archive_format", b"pt2")
        write("archive_version", reader.get_record("archive_version"))
        write(_MODEL, json.dumps(_clean(path, json.loads(reader.get_record(_MODEL)))).encode())
        write(_SAMPLES, b"")
        for folder, config in _CONFIGS.items():
            if f"{folder}model.pt" in held:
                refuse(path, f"{folder}model.pt, a pickle", _HINT)
            payload = _clean(path, json.loads(reader.get_record(folder + config)))
            for file in sorted({_raw_file(path, folder, meta) for meta in payload["config"].values()}):
                write(folder + file, reader.get_record(folder + file))
            write(folder + config, json.dumps(payload).encode())
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TeacherError(f"{path}: a damaged torch.export archive: {brief(error)}", hint=_HINT) from error
    writer.write_end_of_file()
    return out.getvalue()


def _raw_file(path: Path, folder: str, meta: dict[str, Any]) -> str:
    """Return the record that holds a tensor's raw bytes; refuse pickles and anything that is no tensor."""
    file = meta["path_name"]
    if meta["use_pickle"] is not False or not _TENSOR_FILE[folder].fullmatch(file):
        refuse(path, f"{folder}{file}, a pickle", _HINT)
    return str(file)


def _clean(path: Path, value: Any, key: str = "") -> Any:
    """Return a copy of parsed JSON that torch may read: every string checked by the field it stands in."""
    if isinstance(value, dict):
        if key == "device":  # a graph exported on another device is moved afterwards
            return {"type": "cpu", "index": None}
        names = key in _NAMED
        for name in value:
            if name in _REFUSED and not names:
                refuse(path, f"a value of kind {name}", _HINT)
            if not _PLAIN.fullmatch(name) or _dunder(name):
                refuse(path, f"the name {name!r}", _HINT)
        if names:
            return {name: _clean(path, part) for name, part in value.items()}
        return {name: _DROPPED[name] if name in _DROPPED else _clean(path, part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_clean(path, part, key) for part in value]
    if isinstance(value, str):
        fault = _fault(key, value)
        if fault:
            refuse(path, f"{fault} {value[:80]!r}", _HINT)
    return value


def _fault(key: str, text: str) -> str | None:
    """Return what is wrong with a string in the field `key`, or None."""
    if key in ("target", "as_operator"):
        return None if _is_operator(text) else "the operator"
    if key == "expr_str":
        # Python's eval will see it: nothing but symbols, numbers and the listed functions.
        return None if re.fullmatch(f"(?:{_TOKEN.pattern})+", text) else "the shape expression"
    if key in ("in_spec", "out_spec"):
        return None if _is_plain_tree(json.loads(text)[1]) else "the structure"
    if key in ("name", "as_name", "forward_arg_names"):
        return None if _IDENTIFIER.fullmatch(text) and not _dunder(text) else "the name"
    if key in ("as_string", "as_strings"):
        return None if _TEXT.fullmatch(text) else "the text"
    return None if _PLAIN.fullmatch(text) and not _dunder(text) else "the name"


def _dunder(text: str) -> bool:
    """Whether a dotted name reaches into Python's own attributes."""
    return any(part.startswith("__") for part in text.split("."))


def _is_operator(text: str) -> bool:
    """Whether a name is an aten operator that touches no files, or arithmetic on sizes."""
    if _SCALAR.fullmatch(text):
        return True
    found = _ATEN.fullmatch(text)
    if not found:
        return False
    operator = getattr(getattr(torch.ops.aten, found[1], None), found[2], None)
    return isinstance(operator, torch._ops.OpOverload) and not any(
        argument.name == "filename" for argument in operator._schema.arguments
    )


def _is_plain_tree(spec: Any) -> bool:
    """Whether inputs or outputs are tensors in plain tuples, lists and dicts."""
    return spec["type"] in _TREE_TYPES and all(_is_plain_tree(child) for child in spec["children_spec"])
