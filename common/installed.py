"""Python code that whoever runs this installed beside Consilience, by name: `package.module:function`.

Lives here: importing it, and telling its version. Does not live here: what it is for (client/teacher/python_callable,
common/nets/own_networks). Nothing is sandboxed: a name comes from settings, which are of the one who runs this.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from consilience.common.errors import ConsilienceError
from consilience.common.files import sha256_file


def find_installed(name: str, kind: type[ConsilienceError], field: str) -> tuple[Any, ModuleType]:
    """Return the callable that `name` names, and its module, imported if need be.

    Raises `kind` when there is none; `field` is where the name stands in the settings.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs code, which may raise anything
        raise kind(
            f"{name}: module {module_name} cannot be imported: {brief(error)}",
            hint="Install it into the same environment as Consilience",
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        held = "no such name" if found is None else f"an object of type {type(found).__name__}"
        raise kind(f"{name}: {module_name} has {held}; expected a callable {attribute!r}", hint=f"Correct {field}")
    return found, module


def version_of(module: ModuleType) -> str:
    """Return name and version of the package that brings `module`, or the digest of its source if none does."""
    top = module.__name__.partition(".")[0]
    for package in metadata.packages_distributions().get(top, ()):
        return f"{package} {metadata.version(package)}"
    return sha256_file(Path(module.__file__)) if module.__file__ else top


def brief(error: BaseException) -> str:
    """Return an exception's kind and the start of its first line, for the eyes of whoever installed what raised it."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return (text if len(text) <= 200 else text[:197] + "...").rstrip(".")
