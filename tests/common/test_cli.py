"""How results reach the terminal: a stranger's text is text."""

from __future__ import annotations

import pytest
from rich.table import Table

from consilience.common.cli import emit

TEXT = "[/x] [link=http://evil]here[/link] pip install 'consilience[onnx]' /data/[1]"


@pytest.mark.parametrize("as_table", [False, True])
def test_square_brackets_are_no_markup(as_table: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def view() -> str | Table:
        if not as_table:
            return TEXT
        table = Table("found", width=200)
        table.add_row(TEXT)
        return table

    emit(False, lambda: ({}, view()))
    assert TEXT.split()[1:4] == [word for word in capsys.readouterr().out.split() if word in TEXT.split()[1:4]]
