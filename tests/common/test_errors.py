"""The registry of failures: one code a kind, explained in the docs."""

from __future__ import annotations

from pathlib import Path

from consilience.common import errors

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"


def kinds() -> list[type[errors.ConsilienceError]]:
    found = [errors.ConsilienceError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_every_kind_has_its_own_code_name_and_paragraph() -> None:
    assert {kind.exit_code: kind for kind in kinds()} == errors.REGISTRY
    assert len({kind.name for kind in kinds()}) == len(kinds())
    assert not {0, 2, 130} & set(errors.REGISTRY)
    text = DOCS.read_text()
    for code, kind in errors.REGISTRY.items():
        assert f"## {code}: {kind.name}\n\n{kind.explanation}\n" in text


def test_a_failure_reads_as_one_line_with_its_next_step() -> None:
    assert str(errors.PoolError("It is wrong", hint="Mend it")) == "It is wrong. Mend it"
    assert str(errors.PoolError("It is wrong")) == "It is wrong"
