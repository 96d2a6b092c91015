"""What bodies consist of: lenient and strict ones, and the fields that many have."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Id = Annotated[str, Meta(min_length=1, max_length=300)]
Text = Annotated[str, Meta(max_length=10_000)]
SeqId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TrainingSeqId = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Ttl = Annotated[int, Meta(ge=3600, le=10 * 366 * 86400)]
UserMetadata = dict[str, Any]
TextMetadata = dict[str, str]


class Lenient(msgspec.Struct, kw_only=True):
    """Unknown fields mean nothing here."""


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Unknown fields would change the result, and are refused by name."""

    type: str | None = None
