"""How many values a stranger's JSON may hold, so that reading it takes no more memory than it should.

Lives here: the bound, which is checked before anything is parsed. Does not live here: what the values must be.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice

from consilience.common.errors import ProtocolError

MOST_TIMES, MOST_SPARE = 4, 32 * 2**20
"""Reading JSON takes at most so many times its bytes, and so many bytes more."""
_VALUE_BYTES, _GROUP_BYTES = 80, 720
"""What a value, and an array or object, take at most while JSON is read and checked, as measured."""
_FIELD, _MOST_FIELDS = re.compile(r'"\s*:'), 10_000
"""A field's name in JSON, and how many there may be: the largest record, of a sum over 255 sites, has some 2,000."""


def bounded(text: str, known: Collection[str] = ()) -> str:
    """Return `text`. Raises `ProtocolError` where it holds so many values that reading it would take too much memory.

    An array of empty arrays takes 240 times its bytes when it is read, before any field is looked at, and an object of
    fields that are not known 90 times. Fields that are `known` may stand there as often as values may.
    """
    groups = text.count("[") + text.count("{")
    if (
        _VALUE_BYTES * text.count(",") + _GROUP_BYTES * groups > MOST_TIMES * len(text) + MOST_SPARE
        or _count(_FIELD, text, known) > _MOST_FIELDS
    ):
        raise ProtocolError("A message's record holds more values than any record of its size")
    return text


def _count(field: re.Pattern[str], text: str, known: Collection[str]) -> int:
    """Return how many fields are not known; with none known it stops counting where there are too many."""
    if not known:
        return sum(1 for _ in islice(field.finditer(text), _MOST_FIELDS + 1))
    names = re.compile(f'"(?:{"|".join(map(re.escape, known))}){field.pattern}')
    return sum(1 for _ in field.finditer(text)) - sum(1 for _ in names.finditer(text))
