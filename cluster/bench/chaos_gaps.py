"""Which pauses in the streams a fault has caused: pure.

    tokens    | | | | | | |              | | | | | |
    fault                  ▲ begins
    gap                   |◄────────────►|           the longest one that touches the window
    window                 |◄─────────────── 5 s ──►|

Only the victims of a fault count: the streams that it hit, not those beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.bench.chaos_schedule import FaultKind, Target

WINDOW_S = 5.0
"""What begins later than this behind a fault has another cause."""

ON_ITS_WAY_S = 0.05
"""What arrives so soon behind a fault had left its victim before."""


@dataclass(slots=True)
class Trace:
    """When a stream moved; seconds since the run began."""

    begin_s: float
    end_s: float = 0.0
    # Each list is one stretch in which the client listened; a pause between two was its own wish.
    stretches: list[list[float]] = field(default_factory=lambda: [[]])
    replicas: list[tuple[float, str]] = field(default_factory=list)  # that computed it, from when
    # From the last event before the client library went on elsewhere, to the first one behind.
    resumptions: list[tuple[float, float]] = field(default_factory=list)

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Yield (begin, end) of the time between two arrivals."""
        for stretch in self.stretches:
            yield from pairwise(stretch)

    def replica_at(self, time_s: float) -> str:
        """Return which replica computed it then, as far as the client knew."""
        names = [name for since_s, name in self.replicas if since_s <= time_s]
        return names[-1] if names else ""


@dataclass(slots=True)
class FaultRecord:
    """A fault that happened; seconds since the run began."""

    number: int
    kind: FaultKind
    victim: str  # id of a replica or gateway; empty: no one in particular
    planned_s: float
    begin_s: float
    end_s: float | None = None  # made good by the benchmark; None: not yet
    whole_s: float | None = None  # all replicas and gateways serve again; None: not seen
    error: str = ""  # it could not be brought about

    def covers(self, trace: Trace) -> bool:
        """Return whether a stream lived while this went on."""
        end_s = self.begin_s + self.kind.lasts_s if self.end_s is None else self.end_s
        return trace.begin_s <= end_s and self.begin_s <= trace.end_s


def victim_gaps_s(fault: FaultRecord, traces: Sequence[Trace]) -> list[float]:
    """Return the longest gap of each victim of a fault, seconds.

    A victim of a replica's fault was computed there. Of a gateway's or the network's it is one
    whose client went on elsewhere, of a network that stood still and of the store it is any.
    """
    if fault.error:
        return []
    window = (fault.begin_s, fault.begin_s + max(WINDOW_S, 2 * fault.kind.lasts_s))
    found = []
    for trace in traces:
        if not (trace.begin_s <= fault.begin_s < trace.end_s and _is_victim(fault, trace, window)):
            continue
        last_s = max((time_s for times in trace.stretches for time_s in times), default=0.0)
        if last_s <= fault.begin_s + ON_ITS_WAY_S:
            continue  # all of it was on its way already: nothing was left to hit
        touching = [b - a for a, b in trace.gaps() if a < window[1] and b > window[0]]
        if touching:
            found.append(max(touching))
    return found


def _is_victim(fault: FaultRecord, trace: Trace, window: tuple[float, float]) -> bool:
    if fault.kind.target is Target.REPLICA:
        return trace.replica_at(fault.begin_s) == fault.victim
    if fault.kind.target is Target.STORE or fault.kind.lasts_s:
        return True
    return any(a < window[1] and b > window[0] for a, b in trace.resumptions)
