"""Settings files: reading, writing, and how a mistake in one reads.

Lives here: YAML to the models of `settings` and back. Does not live here: any field. Relative paths are relative to
the file's folder and are made absolute on loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from consilience.common.errors import SettingsError
from consilience.common.files import write_bytes
from consilience.common.settings import Settings

SettingsModel = TypeVar("SettingsModel", bound=Settings)


def load_settings(path: Path, model: type[SettingsModel]) -> SettingsModel:
    """Read a YAML file into `model`; relative paths become absolute, from the file's folder.

    Raises `SettingsError`: one line that names file, field, value, what is allowed, and the next step.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"Cannot read {path}: {reason}", hint="Name an existing YAML file") from error
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(
            f"{path}{where}: {getattr(error, 'problem', None) or 'not YAML'}", hint="Mend the YAML there"
        ) from error
    return parse_settings(raw, model, source=str(path), folder=path.resolve().parent)


def parse_settings(raw: Any, model: type[SettingsModel], *, source: str, folder: Path) -> SettingsModel:
    """Validate `raw` (what YAML gave) as `model`. Raises `SettingsError`; `source` names the origin in it."""
    if not isinstance(raw, dict):
        raise SettingsError(
            f"{source}: holds {_brief(raw)}, not fields", hint="Write `field: value` lines; see docs/settings.md"
        )
    try:
        settings = model.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(
            f"{source}: {_describe(error.errors()[0], model)}",
            hint="Correct the field and run the same command again",
        ) from error
    resolved: SettingsModel = _absolute(settings, folder)
    return resolved


def dump_settings(settings: Settings, path: Path) -> None:
    """Write `settings`, defaults filled in, as YAML; atomically. Raises `StorageError`."""
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_bytes(path, text.encode())


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's SafeLoader, but a key given twice is an error instead of a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"field {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _absolute(value: Any, folder: Path) -> Any:
    """Return `value` with every relative path in it made absolute from `folder`."""
    if isinstance(value, Path):
        return value if value.is_absolute() else folder / value
    if isinstance(value, Settings):
        changes = {name: _absolute(getattr(value, name), folder) for name in type(value).model_fields}
        return value.model_copy(update=changes)
    if isinstance(value, tuple):
        return tuple(_absolute(part, folder) for part in value)
    return value


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    """One line for pydantic's first complaint: field, value, what is allowed."""
    location, parent = _walk([str(part) for part in error["loc"]], model)
    kind, context = error["type"], error.get("ctx", {})
    field = ".".join(location)
    if kind == "extra_forbidden":
        return f"field {field!r} is unknown; allowed here: {', '.join(parent.model_fields)}"
    if kind == "missing":
        return f"field {field!r} is missing"
    if kind == "value_error":
        return f"{field}: {context.get('error')}" if field else f"{context.get('error')}"
    if kind == "union_tag_invalid":
        return f"field {field + _told_apart(context)!r} is {context['tag']!r}; allowed: {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"field {field + _told_apart(context)!r} is missing"
    message = error["msg"]
    return f"field {field!r} is {_brief(error['input'])}; {message[0].lower() + message[1:]}"


def _walk(location: list[str], model: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """Return the path a user would write (pydantic adds the tags of unions) and the innermost model on it."""
    written: list[str] = []
    current: Any = model
    innermost = model
    for part in location:
        tagged = [m for m in _members(current) if m is not current and _has_tag(m, part)]
        if tagged:
            current = innermost = tagged[0]
            continue
        written.append(part)
        field = current.model_fields.get(part) if current in _members(current) else None
        if field is not None:
            current = field.annotation
            if current in _members(current):
                innermost = current
    return written, innermost


def _members(annotation: Any) -> list[type[BaseModel]]:
    """Models that an annotation speaks of, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _members(part)]


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    fields = (model.model_fields.get(name) for name in ("kind", "mechanism"))
    return any(field is not None and tag in getattr(field.annotation, "__args__", ()) for field in fields)


def _told_apart(context: dict[str, Any]) -> str:
    """The field that says which of several models is meant, as a user writes it after the others."""
    return "." + str(context["discriminator"]).strip("'")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
