"""A site with tiny private data."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.private_site import Make, bars, settings_of, write_data


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(privacy, ...) gives settings of a site with 120 private images."""
    write_data(tmp_path, *bars(120))
    return lambda privacy, **raw: settings_of(tmp_path, privacy, **raw)
