"""Every unary call of the public API: what is sent, and how the answer is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.rpc import public, public_cache, public_route
from cluster.rpc.public import ClusterState, ServedModel
from cluster.rpc.public_cache import CacheBooks, Flushed, Inspected, Prefix
from cluster.rpc.public_route import Explanation
from cluster.rpc.sluice.v1 import cache_pb2, inference_pb2

GENERATE_TIMEOUT_S = 600.0
QUERY_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 60.0  # a store is emptied in small steps

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Query(Generic[Answer]):
    """One call, for a client of either kind."""

    method: str  # as in the proto
    request: Any
    read: Callable[[Any], Answer]
    timeout_s: float = QUERY_TIMEOUT_S
    is_read: bool = True  # changes nothing, so it may be made twice


def tokenize(text: str, model: str) -> Query[list[int]]:
    """Ask for the token ids of a text."""
    request = inference_pb2.TokenizeRequest(model=model, text=text)
    return Query("Tokenize", request, lambda answer: list(answer.token_ids))


def list_models() -> Query[list[ServedModel]]:
    """Ask for the models."""
    return Query("ListModels", inference_pb2.ListModelsRequest(), public.models_from_proto)


def status() -> Query[ClusterState]:
    """Ask for the replica groups and their load."""
    return Query("ClusterStatus", inference_pb2.ClusterStatusRequest(), public.cluster_from_proto)


def explain(request_id: str) -> Query[Explanation]:
    """Ask why a request went where it went."""
    public_cache.check_text("request_id", request_id)
    request = inference_pb2.ExplainRequest(request_id=request_id)
    return Query("Explain", request, public_route.explanation_from_proto)


def drain_replica(replica_id: str) -> Query[int]:
    """Make a replica leave."""
    public_cache.check_text("replica_id", replica_id)
    request = inference_pb2.DrainReplicaRequest(replica_id=replica_id)
    return Query("DrainReplica", request, lambda answer: int(answer.num_requests), is_read=False)


def register_prefix(
    name: str,
    text: str | None,
    token_ids: Sequence[int] | None,
    *,
    model: str,
    timeout_s: float,
) -> Query[Prefix]:
    """Register a prefix."""
    request = public_cache.register_request(name, text, token_ids, model)
    return Query(
        "RegisterPrefix",
        request,
        lambda answer: public_cache.prefix_from_proto(answer.prefix),
        timeout_s,
        is_read=False,
    )


def list_prefixes(tenant: str | None) -> Query[list[Prefix]]:
    """Ask for the prefixes of a tenant, of the caller, or of "*"."""
    request = public_cache.list_request(tenant)
    return Query("ListPrefixes", request, public_cache.prefixes_from_proto)


def remove_prefix(name: str, tenant: str | None) -> Query[None]:
    """Forget a prefix."""
    request = public_cache.remove_request(name, tenant)
    return Query("RemovePrefix", request, lambda answer: None, is_read=False)


def cache_stats() -> Query[CacheBooks]:
    """Ask for the books of the store and of each replica's tiers."""
    return Query("CacheStats", cache_pb2.CacheStatsRequest(), public_cache.books_from_proto)


def flush_cache(*, replicas: bool, store: bool) -> Query[Flushed]:
    """Empty caches."""
    request = cache_pb2.FlushCacheRequest(replicas=replicas, store=store)
    return Query(
        "FlushCache", request, public_cache.flushed_from_proto, FLUSH_TIMEOUT_S, is_read=False
    )


def inspect_cache(
    text: str | None, token_ids: Sequence[int] | None, *, prefix: str, model: str
) -> Query[Inspected]:
    """Ask where a prompt is cached."""
    request = public_cache.inspect_request(text, token_ids, prefix, model)
    return Query("InspectCache", request, public_cache.inspected_from_proto)
