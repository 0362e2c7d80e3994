"""Requests that go on for a time after their client has gone.

    call ◄── events, one at a time ◄── task: admitted, generated, journalled ──► end
      └─► client gone: events are dropped, the task has `detach_s` left ──► end, or cancelled

Without `detach_s` there is no task: the request ends with its call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, SluiceError
from cluster.rpc.sluice.v1 import inference_pb2

logger = logging.getLogger(__name__)

_FIELD = "detach_on_disconnect_s"
_Event = inference_pb2.GenerateStreamResponse
Send = Callable[[_Event], Awaitable[None]]


def check_detach(detach_s: float, config: GatewayConfig) -> None:
    """Raise unless a request may go on for so long without its client, seconds; 0 is not at all.

    Raises:
        InvalidArgumentError: It is negative, no number, or longer than allowed.
    """
    limit = config.max_detach_s
    if not 0 <= detach_s <= limit:
        raise InvalidArgumentError(
            f"{_FIELD}={detach_s:g}, gateway.max_detach_s={limit:g}: it is from 0 to that",
            field=_FIELD,
        )


def counted_from_now(remaining_s: float | None) -> Callable[[], float | None]:
    """Return what tells the seconds to a deadline, even when its call is gone; None is no bound."""
    if remaining_s is None:
        return lambda: None
    deadline_s = time.monotonic() + remaining_s
    return lambda: deadline_s - time.monotonic()


class DetachedRequests:
    """The requests of one gateway that may outlive their calls."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Future[None]] = set()

    @property
    def num_live(self) -> int:
        """Requests that have not ended, whether or not somebody listens."""
        return len(self._tasks)

    async def serve(
        self, work: Callable[[Send], Awaitable[None]], send: Send, detach_s: float, request_id: str
    ) -> None:
        """Carry a request to its end, or until the client is gone; the request then goes on.

        Args:
            work: The request; gets what takes its events, and ends with it.
            send: Takes them for the client; fails, or this call is cancelled, when that is gone.
            detach_s: So long the request goes on then.
            request_id: For logs.

        Raises:
            SluiceError: The request has failed.
        """
        hand_off = _HandOff()
        task = asyncio.ensure_future(work(hand_off.put))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: hand_off.end())
        try:
            await hand_off.forward(send)
        except BaseException:
            logger.info("request %.130r goes on for %g s without its client", request_id, detach_s)
            hand_off.detach()
            timer = asyncio.get_running_loop().call_later(detach_s, task.cancel)
            task.add_done_callback(lambda ended: _note_end(request_id, ended, timer))
            raise
        task.result()

    async def stop(self) -> None:
        """End all that there are; their journals stay."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class _HandOff:
    """At most one event on its way from a request to its client."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[_Event | None] = asyncio.Queue()
        self._has_room = asyncio.Semaphore(1)
        self._is_detached = False

    async def put(self, event: _Event) -> None:
        """Pass an event on as soon as the one before was taken; without a client it is dropped."""
        if not self._is_detached:
            await self._has_room.acquire()
            self._events.put_nowait(event)

    async def forward(self, send: Send) -> None:
        """Give a client its events; returns when the request has ended."""
        while (event := await self._events.get()) is not None:
            await send(event)
            self._has_room.release()

    def end(self) -> None:
        """Let `forward` return after the last event."""
        self._events.put_nowait(None)

    def detach(self) -> None:
        """Drop events from now on."""
        self._is_detached = True
        self._has_room.release()


def _note_end(request_id: str, task: asyncio.Future[None], timer: asyncio.TimerHandle) -> None:
    """Log what nobody else is told; an exception that nobody takes would be reported by asyncio."""
    timer.cancel()
    if task.cancelled():
        end = "its time is over"
    elif (error := task.exception()) is None:
        end = "finished"
    elif isinstance(error, SluiceError):
        end = error.code
    else:
        logger.error("request %.130r failed without its client", request_id, exc_info=error)
        return
    logger.info("request %.130r ended without its client: %s", request_id, end)
