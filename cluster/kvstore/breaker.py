"""When to stop asking a server that does not answer, and when to ask again.

CLOSED ── max_failures in a row ──► OPEN ── its time is over: one probe ──► HALF_OPEN
   ▲                                 ▲ └─ the time doubles ── it failed ────────┘ │
   └─────────────────────────────────┼─────────── it succeeded ───────────────────┘
"""

from __future__ import annotations

from enum import StrEnum

from cluster.clock import Clock


class BreakerState(StrEnum):
    """What a breaker lets through."""

    CLOSED = "closed"  # everything
    HALF_OPEN = "half_open"  # one probe is on its way, nothing else
    OPEN = "open"  # nothing


class CircuitBreaker:
    """Fails fast for one endpoint; who calls asks `allow` first and reports how it ended.

    Args:
        clock: For the open time.
        max_failures: In a row, that open it.
        min_open_s: It stays open for this long at first, seconds; the time doubles with each
            failed probe and is this again after a success.
        max_open_s: ... and never longer than this; a probe that has not reported by then is given
            up, and the next one may go.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_failures: int = 3,
        min_open_s: float = 0.25,
        max_open_s: float = 2.0,
    ) -> None:
        assert max_failures >= 1, f"{max_failures=}"
        assert 0 < min_open_s <= max_open_s, f"{min_open_s=}, {max_open_s=}"
        self._clock = clock
        self._max_failures = max_failures
        self._min_open_s = min_open_s
        self._max_open_s = max_open_s
        self._state = BreakerState.CLOSED
        self._num_failures = 0
        self._open_s = min_open_s
        self._next_probe_s = 0.0

    @property
    def state(self) -> BreakerState:
        """What it lets through as of the last call or report."""
        return self._state

    def allow(self) -> bool:
        """Return whether a call may go now; what goes has to report."""
        if self._state is BreakerState.CLOSED:
            return True
        now_s = self._clock.now()
        if now_s < self._next_probe_s:
            return False
        self._state = BreakerState.HALF_OPEN
        self._next_probe_s = now_s + self._max_open_s
        return True

    def succeeded(self) -> None:
        """A call was answered. Calls that began before it opened do not close it."""
        if self._state is BreakerState.OPEN:
            return
        self._state = BreakerState.CLOSED
        self._num_failures = 0
        self._open_s = self._min_open_s

    def failed(self) -> None:
        """A call was not answered, or too late. Once open, only a probe's failure counts."""
        if self._state is BreakerState.HALF_OPEN:
            self._open_s = min(2 * self._open_s, self._max_open_s)
            self._open()
        elif self._state is BreakerState.CLOSED:
            self._num_failures += 1
            if self._num_failures >= self._max_failures:
                self._open()

    def _open(self) -> None:
        self._state = BreakerState.OPEN
        self._next_probe_s = self._clock.now() + self._open_s
