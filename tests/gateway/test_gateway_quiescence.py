"""Every request ends once: when nothing is left to do, nothing is left over anywhere.

A seeded mix of answers that finish, clients that leave, come back and detach, deadlines, refusals
and leaders that die, at two gateways with one store.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, eventually
from resume_fakes import Received, begin, nothing, read, resume, two_gateways
from tenant_files import KEYS, bearer, sha256, write_tenants

from cluster.gateway.live_streams import PERIOD_S
from cluster.gateway.servicer import InferenceServicer
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import SampledToken

pytestmark = pytest.mark.integration

NUM_REQUESTS = 60
NUM_TOKENS = 40
ALICE = bearer(KEYS["alice"])
SCRIPT = [64 + step % 30 for step in range(NUM_TOKENS)]
LIMITS = {"max_streams": 1000, "requests_per_minute": 100_000, "tokens_per_minute": 10_000_000}


def _leader(index: int) -> FakeLeader:
    leader = FakeLeader(f"replica-{index}")
    leader.step_s = 0.02
    leader.script = [SampledToken(token) for token in SCRIPT[:30]]
    return leader


class _Clients:
    """Each does one thing to one request; all of them leave in the end."""

    def __init__(self, stubs: list[InferenceStub], rng: random.Random) -> None:
        self._stubs = stubs
        self._rng = rng
        self.codes: Counter[str] = Counter()
        self.num_whole = 0
        self.kinds: list[Callable[[str], Coroutine[Any, Any, None]]] = [
            self.finish,
            self.leave,
            self.run_out_of_time,
            self.come_back,
            self.come_back_twice_at_once,
            self.detach_and_stay_away,
            self.detach_and_come_back,
        ]

    async def finish(self, request_id: str) -> None:
        await self._take(self._begin(request_id), nothing())

    async def leave(self, request_id: str) -> None:
        call = self._begin(request_id)
        await self._take(call, nothing(), self._some())
        call.cancel()

    async def run_out_of_time(self, request_id: str) -> None:
        await self._take(self._begin(request_id, timeout_s=0.5), nothing())

    async def come_back(self, request_id: str) -> None:
        call, received = self._begin(request_id), nothing()
        await self._take(call, received, self._some())
        if received.finished is None:
            await self._take(self._resume(received, request_id), received)
        call.cancel()

    async def come_back_twice_at_once(self, request_id: str) -> None:
        call, received = self._begin(request_id), nothing()
        await self._take(call, received, self._some())
        if received.finished is None:
            copies = [
                Received([*received.seqs], [*received.token_ids], received.text) for _ in range(2)
            ]
            await asyncio.gather(
                *(self._take(self._resume(copy, request_id), copy) for copy in copies)
            )
        call.cancel()

    async def detach_and_stay_away(self, request_id: str) -> None:
        call = self._begin(request_id, detach_s=self._rng.choice([0.05, 0.3, 20.0]))
        await self._take(call, nothing(), self._some())
        call.cancel()

    async def detach_and_come_back(self, request_id: str) -> None:
        call, received = self._begin(request_id, detach_s=20.0), nothing()
        await self._take(call, received, self._some())
        call.cancel()
        if received.finished is None:
            await self._take(self._resume(received, request_id), received)

    def _some(self) -> int:
        return self._rng.randrange(1, NUM_TOKENS)

    def _begin(self, request_id: str, **options: Any) -> Any:
        stub = self._rng.choice(self._stubs)
        return begin(stub, request_id, max_tokens=NUM_TOKENS, metadata=ALICE, **options)

    def _resume(self, received: Received, request_id: str) -> Any:
        return resume(self._rng.choice(self._stubs), received, request_id, metadata=ALICE)

    async def _take(self, call: Any, received: Received, num_tokens: int = 10**9) -> None:
        """Take events; whatever was received is right, and an end is told by the last one."""
        try:
            await read(call, received, num_tokens)
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
        assert received.token_ids == SCRIPT[: len(received.token_ids)]
        assert received.seqs == list(range(len(received.seqs)))
        if received.finished is not None:
            assert received.token_ids == SCRIPT
            self.num_whole += 1


async def _disturb(running: Stage) -> None:
    """Let leaders die, refuse, and others come."""
    for index in range(3):
        await asyncio.sleep(0.3)
        victim = running.leaders[index]
        if index == 1:
            victim.refusal = "RESOURCE_EXHAUSTED: full"
            await asyncio.sleep(0.1)
            victim.refusal = ""
        await victim.die()
        await running.registry.unregister(victim.replica_id)
        await running.add(_leader(10 + index))


def _left_over(running: Stage) -> dict[str, object]:
    """Return what a gateway has that belongs to requests; empty is right."""
    server, dispatcher = running.server, running.dispatcher
    server._admission.check_invariants()
    found = {
        "admitted": server.num_inflight,
        "running": list(server._running),
        "flights": list(dispatcher._flights),
        "queued": dispatcher.num_queued,
        "streams": [link.info.replica_id for link in server._fleet.links if link._streams],
        "limited": not server._rate_limiter._streams.is_idle,
        "detached": server._detached.num_live,
        "moving": server._hand_overs.num_moving,
        "journals": len(server._journals),
        "turns": list(running.server._waiting._turns),
        "open": sum(snapshot.num_inflight for snapshot in server.snapshots()),
        "inflight": running.value("sluice_inflight_requests"),
    }
    return {name: value for name, value in found.items() if value}


def _num_streams(running: Stage) -> int:
    """Return how many streams the gateways count together now."""
    store: Any = running.store
    period = int(time.time() // PERIOD_S)  # what is counted in former ones is over
    keys = [f"streams:alice:{period + later}" for later in (0, 1)]
    return sum(abs(store._live_counter(key) or 0) for key in keys)


def _codes(running: Stage) -> Counter[str]:
    """Return how many calls ended with each code."""
    samples = (sample for metric in running.metrics.collect() for sample in metric.samples)
    return Counter(
        {s.labels["code"]: int(s.value) for s in samples if s.name == "sluice_requests_total"}
    )


@pytest.mark.parametrize("seed", [1, 2])
async def test_requests_leave_nothing_behind(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls: Counter[int] = Counter()  # that have reached a gateway, by its servicer
    ending = InferenceServicer._ending

    def counted(servicer: InferenceServicer, *args: Any) -> Any:
        num_calls[id(servicer._parts)] += 1
        return ending(servicer, *args)

    monkeypatch.setattr(InferenceServicer, "_ending", counted)
    tenant = {"name": "alice", "key_sha256": [sha256(KEYS["alice"])], **LIMITS}
    auth = {"tenants_file": str(write_tenants(tmp_path, [tenant]))}
    rng = random.Random(seed)
    leaders = [_leader(index) for index in range(3)]
    async with (
        two_gateways(*leaders, auth=auth) as (first, second),
        grpc.aio.insecure_channel(first.address) as one,
        grpc.aio.insecure_channel(second.address) as other,
    ):
        clients = _Clients([InferenceStub(one), InferenceStub(other)], rng)
        disturbing = asyncio.create_task(_disturb(first))
        deeds = []
        for index in range(NUM_REQUESTS):
            deed = clients.kinds[index % len(clients.kinds)]
            deeds.append(asyncio.create_task(deed(f"r{index}")))
            await asyncio.sleep(rng.random() * 0.03)
        await asyncio.gather(*deeds)
        await disturbing
        for running in (first, second):
            await eventually(lambda running=running: not _left_over(running), 30.0)
        assert all(leader.num_live == 0 for leader in first.leaders)
        for limiter in (first.server._rate_limiter, second.server._rate_limiter):
            await limiter.close()
        assert _num_streams(first) == 0
        codes = _codes(first) + _codes(second)
        assert codes.total() == sum(num_calls.values()) >= NUM_REQUESTS
        assert clients.num_whole >= NUM_REQUESTS // 3, "the mix is what it is meant to be"
        assert clients.codes.keys() <= {"DEADLINE_EXCEEDED", "ABORTED", "INTERNAL"}
        name = "sluice_quarantined_requests_total"  # alone with a leader when it died, twice
        assert clients.codes["INTERNAL"] <= first.value(name) + second.value(name)
