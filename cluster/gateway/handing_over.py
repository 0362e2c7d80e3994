"""Which requests leave a draining replica now: a few at a time, so that each finds room at once.

replica drains ──► its requests, MAX_MOVES at a time ──HandOver──► cut ──► go on elsewhere
                                   ▲                                             │
                                   └────────────── first token there ◄───────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

MAX_MOVES = 8
"""Requests of one gateway between two replicas at once."""

MOVE_S = 1.0
"""After so long a request that is on its way holds up no other: its client may read nothing."""


class Movable(Protocol):
    """A request that runs; what decides about its move."""

    @property
    def replica_id(self) -> str:
        """Of the replica that it runs at; empty: none."""
        ...

    @property
    def can_move(self) -> bool:
        """Whether another replica would take it."""
        ...

    def hand_over(self) -> None:
        """Ask its replica to let it go."""
        ...


class HandOvers:
    """Moves the requests of draining replicas.

    Args:
        running: The requests of this gateway.
        is_draining: Of a replica, by its id.
        later: Calls something after so many seconds.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[Movable]],
        is_draining: Callable[[str], bool],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._running = running
        self._is_draining = is_draining
        self._later = later
        self._moving: dict[Movable, bool] = {}  # whether it still holds up others

    @property
    def num_moving(self) -> int:
        """Requests that have been asked for and have got no token elsewhere yet."""
        return len(self._moving)

    def poke(self) -> None:
        """Look again: a replica has come, gone or begun to drain."""
        num_free = MAX_MOVES - sum(self._moving.values())
        for request in list(self._running()):
            if num_free <= 0:
                return
            replica_id = request.replica_id
            is_asked = request in self._moving
            if replica_id and not is_asked and self._is_draining(replica_id) and request.can_move:
                self._moving[request] = True
                num_free -= 1
                self._later(MOVE_S, lambda request=request: self._let_others(request))  # type: ignore[misc]
                request.hand_over()

    def done(self, request: Movable) -> None:
        """Note that a request goes on elsewhere, or has ended; the next one may move."""
        if self._moving.pop(request, None) is not None:
            self.poke()

    def _let_others(self, request: Movable) -> None:
        if self._moving.get(request):
            self._moving[request] = False
            self.poke()
