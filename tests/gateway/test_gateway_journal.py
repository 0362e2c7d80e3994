"""What a gateway's journals write, when, and what they do when the store or its answer is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from gateway_fakes import eventually
from journal_fakes import Fault, JournalStore, header, ids, tokens
from prometheus_client import CollectorRegistry

from cluster.errors import PoisonError
from cluster.gateway.journal import MAX_CALL_BYTES, MAX_CALL_JOURNALS, Journals
from cluster.gateway.journal_entry import unseal
from cluster.kvstore.store import JournalWrite
from cluster.metrics import Metrics
from cluster.types import FinishReason

NEVER_S = 3600.0


class Scene:
    """A store, and the journals of one gateway on it."""

    def __init__(self, store: JournalStore | None = None, **options: Any) -> None:
        self.store = store or JournalStore()
        self.registry = CollectorRegistry()
        self.journals = Journals(
            self.store, Metrics(self.registry), **({"interval_s": NEVER_S} | options)
        )
        self.superseded: list[str] = []

    def ender(self, request_id: str) -> Callable[[], None]:
        return lambda: self.superseded.append(request_id)

    def begin(self, request_id: str = "r1", **options: Any) -> Any:
        begun = header(request_id, **options)
        return self.journals.begin(begun, on_superseded=self.ender(request_id))

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def dropped(self, state: str) -> float:
        return self.sample("sluice_journals_dropped_total", state=state)


async def test_events_are_written_with_the_request_they_belong_to() -> None:
    scene = Scene()
    first, second = scene.begin("r1"), scene.begin("r2", tenant="bob")
    first.note(0)
    first.note(1, tokens(7, 8), fingerprint="aa", num_cached_tokens=2)
    second.note(0, tokens(9))
    first.timings(0.25, 0.5)
    await scene.journals.flush()
    state = await scene.store.state("r1")
    assert state.header == header("r1")
    assert (ids(state), state.marks) == ([7, 8], ((0, 0), (1, 2)))
    assert (state.fingerprint, state.num_cached_tokens) == ("aa", 2)
    assert (state.queued_s, state.ttft_s) == (0.25, 0.5)
    assert ids(await scene.store.state("r2")) == [9]
    assert len(scene.store.calls) == 1
    assert [write.scope for write in scene.store.calls[0]] == ["alice", "bob"]


async def test_progress_of_a_request_is_one_entry_per_call() -> None:
    scene = Scene()
    journal = scene.begin()
    for seq in range(10):
        journal.note(seq, tokens(seq))
    await scene.journals.flush()
    for seq in range(10, 20):
        journal.note(seq, tokens(seq))
    await scene.journals.flush()
    await scene.journals.flush()
    assert [len(write.entries) for (write,) in scene.store.calls] == [2, 1]
    assert ids(await scene.store.state()) == list(range(20))


async def test_end_is_told_with_the_last_entry() -> None:
    scene = Scene()
    journal = scene.begin()
    journal.note(0, tokens(1))
    await scene.journals.flush()
    journal.note(1, tokens(2))
    journal.finish(2, FinishReason.LENGTH)
    journal.note(3, tokens(3))
    journal.fail(PoisonError("too late"))
    await scene.journals.flush()
    assert [write.ends for (write,) in scene.store.calls] == [False, True]
    state = await scene.store.state()
    assert (ids(state), state.finish_reason, state.last_seq) == ([1, 2], FinishReason.LENGTH, 2)
    assert state.error == ""
    assert len(scene.journals) == 0


async def test_failure_is_told() -> None:
    scene = Scene()
    scene.begin().fail(PoisonError("replicas died of it"))
    await scene.journals.flush()
    state = await scene.store.state()
    assert (state.error, state.finish_reason) == ("INTERNAL: replicas died of it", None)
    journal = await scene.store.read_journal("r1")
    assert journal is not None
    assert journal.is_ended


async def test_closed_journal_has_what_was_noted_and_goes_on_elsewhere() -> None:
    scene = Scene()
    journal = scene.begin()
    journal.note(0, tokens(1))
    journal.note(1, tokens(2))
    journal.close()
    journal.note(2, tokens(3))
    journal.finish(2, FinishReason.STOP)
    await scene.journals.flush()
    state = await scene.store.state()
    assert (ids(state), state.is_ended) == ([1, 2], False)
    assert len(scene.journals) == 0

    other = Scene(scene.store)
    owner = other.journals.new_owner()
    await scene.store.claim_journal("r1", "alice", owner)
    journal = other.journals.go_on(state, owner, on_superseded=other.ender("r1"))
    journal.note(1, tokens(3))  # it repeats what came with event 1, and brings more
    journal.finish(2, FinishReason.STOP)
    await other.journals.flush()
    state = await scene.store.state()
    assert (ids(state), state.finish_reason) == ([1, 2, 3], FinishReason.STOP)
    assert state.marks == ((0, 1), (1, 3), (2, 3))


async def test_journal_that_has_ended_takes_nothing_more() -> None:
    scene = Scene()
    scene.begin().finish(0, FinishReason.STOP)
    await scene.journals.flush()
    state = await scene.store.state()
    journal = scene.journals.go_on(state, "", on_superseded=scene.ender("r1"))
    journal.note(0, tokens(1))
    journal.finish(1, FinishReason.STOP)
    await scene.journals.flush()
    await asyncio.sleep(0)
    assert await scene.store.state() == state
    assert (len(scene.store.calls), scene.superseded, len(scene.journals)) == (1, [], 0)


async def test_owner_who_lost_a_journal_is_told_once_and_writes_no_more() -> None:
    scene = Scene()
    journal, other = scene.begin("r1"), scene.begin("r2")
    await scene.journals.flush()
    await scene.store.claim_journal("r1", "alice", "somebody else")
    journal.note(0, tokens(1))
    other.note(0, tokens(2))
    await scene.journals.flush()
    assert scene.superseded == [], "not from within the write"
    await asyncio.sleep(0)
    assert scene.superseded == ["r1"]
    journal.note(1, tokens(3))
    await scene.journals.flush()
    await asyncio.sleep(0)
    assert scene.superseded == ["r1"]
    assert len(scene.store.calls) == 2
    assert ids(await scene.store.state("r1")) == []
    assert ids(await scene.store.state("r2")) == [2]
    assert len(scene.journals) == 1


async def test_callback_that_fails_hurts_nobody_else() -> None:
    scene = Scene()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    def fail() -> None:
        raise RuntimeError("a bug")

    journal = scene.journals.begin(header("r1"), on_superseded=fail)
    other = scene.begin("r2")
    await scene.journals.flush()
    for request_id in ("r1", "r2"):
        await scene.store.claim_journal(request_id, "alice", "somebody else")
    journal.note(0)
    other.note(0)
    await scene.journals.flush()
    await asyncio.sleep(0)
    assert scene.superseded == ["r2"]


async def test_owner_who_had_ended_before_is_not_told() -> None:
    scene = Scene()
    journal = scene.begin()
    await scene.journals.flush()
    await scene.store.claim_journal("r1", "alice", "somebody else")
    journal.note(0)
    journal.close()
    await scene.journals.flush()
    await asyncio.sleep(0)
    assert scene.superseded == []
    assert len(scene.journals) == 0


async def test_journal_that_cannot_be_written_is_given_up_and_counted() -> None:
    scene = Scene(JournalStore(journal_bytes=2**16, journal_ttl_s=60.0))
    gone = scene.begin("r1")
    await scene.journals.flush()
    scene.store.clock.advance(61.0)
    await scene.store.write_journals([JournalWrite("r2", "bob", "b", (b"x",), begins=True)])
    foreign, long = scene.begin("r2"), scene.begin("r3")
    await scene.journals.flush()
    gone.note(0)
    long.note(0, tokens(1) * 2**15)
    await scene.journals.flush()
    assert [scene.dropped(state) for state in ("foreign", "gone", "full")] == [1, 1, 1]
    assert scene.superseded == []
    for journal in (foreign, gone, long):
        journal.note(9, tokens(1))
    num_calls = len(scene.store.calls)
    await scene.journals.flush()
    assert len(scene.store.calls) == num_calls
    assert ids(await scene.store.state("r3")) == []
    assert len(scene.journals) == 0


async def test_journals_that_made_room_are_counted() -> None:
    scene = Scene(JournalStore(journal_bytes=2**16))
    scene.begin("ended").finish(0, FinishReason.STOP)
    scene.begin("old").note(0, tokens(1) * 1000)
    await scene.journals.flush()
    long = scene.begin("long")
    long.note(0, tokens(1) * 16_000)
    await scene.journals.flush()
    assert (scene.dropped("finished"), scene.dropped("live")) == (1, 1)
    assert len(ids(await scene.store.state("long"))) == 16_000


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.UNANSWERED, Fault.BROKEN])
async def test_what_the_store_did_not_take_is_written_later(fault: Fault) -> None:
    """Whether a lost answer hid a success or a failure, nothing is missing or there twice."""
    scene = Scene()
    journal = scene.begin()
    seq = 0
    for present in (fault, Fault.NONE, fault, fault, Fault.NONE, fault):
        scene.store.fault = present
        for _ in range(3):
            journal.note(seq, tokens(seq))
            seq += 1
        await scene.journals.flush()
        if present is Fault.NONE:
            assert ids(await scene.store.state()) == list(range(seq))
    journal.finish(seq, FinishReason.STOP)
    scene.store.fault = Fault.NONE
    await scene.journals.flush()
    state = await scene.store.state()
    assert state.marks == tuple((at, min(at + 1, seq)) for at in range(seq + 1))
    assert state.is_ended
    assert scene.sample("sluice_journal_errors_total") == 4
    assert max(len(write.entries) for (write,) in scene.store.calls) == 2, "they do not pile up"
    assert len(scene.journals) == 0


async def test_what_waits_for_the_store_is_bounded() -> None:
    scene = Scene(max_pending_bytes=6000)
    scene.store.fault = Fault.REFUSED
    old, new = scene.begin("old"), scene.begin("new")
    await scene.journals.flush()
    for seq in range(40):
        old.note(seq, tokens(*range(10)))
        new.note(seq, tokens(*range(10)))
        await scene.journals.flush()
    assert scene.dropped("pending") == 1
    scene.store.fault = Fault.NONE
    await scene.journals.flush()
    assert await scene.store.read_journal("old") is None
    assert len((await scene.store.state("new")).tokens) == 400
    assert old.pending_bytes == new.pending_bytes == 0
    assert scene.superseded == []


async def test_calls_are_bounded_and_follow_each_other() -> None:
    scene = Scene()
    num = MAX_CALL_JOURNALS + 10
    journals = [scene.begin(f"r{index}") for index in range(num)]
    await scene.journals.flush()
    assert [len(call) for call in scene.store.calls] == [MAX_CALL_JOURNALS, 10]
    scene.store.calls.clear()
    for journal in journals[:5]:
        journal.note(0, tokens(1) * 60_000)
    await scene.journals.flush()
    sizes = [
        sum(len(entry) for write in call for entry in write.entries) for call in scene.store.calls
    ]
    assert len(sizes) == 2
    assert max(sizes) <= MAX_CALL_BYTES
    assert len((await scene.store.state("r4")).tokens) == 60_000


async def test_entries_beyond_one_call_keep_their_order_and_their_end() -> None:
    scene = Scene()
    journal = scene.begin()
    many = tokens(1) * 65_536
    for seq in range(5):
        journal.note(seq, many)
    journal.finish(5, FinishReason.LENGTH)
    await scene.journals.flush()
    assert [write.ends for (write,) in scene.store.calls] == [False, True]
    assert [write.begins for (write,) in scene.store.calls] == [True, False]
    written = await scene.store.read_journal("r1")
    assert written is not None
    assert [unseal(entry)[1] for entry in written.entries] == list(range(7))


async def test_calls_of_one_gateway_never_overlap() -> None:
    scene = Scene()
    scene.store.gate.clear()
    journal = scene.begin()
    first = asyncio.create_task(scene.journals.flush())
    await asyncio.sleep(0)
    assert scene.store.num_inside == 1
    journal.note(0, tokens(1))
    journal.finish(1, FinishReason.STOP)
    second = asyncio.create_task(scene.journals.flush())
    await asyncio.sleep(0)
    assert len(scene.store.calls) == 1
    scene.store.gate.set()
    await asyncio.gather(first, second)
    assert [len(write.entries) for (write,) in scene.store.calls] == [1, 2]
    assert (await scene.store.state()).is_ended


async def test_flush_that_is_given_up_loses_nothing() -> None:
    scene = Scene()
    scene.store.gate.clear()
    journal = scene.begin()
    journal.note(0, tokens(1))
    task = asyncio.create_task(scene.journals.flush())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    scene.store.gate.set()
    journal.note(1, tokens(2))
    await scene.journals.flush()
    assert ids(await scene.store.state()) == [1, 2]


async def test_new_journal_does_not_wait_for_the_interval() -> None:
    scene = Scene()
    scene.journals.start()
    first = scene.begin("r1")
    await eventually(lambda: len(scene.store.calls) == 1)
    first.note(0, tokens(1))
    scene.begin("r2")
    scene.begin("r3")
    await eventually(lambda: len(scene.store.calls) == 2)
    assert [write.key for write in scene.store.calls[1]] == ["r2", "r3"], "the others do wait"
    await scene.journals.stop()
    assert [write.key for write in scene.store.calls[2]] == ["r1"]
    assert ids(await scene.store.state("r1")) == [1]


async def test_progress_is_written_after_the_interval() -> None:
    scene = Scene(interval_s=0.01)
    scene.journals.start()
    journal = scene.begin()
    for seq in range(3):
        journal.note(seq, tokens(seq))
        num_calls = seq + 1
        await eventually(lambda num=num_calls: len(scene.store.calls) >= num)
    await scene.journals.stop()
    assert ids(await scene.store.state()) == [0, 1, 2]


async def test_interval_comes_again_while_the_store_is_away() -> None:
    scene = Scene(interval_s=0.01)
    scene.store.fault = Fault.REFUSED
    scene.journals.start()
    scene.begin().note(0, tokens(1))
    await eventually(lambda: len(scene.store.calls) >= 3)
    scene.store.fault = Fault.NONE
    await eventually(lambda: scene.store.read_journal("r1"))
    await scene.journals.stop()
    assert ids(await scene.store.state()) == [1]


async def test_stop_ends_with_a_store_that_is_away() -> None:
    scene = Scene()
    scene.store.fault = Fault.REFUSED
    scene.journals.start()
    scene.begin()
    await scene.journals.stop()
    assert 1 <= len(scene.store.calls) <= 2


def test_owners_differ() -> None:
    assert len({Journals.new_owner() for _ in range(100)}) == 100
