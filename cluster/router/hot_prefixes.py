"""How often each prefix was asked for of late."""

from __future__ import annotations

import math
from collections import OrderedDict

MAX_PREFIXES = 4096
"""Remembered; the least recently used ones are forgotten."""


class HotPrefixes:
    """Counts uses with an exponential window: a use of `window_s` ago counts a third.

    Args:
        window_s: Time constant, seconds.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._uses: OrderedDict[int, tuple[float, float]] = OrderedDict()  # key -> (uses, when)

    def uses(self, key: int, now_s: float) -> float:
        """Return the uses of late of the prefix that ends with this block."""
        uses, when_s = self._uses.get(key, (0.0, now_s))
        return uses * math.exp((when_s - now_s) / self._window_s)

    def use(self, key: int, now_s: float) -> None:
        """Count a use."""
        self._uses[key] = (self.uses(key, now_s) + 1.0, now_s)
        self._uses.move_to_end(key)
        if len(self._uses) > MAX_PREFIXES:
            self._uses.popitem(last=False)
