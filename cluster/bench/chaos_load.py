"""The load of `sluice bench chaos`: what each request must answer, then a fixed number of streams.

quiet     every request twice, in batches of two sizes      what differs there is left out
load      S streams at once, each followed by the next      every one is checked
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.bench.chaos_checker import Finding, Seen, Verdict, check
from cluster.bench.chaos_gaps import FaultRecord, Trace
from cluster.bench.chaos_requests import Ask, Manner, Visit, visits
from cluster.bench.chaos_stream import Record, Visitor
from cluster.errors import SluiceError

REFUSED_PAUSE_S = 0.5  # a client that is sent away does not come back at once


@dataclass(frozen=True, slots=True)
class Reference:
    """What undisturbed requests answer."""

    asks: tuple[Ask, ...]  # those whose answers are known
    answers: tuple[Seen, ...]  # of each
    num_unstable: int  # left out: two quiet runs answered differently
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stream of the load, checked."""

    request_id: str
    ask: str  # name of its kind of sampling
    manner: Manner
    num_tokens: int
    finding: Finding
    trace: Trace


@dataclass(slots=True)
class Tally:
    """How the load stands."""

    num_streams: int = 0
    num_tokens: int = 0
    verdicts: Counter[Verdict] = field(default_factory=Counter)


async def learn(
    asks: Sequence[Ask],
    make_visitor: Callable[[Sequence[Ask]], Visitor],
    *,
    num_at_once: int,
    now: Callable[[], float],
) -> Reference:
    """Ask every request twice in quiet, and return what it answers.

    Args:
        asks: The catalogue.
        make_visitor: Asks them.
        num_at_once: Streams; the second time half as many, in the opposite order.
        now: The time, seconds.

    Raises:
        SluiceError: A request failed, though nothing was disturbed.
    """
    begin_s = now()
    visitor, order = make_visitor(asks), list(range(len(asks)))
    first = await _ask_all(visitor, order, num_at_once)
    second = await _ask_all(visitor, order[::-1], max(1, num_at_once // 2))
    stable = [i for i in order if check(first[i], second[i]).verdict is Verdict.EXACT]
    if not stable:
        raise SluiceError("no request answers the same twice, undisturbed: is model.dtype float32?")
    return Reference(
        tuple(asks[i] for i in stable),
        tuple(first[i] for i in stable),
        len(asks) - len(stable),
        now() - begin_s,
    )


async def _ask_all(visitor: Visitor, order: list[int], num_at_once: int) -> dict[int, Seen]:
    waiting, answers = list(order), {}

    async def one_stream() -> None:
        while waiting:
            index = waiting.pop(0)
            record = await visitor.visit(Visit(index))
            if record.seen.error is not None:
                raise record.seen.error
            answers[index] = record.seen

    await asyncio.gather(*(one_stream() for _ in range(num_at_once)))
    return answers


class Load:
    """Keeps a cluster under load, and checks what it answers.

    Args:
        visitor: Asks the requests of the reference.
        reference: What they must answer.
        faults: That happen meanwhile.
        seed: Of what the clients do.
        now: Seconds since the run began.
    """

    def __init__(
        self,
        visitor: Visitor,
        reference: Reference,
        faults: Sequence[FaultRecord],
        *,
        seed: int,
        now: Callable[[], float],
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.tally = Tally()
        self._visitor = visitor
        self._reference = reference
        self._faults = faults
        self._seed = seed
        self._now = now

    async def run(self, num_streams: int, until_s: float) -> None:
        """Keep so many streams open until then; return when the last one has ended."""
        await asyncio.gather(*(self._stream(index, until_s) for index in range(num_streams)))

    async def _stream(self, index: int, until_s: float) -> None:
        for visit in visits(len(self._reference.asks), seed=self._seed, stream=index):
            if self._now() >= until_s:
                return
            outcome = self._check(await self._visitor.visit(visit))
            self.outcomes.append(outcome)
            self._count(outcome)
            if outcome.finding.verdict in (Verdict.REFUSED, Verdict.LOST):
                await asyncio.sleep(REFUSED_PAUSE_S)

    def _check(self, record: Record) -> Outcome:
        index = record.visit.ask
        may_miss_journal = any(
            fault.kind.loses_journals and fault.covers(record.trace) for fault in self._faults
        )
        finding = check(
            self._reference.answers[index],
            record.seen,
            forgotten=record.forgotten,
            may_miss_journal=may_miss_journal,
        )
        return Outcome(
            record.request_id,
            self._reference.asks[index].name,
            record.visit.manner,
            len(record.seen.token_ids),
            finding,
            record.trace,
        )

    def _count(self, outcome: Outcome) -> None:
        tally = self.tally
        tally.num_streams += 1
        tally.num_tokens += outcome.num_tokens
        tally.verdicts[outcome.finding.verdict] += 1
