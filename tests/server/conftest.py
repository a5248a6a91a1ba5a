"""What tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from consilience.common.progress import Reporter


@pytest.fixture
def reporter() -> Iterator[Reporter]:
    """Progress that is shown to nobody."""
    with Reporter(quiet=True) as quiet:
        yield quiet
