"""Seeds that depend on a seed and a purpose alone.

Does not live here: torch's generators (common/nets/seeding), what the numbers are for.
"""

from __future__ import annotations

from consilience.common.files import canonical_json, sha256


def derive(seed: int, purpose: str, number: int = 0) -> int:
    """Return the 63-bit seed that belongs to `seed`, `purpose` and `number`: no state to keep, none to restore."""
    return int(sha256(canonical_json([seed, purpose, number]))[:16], 16) >> 1
