"""Which prompt is computed next: what is due first and can still be met, within fair shares.

    due            first token: arrival + ttft_s
    order          soonest due first, among those whose class and tenant are not ahead of others
    late           who cannot meet its objective any more; a class of its own, with a weight

Prompts in order of due times meet all objectives if any order does. Where none does, somebody has
to be late: whenever the prompts up to some due time need longer than there is time, the longest of
them becomes late. So the fewest requests miss their objective; those that missed it are computed in
what is left and in their share, and wait for nobody for ever.

Source: Moore, An n job, one machine sequencing algorithm for minimizing the number of late jobs
(Management Science 15, 1968), with the predicted remaining seconds as job lengths.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from cluster.config import EngineConfig
from cluster.engine.sequence import Sequence
from cluster.fair_order import FairOrder
from cluster.types import MAX_DUE_WORKS, DueWork, ServiceClass

IMPLIED_TTFT_S = 30.0
"""A prompt without an objective is ordered as if it had this one, but is never late."""

BATCH_TTFT_S = 1e5
"""Likewise for the batch class: its weight brings it its turn, not the time that it waits."""

LATE = "late"
"""Class of prompts that cannot meet their objective any more."""

REVIEW_S = 0.25
"""Between two looks at who has become late, while nothing arrives."""

_ENDLESS_TOKENS = 2**60

Seconds = Callable[[Sequence], float]
"""Predicted seconds until a sequence's prompt is computed, were it alone."""


class PromptOrder:
    """The sequences that have prompt to compute, whether they have begun or not.

    Args:
        config: Order, weights, burst.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._is_fcfs = config.order == "fcfs"
        weights: dict[str, float] = {
            ServiceClass.INTERACTIVE: config.interactive.weight,
            ServiceClass.STANDARD: config.standard.weight,
            ServiceClass.BATCH: config.batch.weight,
            LATE: config.late_weight,
        }
        # In order of arrival nobody is ever ahead of others.
        burst_tokens = _ENDLESS_TOKENS if self._is_fcfs else config.fair_burst_tokens
        self._fair: FairOrder[Sequence] = FairOrder(weights, burst_tokens)
        self._class_of: dict[int, str] = {}  # of each sequence here
        self._due: list[tuple[float, int, Sequence]] = []  # those that can be late, soonest first
        self._has_news = False  # something arrived since the last review
        self._reviewed_s = -math.inf

    def __len__(self) -> int:
        return len(self._class_of)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._class_of

    def __iter__(self) -> Iterator[Sequence]:
        """Return the sequences, most urgent first; not changed by what happens meanwhile."""
        return iter(self._fair)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence that has prompt to compute: a new one, or one that was preempted."""
        name = ServiceClass.STANDARD if self._is_fcfs else sequence.request.service_class
        self._put(name, sequence)
        if self._can_be_late(sequence):
            insort(self._due, self._item(sequence))
            self._has_news = True

    def discard(self, sequence: Sequence) -> None:
        """Let a sequence go, whose prompt is computed or that has ended; fine if it is not here."""
        name = self._class_of.pop(sequence.seq_id, None)
        if name is not None:
            self._fair.take(name, self._item(sequence))
            self._forget_due(sequence)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that tokens of a sequence are computed, of its prompt or its answer."""
        name = self._class_of.get(sequence.seq_id, sequence.request.service_class)
        self._fair.charge(ServiceClass.STANDARD if self._is_fcfs else name, sequence, num_tokens)

    def review(self, now_s: float, make_seconds: Callable[[], Seconds]) -> None:
        """Find out who cannot meet its objective any more; the predictions are made if needed."""
        if not self._due:
            return
        is_head_late = self._due[0][0] < now_s
        if not (self._has_news or is_head_late or now_s - self._reviewed_s > REVIEW_S):
            return
        self._has_news, self._reviewed_s = False, now_s
        end_s, seconds = now_s, make_seconds()
        longest: list[tuple[float, int, Sequence]] = []
        late = []
        for due_s, seq_id, sequence in self._due:
            work_s = seconds(sequence)
            end_s += work_s
            heapq.heappush(longest, (-work_s, -seq_id, sequence))
            if end_s > due_s:
                most_s, _, victim = heapq.heappop(longest)
                end_s += most_s
                late.append(victim)
        for victim in late:
            self._make_late(victim)

    def is_late(self, sequence: Sequence) -> bool:
        """Return whether a sequence is here and cannot meet its objective any more."""
        return self._class_of.get(sequence.seq_id) == LATE

    def work(self, now_s: float, seconds: Seconds) -> tuple[tuple[DueWork, ...], float]:
        """Return what is to be computed: by due time, and of all that yields to these, seconds."""
        due: list[tuple[float, float]] = []
        late_s = 0.0
        for name, item in self._fair.items():
            if name in (LATE, ServiceClass.BATCH):
                late_s += seconds(item[2])
            else:
                due.append((item[0], seconds(item[2])))
        due.sort()
        size = -(-len(due) // MAX_DUE_WORKS)
        groups = [due[start : start + size] for start in range(0, len(due), max(1, size))]
        # A group counts from its first one on: rather too much before a prompt than too little.
        works = [
            DueWork(max(group[0][0] - now_s, -1e6), sum(work_s for _, work_s in group))
            for group in groups
        ]
        return tuple(works), late_s

    def check_invariants(self) -> None:
        """Assert that the books agree."""
        self._fair.check_invariants()
        assert self._due == sorted(self._due)
        for _, seq_id, _ in self._due:
            assert self._class_of[seq_id] != LATE

    def _item(self, sequence: Sequence) -> tuple[float, int, Sequence]:
        return (self._due_s(sequence), sequence.seq_id, sequence)

    def _due_s(self, sequence: Sequence) -> float:
        if self._is_fcfs:
            return 0.0
        if sequence.num_output_tokens:
            return -math.inf  # it was preempted: somebody reads its answer already
        ttft_s = sequence.request.slo.ttft_s
        if ttft_s is None:
            is_batch = sequence.request.service_class is ServiceClass.BATCH
            ttft_s = BATCH_TTFT_S if is_batch else IMPLIED_TTFT_S
        return sequence.arrived_s + ttft_s

    def _can_be_late(self, sequence: Sequence) -> bool:
        if self._is_fcfs or sequence.num_output_tokens:
            return False
        return sequence.request.slo.ttft_s is not None

    def _put(self, name: str, sequence: Sequence) -> None:
        self._class_of[sequence.seq_id] = name
        self._fair.put(name, self._item(sequence))

    def _make_late(self, sequence: Sequence) -> None:
        self._fair.take(self._class_of[sequence.seq_id], self._item(sequence))
        self._forget_due(sequence)
        self._put(LATE, sequence)

    def _forget_due(self, sequence: Sequence) -> None:
        item = self._item(sequence)
        index = bisect_left(self._due, item[:2], key=lambda other: other[:2])
        if index < len(self._due) and self._due[index][1] == sequence.seq_id:
            del self._due[index]
