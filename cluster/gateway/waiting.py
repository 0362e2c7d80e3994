"""Requests before the dispatcher, until a replica takes them.

    place ──► submit ──► dispatched ─────────────────────► returns
                 │  └──► refused ──────────────────────────► raises
                 └──► queued ──► told of its place ──┐        ▲
                        ▲                            │        │
      one task polls ───┴─ wakes those that leave ◄──┴────────┘

One task for all that wait: it polls when a replica comes or goes, when a request ends, when a time
is over, and as often as a replica reports its load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from cluster.errors import DeadlineError, OverloadedError, SluiceError, UnavailableError
from cluster.metrics import Metrics
from cluster.router.dispatcher import Dispatcher
from cluster.router.route import Outcome, OutcomeKind, RouteRequest

logger = logging.getLogger(__name__)

SLO_NOT_ATTAINABLE = "SLO_NOT_ATTAINABLE"
"""Reason of a refusal: no replica is predicted to answer in time."""

QUEUE_FULL = "QUEUE_FULL"
"""Reason of a refusal: no replica takes it now, and too much waits already."""

_TELL_INTERVAL_S = 1.0  # between two looks at the place of the first request
_TELL_SLOWER = 64  # places: so far behind, an interval is twice as long
_MIN_POLL_INTERVAL_S = 0.01  # whatever happened meanwhile is one poll
_GRACE_S = 5.0  # for the task to see that a request's time is over
_IS_OVER = "this gateway is shutting down: connect again"


class WaitingRoom:
    """Puts requests before the dispatcher, and lets those wait that it has queued.

    Args:
        dispatcher: Decides; has the queue.
        metrics: Count what was decided.
        queue_timeout_s: After which the dispatcher lets a request wait no longer, seconds.
        load_interval_s: Between two load reports of a replica, seconds.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        queue_timeout_s: float,
        load_interval_s: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._queue_timeout_s = queue_timeout_s
        self._load_interval_s = load_interval_s
        self._turns: dict[str, asyncio.Future[Outcome]] = {}
        self._wake = asyncio.Event()
        self._is_stopped = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to poll."""
        self._task = asyncio.create_task(self._run(), name="waiting-room")

    async def stop(self) -> None:
        """End; all requests that wait do."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for turn in self._turns.values():
            if not turn.done():
                turn.set_result(Outcome(OutcomeKind.EXPIRED, _IS_OVER))

    def poke(self) -> None:
        """Poll soon: a replica has come or gone, or a request has ended."""
        if self._turns:
            self._wake.set()

    async def place(
        self, request: RouteRequest, tell: Callable[[Outcome], Awaitable[None]]
    ) -> Outcome:
        """Return where a request goes, as soon as a replica takes it.

        `end` has to follow, whatever becomes of the request, this call included.

        Args:
            request: Its id is that of no other one here.
            tell: Called with the request's place while it waits, at first and when that changes.

        Raises:
            OverloadedError: It cannot be served in time, or too much waits already.
            DeadlineError: Its deadline passed while it waited.
            UnavailableError: No replica took it in time, or this gateway is shutting down.
        """
        start_s = time.perf_counter()
        outcome = self._dispatcher.submit(request, time.monotonic())
        self._metrics.route.observe(time.perf_counter() - start_s)
        self._count(request, outcome)
        if outcome.kind is OutcomeKind.QUEUED:
            with self._turn(request.request_id) as turn, self._metrics.queue.time():
                outcome = await self._wait(request, outcome, turn, tell)
            self._count(request, outcome)
        if not outcome.is_dispatched:
            raise _error(request, outcome)
        return outcome

    def end(self, request_id: str) -> None:
        """Forget a request, wherever it stands; another one may take its place."""
        self._dispatcher.on_end(request_id)
        self.poke()

    @contextmanager
    def _turn(self, request_id: str) -> Iterator[asyncio.Future[Outcome]]:
        if self._is_stopped:
            raise UnavailableError(_IS_OVER)
        turn: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._turns[request_id] = turn
        self._wake.set()  # its own time may be the next that is over
        try:
            yield turn
        finally:
            del self._turns[request_id]

    async def _wait(
        self,
        request: RouteRequest,
        outcome: Outcome,
        turn: asyncio.Future[Outcome],
        tell: Callable[[Outcome], Awaitable[None]],
    ) -> Outcome:
        give_up_s = min(request.expires_s, time.monotonic() + self._queue_timeout_s) + _GRACE_S
        await tell(outcome)
        told = outcome.position
        while (left_s := give_up_s - time.monotonic()) > 0:
            await asyncio.wait([turn], timeout=min(left_s, _tell_interval_s(told)))
            if turn.done():
                return turn.result()
            place = self._dispatcher.place(request.request_id, time.monotonic())
            if place is not None and _is_news(told, place.position):
                await tell(place)
                told = place.position
        raise UnavailableError("nobody has looked after the queue: try again")

    def _count(self, request: RouteRequest, outcome: Outcome) -> None:
        self._metrics.admission.labels(outcome.kind, request.service_class).inc()

    async def _run(self) -> None:
        while True:
            try:
                await self._sleep()
                self._poll()
            except Exception:  # whoever waits goes on waiting, in vain at the worst
                logger.exception("looking after the queue failed")
            await asyncio.sleep(_MIN_POLL_INTERVAL_S)

    async def _sleep(self) -> None:
        """Return when something may have changed for those that wait."""
        wait_s: float | None = None
        if self._turns:
            due_s = self._dispatcher.next_poll_s() - time.monotonic()
            wait_s = min(due_s, self._load_interval_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), wait_s)
        self._wake.clear()

    def _poll(self) -> None:
        if not self._turns:
            return
        for request, outcome in self._dispatcher.poll(time.monotonic()):
            turn = self._turns.get(request.request_id)
            if turn is not None and not turn.done():
                turn.set_result(outcome)


def _tell_interval_s(position: int) -> float:
    """Return when to look at a place again: finding it takes longer the further behind it is."""
    return _TELL_INTERVAL_S * (1 + position / _TELL_SLOWER)


def _is_news(told: int, position: int) -> bool:
    """Return whether a place differs by more than a tenth from the one that the client knows."""
    return 10 * abs(told - position) > told


def _error(request: RouteRequest, outcome: Outcome) -> SluiceError:
    """Return what a client is told whose request goes nowhere."""
    if outcome.kind is OutcomeKind.REFUSED:
        # One that was weighed and found wanting has a decision; one without found no room.
        reason = QUEUE_FULL if outcome.decision is None else SLO_NOT_ATTAINABLE
        return OverloadedError(outcome.reason, retry_after_s=outcome.retry_after_s, reason=reason)
    if request.expires_s <= time.monotonic():
        return DeadlineError(outcome.reason)
    return UnavailableError(outcome.reason)
