"""The life of one request at one gateway, as a pure state machine: it ends exactly once.

    WAITING ──dispatched──► RUNNING ──last token──► FINISHED
       ▲                       │
       └──────── CUT ◄─────────┘  its replica was lost, or hands it over

    any of these ──► FAILED, CANCELLED, SUPERSEDED

A stream whose gateway dies has no end here: it goes on at another gateway, as a life of its own.
"""

from __future__ import annotations

from enum import StrEnum

from cluster.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    OverloadedError,
    PoisonError,
    ReplicaLostError,
    SluiceError,
)


class RequestState(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"  # for a replica
    RUNNING = "running"  # at a replica
    CUT = "cut"  # between two replicas
    FINISHED = "finished"  # the client was given all of its answer
    FAILED = "failed"  # the client was given a status
    CANCELLED = "cancelled"  # the client went away
    SUPERSEDED = "superseded"  # the client goes on with it in another call


_ENDS = frozenset(
    {
        RequestState.FINISHED,
        RequestState.FAILED,
        RequestState.CANCELLED,
        RequestState.SUPERSEDED,
    }
)
_NEXT = {
    # What was resumed may be finished already.
    RequestState.WAITING: _ENDS | {RequestState.RUNNING},
    RequestState.RUNNING: _ENDS | {RequestState.CUT},
    RequestState.CUT: (_ENDS - {RequestState.FINISHED}) | {RequestState.WAITING},
}


class RequestLife:
    """Takes what happens to a request; refuses what cannot."""

    def __init__(self) -> None:
        self.state = RequestState.WAITING

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in _ENDS

    def go(self, state: RequestState) -> None:
        """Enter a state that may follow the present one."""
        assert state in _NEXT.get(self.state, ()), f"{self.state} is not followed by {state}"
        self.state = state


_FINAL_ERRORS = (FailedPreconditionError, InvalidArgumentError, PoisonError, ReplicaLostError)


def is_final(error: SluiceError, *, was_admitted: bool) -> bool:
    """Return whether a client that resumes would be told the same again."""
    if isinstance(error, OverloadedError):
        return not was_admitted
    return isinstance(error, _FINAL_ERRORS)
