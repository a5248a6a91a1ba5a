"""Pages made from the code are as the code is now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_is_up_to_date() -> None:
    code = f"import sys; sys.path.insert(0, {str(DOCS)!r}); import make_settings; print(make_settings.page(), end='')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (DOCS / "settings.md").read_text() == made, "run: python docs/make_settings.py"
