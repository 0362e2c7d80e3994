"""A registered prefix as it lies in the store, where anybody may have written."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, Self

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
    packed_tokens: bytes = field(repr=False)  # at least one, 4 bytes each, little-endian
    registered_at_s: float  # since 1970

    @classmethod
    def of(
        cls, tenant: str, name: str, model: str, token_ids: tuple[int, ...], registered_at_s: float
    ) -> Self:
        """Return the record of a prefix given as token ids: unsigned 32-bit numbers."""
        packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
        return cls(tenant, name, model, packed, registered_at_s)

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return len(self.packed_tokens) // _TOKEN_BYTES

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens, unpacked anew each time: a gateway keeps many prefixes and needs few."""
        return struct.unpack(f"<{self.num_tokens}I", self.packed_tokens)


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
        tokens=record.packed_tokens,
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
    if len(entry.tokens) % _TOKEN_BYTES or key != record_key(entry.tenant, entry.name):
        return None
    return PrefixRecord(entry.tenant, entry.name, entry.model, entry.tokens, entry.registered_at_s)
