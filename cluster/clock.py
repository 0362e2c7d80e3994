"""Time as an argument: the wall's in production, a virtual one in tests and simulation."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock."""

    def now(self) -> float:
        """Return seconds since an arbitrary, fixed origin."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when it is told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the virtual time, seconds."""
        return self._now_s

    def advance(self, delta_s: float) -> None:
        """Move time forward by `delta_s` seconds; it never goes back."""
        assert delta_s >= 0, f"time cannot go back: {delta_s=}"
        self._now_s += delta_s
