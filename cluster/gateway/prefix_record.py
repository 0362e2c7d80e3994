"""A registered prefix as it lies in the store, where anybody may have written."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

PREFIX_RECORDS = "prefix"
NAME_PATTERN = r"[A-Za-z0-9._-]{1,128}"

_KEY_BYTES = 16
_KEY = b"sluice-prefix-v1"
_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class PrefixRecord:
    """What one tenant registered under one name."""

    tenant: str  # empty without authentication
    name: str  # matches NAME_PATTERN
    model: str  # name of the model whose tokenizer made the tokens
    token_ids: tuple[int, ...]  # at least one, unsigned 32-bit numbers
    registered_at_s: float  # since 1970


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    tenant: str
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    model: str
    tokens: bytes = Field(min_length=_TOKEN_BYTES)
    registered_at_s: float = Field(ge=0, allow_inf_nan=False)


def record_key(tenant: str, name: str) -> str:
    """Return the key of a record: different for every pair, whatever characters they hold."""
    owner = tenant.encode()
    seed = struct.pack("<Q", len(owner)) + owner + name.encode()
    return blake2b(seed, digest_size=_KEY_BYTES, person=_KEY).hexdigest()


def encode_record(record: PrefixRecord) -> bytes:
    """Return the bytes of a record: 4 per token, and some hundred more."""
    entry = _Entry(
        tenant=record.tenant,
        name=record.name,
        model=record.model,
        tokens=struct.pack(f"<{len(record.token_ids)}I", *record.token_ids),
        registered_at_s=record.registered_at_s,
    )
    packed: bytes = msgpack.packb(entry.model_dump())
    return packed


def decode_record(key: str, value: bytes) -> PrefixRecord | None:
    """Return the record; None where it is damaged, of another version, or not this key's.

    The key is compared, so that whoever moves a record within the store gives it to no other
    tenant.
    """
    try:
        entry = _Entry.model_validate(msgpack.unpackb(value), strict=True)
    except (ValueError, ValidationError, msgpack.UnpackException):
        return None
    num_tokens, rest = divmod(len(entry.tokens), _TOKEN_BYTES)
    if rest or key != record_key(entry.tenant, entry.name):
        return None
    return PrefixRecord(
        tenant=entry.tenant,
        name=entry.name,
        model=entry.model,
        token_ids=struct.unpack(f"<{num_tokens}I", entry.tokens),
        registered_at_s=entry.registered_at_s,
    )
