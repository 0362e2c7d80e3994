"""The entries of a journal, as bytes.

    entry     | CRC-32 of the rest, 4 | msgpack array: version, kind, number, fields of the kind |
    journal   | HEADER 0 | PROGRESS 1 | PROGRESS 2 | ... | END n |

Entries are numbered, so that one that was written twice, because the store's answer to the first
time was lost, counts once, and one that is missing is noticed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import msgpack

from cluster.types import SampledToken, TokenLogprob

MAX_EVENTS = 2**16
"""In one entry."""

_VERSION = 1
_CHECKSUM = struct.Struct("<I")
_WORD_BYTES = 4  # of a token id, and of a log probability


class JournalError(ValueError):
    """A journal is damaged, or of another version: nothing of it can be trusted."""


class EntryKind(IntEnum):
    """What an entry tells."""

    HEADER = 0  # what was asked for
    PROGRESS = 1  # events that were sent
    END = 2  # nothing follows


def seal(kind: EntryKind, number: int, *fields: object) -> bytes:
    """Return the bytes of an entry."""
    body: bytes = msgpack.packb((_VERSION, kind.value, number, *fields))
    return _CHECKSUM.pack(zlib.crc32(body)) + body


def unseal(entry: bytes) -> tuple[EntryKind, int, tuple[object, ...]]:
    """Return kind, number and fields of an entry.

    Raises:
        JournalError: It is damaged, or of another version.
    """
    body = entry[_CHECKSUM.size :]
    if entry[: _CHECKSUM.size] != _CHECKSUM.pack(zlib.crc32(body)):
        raise JournalError("an entry's checksum does not match")
    try:
        version, kind, number, *fields = msgpack.unpackb(body, use_list=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise JournalError(f"an entry is no msgpack array: {error}") from error
    if any(type(value) is not int for value in (version, kind, number)) or number < 0:
        raise JournalError("an entry does not begin with version, kind and number")
    if version != _VERSION:
        raise JournalError(f"an entry has version {version}, known is {_VERSION}")
    if kind not in list(EntryKind):
        raise JournalError(f"an entry has kind {kind}, which is unknown")
    return EntryKind(kind), number, tuple(fields)


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Return token ids, 4 bytes each."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """Return the token ids.

    Raises:
        JournalError: They are cut off.
    """
    return struct.unpack(f"<{_num_words(data)}I", data)


def pack_floats(values: Sequence[float]) -> bytes:
    """Return numbers, 4 bytes each."""
    return struct.pack(f"<{len(values)}f", *values)


def add_run(runs: list[int], value: int) -> None:
    """Append a value to pairs (n, k), flat: n times the value k."""
    if runs and runs[-1] == value:
        runs[-2] += 1
    else:
        runs += (1, value)


def expand_runs(runs: Sequence[int], limit: int, *, at_least: int = 0) -> list[int]:
    """Return the values of pairs (n, k).

    Args:
        runs: The pairs, flat.
        limit: Of the values' number: a damaged pair must not take all memory.
        at_least: Of each value.

    Raises:
        JournalError: There are more or smaller values, or these are no pairs.
    """
    nums, values = runs[::2], runs[1::2]
    if len(runs) % 2 or min(nums, default=1) < 1 or min(values, default=at_least) < at_least:
        raise JournalError("runs are no pairs of a number and a value")
    if sum(nums) > limit:
        raise JournalError(f"runs of {sum(nums)} values, limit={limit}")
    return [value for num, value in zip(nums, values, strict=True) for _ in range(num)]


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """Tokens in columns: 4 bytes each where no log probabilities were asked for."""

    ids: bytes
    # For each token how many likeliest ones stand beside its log probability, -1 where it has none.
    # Empty: none has one.
    logprob_runs: tuple[int, ...] = ()
    logprobs: bytes = b""  # of a token, then of its likeliest ones
    top_ids: bytes = b""  # of the likeliest ones

    def unpack(self) -> list[SampledToken]:
        """Return the tokens.

        Raises:
            JournalError: The columns do not fit together.
        """
        ids = unpack_ids(self.ids)
        if not (self.logprob_runs or self.logprobs or self.top_ids):
            return [SampledToken(token_id) for token_id in ids]
        num_tops = expand_runs(self.logprob_runs, len(ids), at_least=-1)
        values = struct.unpack(f"<{_num_words(self.logprobs)}f", self.logprobs)
        top_ids = unpack_ids(self.top_ids)
        num_all = sum(num for num in num_tops if num > 0)
        num_values = num_all + sum(num >= 0 for num in num_tops)
        if (len(num_tops), len(top_ids), len(values)) != (len(ids), num_all, num_values):
            raise JournalError("tokens and log probabilities differ in number")
        logprobs, likeliest, tokens = iter(values), iter(top_ids), []
        for token_id, num_top in zip(ids, num_tops, strict=True):
            if num_top < 0:
                tokens.append(SampledToken(token_id))
                continue
            logprob = next(logprobs)
            top = (TokenLogprob(next(likeliest), next(logprobs)) for _ in range(num_top))
            tokens.append(SampledToken(token_id, logprob, tuple(top)))
        return tokens


def _num_words(data: bytes) -> int:
    if len(data) % _WORD_BYTES:
        raise JournalError(f"{len(data)} bytes are no whole number of tokens")
    return len(data) // _WORD_BYTES
