"""Typed records as Flower messages: every field is validated on arrival.

Lives here: the record that all messages between server and sites are made of, and the types that many fields have. Does
not live here: which messages there are (protocol, sums/messages, tails), what a site says of itself (cards).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from flwr.app import ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.common.bounded import bounded
from consilience.common.errors import ProtocolError
from consilience.common.settings import NAME_PATTERN

_MOST_MISTAKES = 1000
"""Mistakes in a record that are looked at: a list of them takes far more than the record."""
FINGERPRINT_SHOWN = 12
"""First digits of a fingerprint by which folders are named and people tell one from another."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SiteName = Annotated[str, Field(pattern=NAME_PATTERN)]
Line = Annotated[str, Field(max_length=500, pattern=r"^\P{C}*$")]
"""One line of printable characters: a stranger's text is shown on terminals."""

RecordType = TypeVar("RecordType", bound="Record")


class Record(BaseModel):
    """A flat record that travels as JSON text in a Flower ConfigRecord."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    protocol: Literal[3] = 3
    """Another one where records say something else than before: both sides must be of one. Since 2 principal components
    come with agreements, and cards tell no more of them than their digest. Since 3 questions, and contracts, may be
    about a part of the pool."""

    def to_content(self) -> RecordDict:
        """Return the message content that carries this record. Raises `ProtocolError` for more than may be read."""
        return RecordDict({"record": ConfigRecord({"json": bounded(self.model_dump_json())})})

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read the record back. Raises `ProtocolError` naming the first field that is not as it must be."""
        text = config_of(content, "record").get("json")
        if not isinstance(text, str):
            raise ProtocolError("A message carries no record")
        try:
            return cls.model_validate_json(bounded(text))
        except ValidationError as error:
            if error.error_count() > _MOST_MISTAKES:
                raise ProtocolError(f"A message's {cls.__name__} is not as it must be: many fields") from None
            mistakes = error.errors(include_url=False, include_context=False, include_input=False)
            first = str((*mistakes[0]["loc"], "")[0])
            if first == "protocol":
                raise ProtocolError(
                    f"A message's {cls.__name__} is of another protocol than this version's, "
                    f"{cls.model_fields['protocol'].default}: site and server must run one version of Consilience"
                ) from None
            field = first if first in cls.model_fields else "a field it has not"  # a stranger may have named it
            raise ProtocolError(f"A message's {cls.__name__} is not as it must be: {field}") from None


def config_of(content: RecordDict, key: str) -> dict[str, Any]:
    """Return the values of a message's record; none where there is no such record."""
    record = content.get(key)
    return dict(record) if isinstance(record, ConfigRecord) else {}
