"""The key of a worker's part of a KV block in a store.

    | model 8 bytes | part 2 bytes | block 16 bytes |

model: digest of what decides the part's bytes: fingerprint of weights, dtype and tensor-parallel
layout, and the number of pipeline stages. part: index of the worker in its group. block: its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

MODEL_BYTES = 8
PART_BYTES = 2
_MODEL = b"sluice-blocks-v1"


def part_prefix(fingerprint: bytes, *, pp: int, part: int) -> bytes:
    """Return what all keys of one worker's parts begin with, 10 bytes.

    Args:
        fingerprint: That seeds the block hashes.
        pp: Pipeline stages of the group.
        part: Index of the worker, 0 ... tp * pp - 1.
    """
    seed = pp.to_bytes(4, "little") + fingerprint
    model = blake2b(seed, digest_size=MODEL_BYTES, person=_MODEL).digest()
    return model + part.to_bytes(PART_BYTES, "little")


def block_keys(prefix: bytes, hashes: Sequence[bytes]) -> list[bytes]:
    """Return the keys of blocks, in order; `prefix` is from `part_prefix`."""
    return [prefix + block_hash for block_hash in hashes]


def hash_of_key(key: bytes) -> bytes:
    """Return the block hash in a key."""
    return key[MODEL_BYTES + PART_BYTES :]
