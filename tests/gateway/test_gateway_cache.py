"""The service Cache over the wire, in front of leaders that store what is pinned."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import FINGERPRINT, FakeLeader, Stage, eventually, stage
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prefix_fakes import TOKENS, StoringLeader, flaky_blocks, keys_of, record
from tenant_files import KEYS, auth_config, sha256, write_tenants

from cluster.client import AsyncClient
from cluster.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from cluster.gateway import prefix_keeper
from cluster.gateway.identity import Authenticator
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.rpc.sluice.v1 import cache_pb2 as pb
from cluster.rpc.sluice.v1 import cache_pb2_grpc, inference_pb2
from cluster.types import CacheLoad, ReplicaLoad, StoreState

pytestmark = pytest.mark.integration


@pytest.fixture
async def running() -> AsyncIterator[Stage]:
    blocks = flaky_blocks()
    async with stage(StoringLeader(blocks), block_store=blocks) as running:
        yield running


@pytest.fixture
async def client(running: Stage) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.address) as client:
        yield client


def _leader(running: Stage) -> StoringLeader:
    (leader,) = running.leaders
    assert isinstance(leader, StoringLeader)
    return leader


async def test_registered_prefix_is_computed_stored_and_pinned(
    running: Stage, client: AsyncClient
) -> None:
    prefix = await client.register_prefix("system", token_ids=TOKENS)
    assert (prefix.name, prefix.model) == ("system", "sluice-demo")
    assert (prefix.num_tokens, prefix.num_blocks, prefix.num_stored_blocks) == (53, 3, 3)
    (request,) = _leader(running).pinned
    assert request.prompt_token_ids == TOKENS
    assert request.sampling.max_tokens == 1
    assert (await running.blocks.stats()).num_pinned == 3
    assert await client.list_prefixes() == [prefix]


async def test_request_with_a_prefix_gets_its_tokens_first(
    running: Stage, client: AsyncClient
) -> None:
    await client.register_prefix("system", token_ids=TOKENS)
    answer = await client.generate(token_ids=[7], prefix="system", sampling={"max_tokens": 2})
    assert answer.usage.prompt_tokens == len(TOKENS) + 1
    request = _leader(running).submitted[-1]
    assert request.prompt_token_ids == (*TOKENS, 7)
    assert not request.pins_prefix
    events = [e async for e in client.stream("x", prefix="system", sampling={"max_tokens": 1})]
    assert events
    with pytest.raises(NotFoundError, match="'other' is not registered"):
        await client.generate("x", prefix="other")


async def test_text_is_registered_as_requests_tokenize_it(
    running: Stage, client: AsyncClient
) -> None:
    text = "def main():\n    return 0\n"
    prefix = await client.register_prefix("code", text)
    token_ids = tuple(await client.tokenize(text))
    assert prefix.num_tokens == len(token_ids)
    assert _leader(running).pinned[0].prompt_token_ids == token_ids


async def test_name_that_is_taken_is_refused(client: AsyncClient) -> None:
    first = await client.register_prefix("system", token_ids=TOKENS)
    assert await client.register_prefix("system", token_ids=TOKENS) == first
    with pytest.raises(AlreadyExistsError, match="remove it first"):
        await client.register_prefix("system", token_ids=TOKENS[1:])


async def test_removed_prefix_is_gone_and_its_blocks_are_unpinned(
    running: Stage, client: AsyncClient
) -> None:
    await client.register_prefix("system", token_ids=TOKENS)
    await client.remove_prefix("system")
    assert await client.list_prefixes() == []
    stats = await running.blocks.stats()
    assert (stats.num_blocks, stats.num_pinned) == (3, 0)
    with pytest.raises(NotFoundError):
        await client.remove_prefix("system")
    with pytest.raises(NotFoundError):
        await client.generate("x", prefix="system")


async def test_prefix_that_cannot_be_computed_stays_registered(
    running: Stage, client: AsyncClient
) -> None:
    leader = _leader(running)
    leader.refusal = "UNAVAILABLE: the group ends"
    with pytest.raises(UnavailableError, match="the group ends"):
        await client.register_prefix("system", token_ids=TOKENS)
    leader.refusal = ""
    (prefix,) = await client.list_prefixes()
    assert prefix.num_stored_blocks == 0
    assert (await client.register_prefix("system", token_ids=TOKENS)).num_stored_blocks == 3


async def test_flushed_prefix_is_computed_again_by_itself(
    running: Stage, client: AsyncClient
) -> None:
    leader = _leader(running)
    leader.blocks = [1, 2]
    await client.register_prefix("system", token_ids=TOKENS)
    flushed = await client.flush_cache(store=True, replicas=True)
    assert (flushed.num_store_blocks, flushed.num_replica_blocks) == (3, 2)
    assert flushed.failed_replica_ids == ()
    assert leader.num_flushed == 1
    await eventually(lambda: len(leader.pinned) == 2)

    async def is_stored() -> bool:
        return (await client.list_prefixes())[0].num_stored_blocks == 3

    await eventually(is_stored)


async def test_flush_does_what_is_asked_and_no_more(running: Stage, client: AsyncClient) -> None:
    leader = _leader(running)
    await leader.store.put_blocks({b"k" * 26: b"x"})
    assert (await client.flush_cache(replicas=True)).num_store_blocks == 0
    assert (await leader.store.stats()).num_blocks == 1
    assert (await client.flush_cache(store=True)).num_store_blocks == 1
    assert leader.num_flushed == 1
    with pytest.raises(InvalidArgumentError, match="nothing to flush"):
        await client.flush_cache()
    leader.flush_fails = True
    assert (await client.flush_cache(replicas=True)).failed_replica_ids == ("replica-1",)


async def test_stats_are_the_stores_and_each_replicas(running: Stage, client: AsyncClient) -> None:
    await client.register_prefix("system", token_ids=TOKENS)
    tiers = CacheLoad(store_state=StoreState.DEGRADED, num_host_blocks=4, saved_s=1.5)
    load = ReplicaLoad(num_blocks=100, num_free_blocks=60, num_prefix_hit_tokens=9, cache=tiers)
    _leader(running).push_load(load)
    await eventually(lambda: running.server.snapshots()[0].load == load)
    books = await client.cache_stats()
    assert books.store is not None
    assert (books.store.num_blocks, books.store.num_pinned_blocks) == (3, 3)
    assert 0 < books.store.used_bytes <= books.store.max_bytes
    (replica,) = books.replicas
    assert (replica.replica_id, replica.num_free_blocks) == ("replica-1", 60)
    assert replica.num_prefix_hit_tokens == 9
    assert replica.tiers == tiers
    (status,) = (await client.status()).replicas
    assert status.cache == tiers


async def test_inspect_says_what_is_where(running: Stage, client: AsyncClient) -> None:
    leader = _leader(running)
    await client.register_prefix("system", token_ids=TOKENS)
    longer = (*TOKENS, *range(30))
    hashes = block_hashes(longer, 16, fingerprint=FINGERPRINT)
    leader.push(seq=1, added=[router_key(block_hash) for block_hash in hashes[:4]])
    await eventually(lambda: running.server._fleet.index.num_blocks("replica-1") == 4)
    found = await client.inspect_cache(token_ids=longer)
    assert (found.num_tokens, found.num_blocks, found.num_stored_blocks) == (83, 5, 3)
    assert [(on.replica_id, on.num_blocks) for on in found.replicas] == [("replica-1", 4)]
    by_name = await client.inspect_cache(token_ids=range(30), prefix="system")
    assert by_name == found
    alone = await client.inspect_cache(prefix="system")
    assert (alone.num_tokens, alone.num_stored_blocks, alone.store_error) == (53, 3, "")


async def test_store_that_is_down_costs_no_request(running: Stage, client: AsyncClient) -> None:
    await client.register_prefix("system", token_ids=TOKENS)
    running.blocks.is_down = True
    answer = await client.generate("x", prefix="system", sampling={"max_tokens": 1})
    assert answer.usage.prompt_tokens > len(TOKENS)
    (prefix,) = await client.list_prefixes()
    assert prefix.num_stored_blocks == 0
    books = await client.cache_stats()
    assert (books.store, books.store_error) == (None, "the store does not answer")
    found = await client.inspect_cache(prefix="system")
    assert found.store_error == "the store does not answer"
    with pytest.raises(UnavailableError):
        await client.flush_cache(store=True)
    await client.remove_prefix("system")


async def test_cluster_without_stored_blocks_says_so() -> None:
    async with stage(FakeLeader()) as running, AsyncClient(running.address) as client:
        prefix = await client.register_prefix("system", token_ids=TOKENS)
        assert (prefix.num_blocks, prefix.num_stored_blocks) == (3, 0)
        assert "kv_url=off" in (await client.cache_stats()).store_error
        assert "kv_url=off" in (await client.inspect_cache("x")).store_error
        with pytest.raises(InvalidArgumentError, match="kv_url=off"):
            await client.flush_cache(store=True)


async def test_prefix_lost_with_the_blocks_is_computed_again(
    running: Stage, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_keeper, "_RETRY_S", 0.05)
    leader, blocks = _leader(running), running.blocks
    await client.register_prefix("system", token_ids=TOKENS)
    blocks.is_down = True
    running.server._keeper.wake()
    await eventually(lambda: blocks.calls.count("touch_blocks") > 1)
    blocks.is_down = False
    await blocks.flush()
    await eventually(lambda: len(leader.pinned) == 2)

    async def is_stored() -> bool:
        return all(await blocks.has_blocks(keys_of(TOKENS)))

    await eventually(is_stored)  # the leader writes after it was asked


async def test_tenants_share_neither_names_nor_blocks(tmp_path: Path) -> None:
    blocks = flaky_blocks()
    auth = auth_config(tmp_path)
    salt = Authenticator(auth).salt_of("alice")
    async with stage(StoringLeader(blocks), block_store=blocks, auth=auth.model_dump()) as running:
        alice, carol, root = (
            AsyncClient(running.address, api_key=KEYS[name]) for name in ("alice", "carol", "root")
        )
        async with alice, carol, root:
            await alice.register_prefix("system", token_ids=TOKENS)
            assert _leader(running).pinned[0].salt == salt
            assert (await alice.inspect_cache(prefix="system")).num_stored_blocks == 3
            assert await carol.list_prefixes() == []
            for call in (
                carol.generate("x", prefix="system"),
                carol.inspect_cache(prefix="system"),
                carol.remove_prefix("system"),
            ):
                with pytest.raises(NotFoundError):
                    await call
            assert (await carol.inspect_cache(token_ids=TOKENS)).num_stored_blocks == 0
            for call in (carol.cache_stats(), carol.flush_cache(store=True)):
                with pytest.raises(PermissionDeniedError, match="'carol' is no administrator"):
                    await call
            assert (await root.cache_stats()).store is not None
            assert (await root.flush_cache(store=True)).num_store_blocks == 3


async def test_prefix_beyond_its_tenants_limits_is_not_registered(tmp_path: Path) -> None:
    tenant = {"name": "alice", "key_sha256": [sha256(KEYS["alice"])], "tokens_per_minute": 54}
    auth, blocks = {"tenants_file": str(write_tenants(tmp_path, [tenant]))}, flaky_blocks()
    async with stage(StoringLeader(blocks), block_store=blocks, auth=auth) as running:
        async with AsyncClient(running.address, api_key=KEYS["alice"]) as alice:
            with pytest.raises(InvalidArgumentError, match="tokens_per_minute=54"):
                await alice.register_prefix("long", token_ids=range(100, 300))
            assert await alice.list_prefixes() == []
            await alice.register_prefix("system", token_ids=TOKENS)  # 53 and one after them
            with pytest.raises(OverloadedError, match="tokens_per_minute=54"):
                await alice.register_prefix("other", token_ids=TOKENS[1:])
            assert [prefix.name for prefix in await alice.list_prefixes()] == ["system"]
        assert len(_leader(running).pinned) == 1


async def test_registry_that_is_full_costs_no_tokens(tmp_path: Path) -> None:
    key = KEYS["alice"]
    tenant = {"name": "alice", "key_sha256": [sha256(key)], "tokens_per_minute": 200}
    auth = {"tenants_file": str(write_tenants(tmp_path, [tenant]))}
    one_at_most = stage(FakeLeader(), auth=auth, max_prefixes=1)
    async with one_at_most as running, AsyncClient(running.address, api_key=key) as alice:
        await alice.register_prefix("system", token_ids=TOKENS)
        for _ in range(5):
            with pytest.raises(OverloadedError, match=r"limit=1 \(gateway.max_prefixes"):
                await alice.register_prefix("other", token_ids=TOKENS)
            await eventually(lambda: not running.server._rate_limiter._tasks)
        await alice.remove_prefix("system")
        await alice.register_prefix("other", token_ids=TOKENS)


async def test_prefix_is_computed_with_its_tenants_weight(tmp_path: Path) -> None:
    tenant = {"name": "alice", "key_sha256": [sha256(KEYS["alice"])], "weight": 2.5}
    auth, blocks = {"tenants_file": str(write_tenants(tmp_path, [tenant]))}, flaky_blocks()
    async with stage(StoringLeader(blocks), block_store=blocks, auth=auth) as running:
        async with AsyncClient(running.address, api_key=KEYS["alice"]) as alice:
            await alice.register_prefix("system", token_ids=TOKENS)
        assert [request.tenant_weight for request in _leader(running).pinned] == [2.5]


async def test_administrator_lists_and_removes_prefixes_of_tenants_that_are_gone(
    tmp_path: Path,
) -> None:
    auth = auth_config(tmp_path)
    async with stage(FakeLeader(), auth=auth.model_dump()) as running:
        alice, carol, root = (
            AsyncClient(running.address, api_key=KEYS[name]) for name in ("alice", "carol", "root")
        )
        async with alice, carol, root:
            await running.server._prefixes.put(record("left", tenant="gone"))
            await running.server._prefixes.put(record("unnamed", tenant=""))
            own = await carol.register_prefix("own", token_ids=TOKENS)
            assert await carol.list_prefixes(tenant="carol") == [own]
            for owner in ("alice", "gone", "*", ""):
                with pytest.raises(PermissionDeniedError, match="'carol' is no administrator"):
                    await carol.list_prefixes(tenant=owner)
                with pytest.raises(PermissionDeniedError):
                    await carol.remove_prefix("left", tenant=owner)
            assert await root.list_prefixes() == []
            listed = await root.list_prefixes(tenant="*")
            assert [(p.tenant, p.name) for p in listed] == [
                ("", "unnamed"),
                ("carol", "own"),
                ("gone", "left"),
            ]
            await root.remove_prefix("left", tenant="gone")
            await root.remove_prefix("unnamed", tenant="")
            assert await root.list_prefixes(tenant="gone") == []
            with pytest.raises(NotFoundError):
                await root.remove_prefix("own")
            assert await root.list_prefixes(tenant="*") == [own]


async def test_tenant_is_not_told_what_the_store_says_of_itself(tmp_path: Path) -> None:
    auth, blocks = auth_config(tmp_path), flaky_blocks()
    blocks.is_down, blocks.reason = True, "redis 10.0.0.7:6379: NOPERM user sluice"
    async with stage(FakeLeader(), block_store=blocks, auth=auth.model_dump()) as running:
        carol, root = (AsyncClient(running.address, api_key=KEYS[n]) for n in ("carol", "root"))
        async with carol, root:
            told = [await caller.inspect_cache(token_ids=TOKENS) for caller in (carol, root)]
            errors = [answer.store_error for answer in told]
            assert errors == ["the store does not answer", blocks.reason]
            assert (await root.cache_stats()).store_error == blocks.reason


async def test_every_method_asks_who_calls(tmp_path: Path) -> None:
    auth = auth_config(tmp_path).model_dump()
    async with (
        stage(FakeLeader(), auth=auth) as running,
        AsyncClient(running.address) as nobody,
        AsyncClient(running.address, api_key="sk-wrong") as stranger,
    ):
        for client in (nobody, stranger):
            for call in (
                client.register_prefix("a", "x"),
                client.list_prefixes(),
                client.remove_prefix("a"),
                client.cache_stats(),
                client.flush_cache(store=True),
                client.inspect_cache("x"),
            ):
                with pytest.raises(UnauthenticatedError):
                    await call


def _register(**fields: Any) -> tuple[str, Any]:
    return "RegisterPrefix", pb.RegisterPrefixRequest(**{"name": "a", "text": "x", **fields})


def _ids(ids: Any) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=ids)


BAD = {
    "no name": (_register(name=""), "name"),
    "name with a slash": (_register(name="a/b"), "name"),
    "name with a newline": (_register(name="a\n"), "name"),
    "long name": (_register(name="a" * 129), "name"),
    "no prompt": (("RegisterPrefix", pb.RegisterPrefixRequest(name="a")), "prompt"),
    "empty text": (_register(text=""), "text"),
    "token id": (_register(token_ids=_ids([1, 4096])), "token_ids.ids[1]"),
    "too long for prefixes": (_register(token_ids=_ids([1] * 101)), "token_ids"),
    "too long for the model": (_register(token_ids=_ids([1] * 64)), "token_ids"),
    "nothing to inspect": (("InspectCache", pb.InspectCacheRequest()), "prompt"),
    "too long to inspect": (
        ("InspectCache", pb.InspectCacheRequest(token_ids=_ids([1] * 65))),
        "token_ids",
    ),
    "nothing to flush": (("FlushCache", pb.FlushCacheRequest()), "replicas"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_names_its_field(case: str) -> None:
    (method, request), field = BAD[case]
    async with (
        stage(FakeLeader(max_model_len=64), max_prefix_tokens=100) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = cache_pb2_grpc.CacheStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _field(caught.value) == field


@pytest.mark.parametrize(
    ("method", "data", "field"),
    [
        ("RegisterPrefix", b"\x0a\x02\xff\xfe", "name"),
        ("InspectCache", b"\x22\x02\xff\xfe", "prefix"),
        ("RemovePrefix", b"\x08", ""),
    ],
)
async def test_bytes_that_are_no_message_are_refused(method: str, data: bytes, field: str) -> None:
    async with stage() as running, grpc.aio.insecure_channel(running.address) as channel:
        call = channel.unary_unary(f"/sluice.v1.Cache/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _field(caught.value) == field


def _field(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    assert status is not None
    violation = error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(violation)
    return violation.field_violations[0].field if violation.field_violations else ""


@pytest.mark.parametrize("cache", [{"host_memory_bytes": 0}, {"prefix_caching": False}])
async def test_registering_does_not_wait_for_what_replicas_never_write(
    cache: dict[str, Any],
) -> None:
    blocks = flaky_blocks()
    async with (
        stage(FakeLeader(), block_store=blocks, cache=cache) as running,
        AsyncClient(running.address) as client,
    ):
        prefix = await client.register_prefix("system", token_ids=TOKENS)
    assert (prefix.num_blocks, prefix.num_stored_blocks) == (3, 0)
    assert blocks.calls.count("has_blocks") == 1


async def test_registering_waits_no_longer_than_its_deadline() -> None:
    leader = FakeLeader()  # stores nothing
    async with (
        stage(leader, block_store=flaky_blocks()) as running,
        AsyncClient(running.address) as client,
    ):
        prefix = await client.register_prefix("system", token_ids=TOKENS, timeout_s=1.0)
    assert prefix.num_stored_blocks == 0
