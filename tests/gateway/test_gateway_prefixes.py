"""The set of registered prefixes: whose they are, and what a store's failures do to it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
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
from cluster.gateway.prefix_record import (
    PREFIX_RECORDS,
    PrefixRecord,
    encode_record,
    record_key,
)
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


class Racing:
    """A store where another gateway registers `record` right before this one writes it."""

    def __init__(self, store: Any, record: PrefixRecord) -> None:
        self._store = store
        self._key = record_key(record.tenant, record.name)
        self._value = encode_record(record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put_record(self, kind: str, key: str, value: bytes, **options: Any) -> Any:
        if key == self._key:
            await self._store.put_record(kind, key, self._value)
        return await self._store.put_record(kind, key, value, **options)


async def test_who_loses_a_race_for_a_name_is_told() -> None:
    store = flaky_store()
    racing = _prefixes(Racing(store, record(token_ids=(9,))))
    with pytest.raises(AlreadyExistsError, match="another prefix of 1 tokens"):
        await racing.put(record())
    assert await _prefixes(store).tokens_of(ALICE, "system", "") == (9,)


async def test_no_more_prefixes_than_the_limit() -> None:
    prefixes = _prefixes(flaky_store(), max_prefixes=2)
    await prefixes.put(record("a"))
    await prefixes.put(record("b", tenant="bob"))
    with pytest.raises(OverloadedError, match=r"limit=2 \(gateway\.max_prefixes\)"):
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


async def _emptied_with(*others: PrefixRecord) -> tuple[Any, Prefixes]:
    """Return a store that lost a gateway's prefix "one" and got others, and the gateway."""
    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await mine.put(record("one"))
    await _empty(store)
    for registered in others:
        await other.put(registered)
    return store, mine


async def test_what_others_registered_in_an_emptied_store_is_found_at_once() -> None:
    _, mine = await _emptied_with(record("two"))
    assert (await mine.find("alice", "two")).name == "two"
    assert (await mine.find("alice", "one")).name == "one"


@pytest.mark.parametrize("name", ["two", "one"])
async def test_what_others_registered_in_an_emptied_store_is_not_overwritten(name: str) -> None:
    others = (7, 8, 9)
    store, mine = await _emptied_with(record(name, token_ids=others))
    with pytest.raises(AlreadyExistsError):
        await mine.put(record(name))
    for prefixes in (mine, _prefixes(store)):
        assert (await prefixes.find("alice", name)).token_ids == others


async def test_what_is_put_back_replaces_nothing_that_another_registered_meanwhile() -> None:
    store = flaky_store()
    mine = _prefixes(store)
    await mine.put(record())
    await _empty(store)
    mine._store = Racing(store, record(token_ids=(9,)))
    await mine.refresh()
    for prefixes in (mine, _prefixes(store)):
        assert await prefixes.tokens_of(ALICE, "system", "") == (9,)


async def test_store_emptied_again_while_it_is_filled_loses_nothing() -> None:
    class Emptied:
        """Is emptied right after each prefix that is put back, while it may."""

        is_emptied = False

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def put_record(self, *args: Any, **options: Any) -> Any:
            result = await store.put_record(*args, **options)
            if self.is_emptied:
                await _empty(store)
            return result

    store, front = flaky_store(), Emptied()
    prefixes = _prefixes(front)
    await prefixes.put(record())
    front.is_emptied = True
    await _empty(store)
    with pytest.raises(UnavailableError, match="emptied while"):
        await prefixes.refresh()
    front.is_emptied = False
    await prefixes.refresh()
    assert (await _prefixes(store).find("alice", "system")).token_ids == TOKENS


async def test_last_prefix_that_is_removed_stays_removed() -> None:
    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await mine.put(record())
    await other.refresh()
    await mine.remove("alice", "system")
    for prefixes in (other, mine, other):
        await prefixes.refresh()
        assert prefixes.records == []


async def test_known_prefix_is_removed_where_the_others_cannot_be_read() -> None:
    class TooLarge:
        """Misses its deadline with whatever is large."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def list_records(self, *args: Any) -> Any:
            raise UnavailableError("deadline")

    store = flaky_store()
    mine, other = _prefixes(store), _prefixes(store)
    await mine.put(record("known"))
    await other.put(record("unseen"))
    mine._store = TooLarge()
    removed = await mine.remove("alice", "known")
    assert removed is not None
    assert removed.name == "known"
    assert await mine.remove("alice", "unseen") is None
    await other.refresh()
    assert other.records == []


async def test_client_is_told_nothing_of_what_the_store_says_of_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Talkative:
        def __getattr__(self, name: str) -> Any:
            async def call(*args: Any, **options: Any) -> Any:
                raise UnavailableError("redis 10.0.0.7:6379: NOPERM user sluice")

            return call

    prefixes = _prefixes(Talkative())
    with caplog.at_level(logging.INFO):
        for call in (
            prefixes.find("alice", "system"),
            prefixes.put(record()),
            prefixes.remove("alice", "system"),
        ):
            with pytest.raises(UnavailableError, match="the store does not answer: try") as told:
                await call
            assert "10.0.0.7" not in str(told.value)
    assert any("10.0.0.7" in message for message in caplog.messages)


async def test_flush_reaches_every_gateway_once() -> None:
    store = flaky_store()
    announced = []
    gateways = {name: _prefixes(store) for name in ("flushing", "other", "late")}
    for name, prefixes in gateways.items():
        prefixes.on_store_back = partial(announced.append, name)
    await gateways["flushing"].put(record())
    await gateways["other"].refresh()
    await gateways["flushing"].announce_flush()
    for _ in range(2):
        for prefixes in gateways.values():
            await prefixes.refresh()
            assert [known.name for known in prefixes.records] == ["system"]
    assert announced == ["flushing", "other"]


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
