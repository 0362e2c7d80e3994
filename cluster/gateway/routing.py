"""What the router is told of a request: the keys of its prompt, and its session."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import InvalidArgumentError
from cluster.kvstore.block_hash import block_hashes, router_key

_MAX_SESSION_CHARS = 128


class PromptKeys:
    """Router keys of one prompt's full blocks; hashes it once for each kind of replica.

    Replicas of another fingerprint or block size (an upgrade is under way) know the prompt by other
    keys.

    Args:
        token_ids: Of the prompt.
        salt: Of the tenant, as the engines get it.
    """

    def __init__(self, token_ids: tuple[int, ...], *, salt: bytes) -> None:
        self._token_ids = token_ids
        self._salt = salt
        self._keys: dict[tuple[str, int], list[int]] = {}

    def __call__(self, fingerprint: str, block_size: int) -> Sequence[int]:
        """Return the keys, for replicas of a fingerprint (hex) and a block size (tokens)."""
        kind = (fingerprint, block_size)
        if kind not in self._keys:
            hashes = block_hashes(
                self._token_ids, block_size, fingerprint=bytes.fromhex(fingerprint), salt=self._salt
            )
            self._keys[kind] = [router_key(block_hash) for block_hash in hashes]
        return self._keys[kind]


def session_key(session: str, tenant: str) -> str:
    """Return what the router knows a session by; empty is none. No two tenants share one.

    Raises:
        InvalidArgumentError: The name is too long or not printable.
    """
    if len(session) > _MAX_SESSION_CHARS or not session.isprintable():
        raise InvalidArgumentError(
            f"session has {len(session)} characters, limit={_MAX_SESSION_CHARS} printable ones: "
            "choose another, or leave it out",
            field="session",
        )
    # A printable name has no NUL: the first one ends it, whatever the tenant is called.
    return f"{session}\0{tenant}" if session else ""
