"""The rounds of a keeper: who does them, what is computed again, what is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_fakes import eventually
from prefix_fakes import (
    TOKENS,
    flaky_blocks,
    flaky_store,
    keys_of,
    record,
    replica_info,
    stored_blocks,
)

from cluster.config import CacheConfig, ClusterConfig, GatewayConfig, StoreConfig
from cluster.errors import OverloadedError, UnavailableError
from cluster.gateway.prefix_keeper import KEEPER_LEASES, PrefixKeeper
from cluster.gateway.prefix_record import PrefixRecord
from cluster.gateway.prefixes import Prefixes

SALTS = {"alice": b"a", "bob": b"b"}


async def _nothing() -> None: ...


class Scene:
    """One gateway's keeper; `compute` stores what it computes, unless it is told not to."""

    def __init__(self, records: Any, blocks: Any, gateway_id: str = "g1", **sections: Any):
        self.store = records
        self.blocks = blocks
        self.prefixes = Prefixes(records, GatewayConfig(), model="sluice-demo", vocab_size=4096)
        parts: Any = SimpleNamespace(
            config=ClusterConfig(**sections),
            gateway_id=gateway_id,
            prefixes=self.prefixes,
            authenticator=SimpleNamespace(salt_of=SALTS.get),
            fleet=SimpleNamespace(table=["a replica"]),
            rng=SimpleNamespace(uniform=lambda low, high: (low + high) / 2),
        )
        self.keeper = PrefixKeeper(parts, records, stored_blocks(blocks, replica_info()))
        self.keeper.compute = self.compute
        self.computed: list[str] = []
        self.stores = True
        self.refusal: Exception | None = None
        self.before_compute: Callable[[], Awaitable[object]] = _nothing

    async def compute(self, known: PrefixRecord, salt: bytes, remaining_s: Any) -> None:
        self.computed.append(f"{known.tenant}/{known.name}")
        await self.before_compute()
        if self.refusal is not None:
            raise self.refusal
        if self.stores:
            keys = keys_of(known.token_ids, salt=salt)
            await self.blocks.put_blocks(dict.fromkeys(keys, b"x"), pinned=True)


async def test_round_computes_what_is_missing_and_only_that() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record("one"))
    await scene.prefixes.put(record("two", tenant="bob", token_ids=TOKENS[::-1]))
    await scene.keeper.keep_all()
    assert scene.computed == ["alice/one", "bob/two"]
    await scene.keeper.keep_all()
    assert len(scene.computed) == 2
    assert (await scene.blocks.stats()).num_pinned == 6
    await scene.blocks.flush()
    await scene.keeper.keep_all()
    assert len(scene.computed) == 4


async def test_round_renews_and_pins_what_others_wrote() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record())
    keys = keys_of(TOKENS, salt=b"a")
    await scene.blocks.put_blocks(dict.fromkeys(keys, b"x"))
    await scene.keeper.keep_all()
    assert scene.computed == []
    assert (await scene.blocks.stats()).num_pinned == len(keys)


async def test_one_gateway_does_it_and_another_goes_on_when_it_stops() -> None:
    store, blocks = flaky_store(), flaky_blocks()
    first, second = Scene(store, blocks, "g1"), Scene(store, blocks, "g2")
    await first.prefixes.put(record())
    await second.prefixes.refresh()
    first.stores = second.stores = False
    await first.keeper.keep_all()
    await second.keeper.keep_all()
    assert (len(first.computed), len(second.computed)) == (1, 0)
    await store.drop_lease(KEEPER_LEASES, "g1")
    await second.keeper.keep_all()
    assert len(second.computed) == 1


async def test_what_never_stays_is_computed_ever_more_rarely() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record())
    scene.stores = False
    for _ in range(64):
        await scene.keeper.keep_all()
    assert 3 <= len(scene.computed) <= 7
    scene.computed.clear()
    scene.keeper.wake()
    await scene.keeper.keep_all()
    assert len(scene.computed) == 1, "after a flush nothing is put off"


@pytest.mark.parametrize("cache", [{"host_memory_bytes": 0}, {"prefix_caching": False}])
async def test_what_replicas_never_write_is_not_computed(cache: dict[str, Any]) -> None:
    scene = Scene(flaky_store(), flaky_blocks(), cache=CacheConfig(**cache))
    await scene.prefixes.put(record())
    scene.stores = False
    for _ in range(3):
        await scene.keeper.keep_all()
    assert scene.computed == []
    assert scene.blocks.calls == []


async def _removed_by_another_gateway(scene: Scene, name: str) -> None:
    other = Scene(scene.store, scene.blocks, "g2")
    await other.prefixes.refresh()
    removed = await other.prefixes.remove("alice", name)
    assert removed is not None
    await other.keeper.release(removed)


async def test_prefix_that_is_removed_within_a_round_is_not_pinned_again() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record("one", token_ids=TOKENS[::-1]))
    await scene.prefixes.put(record("two"))
    keys = keys_of(TOKENS, salt=b"a")
    await scene.blocks.put_blocks(dict.fromkeys(keys, b"x"), pinned=True)
    scene.before_compute = partial(_removed_by_another_gateway, scene, "two")
    await scene.keeper.keep_all()
    assert scene.computed == ["alice/one"]
    assert (await scene.blocks.stats()).num_pinned == 3, "those of one"
    assert await scene.blocks.has_blocks(keys) == [True] * 3


async def test_prefix_that_was_removed_since_the_last_look_is_not_pinned_again() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record())
    await scene.keeper.keep_all()
    await _removed_by_another_gateway(scene, "system")
    await scene.keeper.keep_all()
    assert (await scene.blocks.stats()).num_pinned == 0
    assert len(scene.computed) == 1


async def test_keeper_of_long_rounds_stays_the_keeper() -> None:
    scene = Scene(flaky_store(), flaky_blocks(), store=StoreConfig(kv_ttl_s=0.01))
    await scene.prefixes.put(record())

    async def until_renewed() -> None:
        num_before = scene.store.calls.count("put_lease")
        await eventually(lambda: scene.store.calls.count("put_lease") >= num_before + 3)

    scene.before_compute = until_renewed
    await scene.keeper.keep_all()
    assert scene.computed == ["alice/system"]
    assert (await scene.blocks.stats()).num_blocks == 3, "the computing was waited for"


async def test_round_ends_where_another_gateway_has_become_the_keeper() -> None:
    store, blocks = flaky_store(), flaky_blocks()
    scene = Scene(store, blocks, "g2")
    await scene.prefixes.put(record("one"))
    await scene.prefixes.put(record("two", token_ids=TOKENS[::-1]))
    scene.before_compute = lambda: store.put_lease(KEEPER_LEASES, "g1", b"", 60.0)
    await scene.keeper.keep_all()
    assert scene.computed == ["alice/one"]


async def test_flush_wakes_the_keeper_of_another_gateway() -> None:
    store, blocks = flaky_store(), flaky_blocks()
    keeper, flushing = Scene(store, blocks, "g1"), Scene(store, blocks, "g2")
    await keeper.prefixes.put(record())
    await flushing.prefixes.refresh()

    async def is_stored() -> bool:
        return bool((await blocks.stats()).num_blocks == 3)

    keeper.keeper.start()
    try:
        await eventually(is_stored)
        await blocks.flush()
        await flushing.keeper.wake_all()
        await keeper.prefixes.refresh()  # as it does every second
        await eventually(is_stored)
    finally:
        await keeper.keeper.stop()
    assert flushing.computed == []


@pytest.mark.parametrize("refusal", [OverloadedError("full"), RuntimeError("a mistake of ours")])
async def test_refusal_of_one_prefix_does_not_hold_up_the_others(refusal: Exception) -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record("one"))
    await scene.prefixes.put(record("two"))
    scene.refusal = refusal
    await scene.keeper.keep_all()
    assert scene.computed == ["alice/one", "alice/two"]


async def test_store_that_is_down_ends_the_round() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record())
    scene.blocks.is_down = True
    with pytest.raises(UnavailableError):
        await scene.keeper.keep_all()
    assert scene.computed == []


async def test_prefixes_of_a_tenant_or_model_that_is_gone_are_left_alone() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record("one", tenant="carol"))
    await scene.prefixes.put(record("two", model="another"))
    await scene.keeper.keep_all()
    assert scene.computed == []


async def test_release_unpins_but_for_what_others_need() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record("long"))
    await scene.prefixes.put(record("short", token_ids=TOKENS[:20]))
    await scene.keeper.keep_all()
    assert (await scene.blocks.stats()).num_pinned == 3
    await scene.keeper.release(await scene.prefixes.remove("alice", "long"))
    assert (await scene.blocks.stats()).num_pinned == 1


async def test_prefix_is_removed_though_its_blocks_cannot_be_reached(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record())
    await scene.keeper.keep_all()
    scene.blocks.is_down = True
    await _removed_by_another_gateway(scene, "system")
    assert "stay until their pins end" in caplog.text
    scene.blocks.is_down = False
    scene.blocks.calls.clear()
    await scene.keeper.keep_all()
    assert scene.blocks.calls == [], "what keeps a pin alive is not done any more"


@pytest.mark.integration  # it takes the time that it is about
async def test_rounds_renew_pins_before_they_end() -> None:
    store = StoreConfig(kv_ttl_s=1.5)
    scene = Scene(flaky_store(), flaky_blocks(kv_ttl_s=1.5), store=store)
    await scene.prefixes.put(record())
    scene.keeper.start()
    await asyncio.sleep(2.5)
    await scene.keeper.stop()
    assert (await scene.blocks.stats()).num_pinned == 3
    assert scene.computed == ["alice/system"]
    assert scene.blocks.calls.count("touch_blocks") <= 7, "three rounds within the time of a pin"
