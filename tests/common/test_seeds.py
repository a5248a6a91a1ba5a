from __future__ import annotations

from consilience.common.seeds import derive


def test_derived_seeds_are_fixed_and_differ() -> None:
    assert derive(0, "order", 1) == derive(0, "order", 1)
    assert len({derive(s, p, n) for s in (0, 1) for p in ("order", "windows") for n in (0, 1)}) == 8
    assert derive(0, "order") == 8257676712268907911  # for ever: checkpoints rely on it
