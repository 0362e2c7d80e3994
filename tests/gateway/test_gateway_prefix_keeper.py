"""The rounds of a keeper: who does them, what is computed again, what is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prefix_fakes import (
    TOKENS,
    flaky_blocks,
    flaky_store,
    keys_of,
    record,
    replica_info,
    stored_blocks,
)

from cluster.config import ClusterConfig, GatewayConfig, StoreConfig
from cluster.errors import OverloadedError, UnavailableError
from cluster.gateway.prefix_keeper import KEEPER_LEASES, PrefixKeeper
from cluster.gateway.prefix_record import PrefixRecord
from cluster.gateway.prefixes import Prefixes

SALTS = {"alice": b"a", "bob": b"b"}


class Scene:
    """One gateway's keeper; `compute` stores what it computes, unless it is told not to."""

    def __init__(self, store: Any, blocks: Any, gateway_id: str = "g1", kv_ttl_s: float = 3600):
        self.blocks = blocks
        self.prefixes = Prefixes(store, GatewayConfig(), model="sluice-demo", vocab_size=4096)
        parts: Any = SimpleNamespace(
            config=ClusterConfig(store=StoreConfig(kv_ttl_s=kv_ttl_s)),
            gateway_id=gateway_id,
            prefixes=self.prefixes,
            authenticator=SimpleNamespace(salt_of=SALTS.get),
            fleet=SimpleNamespace(table=["a replica"]),
        )
        self.keeper = PrefixKeeper(parts, store, stored_blocks(blocks, replica_info()))
        self.keeper.compute = self.compute
        self.computed: list[str] = []
        self.stores = True
        self.refusal: Exception | None = None

    async def compute(self, known: PrefixRecord, salt: bytes, remaining_s: Any) -> None:
        self.computed.append(f"{known.tenant}/{known.name}")
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


async def test_refusal_of_one_prefix_does_not_hold_up_the_others() -> None:
    scene = Scene(flaky_store(), flaky_blocks())
    await scene.prefixes.put(record("one"))
    await scene.prefixes.put(record("two"))
    scene.refusal = OverloadedError("full")
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
    scene.blocks.is_down = True
    await scene.keeper.release(await scene.prefixes.remove("alice", "short"))


@pytest.mark.parametrize(("kv_ttl_s", "interval_s"), [(3600.0, 30.0), (9.0, 3.0)])
def test_rounds_come_before_blocks_expire(kv_ttl_s: float, interval_s: float) -> None:
    scene = Scene(flaky_store(), flaky_blocks(), kv_ttl_s=kv_ttl_s)
    assert scene.keeper._interval_s == interval_s
