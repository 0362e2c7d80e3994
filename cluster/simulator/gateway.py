"""A simulated gateway: the real dispatcher, and the way to the replicas."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.router.dispatcher import Dispatcher
from cluster.router.route import Outcome, OutcomeKind, RouteRequest
from cluster.simulator.record import End, RequestRecord
from cluster.types import SLO, EngineOutput, ReplicaLoad

if TYPE_CHECKING:
    from cluster.simulator.replica import SimulatedReplica
    from cluster.simulator.simulator import Simulator

_MAX_ATTEMPTS = 2  # as gateway/generation.py: replicas asked before their refusal is passed on
_RETRIED = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")  # likewise: what another replica may answer


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    record: RequestRecord
    route: RouteRequest
    replica_id: str = ""  # that has it or gets it; empty: none
    num_attempts: int = 0  # replicas that it was sent to


class SimulatedGateway:
    """Routes its part of the arrivals on what it has heard by then."""

    def __init__(self, simulator: Simulator, index: int, rng: random.Random) -> None:
        self.index = index
        self._simulator = simulator
        self._rng = rng
        self._dispatcher = Dispatcher(simulator.settings.config, rng=rng)
        self._dispatcher.set_peers(index, simulator.settings.num_gateways)
        self._open: dict[str, _Open] = {}
        self._poll_s = math.inf  # when a poll is planned

    @property
    def num_queued(self) -> int:
        """Requests that wait for a replica here."""
        return self._dispatcher.num_queued

    def arrive(self, record: RequestRecord) -> None:
        """Decide about a request that comes now."""
        route = self._route_request(record)
        self._open[route.request_id] = _Open(record, route)
        self._take(route.request_id, self._dispatcher.submit(route, self._simulator.now_s))

    def connect(self, replica: SimulatedReplica) -> None:
        """Begin to know a replica, one event delay from now."""

        def known() -> None:
            if not replica.is_dead:
                keys = [router_key(block) for block in replica.engine.cached_blocks()]
                self._dispatcher.index.replace(replica.info.replica_id, keys)
                self._dispatcher.table.add(
                    replica.info, replica.load(), now_s=self._simulator.now_s
                )
                # After all others that become known at this moment.
                self._simulator.at(self._simulator.now_s, self._poll)

        self._simulator.later(known)

    def lose(self, replica: SimulatedReplica) -> None:
        """Notice that a replica has gone, one event delay from now; its requests end or go on."""
        replica_id = replica.info.replica_id

        def lost() -> None:
            self._dispatcher.table.remove(replica_id)
            self._dispatcher.index.drop(replica_id)
            for request in list(self._open.values()):
                if request.replica_id == replica_id:
                    self._fail(request, "its replica died")

        self._simulator.later(lost)

    def hear(
        self,
        replica_id: str,
        outputs: Sequence[EngineOutput],
        added: Sequence[int],
        removed: Sequence[int],
        load: ReplicaLoad | None,
    ) -> None:
        """Take what a replica tells, one event delay from now."""
        mine = [output for output in outputs if output.request_id in self._open]
        if not mine and not added and not removed and load is None:
            return

        def heard() -> None:
            for output in mine:
                self._output(output)
            dispatcher = self._dispatcher
            if replica_id not in dispatcher.table:
                return
            if added or removed:
                dispatcher.index.apply(replica_id, added=added, removed=removed)
            if load is not None:
                dispatcher.table.on_load(replica_id, load, now_s=self._simulator.now_s)
                self._poll()

        self._simulator.later(heard)

    def _route_request(self, record: RequestRecord) -> RouteRequest:
        arrival = record.arrival
        keys: dict[tuple[str, int], list[int]] = {}

        def keys_of(fingerprint: str, block_size: int) -> list[int]:
            kind = (fingerprint, block_size)
            if kind not in keys:
                hashes = block_hashes(
                    arrival.prompt(), block_size, fingerprint=bytes.fromhex(fingerprint)
                )
                keys[kind] = [router_key(block) for block in hashes]
            return keys[kind]

        return RouteRequest(
            arrival.request_id,
            arrival.num_prompt_tokens,
            keys_of,
            record.arrived_s,
            slo=arrival.slo,
            service_class=arrival.service_class,
            tenant=arrival.tenant,
            tenant_weight=arrival.tenant_weight,
            session=arrival.session,
            expires_s=(
                math.inf if arrival.deadline_s is None else record.arrived_s + arrival.deadline_s
            ),
        )

    def _take(self, request_id: str, outcome: Outcome) -> None:
        request = self._open[request_id]
        if outcome.decision is not None and outcome.is_dispatched:
            self._send(request, outcome)
        elif outcome.kind is OutcomeKind.QUEUED:
            self._plan_poll()
        else:
            end = End.REFUSED if outcome.kind is OutcomeKind.REFUSED else End.EXPIRED
            self._end(request.record, end, outcome.reason)

    def _send(self, request: _Open, outcome: Outcome) -> None:
        assert outcome.decision is not None
        record, chosen = request.record, outcome.decision.chosen
        slo, now_s = outcome.slo, self._simulator.now_s
        request.replica_id = record.replica_id = chosen.replica_id
        record.dispatched_s = now_s
        record.num_predicted_cached_tokens = chosen.num_cached_tokens
        record.predicted_ttft_s = chosen.ttft_p50_s
        record.predicted_ttft_high_s = chosen.ttft_high_s
        request.num_attempts += 1
        replica = self._simulator.replicas.get(chosen.replica_id)
        seed = self._rng.getrandbits(63)

        def sent() -> None:
            if request.replica_id != chosen.replica_id:
                return  # that one's loss was noticed meanwhile
            if replica is None or replica.is_dead or replica.is_draining:
                self._fail(request, "its replica has gone")
                return
            arrived_s = self._simulator.now_s
            ttft_s = slo.ttft_s
            if ttft_s is not None:
                ttft_s = max(1e-6, record.arrived_s + ttft_s - arrived_s)
            left_s = request.route.expires_s - arrived_s
            replica.submit(
                record.arrival,
                seed,
                SLO(ttft_s, slo.tpot_s),
                None if left_s == math.inf else max(1e-6, left_s),
                arrived_s,
            )
            self._simulator.wake(replica)

        self._simulator.later(sent)

    def _output(self, output: EngineOutput) -> None:
        request = self._open.get(output.request_id)
        if request is None:
            return
        record = request.record
        now_s = self._simulator.now_s
        if output.error is not None:
            if output.error.startswith("DEADLINE_EXCEEDED"):
                self._end(record, End.EXPIRED, output.error)
            elif output.error.startswith(_RETRIED):
                self._fail(request, output.error)
            else:
                self._end(record, End.FAILED, output.error)
            return
        if output.tokens:
            if record.first_token_s is None:
                record.first_token_s = now_s
                self._dispatcher.on_first_token(output.request_id, now_s)
            record.last_token_s = now_s
            record.num_output_tokens += len(output.tokens)
        record.num_cached_tokens = output.num_cached_tokens
        if output.finish_reason is not None:
            self._end(record, End.FINISHED)

    def _fail(self, request: _Open, reason: str) -> None:
        """Ask another replica where nothing of the answer was seen, else end."""
        record, request_id = request.record, request.route.request_id
        request.replica_id = ""
        others = request.route._replace(excluded=(record.replica_id,))
        can_go_on = request.num_attempts < _MAX_ATTEMPTS and self._dispatcher.can_place(others)
        if record.first_token_s is not None or not can_go_on:
            self._end(record, End.FAILED, reason)
            return
        self._dispatcher.on_end(request_id)
        request.route = others
        self._take(request_id, self._dispatcher.submit(others, self._simulator.now_s))

    def _end(self, record: RequestRecord, end: End, reason: str = "") -> None:
        request_id = record.arrival.request_id
        del self._open[request_id]
        self._dispatcher.on_end(request_id)
        self._simulator.ended(record, end, reason)

    def _poll(self) -> None:
        if self._dispatcher.num_queued:
            for route, outcome in self._dispatcher.poll(self._simulator.now_s):
                self._take(route.request_id, outcome)
            self._plan_poll()

    def _plan_poll(self) -> None:
        """Plan to look when the next queued request expires."""
        when_s = self._dispatcher.next_poll_s()
        if when_s < self._poll_s:
            self._poll_s = when_s

            def poll() -> None:
                self._poll_s = math.inf
                self._poll()

            self._simulator.at(when_s, poll)
