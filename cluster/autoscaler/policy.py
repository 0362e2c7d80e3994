"""How many replica groups the present load asks for, as a pure decision.

The wanted number follows the load at once; the number of groups follows the wanted one only where
it has lasted. Over a sliding window, the smallest number wanted bounds growth and the largest one
bounds shrinking, so a spike starts nothing and a lull stops nothing:

    wanted    1 1 3 3 3 3 3 3 1 3 1 1 1 1 1 1
    groups    1 1 1 1 3 3 3 3 3 3 3 3 3 3 3 1      (grows after 2 steps, shrinks after 6)

Source: the stabilization windows of Kubernetes' HorizontalPodAutoscaler.
"""

from __future__ import annotations

import math
from collections import deque

from cluster.config import AutoscalingConfig


class ScalingPolicy:
    """Decides for one deployment.

    Args:
        config: Bounds, target load per group, delays.
    """

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        self._wanted: deque[tuple[float, int]] = deque()  # (when, groups), oldest first

    def wanted(self, load: float) -> int:
        """Return the groups that a load asks for.

        Args:
            load: Requests running and waiting, over all groups.
        """
        config = self._config
        needed = math.ceil(load / config.target_load)
        return min(max(needed, config.min_replicas), config.max_replicas)

    def decide(self, now_s: float, num_groups: int, load: float) -> int:
        """Return how many groups there should be.

        Args:
            now_s: Time of the decision, never going back.
            num_groups: Groups that there should be until now.
            load: Requests running and waiting, over all groups.
        """
        config = self._config
        self._wanted.append((now_s, self.wanted(load)))
        horizon_s = max(config.upscale_delay_s, config.downscale_delay_s)
        while len(self._wanted) > 1 and self._wanted[1][0] <= now_s - horizon_s:
            self._wanted.popleft()
        floor = self._over(now_s, config.upscale_delay_s, min, num_groups)
        ceiling = self._over(now_s, config.downscale_delay_s, max, num_groups)
        target = max(floor, num_groups) if floor > num_groups else min(ceiling, num_groups)
        return min(max(target, config.min_replicas), config.max_replicas)

    def _over(self, now_s: float, window_s: float, pick: object, default: int) -> int:
        assert callable(pick)
        if self._wanted[0][0] > now_s - window_s:
            return default  # what was wanted then is not known yet
        return int(pick(wanted for when_s, wanted in self._window(now_s - window_s)))

    def _window(self, start_s: float) -> list[tuple[float, int]]:
        """Return what was wanted from `start_s` on, with what still held at that moment."""
        inside = [item for item in self._wanted if item[0] > start_s]
        before = [item for item in self._wanted if item[0] <= start_s]
        return before[-1:] + inside
