"""Every unary call of the public API: what is sent, and how the answer is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.rpc import public, public_cache, public_route
from cluster.rpc.public import ClusterState, Completion, ServedModel
from cluster.rpc.public_cache import CacheBooks, Flushed, Inspected, Prefix
from cluster.rpc.public_route import Explanation
from cluster.rpc.sluice.v1 import cache_pb2, inference_pb2
from cluster.types import SamplingParams

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


def generate(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    *,
    model: str = "",
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    timeout_s: float = GENERATE_TIMEOUT_S,
    request_id: str = "",
    prefix: str = "",
    **route: Any,
) -> Query[Completion]:
    """Ask for a whole completion; `route` is what `public_route.set_route` takes."""
    request = public.generate_request(
        prompt, token_ids, model=model, sampling=sampling, request_id=request_id, prefix=prefix
    )
    public_route.set_route(request, **route)
    return Query("Generate", request, public.completion_from_proto, timeout_s)


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
    )


def list_prefixes(tenant: str | None) -> Query[list[Prefix]]:
    """Ask for the prefixes of a tenant, of the caller, or of "*"."""
    request = public_cache.list_request(tenant)
    return Query("ListPrefixes", request, public_cache.prefixes_from_proto)


def remove_prefix(name: str, tenant: str | None) -> Query[None]:
    """Forget a prefix."""
    return Query("RemovePrefix", public_cache.remove_request(name, tenant), lambda answer: None)


def cache_stats() -> Query[CacheBooks]:
    """Ask for the books of the store and of each replica's tiers."""
    return Query("CacheStats", cache_pb2.CacheStatsRequest(), public_cache.books_from_proto)


def flush_cache(*, replicas: bool, store: bool) -> Query[Flushed]:
    """Empty caches."""
    request = cache_pb2.FlushCacheRequest(replicas=replicas, store=store)
    return Query("FlushCache", request, public_cache.flushed_from_proto, FLUSH_TIMEOUT_S)


def inspect_cache(
    text: str | None, token_ids: Sequence[int] | None, *, prefix: str, model: str
) -> Query[Inspected]:
    """Ask where a prompt is cached."""
    request = public_cache.inspect_request(text, token_ids, prefix, model)
    return Query("InspectCache", request, public_cache.inspected_from_proto)
