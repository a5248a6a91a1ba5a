"""Write docs/settings.md from the models of common/settings: `python docs/make_settings.py`."""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from consilience.common import settings
from consilience.common.settings import (
    ask,
    concentration,
    data,
    filtered,
    job,
    policy,
    privacy,
    simulation,
    student,
    teacher,
)

PARTS = (data, teacher, policy, privacy, job, ask, student, concentration, filtered, simulation)
"""Modules of settings in the order of the page; each of their models has a section."""
TARGET = Path(__file__).with_name("settings.md")
HEAD = """# Settings

Two files: `job.yaml` says what to do (coordinator, researcher), `site.yaml` what a site has and allows (its engineer).
Unknown fields, values out of range and fields given twice are refused with the file, the field, the value and what is
allowed. Relative paths are relative to the file. This page is made from the code by `python docs/make_settings.py`.
"""


def notes(model: type[BaseModel]) -> dict[str, str]:
    """Return the text that stands under each field in the source."""
    (body,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
            found[field.target.id] = " ".join(text.split())
    return found


def kind(annotation: Any) -> str:
    """Return an annotation as a reader of YAML would say it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        names = [kind(part) for part in parts if part is not type(None)]
        return " or ".join(dict.fromkeys(names))
    if origin is tuple:
        return f"list of {kind(parts[0])}"
    if origin is dict:
        return f"{kind(parts[0])} -> {kind(parts[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true, false",
        "Path": "path",
        "date": "date",
    }.get(getattr(annotation, "__name__", ""), str(annotation))


def default(value: Any) -> str:
    """Return a default as YAML would write it."""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel) or value in ({}, (), None):
        return "" if not isinstance(value, BaseModel) else "its defaults"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def limits(metadata: list[Any]) -> str:
    """Return the allowed range, where there is one."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "min_length": "at least"}
    said = [
        f"{words[name]} {getattr(m, name)}" for m in metadata for name in words if getattr(m, name, None) is not None
    ]
    return ", ".join(said)


def section(model: type[BaseModel]) -> str:
    """Return one model's heading, text and table."""
    rows = ["| field | value | default | |", "|---|---|---|---|"]
    texts = notes(model)
    for base in model.__mro__[1:]:
        if issubclass(base, BaseModel) and base not in (BaseModel, settings.Settings):
            texts = {**notes(base), **texts}
    for name, field in model.model_fields.items():
        value = "; ".join(part for part in (kind(field.annotation), limits(field.metadata)) if part)
        rows.append(f"| `{name}` | {value} | {default(field.default)} | {texts.get(name, '')} |")
    about = " ".join((model.__doc__ or "").split())
    return "\n".join([f"## {model.__name__}", "", about, "", *rows, ""])


def page() -> str:
    """Return the whole page."""
    first = [settings.JobSettings, settings.SiteSettings]
    models = [m for part in PARTS for m in vars(part).values() if getattr(m, "__module__", "") == part.__name__]
    shown = [m for m in models if inspect.isclass(m) and issubclass(m, settings.Settings) and m not in first]
    ordered = [*first, *(m for m in shown if not m.__name__.startswith("_"))]
    return re.sub(r" +\|", " |", "\n".join([HEAD, *map(section, ordered)]))


if __name__ == "__main__":
    TARGET.write_text(page())
