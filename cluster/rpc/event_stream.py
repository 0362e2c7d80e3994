"""Reads the events of one stream, and notices what is missing."""

from __future__ import annotations

from cluster.errors import UnavailableError
from cluster.rpc.public import Event, Finished, event_from_proto
from cluster.rpc.sluice.v1 import inference_pb2


class EventStream:
    """The messages of one stream, in order."""

    def __init__(self) -> None:
        self._next_seq = 0
        self._is_finished = False

    def read(self, message: inference_pb2.GenerateStreamResponse) -> Event | None:
        """Return the next event; None for one that this version does not know.

        Raises:
            UnavailableError: Events between it and the one before were lost.
        """
        if message.seq != self._next_seq:
            raise UnavailableError(
                f"event {self._next_seq} was lost on the way, event {message.seq} came: ask again"
            )
        self._next_seq += 1
        event = event_from_proto(message)
        self._is_finished = self._is_finished or isinstance(event, Finished)
        return event

    def check_end(self) -> None:
        """Raise unless the stream has had its last event.

        Raises:
            UnavailableError: It was cut off.
        """
        if not self._is_finished:
            raise UnavailableError(
                f"the stream was cut off after {self._next_seq} events: ask again"
            )
