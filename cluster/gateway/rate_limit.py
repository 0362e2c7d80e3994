"""What a tenant may ask for in a time, and when it may ask again. Pure.

    minutes of the clock    |    previous    |    present     |
    last 60 s                      |<------------->|
                                   |<---------|----|
                              previous x part + present <= limit

Source: the sliding window counter, as Cloudflare's "How we built rate limiting capable of scaling
to millions of domains" (2017) tells it. It takes the previous minute's count for evenly spread over
it: if all of that came in its last moment, 60 s may see up to twice the limit, and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Of one tenant, at all gateways together; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # of prompts, and of answers as they were asked for or became
    max_streams: int = 0  # requests that have not ended


NO_LIMITS = RateLimits()
"""Of a tenant that may ask for anything."""


@dataclass(frozen=True, slots=True)
class Window:
    """A limit at a moment."""

    limit: int  # per 60 s
    num_previous: int  # counted in the previous minute
    elapsed_s: float  # of the present minute, [0, 60)

    @property
    def most(self) -> int:
        """What the present minute's count may reach now."""
        part = 1 - self.elapsed_s / WINDOW_S
        return math.floor(self.limit - max(0, self.num_previous) * part)

    def retry_after_s(self, num_present: int, amount: int) -> float:
        """Return when `amount` fits if nobody else comes, seconds; rounded up to hundredths.

        Args:
            num_present: Counted in the present minute, without `amount`.
            amount: <= limit; with it the count is more than `most`.
        """
        fading, room, start_s = self.num_previous, self.limit - num_present - amount, 0.0
        if room < 0:  # not in this minute: in the next one this one's part gets small enough
            fading, room, start_s = num_present, self.limit - amount, WINDOW_S
        wait_s = start_s + WINDOW_S * (1 - room / fading) - self.elapsed_s
        return math.floor(100 * wait_s + 1) / 100
