"""The set of registered prefixes: whose they are, and what a store's failures do to it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from prefix_fakes import MODEL, TOKENS, flaky_store, record

from cluster.config import GatewayConfig
from cluster.errors import (
    AlreadyExistsError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from cluster.gateway.identity import Caller
from cluster.gateway.prefix_record import PREFIX_RECORDS, encode_record, record_key
from cluster.gateway.prefixes import Prefixes

ALICE, BOB = Caller("alice", b"a", False), Caller("bob", b"b", False)


def _prefixes(store: Any, **limits: int) -> Prefixes:
    return Prefixes(store, GatewayConfig(**limits), model=MODEL, vocab_size=4096)


async def test_prefix_belongs_to_the_tenant_who_registered_it() -> None:
    prefixes = _prefixes(flaky_store())
    await prefixes.put(record())
    assert await prefixes.tokens_of(ALICE, "system", "") == TOKENS
    assert await prefixes.tokens_of(ALICE, "system", MODEL) == TOKENS
    with pytest.raises(NotFoundError, match="'system' is not registered"):
        await prefixes.tokens_of(BOB, "system", "")
    assert prefixes.of_tenant("bob") == []
    with pytest.raises(NotFoundError):
        await prefixes.remove("bob", "system")
    assert await prefixes.tokens_of(ALICE, "system", "") == TOKENS


async def test_two_tenants_use_one_name_for_two_prefixes() -> None:
    prefixes = _prefixes(flaky_store())
    await prefixes.put(record())
    await prefixes.put(record(tenant="bob", token_ids=(7, 8)))
    assert await prefixes.tokens_of(ALICE, "system", "") == TOKENS
    assert await prefixes.tokens_of(BOB, "system", "") == (7, 8)


async def test_registering_again_is_idempotent() -> None:
    store = flaky_store()
    prefixes, other = _prefixes(store), _prefixes(store)
    first = await prefixes.put(record())
    again = await other.put(record())
    assert first == again
    assert len(other.records) == 1


@pytest.mark.parametrize("changed", [{"token_ids": (1, 2)}, {"model": "another"}])
async def test_registering_something_else_is_refused(changed: dict[str, Any]) -> None:
    prefixes = _prefixes(flaky_store())
    await prefixes.put(record())
    with pytest.raises(AlreadyExistsError, match=f"another prefix of {len(TOKENS)} tokens"):
        await prefixes.put(record(**changed))
    assert await prefixes.tokens_of(ALICE, "system", "") == TOKENS


async def test_who_loses_a_race_for_a_name_is_told() -> None:
    class Racing:
        """Lets another gateway write right after this one."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def put_record(self, kind: str, key: str, value: bytes) -> None:
            await store.put_record(kind, key, value)
            if key != "epoch":
                await store.put_record(kind, key, encode_record(record(token_ids=(9,))))

    store = flaky_store()
    with pytest.raises(AlreadyExistsError):
        await _prefixes(Racing()).put(record())


async def test_no_more_prefixes_than_the_limit() -> None:
    prefixes = _prefixes(flaky_store(), max_prefixes=2)
    await prefixes.put(record("a"))
    await prefixes.put(record("b", tenant="bob"))
    with pytest.raises(OverloadedError, match=r"gateway\.max_prefixes=2"):
        await prefixes.put(record("c"))
    await prefixes.remove("alice", "a")
    await prefixes.put(record("c"))


async def test_prefix_of_another_gateway_is_found_on_a_miss() -> None:
    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await other.put(record())
    assert await mine.tokens_of(ALICE, "system", "") == TOKENS


async def test_removal_reaches_other_gateways_with_their_next_look() -> None:
    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await mine.put(record())
    await other.refresh()
    await mine.remove("alice", "system")
    with pytest.raises(NotFoundError):
        await mine.tokens_of(ALICE, "system", "")
    await other.refresh()
    assert other.records == []


async def test_misses_at_the_same_time_share_one_look() -> None:
    store = flaky_store()
    prefixes = _prefixes(store)
    asked = [prefixes.tokens_of(ALICE, f"n{i}", "") for i in range(50)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(result, NotFoundError) for result in results)
    assert store.calls.count("list_records") <= 2


async def test_known_prefixes_survive_a_store_that_is_down() -> None:
    store = flaky_store()
    prefixes = _prefixes(store)
    await prefixes.put(record())
    store.is_down = True
    with pytest.raises(UnavailableError):
        await prefixes.refresh()
    assert await prefixes.tokens_of(ALICE, "system", "") == TOKENS
    with pytest.raises(UnavailableError, match="'other' is not known to this gateway"):
        await prefixes.tokens_of(ALICE, "other", "")
    with pytest.raises(UnavailableError):
        await prefixes.put(record("other"))
    assert len(prefixes.records) == 1


async def test_store_that_is_back_is_announced_once() -> None:
    store = flaky_store()
    prefixes = _prefixes(store)
    announced = []
    prefixes.on_store_back = lambda: announced.append(True)
    await prefixes.refresh()
    store.is_down = True
    with pytest.raises(UnavailableError):
        await prefixes.refresh()
    store.is_down = False
    await prefixes.refresh()
    await prefixes.refresh()
    assert announced == [True]


async def _empty(store: Any) -> None:
    for key in (await store.list_records(PREFIX_RECORDS)).values:
        await store.drop_record(PREFIX_RECORDS, key)


async def test_emptied_store_gets_its_prefixes_back() -> None:
    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await mine.put(record("a"))
    await mine.put(record("b"))
    await other.refresh()
    await _empty(store)
    for prefixes in (other, mine, other):
        await prefixes.refresh()
    fresh = _prefixes(store)
    await fresh.refresh()
    assert [known.name for known in fresh.records] == ["a", "b"]
    await other.remove("alice", "a")
    for prefixes in (mine, other, fresh):
        await prefixes.refresh()
        assert [known.name for known in prefixes.records] == ["b"]


async def test_last_prefix_that_is_removed_stays_removed() -> None:
    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await mine.put(record())
    await other.refresh()
    await mine.remove("alice", "system")
    for prefixes in (other, mine, other):
        await prefixes.refresh()
        assert prefixes.records == []


async def test_prefix_of_another_model_is_not_found() -> None:
    store = flaky_store()
    prefixes = _prefixes(store)
    await prefixes.put(record("old", model="another"))
    await prefixes.put(record("big", token_ids=(4096,)))
    for name in ("old", "big"):
        with pytest.raises(NotFoundError, match="was registered for model"):
            await prefixes.tokens_of(ALICE, name, "")


async def test_what_cannot_be_read_is_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = flaky_store()
    prefixes = _prefixes(store)
    await prefixes.put(record())
    moved = record_key("bob", "system")
    await store.put_record(PREFIX_RECORDS, moved, encode_record(record()))
    with caplog.at_level(logging.WARNING):
        await prefixes.refresh()
        await store.put_record(PREFIX_RECORDS, "x", b"?")
        await prefixes.refresh()
    assert [known.tenant for known in prefixes.records] == ["alice"]
    assert sum("cannot be read" in message for message in caplog.messages) == 2
