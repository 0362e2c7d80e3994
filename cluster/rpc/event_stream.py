"""What has come of one stream over all its calls, and where the next call goes on."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import UnavailableError
from cluster.rpc.failure import CallFailure
from cluster.rpc.public import Event, Finished, TextDelta, event_from_proto
from cluster.rpc.sluice.v1 import inference_pb2


class DisorderFailure(CallFailure):
    """An event came twice, or one is missing."""


class StreamProgress:
    """The events of one stream, in order.

    Args:
        after_seq: The last event that came before this stream; None: it has them all.
        token_ids: Tokens that came with those events; empty: they are not known.
    """

    def __init__(self, after_seq: int | None = None, token_ids: Sequence[int] = ()) -> None:
        self._start_seq = 0 if after_seq is None else after_seq + 1
        self._knows_all_tokens = after_seq is None or bool(token_ids)
        self._token_ids = list(token_ids)
        self._num_known_tokens = len(token_ids)
        self._next_seq = self._start_seq
        self.is_finished = False

    @property
    def num_tokens(self) -> int:
        """Tokens that came with this stream's own events."""
        return len(self._token_ids) - self._num_known_tokens

    def read(self, message: inference_pb2.GenerateStreamResponse) -> Event | None:
        """Return the next event; None for one that this version does not know.

        Raises:
            DisorderFailure: It is not the next one.
        """
        if message.seq != self._next_seq:
            what = "was lost on the way" if message.seq > self._next_seq else "was to come next"
            error = UnavailableError(
                f"event {self._next_seq} {what}, event {message.seq} came: ask again"
            )
            raise DisorderFailure(error, code=error.code)
        self._next_seq += 1
        event = event_from_proto(message)
        if isinstance(event, TextDelta):
            self._token_ids += event.token_ids
        self.is_finished = self.is_finished or isinstance(event, Finished)
        return event

    def check_end(self) -> None:
        """Raise unless the stream has had its last event.

        Raises:
            CallFailure: It was cut off.
        """
        if not self.is_finished:
            error = UnavailableError(
                f"the stream was cut off after {self._next_seq} events: ask again"
            )
            raise CallFailure(error, code=error.code)

    def rewind(self) -> None:
        """Expect all events anew, if no token has come.

        The journal may not know yet of a place in a queue that was told: without a token, the
        beginning is the one position that is surely there.
        """
        if not self.num_tokens:
            self._next_seq = self._start_seq

    def resume_request(
        self, request_id: str, detach_on_disconnect_s: float
    ) -> inference_pb2.ResumeRequest:
        """Return what goes on behind the last event."""
        message = inference_pb2.ResumeRequest(
            request_id=request_id, detach_on_disconnect_s=detach_on_disconnect_s
        )
        if self._next_seq:
            message.after_seq = self._next_seq - 1
            if self._knows_all_tokens:
                message.tokens_received.extend(self._token_ids)
        return message
