from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from cluster.client import (
    AsyncClient,
    CacheBooks,
    CachedOn,
    CacheLoad,
    Client,
    ClusterState,
    Finished,
    Flushed,
    Inspected,
    Prefix,
    Queued,
    ReplicaCache,
    Running,
    ScoredToken,
    TextDelta,
    Timings,
    Tls,
    Usage,
)
from cluster.errors import (
    ConfigError,
    UnavailableError,
)
from cluster.rpc.sluice.v1 import cache_pb2, cache_pb2_grpc
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.types import SamplingParams, StoreState
from tests.client.client_fakes import EVENTS, FakeInference, serving

pytestmark = pytest.mark.integration

READ = [
    Queued(2),
    Running("a"),
    TextDelta("hello", (5, 6), (ScoredToken(5, "he", -0.5),)),
    Finished("stop", Usage(3, 2, 1), Timings(0.25, 0.5, 1.0)),  # type: ignore[arg-type]
]


@pytest.fixture
def server() -> Iterator[tuple[str, FakeInference]]:
    with serving() as served:
        yield served


def _stream(address: str, is_async: bool) -> list[Any]:
    """Collect a stream through either client."""
    if not is_async:
        with Client(address) as client:
            return list(client.stream("x"))

    async def collect() -> list[Any]:
        async with AsyncClient(address) as client:
            return [event async for event in client.stream("x")]

    return asyncio.run(collect())


@pytest.mark.parametrize("is_async", [False, True])
def test_stream_yields_events(server: tuple[str, FakeInference], is_async: bool) -> None:
    assert _stream(server[0], is_async) == READ


@pytest.mark.parametrize("is_async", [False, True])
def test_stream_without_end_is_an_error(server: tuple[str, FakeInference], is_async: bool) -> None:
    server[1].events = EVENTS[:3]
    with pytest.raises(UnavailableError, match="cut off after 3 events"):
        _stream(server[0], is_async)


@pytest.mark.parametrize("is_async", [False, True])
def test_lost_event_is_an_error(server: tuple[str, FakeInference], is_async: bool) -> None:
    server[1].events = EVENTS[:1] + EVENTS[2:]
    with pytest.raises(UnavailableError, match="event 1 was lost"):
        _stream(server[0], is_async)


def test_closed_stream_cancels_the_request(server: tuple[str, FakeInference]) -> None:
    server[1].events, server[1].is_hanging = EVENTS[:2], True
    with Client(server[0]) as client:
        events = client.stream("x")
        assert next(events) == Queued(2)
        events.close()  # type: ignore[attr-defined]
        assert server[1].ended.wait(5)


def test_generate_sends_what_is_given_and_reads_the_answer(
    server: tuple[str, FakeInference],
) -> None:
    address, servicer = server
    with Client(address, metadata=[("tenant", "t")]) as client:
        done = client.generate("x", model="m", sampling={"max_tokens": 3}, request_id="r")
        client.generate(token_ids=[1, 2], sampling=SamplingParams(seed=0, num_logprobs=2))
        assert client.tokenize("four") == [4]
    assert (done.text, done.token_ids, done.finish_reason) == ("hello", (5, 6), "stop")
    assert done.usage == Usage(3, 2, 1)
    assert servicer.metadata["tenant"] == "t"
    first, second = servicer.requests
    assert first == pb.GenerateRequest(
        request_id="r", model="m", text="x", sampling=pb.SamplingParams(max_tokens=3)
    )
    assert list(second.token_ids.ids) == [1, 2]
    assert second.sampling.HasField("seed") and second.sampling.logprobs == 2


def test_status_names_states_in_lower_case(server: tuple[str, FakeInference]) -> None:
    with Client(server[0]) as client:
        state = client.status()
    assert isinstance(state, ClusterState)
    assert (state.gateway_id, state.num_inflight) == ("g", 4)
    assert (state.replicas[0].state, state.replicas[0].tp) == ("ready", 2)


def test_nobody_there_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.list_models()


def test_missing_ca_file_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"/none\.pem"):
        Client("127.0.0.1:1", tls=Tls("/none.pem"))


class _Cache(cache_pb2_grpc.CacheServicer):
    """Answers, and keeps what it was asked and with what credentials."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.authorization: list[str] = []

    def _keep(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.authorization.append(dict(context.invocation_metadata()).get("authorization", ""))

    def RegisterPrefix(self, request: Any, context: Any) -> Any:
        self._keep(request, context)
        return cache_pb2.RegisterPrefixResponse(
            prefix=cache_pb2.Prefix(name=request.name, model="m", num_tokens=2)
        )

    def ListPrefixes(self, request: Any, context: Any) -> Any:
        self._keep(request, context)
        return cache_pb2.ListPrefixesResponse(
            prefixes=[cache_pb2.Prefix(name="a", num_blocks=3, tenant="t")]
        )

    def RemovePrefix(self, request: Any, context: Any) -> Any:
        self._keep(request, context)
        return cache_pb2.RemovePrefixResponse()

    def CacheStats(self, request: Any, context: Any) -> Any:
        self._keep(request, context)
        tiers = pb.CacheTiers(store_state=pb.STORE_STATE_EXACT, num_host_slots=7, saved_s=0.5)
        return cache_pb2.CacheStatsResponse(
            store_error="away", replicas=[cache_pb2.ReplicaCache(replica_id="r", tiers=tiers)]
        )

    def FlushCache(self, request: Any, context: Any) -> Any:
        self._keep(request, context)
        return cache_pb2.FlushCacheResponse(num_store_blocks=5, failed_replica_ids=["r"])

    def InspectCache(self, request: Any, context: Any) -> Any:
        self._keep(request, context)
        return cache_pb2.InspectCacheResponse(
            num_tokens=9, replicas=[cache_pb2.CachedOn(replica_id="r", num_blocks=2)]
        )


@pytest.fixture
def cache_server() -> Iterator[tuple[str, _Cache]]:
    servicer = _Cache()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(2))
    cache_pb2_grpc.add_CacheServicer_to_server(servicer, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}", servicer
    grpc_server.stop(None).wait(5)


def _ask_all(client: Any) -> list[Any]:
    return [
        client.register_prefix("a", "x", model="m"),
        client.register_prefix("b", token_ids=[1, 2]),
        client.list_prefixes(),
        client.list_prefixes(tenant="*"),
        client.list_prefixes(tenant=""),
        client.remove_prefix("a"),
        client.remove_prefix("a", tenant="gone"),
        client.cache_stats(),
        client.flush_cache(store=True),
        client.inspect_cache("y", prefix="a"),
        client.inspect_cache(prefix="a"),
    ]


@pytest.mark.parametrize("is_async", [False, True])
def test_cache_service_is_asked_and_read(cache_server: tuple[str, _Cache], is_async: bool) -> None:
    address, servicer = cache_server
    if is_async:

        async def ask() -> list[Any]:
            async with AsyncClient(address, api_key="sk-a") as client:
                return [await answer for answer in _ask_all(client)]

        answers = asyncio.run(ask())
    else:
        with Client(address, api_key="sk-a") as client:
            answers = _ask_all(client)
    assert answers == [
        Prefix("a", "m", 2, 0, 0, 0.0),
        Prefix("b", "m", 2, 0, 0, 0.0),
        *[[Prefix("a", "", 0, 3, 0, 0.0, "t")]] * 3,
        *[None] * 2,
        CacheBooks(
            None,
            "away",
            (ReplicaCache("r", 0, 0, 0, 0, CacheLoad(StoreState.EXACT, 7, saved_s=0.5)),),
        ),
        Flushed(0, 5, ("r",)),
        Inspected(9, 0, 0, "", (CachedOn("r", 2),)),
        Inspected(9, 0, 0, "", (CachedOn("r", 2),)),
    ]
    assert servicer.requests == [
        cache_pb2.RegisterPrefixRequest(name="a", text="x", model="m"),
        cache_pb2.RegisterPrefixRequest(name="b", token_ids=pb.TokenIds(ids=[1, 2])),
        cache_pb2.ListPrefixesRequest(),
        cache_pb2.ListPrefixesRequest(tenant="*"),
        cache_pb2.ListPrefixesRequest(tenant=""),
        cache_pb2.RemovePrefixRequest(name="a"),
        cache_pb2.RemovePrefixRequest(name="a", tenant="gone"),
        cache_pb2.CacheStatsRequest(),
        cache_pb2.FlushCacheRequest(store=True),
        cache_pb2.InspectCacheRequest(text="y", prefix="a"),
        cache_pb2.InspectCacheRequest(prefix="a"),
    ]
    assert set(servicer.authorization) == {"Bearer sk-a"}


def test_request_names_its_prefix_and_shows_the_key(server: tuple[str, FakeInference]) -> None:
    address, servicer = server
    with Client(address, api_key="sk-a", metadata=[("x", "y")]) as client:
        client.generate("x", prefix="system")
        list(client.stream("x", prefix="system"))
    assert [request.prefix for request in servicer.requests] == ["system", "system"]
    assert servicer.metadata["authorization"] == "Bearer sk-a"
    assert servicer.metadata["x"] == "y"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_key_over_a_network_without_tls_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="without TLS") as caught:
        kind("gateway.example:9000", api_key="sk-secret")
    assert "sk-secret" not in str(caught.value)
