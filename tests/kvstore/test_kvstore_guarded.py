from __future__ import annotations

import asyncio
import inspect

import pytest
from kvstore_kinds import fresh_keys

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.breaker import BreakerState
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.kvstore.guarded import Guard, GuardedBlocks, GuardedStore
from cluster.kvstore.store import (
    MAX_RECORD_BYTES,
    Journal,
    JournalOutcome,
    JournalWrite,
    Store,
)


class ShakyStore(EmbeddedStore):
    """An embedded store that can be told to be out of reach, or to take its time."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(StoreConfig(), clock)
        self.is_up = True
        self.num_calls = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def ping(self) -> None:
        self.num_calls += 1
        await self.may_answer.wait()
        if not self.is_up:
            raise UnavailableError("out of reach")


def guarded(clock: VirtualClock, **knobs: object) -> tuple[ShakyStore, GuardedStore]:
    config = StoreConfig.model_validate(knobs)
    store = ShakyStore(clock)
    return store, GuardedStore(store, Guard(config, clock))


async def test_guard_stops_asking_what_does_not_answer_and_comes_back() -> None:
    clock = VirtualClock()
    store, guard = guarded(clock)
    store.is_up = False
    for _ in range(10):
        with pytest.raises(UnavailableError):
            await guard.ping()
    assert store.num_calls == 3
    assert guard.state is BreakerState.OPEN
    with pytest.raises(UnavailableError, match="circuit breaker is open"):
        await guard.list_leases("replica")  # one breaker for all calls of an endpoint
    clock.advance(0.25)
    with pytest.raises(UnavailableError, match="out of reach"):
        await guard.ping()
    assert store.num_calls == 4
    store.is_up = True
    clock.advance(0.5)
    await guard.ping()
    assert guard.state is BreakerState.CLOSED


async def test_guard_bounds_the_calls_on_their_way() -> None:
    store, guard = guarded(VirtualClock(), max_inflight_calls=4)
    store.may_answer.clear()
    calls = [asyncio.create_task(guard.ping()) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match=r"4 calls .* store\.max_inflight_calls=4"):
        await guard.ping()
    assert guard.state is BreakerState.CLOSED  # a refusal says nothing about the endpoint
    calls[0].cancel()
    await asyncio.sleep(0)
    calls.append(asyncio.create_task(guard.ping()))
    await asyncio.sleep(0)
    store.may_answer.set()
    assert [type(r) for r in await asyncio.gather(*calls, return_exceptions=True)] == [
        asyncio.CancelledError,
        *[type(None)] * 4,
    ]
    await guard.ping()
    assert store.num_calls == 6


async def test_guard_takes_a_refusal_for_an_answer() -> None:
    store, guard = guarded(VirtualClock())
    store.is_up = False
    for _ in range(5):
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await guard.ping()
        with pytest.raises(InvalidArgumentError):
            await guard.put_record("prefix", "a", bytes(MAX_RECORD_BYTES + 1))
    assert guard.state is BreakerState.CLOSED


async def test_guard_probe_is_not_given_up_before_its_deadline() -> None:
    clock = VirtualClock()
    store, guard = guarded(clock, timeout_s=10.0)
    store.is_up = False
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await guard.ping()
    clock.advance(0.25)
    store.may_answer.clear()
    probe = asyncio.create_task(guard.ping())
    await asyncio.sleep(0)
    clock.advance(10.0)
    with pytest.raises(UnavailableError, match="breaker is open"):
        await guard.ping()
    store.is_up = True
    store.may_answer.set()
    await probe
    assert guard.state is BreakerState.CLOSED


@pytest.mark.parametrize(
    ("wrapper", "protocol"), [(GuardedStore, Store), (GuardedBlocks, BlockStore)]
)
def test_guard_has_every_call_of_its_protocol(wrapper: type, protocol: type) -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(kind).items()
            if not name.startswith("_") and inspect.iscoroutinefunction(method)
        }

    assert calls(wrapper) == calls(protocol)


async def test_guard_passes_all_arguments_of_counters() -> None:
    store, guard = guarded(VirtualClock())
    assert await guard.count("a", 2, 30.0, at_most=2) == 2
    assert await guard.count("a", 1, 30.0, at_most=2) == 3
    assert await store.count("a", 0, 30.0) == 2


async def test_guard_passes_all_arguments_of_journals() -> None:
    store, guard = guarded(VirtualClock())
    writes = [JournalWrite("r", "team", "A", (b"entry",), begins=True)]
    assert (await guard.write_journals(writes)).outcomes == [JournalOutcome.WRITTEN]
    claimed = await guard.claim_journal("r", "team", "B")
    assert claimed == Journal("team", "B", [b"entry"], is_ended=False)
    assert await guard.read_journal("r") == await store.read_journal("r") == claimed


async def test_guard_passes_all_arguments_of_blocks() -> None:
    clock = VirtualClock()
    config = StoreConfig()
    blocks = EmbeddedBlocks(config, clock)
    guard = GuardedBlocks(blocks, Guard(config, clock))
    a, b = fresh_keys(2)
    assert await guard.put_blocks({a: b"a"}, pinned=True) == [True]
    assert await guard.put_blocks({b: b"b"}) == [True]
    assert (await guard.stats()).num_pinned == 1
    assert await guard.touch_blocks([b], pinned=True) == [True]
    assert (await guard.stats()).num_pinned == 2
    await guard.unpin_blocks([a, b])
    assert (await guard.stats()).num_pinned == 0
    assert await guard.hottest(b"", 9) == [b, a]
    assert (await guard.get_blocks([a, b])).values == [b"a", b"b"]
    assert await guard.has_blocks([a]) == [True]
    assert await guard.flush() == 2
    await guard.put_blocks({a: b"head"})
    await guard.put_blocks({b: b"tail"}, position=7)
    assert await guard.hottest(b"", 9) == [a, b]
    assert guard.state is BreakerState.CLOSED
