"""The service Cache in plain Python: what clients say, and what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cluster.errors import InvalidArgumentError
from cluster.rpc.sluice.v1 import cache_pb2, inference_pb2
from cluster.types import CacheLoad, StoreState

_STORE_STATES = {
    int(inference_pb2.STORE_STATE_EXACT): StoreState.EXACT,
    int(inference_pb2.STORE_STATE_DEGRADED): StoreState.DEGRADED,
}
_HasPrompt = (
    inference_pb2.GenerateRequest | cache_pb2.RegisterPrefixRequest | cache_pb2.InspectCacheRequest
)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A registered prefix."""

    name: str
    model: str
    num_tokens: int
    num_blocks: int  # full ones: what is shared
    num_stored_blocks: int  # of these in the store, from the first one on
    registered_at_s: float  # since 1970
    tenant: str = ""  # whose it is; empty where there were no tenants


@dataclass(frozen=True, slots=True)
class StoreBooks:
    """The books of the store of KV blocks."""

    used_bytes: int  # counted in the budget
    max_bytes: int  # the budget
    num_blocks: int
    num_pinned_blocks: int  # of registered prefixes
    num_evicted: int  # since the store was empty


@dataclass(frozen=True, slots=True)
class ReplicaCache:
    """The tiers of one replica group."""

    replica_id: str
    num_blocks: int  # of its device
    num_free_blocks: int  # of these, free or evictable
    num_prefix_query_tokens: int  # looked up since start
    num_prefix_hit_tokens: int  # of these, found in any tier
    tiers: CacheLoad  # below the device


@dataclass(frozen=True, slots=True)
class CacheBooks:
    """The store's books and each replica's tiers."""

    store: StoreBooks | None  # None where there is none, or it does not answer
    store_error: str  # why it is None
    replicas: tuple[ReplicaCache, ...]  # by id


@dataclass(frozen=True, slots=True)
class Flushed:
    """What was forgotten."""

    num_replica_blocks: int
    num_store_blocks: int
    failed_replica_ids: tuple[str, ...]  # could not be asked


@dataclass(frozen=True, slots=True)
class CachedOn:
    """How much of a prompt one replica has."""

    replica_id: str
    num_blocks: int  # leading ones, on its device or in its host memory


@dataclass(frozen=True, slots=True)
class Inspected:
    """Where a prompt is cached."""

    num_tokens: int
    num_blocks: int  # full ones
    num_stored_blocks: int  # leading ones in the store
    store_error: str  # why the store could not be asked; empty where it could
    replicas: tuple[CachedOn, ...]  # by id


def set_prompt(message: _HasPrompt, text: str | None, token_ids: Sequence[int] | None) -> None:
    """Write a prompt into a message.

    Raises:
        InvalidArgumentError: Text and token ids are both there or both missing, or cannot be
            written down.
    """
    if (text is None) == (token_ids is None):
        raise InvalidArgumentError("give either prompt or token_ids", field="prompt")
    field = "text" if token_ids is None else "token_ids"
    try:
        if token_ids is None:
            message.text = text or ""
        else:
            message.token_ids.SetInParent()
            message.token_ids.ids.extend(token_ids)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{field}: {error}", field=field) from error


def register_request(
    name: str, text: str | None, token_ids: Sequence[int] | None, model: str
) -> cache_pb2.RegisterPrefixRequest:
    """Return the message that registers a prefix.

    Raises:
        InvalidArgumentError: It cannot be written down.
    """
    check_text("name", name)
    check_text("model", model)
    message = cache_pb2.RegisterPrefixRequest(name=name, model=model)
    set_prompt(message, text, token_ids)
    return message


def inspect_request(
    text: str | None, token_ids: Sequence[int] | None, prefix: str, model: str
) -> cache_pb2.InspectCacheRequest:
    """Return the message that asks where a prompt is cached.

    Raises:
        InvalidArgumentError: It cannot be written down, or there is nothing to look for.
    """
    check_text("prefix", prefix)
    check_text("model", model)
    message = cache_pb2.InspectCacheRequest(prefix=prefix, model=model)
    if not prefix or text is not None or token_ids is not None:
        set_prompt(message, text, token_ids)
    return message


def list_request(tenant: str | None) -> cache_pb2.ListPrefixesRequest:
    """Return the message that asks for prefixes; None is the caller's own.

    Raises:
        InvalidArgumentError: It cannot be written down.
    """
    check_text("tenant", tenant or "")
    return cache_pb2.ListPrefixesRequest(tenant=tenant)


def remove_request(name: str, tenant: str | None = None) -> cache_pb2.RemovePrefixRequest:
    """Return the message that forgets a prefix; the tenant None is the caller.

    Raises:
        InvalidArgumentError: It cannot be written down.
    """
    check_text("name", name)
    check_text("tenant", tenant or "")
    return cache_pb2.RemovePrefixRequest(name=name, tenant=tenant)


def check_text(field: str, value: str) -> None:
    """Raise unless a text can be sent: half a character, as of a badly encoded argument, cannot.

    Raises:
        InvalidArgumentError: It is no Unicode.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{field} is no text: {error.reason}", field=field) from error


def prefix_from_proto(message: cache_pb2.Prefix) -> Prefix:
    """Return one prefix."""
    return Prefix(**{field.name: getattr(message, field.name) for field in fields(Prefix)})


def prefixes_from_proto(message: cache_pb2.ListPrefixesResponse) -> list[Prefix]:
    """Return the prefixes, by tenant and name."""
    return [prefix_from_proto(prefix) for prefix in message.prefixes]


def books_from_proto(message: cache_pb2.CacheStatsResponse) -> CacheBooks:
    """Return the books."""
    books = {field.name: getattr(message.store, field.name) for field in fields(StoreBooks)}
    return CacheBooks(
        store=StoreBooks(**books) if message.HasField("store") else None,
        store_error=message.store_error,
        replicas=tuple(_replica(replica) for replica in message.replicas),
    )


def flushed_from_proto(message: cache_pb2.FlushCacheResponse) -> Flushed:
    """Return what was forgotten."""
    return Flushed(
        message.num_replica_blocks, message.num_store_blocks, tuple(message.failed_replica_ids)
    )


def inspected_from_proto(message: cache_pb2.InspectCacheResponse) -> Inspected:
    """Return where a prompt is cached."""
    return Inspected(
        num_tokens=message.num_tokens,
        num_blocks=message.num_blocks,
        num_stored_blocks=message.num_stored_blocks,
        store_error=message.store_error,
        replicas=tuple(CachedOn(found.replica_id, found.num_blocks) for found in message.replicas),
    )


def tiers_from_proto(message: inference_pb2.CacheTiers) -> CacheLoad:
    """Return the tiers of a replica; a state that this version does not know is OFF."""
    values = {field.name: getattr(message, field.name) for field in fields(CacheLoad)}
    state = _STORE_STATES.get(message.store_state, StoreState.OFF)
    return CacheLoad(**values | {"store_state": state})


def _replica(message: cache_pb2.ReplicaCache) -> ReplicaCache:
    values = {field.name: getattr(message, field.name) for field in fields(ReplicaCache)}
    return ReplicaCache(**values | {"tiers": tiers_from_proto(message.tiers)})
