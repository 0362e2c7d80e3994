"""One client of `sluice bench chaos` and one answer: what came, and when.

stays       ──tokens──────────────────────────► end      the library resumes by itself
leaves      ──tokens── closes ·· away ·· Resume ──► end  another client, with the request's id
detaches    ──tokens── closes ·· away ·· Resume ──► end  the request ran on meanwhile
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from cluster.bench.chaos_checker import Seen
from cluster.bench.chaos_gaps import Trace
from cluster.bench.chaos_requests import Ask, Manner, Visit
from cluster.client import AsyncClient, Event, Finished, Resumed, Running, TextDelta
from cluster.errors import SluiceError

REQUEST_TIMEOUT_S = 90.0  # many times what one takes
RESUME_TIMEOUT_S = 30.0
DETACH_S = 20.0


@dataclass(slots=True)
class Record:
    """One visit as it went."""

    request_id: str  # empty where the client library has chosen it
    visit: Visit
    seen: Seen
    trace: Trace
    forgotten: Seen | None = None  # received before it came back without a memory of it


class Visitor:
    """Asks as one client after another.

    Args:
        addresses: Of the gateways; each new client begins with another one.
        asks: The catalogue.
        now: Seconds since the run began.
    """

    def __init__(
        self, addresses: Sequence[str], asks: Sequence[Ask], now: Callable[[], float]
    ) -> None:
        self._addresses = list(addresses)
        self._asks = asks
        self._now = now

    async def visit(self, visit: Visit) -> Record:
        """Ask, and return what came of it; never raises what the cluster says."""
        # Who comes back has to know the id; who stays leaves it to the library, as most do.
        request_id = "" if visit.manner is Manner.STAYS else uuid.uuid4().hex
        record = Record(request_id, visit, Seen(), Trace(self._now()))
        try:
            num_events = await self._ask(record)
            if num_events is not None:
                await asyncio.sleep(visit.away_s)
                await self._come_back(record, num_events)
        except SluiceError as error:
            record.seen.error = error
        record.trace.end_s = self._now()
        return record

    async def _ask(self, record: Record) -> int | None:
        """Stream until the end, or until it is time to go; then return how many events came."""
        visit, ask = record.visit, self._asks[record.visit.ask]
        async with self._client() as client:
            events = client.stream(
                token_ids=ask.prompt,
                sampling=ask.sampling,
                request_id=record.request_id,
                timeout_s=REQUEST_TIMEOUT_S,
                resume_timeout_s=RESUME_TIMEOUT_S,
                report_resumptions=True,
                detach_on_disconnect_s=DETACH_S if visit.manner is Manner.DETACHES else 0.0,
            )
            num_events = 0
            async with _closing(events):
                async for event in events:
                    self._take(record, event)
                    num_events += not isinstance(event, Resumed)
                    if isinstance(event, Finished):
                        return None
                    if visit.manner is not Manner.STAYS and (
                        len(record.seen.token_ids) >= visit.num_tokens
                    ):
                        return num_events
        return None

    async def _come_back(self, record: Record, num_events: int) -> None:
        """Go on as another process would, which knows the request's id and what it has written."""
        trace = record.trace
        # Before its first token a stream may begin anew: then nobody has counted its events.
        has_memory = record.visit.has_memory and not trace.resumptions
        if not has_memory:
            record.forgotten, record.seen = record.seen, Seen()
        trace.stretches.append([])
        async with self._client() as client:
            events = client.resume(
                record.request_id,
                after_seq=num_events - 1 if has_memory else None,
                tokens_received=tuple(record.seen.token_ids) if has_memory else (),
                timeout_s=REQUEST_TIMEOUT_S,
                resume_timeout_s=RESUME_TIMEOUT_S,
                report_resumptions=True,
            )
            async with _closing(events):
                async for event in events:
                    self._take(record, event)

    def _take(self, record: Record, event: Event) -> None:
        seen, trace, now_s = record.seen, record.trace, self._now()
        if isinstance(event, Running):
            trace.replicas.append((now_s, event.replica_id))
        elif isinstance(event, Resumed):
            trace.resumptions.append((now_s - event.gap_s, now_s))
        elif isinstance(event, TextDelta):
            trace.stretches[-1].append(now_s)
            seen.token_ids += event.token_ids
            seen.text += event.text
            seen.logprobs += [
                (token.logprob, *(other.logprob for other in token.top)) for token in event.logprobs
            ]
        elif isinstance(event, Finished):
            trace.stretches[-1].append(now_s)
            seen.finish_reason = event.finish_reason.value
            seen.num_prompt_tokens = event.usage.prompt_tokens
            seen.num_completion_tokens = event.usage.completion_tokens

    def _client(self) -> AsyncClient:
        self._addresses.append(self._addresses.pop(0))
        return AsyncClient(tuple(self._addresses))


def _closing(events: AsyncIterator[Event]) -> aclosing[AsyncGenerator[Event, None]]:
    """Return a context at whose end the iterator, which is a generator, is closed."""
    return aclosing(cast("AsyncGenerator[Event, None]", events))
