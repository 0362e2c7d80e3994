"""The one hash chain that names KV blocks, in engine, router and store alike.

    root = H_root(len(fingerprint), fingerprint, salt)        model and tenant
    b0   = H_block(root, tokens[0:16])
    b1   = H_block(b0, tokens[16:32])                         names tokens[0:32]

A block's hash stands for every token before it, for the model that computed it and for the tenant
that may reuse it. Two chains that differ anywhere share no hash from there on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16

# Distinct personalizations: no input of one kind can give a digest of the other.
_ROOT = b"sluice-root-v1"
_BLOCK = b"sluice-block-v1"


def root_hash(fingerprint: bytes, salt: bytes = b"") -> bytes:
    """Return the parent of every first block, 16 bytes.

    Args:
        fingerprint: Of weights, dtype, adapter and layout: of whatever changes the cached bytes.
        salt: Of the tenant, from its authenticated identity; chains with other salts never meet.
    """
    # The length comes first, so that moving a byte from one to the other changes the digest.
    seed = struct.pack("<Q", len(fingerprint)) + fingerprint + salt
    return blake2b(seed, digest_size=HASH_BYTES, person=_ROOT).digest()


def child_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of the full block that follows `parent`, 16 bytes.

    Args:
        parent: `root_hash` or the hash of the block before, 16 bytes.
        token_ids: The block's tokens, each an unsigned 32-bit number.
    """
    return _child(parent, _pack(token_ids))


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    fingerprint: bytes,
    salt: bytes = b"",
    parent: bytes | None = None,
) -> list[bytes]:
    """Return the hashes of all full blocks, in order; a last, partial block has none.

    Args:
        token_ids: Unsigned 32-bit numbers.
        block_size: Tokens per block, at least 1.
        fingerprint: See `root_hash`.
        salt: See `root_hash`.
        parent: Hash of the block before `token_ids`, where they continue a sequence; it carries
            fingerprint and salt already. None: they begin one.
    """
    assert block_size >= 1, f"{block_size=}"
    packed = _pack(token_ids)
    stride = 4 * block_size
    digest = root_hash(fingerprint, salt) if parent is None else parent
    digests = []
    for start in range(0, len(packed) - stride + 1, stride):
        digest = _child(digest, packed[start : start + stride])
        digests.append(digest)
    return digests


def router_key(block_hash: bytes) -> int:
    """Return the 64 bits of a hash that the router keeps and that travel as fixed64.

    Two blocks with one key cost a wrong choice of replica, never a wrong answer.
    """
    return int.from_bytes(block_hash[:8], "little")


def _pack(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _child(parent: bytes, packed: bytes) -> bytes:
    assert len(parent) == HASH_BYTES, f"a parent has {HASH_BYTES} bytes, not {len(parent)}"
    return blake2b(parent + packed, digest_size=HASH_BYTES, person=_BLOCK).digest()
