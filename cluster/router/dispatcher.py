"""One gateway's global scheduler: what arrives is dispatched, queued or refused. Pure.

    submit ──► admission ──► dispatched ──► on_first_token ──► on_end
                  │  │             ▲
                  │  └──► queued ──┘ poll
                  └─────► refused

Whoever owns it (gateway/generation.py, simulator/) tells it what happens, does the I/O, and calls
`poll` whenever a replica has come, gone or reported its load while requests are queued.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.config import ClusterConfig, EngineConfig, LatencyConfig
from cluster.errors import OverloadedError
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable, Sent
from cluster.router.route import Candidate, Decision, Outcome, OutcomeKind, RouteRequest
from cluster.router.router import Router
from cluster.router.waiting_queue import WaitingQueue
from cluster.types import NO_SLO, ServiceClass

MAX_HOLD_S = 2.0
"""A request waits at the gateway for room at most so long, while there is a replica."""

MIN_RETRY_S = 0.1
"""A refused request is told to wait at least so long."""

_MIN_DUES = 64
_MAX_DEPARTURES = 256
_DEPARTURES_WINDOW_S = 10.0  # what left before says nothing about what leaves now
_MAX_ERRORS = 4096  # of predictions, until somebody takes them


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is remembered of a decision."""

    request: RouteRequest
    outcome: Outcome
    decided_s: float  # by the gateway's clock
    ttft_s: float | None = None  # from arrival to the first token, once it has come


@dataclass(slots=True)
class _Flight:
    """A request at a replica."""

    request: RouteRequest
    candidate: Candidate
    sent_s: float
    predicted_s: float  # to the first token, without correction
    longest_s: float  # beyond its objective the engine lets others go first: nothing is learned
    is_in_time: bool  # by what was predicted
    has_token: bool = False
    is_missed: bool = False  # its objective, as far as was learnt


class Dispatcher:
    """Decides for one gateway.

    Args:
        config: Of the cluster: router, the classes' objectives, bounds of the queue.
        rng: Breaks ties; seeded in simulations and tests.
    """

    def __init__(self, config: ClusterConfig, *, rng: random.Random) -> None:
        self.table = ReplicaTable(miss_probability=config.router.miss_probability)
        self.index = PrefixIndex(config.router.max_index_bytes)
        self._config = config
        self._router = Router(config.router, rng)
        self._queue = WaitingQueue(config)
        # Classes of which somebody waits for room that others of it may not take.
        self._lines: dict[ServiceClass, None] = {}
        self._pushed_out: list[tuple[RouteRequest, Outcome]] = []  # of a full queue, not told yet
        self._flights: dict[str, _Flight] = {}
        self._explained: OrderedDict[str, Explanation] = OrderedDict()
        self._dues: list[tuple[float, str]] = []  # of first tokens, a heap
        self._errors: list[float] = []
        self._departures = _Departures()

    @property
    def num_queued(self) -> int:
        """Requests that wait for a replica."""
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of these."""
        return self._queue.num_tokens

    def set_peers(self, rank: int, num_gateways: int) -> None:
        """Learn which of how many gateways this is, counted in the order of their ids."""
        self._router.set_peers(rank, num_gateways)

    def submit(self, request: RouteRequest, now_s: float) -> Outcome:
        """Decide about a request that has arrived; one that is dispatched counts as sent."""
        self._note_misses(now_s)
        has_line = request.service_class in self._lines and len(self._queue) > 0
        # Those that wait came first, unless it has come before them.
        is_behind = has_line and not request.is_resumed
        outcome = None if is_behind else self._decide(request, now_s)
        if outcome is None:
            outcome = self._enqueue(request, now_s)
        self._remember(request, outcome, now_s)
        return outcome

    def poll(self, now_s: float) -> list[tuple[RouteRequest, Outcome]]:
        """Return the queued requests that leave the queue now: dispatched, refused or expired."""
        left, self._pushed_out = self._pushed_out, []
        for request in self._queue.expired(now_s):
            left.append((request, self._expired(request, now_s)))
        self._lines.clear()
        for request in self._queue.order(now_s):
            if request.service_class in self._lines:
                continue  # the next one may be smaller, but would let the first one starve
            outcome = self._decide(request, now_s)
            if outcome is None:
                self._hold_line(request)
                continue
            if outcome.is_dispatched:
                self._queue.served(request)
            else:
                self._queue.remove(request.request_id)
            self._departures.note(now_s)
            left.append((request, outcome))
        for request, outcome in left:
            self._remember(request, outcome, now_s)
        return left

    def next_poll_s(self) -> float:
        """Return when `poll` is due though nothing happens; infinite while nothing is queued."""
        return -math.inf if self._pushed_out else self._queue.next_expiry_s

    def place(self, request_id: str, now_s: float) -> Outcome | None:
        """Return the present place of a queued request, with a new estimate; None: not queued."""
        if request_id not in self._queue:
            return None
        return self._queued(self._queue.position(request_id), now_s)

    def can_place(self, request: RouteRequest) -> bool:
        """Return whether a replica takes such a request, were there room."""
        return self._router.takes(request, self.table)

    def on_first_token(self, request_id: str, now_s: float) -> None:
        """Learn from when the first token came."""
        flight = self._flights.get(request_id)
        if flight is None or flight.has_token:
            return
        self._note_misses(now_s)  # this one may be among them
        flight.has_token = True
        actual_s = now_s - flight.sent_s
        if flight.is_in_time and actual_s <= flight.longest_s:
            self.table.risk.observe(flight.candidate.ttft_p50_s, actual_s, now_s)
        # Batch work without an objective lets everybody pass: it says nothing about a replica.
        is_batch = flight.request.service_class is ServiceClass.BATCH
        if flight.longest_s < math.inf or not is_batch:
            self.table.on_first_token(
                flight.candidate.replica_id,
                predicted_s=flight.predicted_s,
                actual_s=min(actual_s, flight.longest_s),
            )
        if flight.candidate.ttft_p50_s > 0 and len(self._errors) < _MAX_ERRORS:
            self._errors.append(actual_s / flight.candidate.ttft_p50_s)
        explanation = self._explained.get(request_id)
        if explanation is not None and not flight.request.is_resumed:
            ttft_s = now_s - flight.request.arrived_s
            self._explained[request_id] = replace(explanation, ttft_s=ttft_s)

    def on_end(self, request_id: str) -> None:
        """Forget a request, wherever it stands; its decision can be explained for a while."""
        self._queue.remove(request_id)
        if self._pushed_out:
            self._pushed_out = [
                item for item in self._pushed_out if item[0].request_id != request_id
            ]
        self._land(request_id)

    def explain(self, request_id: str) -> Explanation | None:
        """Return what is remembered of a request; None: nothing (any more)."""
        return self._explained.get(request_id)

    def take_prediction_errors(self) -> Iterable[float]:
        """Return actual over predicted (p50) TTFT of requests since the last call."""
        errors, self._errors = self._errors, []
        return errors

    def _note_misses(self, now_s: float) -> None:
        """Learn from requests whose first token is overdue: at the latest now they are late."""
        while self._dues and self._dues[0][0] < now_s:
            _, request_id = heapq.heappop(self._dues)
            flight = self._flights.get(request_id)
            if flight is not None and not flight.has_token and not flight.is_missed:
                flight.is_missed = True
                self.table.risk.observe(flight.candidate.ttft_p50_s, math.inf, now_s)

    def _hold_line(self, request: RouteRequest) -> None:
        """Let those of its class wait behind a request that waits for room, or for a replica."""
        if not len(self.table) or self.can_place(request):
            self._lines[request.service_class] = None

    def _decide(self, request: RouteRequest, now_s: float) -> Outcome | None:
        """Dispatch or refuse a request; None: it has to wait."""
        decision = self._router.pick(request, self.table, self.index, now_s)
        if decision is None:
            return None
        if request.is_resumed:
            return self._dispatch(request, decision, now_s)
        if decision.is_full and now_s - request.arrived_s < MAX_HOLD_S:
            return None  # later the engine's own queue keeps a place for it
        if decision.meets_slo or self._config.router.admission == "off":
            return self._dispatch(request, decision, now_s)
        return self._miss(request, decision, now_s)

    def _miss(self, request: RouteRequest, decision: Decision, now_s: float) -> Outcome:
        """Return what becomes of a request whose objective cannot be kept."""
        ttft_s = decision.chosen.ttft_high_s
        late_s = ttft_s - (request.expires_s - now_s)  # as the view compares them
        if late_s > 0:
            reason = f"its deadline is over in {request.expires_s - now_s:.3g} s"
            return self._refused(reason, decision, late_s)
        if request.slo.ttft_s is not None:
            late_s = now_s + ttft_s - request.arrived_s - request.slo.ttft_s
            if request.arrived_s + request.slo.ttft_s < now_s:
                return self._degraded(request, decision, now_s)  # it waited for us
        on_miss = class_config(self._config.engine, request.service_class).on_miss
        if on_miss == "refuse":
            return self._refused(_objective(request, decision), decision, late_s)
        if on_miss == "degrade":
            return self._degraded(request, decision, now_s)
        return self._dispatch(request, decision, now_s)

    def _degraded(self, request: RouteRequest, decision: Decision, now_s: float) -> Outcome:
        outcome = self._dispatch(request._replace(slo=NO_SLO), decision, now_s)
        reason = f"{_objective(request, decision)}: served without it"
        return replace(outcome, kind=OutcomeKind.DEGRADED, reason=reason)

    def _dispatch(self, request: RouteRequest, decision: Decision, now_s: float) -> Outcome:
        self._router.take()
        self._send(request, decision.chosen, now_s)
        return Outcome(OutcomeKind.DISPATCHED, decision=decision, slo=request.slo)

    def _refused(self, why: str, decision: Decision, late_s: float) -> Outcome:
        chosen = decision.chosen
        return Outcome(
            OutcomeKind.REFUSED,
            f"{why}, the best replica is predicted to need {chosen.ttft_high_s:.3g} s to the first "
            f"token and {chosen.tpot_s:.3g} s per further one: try again later, or allow more time",
            decision=decision,
            retry_after_s=max(MIN_RETRY_S, late_s),
        )

    def _enqueue(self, request: RouteRequest, now_s: float) -> Outcome:
        until_s = now_s + self._config.gateway.queue_timeout_s
        retry_s = max(MIN_RETRY_S, self._departures.seconds(1, now_s) or 1.0)
        try:
            pushed_out = self._queue.push(request, until_s)
        except OverloadedError as error:
            return Outcome(OutcomeKind.REFUSED, str(error), retry_after_s=retry_s)
        for other in pushed_out:
            reason = "the gateway's queue is full of requests that come before: try again later"
            outcome = Outcome(OutcomeKind.REFUSED, reason, retry_after_s=retry_s)
            self._pushed_out.append((other, outcome))
        self._hold_line(request)
        return self._queued(self._queue.position(request.request_id), now_s)

    def _queued(self, position: int, now_s: float) -> Outcome:
        return Outcome(
            OutcomeKind.QUEUED,
            "no replica has room" if len(self.table) else "no replica is ready",
            position=position,
            estimate_s=self._departures.seconds(position + 1, now_s),
        )

    def _expired(self, request: RouteRequest, now_s: float) -> Outcome:
        if request.expires_s <= now_s:
            reason = "the deadline passed while it waited for a replica"
        else:
            timeout_s = self._config.gateway.queue_timeout_s
            reason = f"no replica was ready within gateway.queue_timeout_s={timeout_s:g}"
        return Outcome(OutcomeKind.EXPIRED, f"{reason}: try again later")

    def _send(self, request: RouteRequest, candidate: Candidate, now_s: float) -> None:
        row = self.table.row_of(candidate.replica_id)
        predicted_s, longest_s, is_in_time = 0.0, math.inf, False
        if row is not None:
            predicted_s = candidate.ttft_p50_s / float(self.table.column("median")[row])
            block_size = self.table.kinds[row][1]
            slo = request.slo
            if slo.ttft_s is not None:
                left_s = request.arrived_s + slo.ttft_s - now_s
                longest_s = max(predicted_s, left_s)
                is_in_time = candidate.ttft_high_s <= left_s
            if is_in_time:  # what was late from the beginning says nothing about predictions
                self._push_due(now_s + left_s, request.request_id)
            sent = Sent(
                candidate.num_uncached_tokens,
                num_blocks=candidate.num_uncached_tokens // block_size + 1,
                work_s=candidate.own_s,
                due_s=math.inf if slo.ttft_s is None else request.arrived_s + slo.ttft_s,
            )
            self.table.on_submit(candidate.replica_id, request.request_id, sent)
        self._flights[request.request_id] = _Flight(
            request, candidate, now_s, predicted_s, longest_s, is_in_time
        )

    def _push_due(self, due_s: float, request_id: str) -> None:
        # Most have ended long before a distant due time: as many are kept as are under way.
        if len(self._dues) > 2 * len(self._flights) + _MIN_DUES:
            self._dues = [item for item in self._dues if item[1] in self._flights]
            heapq.heapify(self._dues)
        heapq.heappush(self._dues, (due_s, request_id))

    def _land(self, request_id: str) -> None:
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            self.table.on_end(flight.candidate.replica_id, request_id)

    def _remember(self, request: RouteRequest, outcome: Outcome, now_s: float) -> None:
        request_id = request.request_id
        # Without the keys: they hold the prompt's tokens.
        self._explained[request_id] = Explanation(request._replace(keys=_no_keys), outcome, now_s)
        self._explained.move_to_end(request_id)
        while len(self._explained) > self._config.router.max_decisions:
            self._explained.popitem(last=False)


class _Departures:
    """How fast requests leave the queue: the last ones of them, and the time since the first."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_MAX_DEPARTURES)

    def note(self, now_s: float) -> None:
        """Note that one has left."""
        self._times_s.append(now_s)

    def seconds(self, num_requests: int, now_s: float) -> float | None:
        """Return how long it takes until so many have left; None: unknown."""
        while self._times_s and self._times_s[0] < now_s - _DEPARTURES_WINDOW_S:
            self._times_s.popleft()
        if len(self._times_s) < 2:
            return None
        return num_requests * (now_s - self._times_s[0]) / len(self._times_s)


def _no_keys(fingerprint: str, block_size: int) -> Sequence[int]:
    """Stand for the keys of a prompt that is over."""
    del fingerprint, block_size
    return ()


def class_config(config: EngineConfig, service_class: ServiceClass) -> LatencyConfig:
    """Return what the operator gave a class."""
    return {
        ServiceClass.INTERACTIVE: config.interactive,
        ServiceClass.STANDARD: config.standard,
        ServiceClass.BATCH: config.batch,
    }[service_class]


def _objective(request: RouteRequest, decision: Decision) -> str:
    slo, chosen = request.slo, decision.chosen
    if slo.tpot_s is not None and chosen.tpot_s > slo.tpot_s:
        return f"tpot_s={slo.tpot_s:g} cannot be kept"
    return f"ttft_s={slo.ttft_s:g} cannot be kept"
