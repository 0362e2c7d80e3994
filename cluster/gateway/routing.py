"""What the router is told of a request: the keys of its prompt, and its session."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import InvalidArgumentError
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.router.route import RouteRequest
from cluster.types import NO_SLO, EngineRequest

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


def route_of(
    request: EngineRequest, *, model: str, session: str, arrived_s: float, expires_s: float
) -> RouteRequest:
    """Return what the global scheduler has to know of a new request.

    Args:
        request: By the id that the client knows.
        model: Name.
        session: What the router knows its session by; empty is none.
        arrived_s: By the gateway's clock.
        expires_s: Likewise, its deadline.
    """
    return RouteRequest(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        keys=PromptKeys(request.prompt_token_ids, salt=request.salt),
        arrived_s=arrived_s,
        slo=request.slo,
        service_class=request.service_class,
        tenant=request.tenant,
        tenant_weight=request.tenant_weight,
        session=session,
        model=model,
        expires_s=expires_s,
    )


def rest_of(
    route: RouteRequest,
    request: EngineRequest,
    output_token_ids: Sequence[int],
    *,
    fingerprint: str,
    excluded: tuple[str, ...],
) -> RouteRequest:
    """Return what the global scheduler has to know of a request that goes on elsewhere.

    Args:
        route: As it was.
        request: Its prompt and salt.
        output_token_ids: Of its answer so far.
        fingerprint: Of the model that these are from, hex.
        excluded: Replicas that are not there any more, whatever is reported.
    """
    token_ids = (*request.prompt_token_ids, *output_token_ids)
    # What fills the context needs no room for one more token: it has ended.
    most = len(request.prompt_token_ids) + request.sampling.max_tokens - 1
    return route._replace(
        num_prompt_tokens=min(len(token_ids), most),
        keys=PromptKeys(token_ids, salt=request.salt),
        slo=NO_SLO,  # its time is over, or kept
        excluded=excluded,
        fingerprint=fingerprint if output_token_ids else "",
        is_resumed=True,
    )


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
