"""How far predictions are off: the replica's speed, and what nobody can know beforehand.

    predicted  = wait + own work + one step         from the pushed state
    p50        = predicted x median                 of this replica's last requests
    high       = p50 x risk                         a high quantile of recent requests of its size

The median follows whatever makes one replica slower or faster than its model of steps says. The
risk is that of being overtaken: work that takes long waits behind what arrives after it and is due
before it. That cannot be read from the queues of the moment, only from what became of work of its
size in the last seconds, at whichever replica.

Which quantile is high enough shows in how many of the admitted requests miss their objective: the
level rises with each miss and falls with each one that is met, so that few do. With room to spare
it ends at the median, and nothing is refused that would probably have been served in time.

Source: split conformal prediction with a normalized score (Lei et al., JASA 2018), over a window
that moves; adaptive conformal inference (Gibbs and Candes, NeurIPS 2021) for the level.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

OFFSET_S = 0.02
"""Added to both times, so that milliseconds of noise do not look like a large ratio."""

NUM_REMEMBERED = 64
"""Requests of one replica that its median is of."""

WINDOW_S = 20.0
"""Risks are of the requests of so many seconds: what was refused cannot show that it fits again."""

SIZES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Borders of predicted time between which requests are alike."""

PRIOR_RATIOS = (0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.2, 1.5)
"""Always among those of a size: most predictions are about right, some take half as long again."""

MIN_REQUESTS = 8
MAX_REQUESTS = 256
MIN_LEVEL, MAX_LEVEL = 0.5, 0.9
STEP = 0.05
"""By which a miss raises the level."""

MAX_RATIO = 100.0
"""Of a request that missed its objective: how long it would have taken is not known."""


class Correction:
    """Median of measured over predicted time of one replica's requests."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque()
        self._ordered: list[float] = []
        self.median = 1.0

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Learn from one request; both times are at least 0 and finite."""
        ratio = (actual_s + OFFSET_S) / (predicted_s + OFFSET_S)
        self._ratios.append(ratio)
        insort(self._ordered, ratio)
        if len(self._ratios) > NUM_REMEMBERED:
            del self._ordered[bisect_left(self._ordered, self._ratios.popleft())]
        # A few ones say as little as the prior does.
        middle = (len(self._ordered) - 1) // 2
        self.median = self._ordered[middle] if len(self._ordered) >= MIN_REQUESTS else 1.0


class RiskModel:
    """A high quantile of measured over predicted (p50) time, by the size of the prediction.

    Args:
        miss_probability: Of the admitted requests so many may miss their objective, in (0, 1).
    """

    def __init__(self, miss_probability: float) -> None:
        self._miss_probability = miss_probability
        self._ratios: list[deque[tuple[float, float]]] = [
            deque(maxlen=MAX_REQUESTS) for _ in range(len(SIZES_S) + 1)
        ]
        self._risks = np.ones(len(self._ratios))
        self._refresh_s = -math.inf
        self.level = MIN_LEVEL  # of the quantile

    def observe(self, predicted_s: float, actual_s: float, now_s: float) -> None:
        """Learn from one request; an infinite time is that of one that missed its objective."""
        is_missed = actual_s == math.inf
        self.level += STEP * (is_missed - self._miss_probability)
        self.level = min(MAX_LEVEL, max(MIN_LEVEL, self.level))
        size = bisect_left(SIZES_S, predicted_s)
        ratio = min(MAX_RATIO, (actual_s + OFFSET_S) / (predicted_s + OFFSET_S))
        self._ratios[size].append((now_s, ratio))

    def risks(self, predicted_s: Floats, now_s: float) -> Floats:
        """Return the factor of each prediction."""
        if now_s >= self._refresh_s:
            self._refresh_s = now_s + WINDOW_S / 100
            for size in range(len(self._ratios)):
                self._update(size, now_s)
        risks: Floats = self._risks[np.searchsorted(SIZES_S, predicted_s)]
        return risks

    def _update(self, size: int, now_s: float) -> None:
        ratios = self._ratios[size]
        while ratios and ratios[0][0] < now_s - WINDOW_S:
            ratios.popleft()
        ordered = sorted((*PRIOR_RATIOS, *(ratio for _, ratio in ratios)))
        rank = math.ceil(self.level * (len(ordered) + 1)) - 1
        self._risks[size] = max(1.0, ordered[min(rank, len(ordered) - 1)])
