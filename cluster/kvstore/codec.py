"""How a value lies in a store that other processes, versions and models write to as well.

    | magic 4s | version H | num_fingerprint H | num_payload Q | xxh3 Q | fingerprint | payload |

Little-endian. The fingerprint of a block is its key (block_key.py): model, worker's part and block.
The checksum covers every byte but its own eight. XXH3 rather than a cryptographic hash: it runs at
30 GB/s without the interpreter's lock (CRC-32: 2 to 4, SHA-1: 1.9, BLAKE2b: 0.9) and misses an
accident once in 2**64. It guards against accidents only; who may write to the store could write a
right checksum too.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

VERSION = 1
_MAGIC = b"SLkv"
_PREFIX = struct.Struct("<4sHHQ")
_CHECKSUM = struct.Struct("<Q")

HEADER_BYTES = _PREFIX.size + _CHECKSUM.size
MAX_FINGERPRINT_BYTES = 2**16 - 1


def encode_block(payload: bytes | bytearray | memoryview, fingerprint: bytes) -> bytes:
    """Return `payload` framed, so that `decode_block` can tell whether it is whole and ours.

    Args:
        payload: Any bytes, copied once; a memoryview has to be contiguous.
        fingerprint: What the payload belongs to (a model, a block), at most 65,535 bytes.
    """
    assert len(fingerprint) <= MAX_FINGERPRINT_BYTES, f"{len(fingerprint)=}"
    num_bytes = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    prefix = _PREFIX.pack(_MAGIC, VERSION, len(fingerprint), num_bytes)
    checksum = _checksum(prefix, fingerprint, payload)
    return b"".join((prefix, _CHECKSUM.pack(checksum), fingerprint, payload))


class Frame(NamedTuple):
    """A frame that verified."""

    fingerprint: bytes
    payload: memoryview  # into the framed data: nothing is copied


def open_frame(data: bytes | bytearray) -> Frame | None:
    """Return what is in a frame; None where it is none of ours, of another version, cut, longer
    than it says, or changed. What does not verify is a miss, so nothing is raised.
    """
    if len(data) < HEADER_BYTES:
        return None
    magic, version, num_fingerprint, num_payload = _PREFIX.unpack_from(data)
    body = HEADER_BYTES + num_fingerprint
    if magic != _MAGIC or version != VERSION or len(data) != body + num_payload:
        return None
    view = memoryview(data)
    fingerprint, payload = bytes(view[HEADER_BYTES:body]), view[body:]
    checksum = _checksum(view[: _PREFIX.size], fingerprint, payload)
    if _CHECKSUM.unpack_from(data, _PREFIX.size) != (checksum,):
        return None
    return Frame(fingerprint, payload)


def decode_block(data: bytes | bytearray, fingerprint: bytes) -> memoryview | None:
    """Return the payload that was framed for `fingerprint`, bit-exact; None: see `open_frame`."""
    frame = open_frame(data)
    return frame.payload if frame is not None and frame.fingerprint == fingerprint else None


def _checksum(*parts: bytes | bytearray | memoryview) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()
