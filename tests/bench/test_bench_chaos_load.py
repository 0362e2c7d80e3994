"""The streams of `sluice bench chaos`: what each must answer, and how many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from cluster.bench.chaos_checker import Seen, Verdict
from cluster.bench.chaos_gaps import FaultRecord, Trace
from cluster.bench.chaos_load import Load, Reference, learn
from cluster.bench.chaos_requests import Manner, Visit, catalogue
from cluster.bench.chaos_schedule import fault_kinds
from cluster.bench.chaos_stream import Record, Visitor
from cluster.clock import VirtualClock
from cluster.errors import NotFoundError, SluiceError, UnavailableError

ASKS = catalogue(4, seed=0, vocab_size=100)


def seen(index: int) -> Seen:
    return Seen([index, index + 1], "ab", [], "length", 5, 2)


class FakeVisitor:
    """Answers with what it is told to; each visit takes a second."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.visits: list[Visit] = []
        self.nums_open: list[int] = []  # as each visit began
        self.errors: dict[int, SluiceError] = {}  # by ask
        self.fickle: set[int] = set()  # asks that never answer the same twice
        self.forgotten: dict[int, Seen] = {}  # by ask: what came before the answer
        self._num_open = 0

    async def visit(self, visit: Visit) -> Record:
        self._num_open += 1
        self.nums_open.append(self._num_open)
        self.visits.append(visit)
        begin_s = self.clock.now()
        await asyncio.sleep(0)
        self.clock.advance(1.0)
        self._num_open -= 1
        answer = seen(visit.ask)
        if visit.ask in self.errors:
            answer = Seen(error=self.errors[visit.ask])
        if visit.ask in self.fickle:
            answer.token_ids[0] = len(self.visits) + 50
        trace = Trace(begin_s, self.clock.now())
        return Record("", visit, answer, trace, self.forgotten.get(visit.ask))


def learned(visitor: FakeVisitor, num_at_once: int = 4) -> Reference:
    return asyncio.run(
        learn(
            ASKS,
            lambda asks: cast(Visitor, visitor),
            num_at_once=num_at_once,
            now=visitor.clock.now,
        )
    )


def test_reference_asks_everything_twice_in_batches_of_two_sizes() -> None:
    visitor = FakeVisitor(VirtualClock())
    reference = learned(visitor)
    assert [visit.ask for visit in visitor.visits[:4]] == [0, 1, 2, 3]
    assert sorted(visit.ask for visit in visitor.visits[4:]) == [0, 1, 2, 3]
    assert max(visitor.nums_open[:4]) == 4 and max(visitor.nums_open[4:]) == 2
    assert {visit.manner for visit in visitor.visits} == {Manner.STAYS}
    assert reference.asks == tuple(ASKS) and reference.num_unstable == 0
    assert reference.answers[2].token_ids == [2, 3]


def test_reference_leaves_out_what_does_not_answer_the_same_twice() -> None:
    visitor = FakeVisitor(VirtualClock())
    visitor.fickle = {1}
    reference = learned(visitor)
    assert reference.asks == (ASKS[0], ASKS[2], ASKS[3]) and reference.num_unstable == 1
    assert reference.answers[1].token_ids == [2, 3]
    visitor.fickle = {0, 1, 2, 3}
    with pytest.raises(SluiceError, match="no request answers the same twice"):
        learned(visitor)


def test_reference_fails_with_what_the_undisturbed_cluster_says() -> None:
    visitor = FakeVisitor(VirtualClock())
    visitor.errors = {3: UnavailableError("no replica")}
    with pytest.raises(UnavailableError, match="no replica"):
        learned(visitor)


def load_of(visitor: FakeVisitor, faults: Sequence[FaultRecord] = ()) -> Load:
    reference = Reference(tuple(ASKS), tuple(seen(index) for index in range(4)), 0, 0.0)
    return Load(cast(Visitor, visitor), reference, faults, seed=0, now=visitor.clock.now)


def test_load_checks_every_stream_until_its_time_is_over() -> None:
    visitor = FakeVisitor(VirtualClock())
    visitor.fickle = {1}
    load = load_of(visitor)
    asyncio.run(load.run(3, until_s=60.0))
    verdicts = load.tally.verdicts
    assert max(visitor.nums_open) == 3 and 60 <= load.tally.num_streams <= 63
    assert set(verdicts) == {Verdict.EXACT, Verdict.WRONG}
    assert verdicts[Verdict.WRONG] == sum(visit.ask == 1 for visit in visitor.visits)
    assert load.tally.num_tokens == 2 * load.tally.num_streams == 2 * len(load.outcomes)


def test_load_checks_what_a_client_had_before_it_forgot_it() -> None:
    visitor = FakeVisitor(VirtualClock())
    visitor.forgotten = {0: Seen([0], "a"), 2: Seen([9], "a")}
    load = load_of(visitor)
    asyncio.run(load.run(1, until_s=30.0))
    wrong = [o.finding.verdict is Verdict.WRONG for o in load.outcomes]
    assert wrong == [visit.ask == 2 for visit in visitor.visits] and any(wrong)


def test_load_forgives_a_missing_journal_only_where_the_store_lost_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.bench.chaos_load.REFUSED_PAUSE_S", 0.0)
    (kind,) = fault_kinds("flush-redis")
    visitor = FakeVisitor(VirtualClock())
    visitor.errors = dict.fromkeys(range(4), NotFoundError("unknown"))
    load = load_of(visitor, [FaultRecord(0, kind, "", 5.5, 5.5, 5.5)])
    asyncio.run(load.run(1, until_s=10.0))
    verdicts = [outcome.finding.verdict for outcome in load.outcomes]
    assert verdicts.index(Verdict.REFUSED) == 5 and verdicts.count(Verdict.LOST) == 9
