"""Keeps one stream whole over as many calls as it takes: when to go on, where, and from where.

    begin ──► GenerateStream ──► events ──► finished
                   │  cut off        │ cut off
                   │                 ▼
                   └────────────► Resume at the next address, after a pause ──► events ──► ...
                   ◄── unknown, and no token has come: asked anew

Free of I/O: a client makes the calls, tells what came of them, and waits as long as it is told.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cluster.errors import (
    JOURNAL_GONE,
    RESUME_ELSEWHERE,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    SluiceError,
    UnavailableError,
)
from cluster.rpc.addresses import Addresses
from cluster.rpc.event_stream import DisorderFailure, StreamProgress
from cluster.rpc.failure import CallFailure
from cluster.rpc.public import Event, Finished, Resumed, TextDelta
from cluster.rpc.public_route import Queued
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.rpc.stream_query import StreamQuery

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
# Of a status without our details these say that the call broke, not what became of the request: a
# reset connection is UNAVAILABLE, a reset stream one of the others.
_CUT_CODES = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED"})
_NO_SUCH_METHOD = "UNIMPLEMENTED"


@dataclass(frozen=True, slots=True)
class StreamCall:
    """The call to make next."""

    index: int  # of the address
    method: str  # GenerateStream or Resume
    request: inference_pb2.GenerateStreamRequest | inference_pb2.ResumeRequest
    timeout_s: float  # its deadline, seconds


class ResumingStream:
    """One stream as its caller sees it.

    Args:
        query: What is asked for.
        addresses: Of the client; they learn which gateway answers.
        rng: Draws the pauses.
        now_s: The time; its origin is the caller's.
    """

    def __init__(
        self, query: StreamQuery, addresses: Addresses, rng: random.Random, now_s: float
    ) -> None:
        self._query = query
        self._addresses = addresses
        self._rng = rng
        self._progress = StreamProgress(query.after_seq, query.tokens_received)
        self._deadline_s = now_s + query.timeout_s
        self._index = addresses.first
        self._is_resume = query.begin is None  # whether the present or next call is a Resume
        self._num_calls = 0
        self._num_failures = 0  # since the last token
        self._num_disorders = 0
        self._was_found_alive = False
        self._broken_s: float | None = None  # since when nothing has gone on; None: it does
        self._last_event_s = now_s
        self._num_resumptions = 0
        self._first_error: SluiceError | None = None  # of the calls since it last went on
        self._is_cut = False  # the next event is the first one behind a gap
        self._has_begun = False  # whether the present call has brought an event
        self._verdict = ""  # what a gateway said that had begun and then could not go on

    @property
    def is_finished(self) -> bool:
        """Whether the last event has come."""
        return self._progress.is_finished

    def next_call(self, now_s: float) -> StreamCall:
        """Return the call that the stream goes on with."""
        self._num_calls += 1
        self._has_begun = False
        timeout_s = self._deadline_s - now_s
        begin = self._query.begin
        self._progress.rewind()
        if begin is not None and not self._is_resume:
            return StreamCall(self._index, "GenerateStream", begin, timeout_s)
        request = self._progress.resume_request(
            self._query.request_id, self._query.detach_on_disconnect_s
        )
        return StreamCall(self._index, "Resume", request, timeout_s)

    def read(
        self,
        message: inference_pb2.GenerateStreamResponse | inference_pb2.ResumeResponse,
        now_s: float,
    ) -> list[Event]:
        """Return the events that the caller sees of a message.

        Raises:
            CallFailure: An event was lost, or came twice; it is for `broken`.
        """
        if isinstance(message, inference_pb2.ResumeResponse):
            message = message.event
        event = self._progress.read(message)
        self._addresses.answered(self._index)
        self._has_begun = True
        events: list[Event] = []
        if self._is_cut:
            self._is_cut = False
            self._num_resumptions += 1
            if self._query.report_resumptions:
                gap_s = now_s - self._last_event_s
                address = self._addresses[self._index]
                events.append(Resumed(gap_s, address, self._num_resumptions))
        self._last_event_s = now_s
        if event is not None:
            self._note(event)
            events.append(event)
        return events

    def _note(self, event: Event) -> None:
        if not isinstance(event, Queued):  # a place in a queue is no progress
            self._broken_s = self._first_error = None
        if isinstance(event, TextDelta | Finished):
            self._num_failures = 0
            self._verdict = ""

    def check_end(self) -> None:
        """Raise unless a call that ended well has brought the last event.

        Raises:
            CallFailure: It has not; it is for `broken`.
        """
        self._progress.check_end()

    def broken(self, failure: CallFailure, now_s: float) -> float:
        """Take the end of a call; return for how long to wait before the next one, seconds.

        Raises:
            SluiceError: The stream has ended with this.
        """
        if self.is_finished:
            return 0.0  # the caller has all of it
        self._addresses.is_reached = self._addresses.is_reached or failure.is_ours
        self._is_cut = True
        if self._is_resume and failure.code == _NO_SUCH_METHOD:
            raise self._first_error or failure.error  # a gateway that cannot resume
        if self._changes_method(failure):
            return 0.0
        if not self._can_go_on(failure):
            raise failure.error
        self._first_error = self._first_error or failure.error
        self._is_resume = not self._can_begin_anew()
        delay_s = self._delay_s(failure)
        self._check_time(failure.error, now_s, now_s + delay_s)
        self._index = self._addresses.after(self._index)
        return delay_s

    def _changes_method(self, failure: CallFailure) -> bool:
        """Return whether this very gateway is to be asked the other way.

        Raises:
            SluiceError: It knows nothing of a request that has tokens.
        """
        if self._is_resume and failure.is_ours and failure.code == NotFoundError.code:
            if self._query.begin is None and self._num_calls == 1:
                raise failure.error
            if self._query.begin is None or self._progress.num_tokens:
                raise UnavailableError(
                    f"request {self._query.request_id!r} was cut off after "
                    f"{self._progress.num_tokens} tokens and its journal is gone: ask again",
                    reason=JOURNAL_GONE,
                )
            self._is_resume = False
            return True
        # The request was sent again under its caller's id, and here it runs still.
        error = failure.error
        is_alive = isinstance(error, InvalidArgumentError) and error.field == "request_id"
        if is_alive and not self._is_resume and self._num_calls > 1 and not self._was_found_alive:
            self._was_found_alive = self._is_resume = True
            return True
        return False

    def _can_begin_anew(self) -> bool:
        """Return whether to ask anew rather than to resume.

        Under an id that an earlier request may have had, the journal could be that one's. Asking
        anew overwrites it, and nothing is lost as long as no token has come.
        """
        query = self._query
        return (
            query.begin is not None
            and not query.has_unique_id
            and not self._progress.num_tokens
            and not self._was_found_alive
        )

    def _can_go_on(self, failure: CallFailure) -> bool:
        if not self._query.resume_timeout_s or self._is_final(failure):
            return False
        if isinstance(failure, DisorderFailure):
            self._num_disorders += 1
            return self._num_disorders == 1  # twice is a defect, not an accident
        if not failure.is_ours:
            return failure.code in _CUT_CODES
        # A gateway that is full refuses a Resume as well, and the request waits in its journal.
        is_full = failure.code == OverloadedError.code and self._is_resume
        return is_full or failure.code == UnavailableError.code

    def _is_final(self, failure: CallFailure) -> bool:
        """Return whether a gateway repeats out of the journal why the request has failed."""
        message = str(failure)
        is_repeated = self._is_resume and failure.is_ours and message == self._verdict
        if is_repeated and not self._has_begun:  # else it had gone on, and the same came again
            return True
        if self._has_begun and failure.is_ours and not failure.error.reason:
            self._verdict = message
        return False

    def _delay_s(self, failure: CallFailure) -> float:
        """Return a pause: exponential in the failures since the last token, with full jitter."""
        num_before, self._num_failures = self._num_failures, self._num_failures + 1
        is_sent_on = failure.error.reason == RESUME_ELSEWHERE
        if is_sent_on and num_before < len(self._addresses):
            return 0.0
        limit_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(num_before, 10))
        return max(self._rng.uniform(0.0, limit_s), failure.retry_after_s)

    def _check_time(self, error: SluiceError, now_s: float, due_s: float) -> None:
        """Raise if the next call would come too late, or nobody was ever there.

        Raises:
            SluiceError: Is the end of the stream.
        """
        so_far = f"the stream was cut off after {self._progress.num_tokens} tokens"
        if due_s >= self._deadline_s:
            raise DeadlineError(f"timeout_s={self._query.timeout_s:g}: {so_far}: {error}")
        # A client that has never reached anybody has the wrong addresses rather than bad luck.
        if not self._addresses.is_reached and self._num_failures >= 2 * len(self._addresses):
            raise error
        if self._broken_s is None:
            self._broken_s = now_s
        if due_s - self._broken_s > self._query.resume_timeout_s:
            raise UnavailableError(
                f"{so_far} and did not go on within resume_timeout_s="
                f"{self._query.resume_timeout_s:g}: {error}",
                reason=error.reason,
            )
