"""What the processes of a run hold in memory over their lives: pure.

    RSS   |             ________________            a leader: kernels and allocators meet new shapes
          |        ____/                            of batches for its first 10,000 tokens
          |  _____/
          |_/____________________________________   a gateway: all of it is there when it serves
           born    |◄ warm-up ►|◄──── fit ────►|
                   load begins                 load ends, or the process

Only what a process holds under load is fitted: idle ones do not grow, whatever they leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

MIB = 2**20
MIN_FIT_S = 60.0  # a slope of less says nothing
MAX_GROWTH_BYTES_PER_MIN = 4 * MIB
MEASURED_RUN_S = 300.0  # a load of so long has to show whether memory grows
EQUAL_AGE_S = 60.0
_SAMPLE_INTERVAL_S = 10.0  # of what is written down


@dataclass(frozen=True, slots=True)
class Habit:
    """How the memory of a kind of process behaves where nothing leaks."""

    warm_up_s: float  # to start, and under load until it is about as large as it will be
    step_bytes: int  # that it may grow by once behind that: an allocator asks for much at a time


# On a busy machine of two cores a process takes up to 40 s to start. A gateway is then as large as
# after minutes, within 3 MiB. An engine alone grew by 128 MiB over its first 10,000 tokens and by
# 10 MiB, in two steps, over the next 18,000; a leader of three computes about 100 a second.
_COMPUTES, _SERVES = Habit(150.0, 16 * MIB), Habit(60.0, 4 * MIB)
_HABITS = {"leader": _COMPUTES, "worker": _COMPUTES}
_BOUNDED_KINDS = ("redis",)  # fills its budgets, which are checked by themselves


@dataclass(frozen=True, slots=True)
class Growth:
    """The slope of one life under load, behind the warm-up, by least squares."""

    bytes_per_min: float
    seconds: float  # that it was fitted over


@dataclass(slots=True)
class Life:
    """The memory of one process over its life; seconds since the run began."""

    kind: str
    pid: int
    born_s: float  # when it started, or became one of this kind
    times_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)

    def add(self, time_s: float, rss_bytes: int) -> None:
        """Take one more sample."""
        self.times_s.append(time_s)
        self.rss_bytes.append(rss_bytes)

    def growth(self, begin_s: float, end_s: float) -> Growth | None:
        """Return how it grew under load; None where it did not live long enough.

        Args:
            begin_s: Of the load.
            end_s: Likewise.
        """
        if self.kind in _BOUNDED_KINDS:
            return None
        warm_s = max(begin_s, self.born_s) + self._habit.warm_up_s
        samples = zip(self.times_s, self.rss_bytes, strict=True)
        points = [(time_s, rss) for time_s, rss in samples if warm_s <= time_s <= end_s]
        if not points or points[-1][0] - points[0][0] < MIN_FIT_S:
            return None
        times_s, rss_bytes = np.array(points, dtype=float).T
        slope = float(np.polyfit(times_s, rss_bytes, 1)[0])
        return Growth(slope * 60.0, points[-1][0] - points[0][0])

    def allowed_bytes_per_min(self, fit_s: float) -> float:
        """Return the slope that is no leak yet in a fit over so many seconds."""
        return MAX_GROWTH_BYTES_PER_MIN + self._habit.step_bytes * 60.0 / fit_s

    def at_age_bytes(self, age_s: float) -> float | None:
        """Return what it held at that age; None where nobody looked before or behind."""
        time_s = self.born_s + age_s
        if not self.times_s[0] <= time_s <= self.times_s[-1]:
            return None
        return float(np.interp(time_s, self.times_s, self.rss_bytes))

    def figures(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Return it as plain data, for JSON; of a load as for `growth`."""
        growth = self.growth(begin_s, end_s)
        return {
            "kind": self.kind,
            "pid": self.pid,
            "born_s": self.born_s,
            "seconds": self.times_s[-1] - self.born_s,
            "growth_bytes_per_min": None if growth is None else growth.bytes_per_min,
            "allowed_bytes_per_min": (
                None if growth is None else self.allowed_bytes_per_min(growth.seconds)
            ),
            "samples": self._samples(),
        }

    @property
    def _habit(self) -> Habit:
        return _HABITS.get(self.kind, _SERVES)

    def _samples(self) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        for time_s, rss in zip(self.times_s, self.rss_bytes, strict=True):
            if not found or time_s - self.born_s >= found[-1]["age_s"] + _SAMPLE_INTERVAL_S:
                found.append({"age_s": time_s - self.born_s, "rss_bytes": rss})
        return found


def memory_leaks(lives: Sequence[Life], begin_s: float, end_s: float) -> list[str]:
    """Return which processes grew under load beyond what is allowed, in words."""
    found = []
    for life in lives:
        growth = life.growth(begin_s, end_s)
        if growth is None:
            continue
        allowed = life.allowed_bytes_per_min(growth.seconds)
        if growth.bytes_per_min > allowed:
            found.append(
                f"{life.kind} {life.pid} grows by {growth.bytes_per_min / MIB:.1f} MiB a minute "
                f"over {growth.seconds:.0f} s, limit {allowed / MIB:.1f}"
            )
    return found


def memory_figures(lives: Sequence[Life], begin_s: float, end_s: float) -> dict[str, Any]:
    """Return by kind of process how many lives were long enough, and how lives compare.

    Args:
        lives: In order of their births.
        begin_s: Of the load.
        end_s: Likewise.
    """
    kinds = sorted({life.kind for life in lives})
    return {name: _kind([x for x in lives if x.kind == name], begin_s, end_s) for name in kinds}


def _kind(lives: list[Life], begin_s: float, end_s: float) -> dict[str, Any]:
    measured = [(life, growth) for life in lives if (growth := life.growth(begin_s, end_s))]
    aged = [held for life in lives if (held := life.at_age_bytes(EQUAL_AGE_S)) is not None]
    third = len(aged) // 3
    first, last = (median(aged[:third]), median(aged[-third:])) if third else (None, None)
    return {
        "num_lives": len(lives),
        "num_measured": len(measured),
        "growth_max_bytes_per_min": max((g.bytes_per_min for _, g in measured), default=None),
        # A leak of less could not have been seen, in any of them.
        "allowed_min_bytes_per_min": min(
            (life.allowed_bytes_per_min(growth.seconds) for life, growth in measured), default=None
        ),
        "equal_age_s": EQUAL_AGE_S,
        "num_of_that_age": len(aged),
        "first_third_bytes": first,
        "last_third_bytes": last,
        "difference_bytes": None if first is None or last is None else last - first,
    }
