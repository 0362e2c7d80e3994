"""Requests that wait at one gateway for a replica: bounded in number, in tokens and in time.

Those that were admitted before and lost their replica are in nobody's way: they go first in their
class, and the bounds are those of the others.

fair_order.py says whose turn it is. What missed its objective while it waited is late: it does not
hold up what can still be in time, and gets a share of its own (`engine.late_weight`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.errors import OverloadedError
from cluster.fair_order import FairOrder
from cluster.router.route import RouteRequest
from cluster.types import ServiceClass

_LATE = "late"
_MAX_DUE_S = 30.0  # after arrival: without an objective, or with a later one, it is due then


class _Timeline:
    """Serial numbers by time; as short as the queue, so a sorted list is fast enough."""

    def __init__(self) -> None:
        self._times: list[tuple[float, int]] = []

    @property
    def first_s(self) -> float:
        return self._times[0][0] if self._times else math.inf

    def add(self, time_s: float, serial: int) -> None:
        insort(self._times, (time_s, serial))

    def discard(self, time_s: float, serial: int) -> None:
        index = bisect_left(self._times, (time_s, serial))
        if index < len(self._times) and self._times[index] == (time_s, serial):
            del self._times[index]

    def pop_until(self, now_s: float) -> list[int]:
        index = bisect_left(self._times, (now_s, math.inf))
        passed, self._times = self._times[:index], self._times[index:]
        return [serial for _, serial in passed]


@dataclass(slots=True)
class _Entry:
    request: RouteRequest
    serial: int  # of the arrival in the queue
    until_s: float
    class_name: str  # in the order

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def tenant_weight(self) -> float:
        return self.request.tenant_weight

    @property
    def num_tokens(self) -> int:
        """That count; of one that is resumed they have been counted."""
        return 0 if self.request.is_resumed else self.request.num_prompt_tokens

    @property
    def item(self) -> tuple[float, int, _Entry]:
        if self.request.is_resumed:
            return (-math.inf, self.serial, self)
        ttft_s = self.request.slo.ttft_s
        due_s = _MAX_DUE_S if ttft_s is None else min(ttft_s, _MAX_DUE_S)
        return (self.request.arrived_s + due_s, self.serial, self)

    @property
    def end_s(self) -> float:
        """When it waits no longer."""
        return min(self.until_s, self.request.expires_s)

    @property
    def late_s(self) -> float:
        """When its objective is missed."""
        ttft_s = self.request.slo.ttft_s
        return math.inf if ttft_s is None else self.request.arrived_s + ttft_s


class WaitingQueue:
    """The queue of one gateway; pure.

    Args:
        config: Bounds of the gateway's queue; weights and burst of the engine's fair shares.
    """

    def __init__(self, config: ClusterConfig) -> None:
        engine = config.engine
        self._limits = config.gateway
        weights: dict[str, float] = {
            ServiceClass.INTERACTIVE: engine.interactive.weight,
            ServiceClass.STANDARD: engine.standard.weight,
            ServiceClass.BATCH: engine.batch.weight,
            _LATE: engine.late_weight,
        }
        self._order: FairOrder[_Entry] = FairOrder(weights, engine.fair_burst_tokens)
        self._serials: dict[str, int] = {}  # by request id
        self._entries: dict[int, _Entry] = {}  # by serial number
        self._ends = _Timeline()
        self._objectives = _Timeline()  # of those that are not late
        self._num_tokens = 0
        self._num_resumed = 0
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._serials

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all that wait."""
        return self._num_tokens

    @property
    def next_expiry_s(self) -> float:
        """When the next request's time is over; infinite while none waits."""
        return self._ends.first_s

    def push(self, request: RouteRequest, until_s: float) -> list[RouteRequest]:
        """Let a request wait; return those that have to leave for it.

        In a full queue who would be served last leaves, so a flood of one tenant keeps nobody out.

        Args:
            request: Its id is not in the queue.
            until_s: It waits no longer than this, nor than its own `expires_s`.

        Raises:
            OverloadedError: The queue is full, and the request would be served last.
        """
        assert request.request_id not in self._serials, f"{request.request_id} waits already"
        full = self._why_full(request)
        self._put(request, until_s)
        pushed_out: list[RouteRequest] = []
        while self._is_over:
            last = self._last()
            self.remove(last.request_id)
            if last is request:
                for other in pushed_out:  # it was all for nothing
                    self._put(other, until_s)
                raise OverloadedError(full)
            pushed_out.append(last)
        return pushed_out

    def _put(self, request: RouteRequest, until_s: float) -> None:
        entry = _Entry(request, self._next_serial, until_s, request.service_class)
        self._next_serial += 1
        self._serials[request.request_id] = entry.serial
        self._entries[entry.serial] = entry
        self._ends.add(entry.end_s, entry.serial)
        self._objectives.add(entry.late_s, entry.serial)
        self._num_tokens += entry.num_tokens
        self._num_resumed += request.is_resumed
        self._order.put(entry.class_name, entry.item)

    def remove(self, request_id: str) -> None:
        """Forget a request; not there is fine."""
        serial = self._serials.pop(request_id, None)
        if serial is None:
            return
        entry = self._entries.pop(serial)
        self._ends.discard(entry.end_s, serial)
        self._objectives.discard(entry.late_s, serial)
        self._num_tokens -= entry.num_tokens
        self._num_resumed -= entry.request.is_resumed
        self._order.take(entry.class_name, entry.item)

    def served(self, request: RouteRequest) -> None:
        """Note that a request goes to a replica: its class and tenant have had its prompt tokens.

        Args:
            request: Leaves the queue if it is there; those that did not have to wait count too.
        """
        serial = self._serials.get(request.request_id)
        entry = _Entry(request, -1, math.inf, request.service_class)
        if serial is not None:
            entry = self._entries[serial]
        self._order.charge(entry.class_name, entry, entry.num_tokens)
        self.remove(request.request_id)

    def expired(self, now_s: float) -> list[RouteRequest]:
        """Take out and return the requests whose time is over, the first one first."""
        requests = [self._entries[serial].request for serial in self._ends.pop_until(now_s)]
        for request in requests:
            self.remove(request.request_id)
        return requests

    def order(self, now_s: float) -> Iterator[RouteRequest]:
        """Return the requests in the order in which they should be tried now.

        It is found as it is read; what is pushed, served or removed meanwhile does not change it.
        """
        for serial in self._objectives.pop_until(now_s):
            entry = self._entries[serial]
            self._order.take(entry.class_name, entry.item)
            entry.class_name = _LATE
            self._order.put(entry.class_name, entry.item)
        return (entry.request for entry in self._order)

    def position(self, request_id: str) -> int:
        """Return how many requests come before one that waits, late as of the last `order`.

        It takes as long as reading the order up to there.
        """
        serial = self._serials[request_id]
        places = enumerate(self._order)
        return next(place for place, entry in places if entry.serial == serial)

    def check_invariants(self) -> None:
        """Assert that the books agree, and that the bounds hold."""
        self._order.check_invariants()
        waiting = list(self._order)
        assert sorted(entry.request.request_id for entry in waiting) == sorted(self._serials)
        assert sorted(self._entries) == sorted(self._serials.values())
        assert self._num_tokens == sum(entry.num_tokens for entry in waiting)
        assert self._num_resumed == sum(entry.request.is_resumed for entry in waiting)
        assert len(self) - self._num_resumed <= self._limits.max_queued_requests
        assert self._num_tokens <= self._limits.max_queued_tokens

    @property
    def _is_over(self) -> bool:
        limits = self._limits
        is_long = len(self) - self._num_resumed > limits.max_queued_requests
        return is_long or self._num_tokens > limits.max_queued_tokens

    def _last(self) -> RouteRequest:
        """Return who would be served last."""
        *_, last = (entry.request for entry in self._order if not entry.request.is_resumed)
        return last

    def _why_full(self, request: RouteRequest) -> str:
        max_requests, max_tokens = self._limits.max_queued_requests, self._limits.max_queued_tokens
        num_requests = len(self) - self._num_resumed
        if num_requests >= max_requests:
            return (
                f"{num_requests} requests wait for a replica, "
                f"gateway.max_queued_requests={max_requests}: try again later"
            )
        return (
            f"{self._num_tokens} prompt tokens wait for a replica, with this request's "
            f"{request.num_prompt_tokens} it would be more than "
            f"gateway.max_queued_tokens={max_tokens}: try again later, or send fewer"
        )
