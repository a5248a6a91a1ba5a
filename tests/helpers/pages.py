"""What a page of the docs shows in its fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str, section: str = "") -> list[str]:
    """Return the blocks of a language, of one section where one is named."""
    text = page.read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def typed(page: Path, section: str = "") -> list[str]:
    """Return the lines of a page's console blocks."""
    return [line for block in blocks(page, "console", section) for line in block.splitlines() if line.strip()]
