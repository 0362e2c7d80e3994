"""`sluice bench gateway`: what gateway and router cost, before an engine that costs nothing.

    client (this process)  ──gRPC──►  gateway process  ──gRPC──►  fake leader's process

Three measurements: streams as fast as they go; streams at a pace, with the CPU time of all three
processes and the delivery latency; and the TTFT of probes, through the gateway and straight to
the leader in turn, while the paced streams run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import psutil

from cluster.bench.gateway_streams import DirectProbe, EndlessStreams, Traffic, gateway_ttft_s
from cluster.bench.statistics import percentile, spread
from cluster.errors import UnavailableError
from cluster.rpc.sluice.internal.v1.engine_pb2_grpc import EngineStub
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_WARMUP_S = 1.0
_NUM_PROBES = 100
_MAX_LINE_BYTES = 64 * 2**20  # the leader's times, as text
_PROBE_TEXT = "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1)\n" * 8


@dataclass(frozen=True, slots=True)
class GatewayBench:
    """What to measure."""

    num_streams: int = 16
    seconds: float = 5.0  # of the unthrottled and of the paced window
    rate_per_s: float = 300.0  # messages of all streams together, where paced


@dataclass(slots=True)
class _Bench:
    """The parts that the measurements share."""

    what: GatewayBench
    leader: Process
    gateway: Process
    stub: InferenceStub
    engine_stub: EngineStub
    model: pb.Model

    async def unthrottled(self) -> dict[str, Any]:
        """Measure how many messages get through."""
        await self._set_pace(0.0)
        async with self._streaming(Traffic()) as traffic:
            return await self._window(traffic)

    async def paced(self) -> dict[str, Any]:
        """Measure CPU time per message, delivery, and the TTFT that is added."""
        await self._set_pace(self.what.num_streams / self.what.rate_per_s)
        async with self._streaming(Traffic(received_s={})) as traffic:
            since_s = time.monotonic()
            figures = await self._window(traffic)
            probes = await self._probe()
        sent_s = await self._set_pace(0.0)
        return {**figures, "delivery_s": spread(_delays_s(sent_s, traffic, since_s)), **probes}

    @contextlib.asynccontextmanager
    async def _streaming(self, traffic: Traffic) -> AsyncIterator[Traffic]:
        streams = EndlessStreams(self.stub, self.model, traffic)
        task = asyncio.create_task(streams.run(self.what.num_streams))
        try:
            await _still_running(task, _WARMUP_S)
            yield traffic
            await _still_running(task, 0.0)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _window(self, traffic: Traffic) -> dict[str, Any]:
        start_s, start_cpu_s = time.perf_counter(), self._cpu_s()
        num_messages, num_tokens = traffic.num_messages, traffic.num_tokens
        await asyncio.sleep(self.what.seconds)
        window_s = time.perf_counter() - start_s
        cpu_s = {role: now_s - start_cpu_s[role] for role, now_s in self._cpu_s().items()}
        num_messages, num_tokens = (
            traffic.num_messages - num_messages,
            traffic.num_tokens - num_tokens,
        )
        if not num_messages:
            raise UnavailableError(f"no message came in {window_s:.1f} s: the gateway is stuck")
        return {
            "window_s": window_s,
            "num_messages": num_messages,
            "num_tokens": num_tokens,
            "messages_per_s": num_messages / window_s,
            "tokens_per_s": num_tokens / window_s,
            "cpu_ms_per_message": sum(cpu_s.values()) * 1e3 / num_messages,
            "cpu_s": cpu_s,
        }

    def _cpu_s(self) -> dict[str, float]:
        pids = {"client": None, "gateway": self.gateway.pid, "leader": self.leader.pid}
        times = {role: psutil.Process(pid).cpu_times() for role, pid in pids.items()}
        return {role: spent.user + spent.system for role, spent in times.items()}

    async def _probe(self) -> dict[str, Any]:
        tokens = await self.stub.Tokenize(pb.TokenizeRequest(text=_PROBE_TEXT))
        direct = DirectProbe(self.engine_stub, list(tokens.token_ids))
        through_s, direct_s = [], []
        try:
            for _ in range(_NUM_PROBES):
                through_s.append(await gateway_ttft_s(self.stub, _PROBE_TEXT))
                direct_s.append(await direct.ttft_s())
        finally:
            direct.close()
        added_s = (percentile(through_s, 50) or 0.0) - (percentile(direct_s, 50) or 0.0)
        return {
            "num_probe_prompt_tokens": len(tokens.token_ids),
            "ttft_gateway_s": spread(through_s),
            "ttft_direct_s": spread(direct_s),
            "ttft_added_p50_s": added_s,
        }

    async def _set_pace(self, step_s: float) -> dict[str, list[float]]:
        """Change the leader's pace; return when it sent what since the last change."""
        assert self.leader.stdin is not None
        self.leader.stdin.write(json.dumps({"step_s": step_s}).encode() + b"\n")
        await self.leader.stdin.drain()
        sent_s: dict[str, list[float]] = (await _read_line(self.leader))["sent_s"]
        return sent_s


async def run_gateway_bench(what: GatewayBench) -> dict[str, Any]:
    """Start the processes, measure, stop them; return plain data.

    Raises:
        UnavailableError: A process does not start, or a stream ends.
    """
    async with (
        _process("leader") as (leader, leader_address),
        _process("gateway", leader_address) as (gateway, address),
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(leader_address) as leader_channel,
    ):
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        engine_stub = EngineStub(leader_channel)  # type: ignore[no-untyped-call]
        models = await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=10)
        bench = _Bench(what, leader, gateway, stub, engine_stub, models.models[0])
        return {
            "load": asdict(what),
            "unthrottled": await bench.unthrottled(),
            "paced": await bench.paced(),
        }


def _delays_s(sent_s: dict[str, list[float]], traffic: Traffic, since_s: float) -> list[float]:
    """Return the way's latency of every token that left after `since_s` and arrived."""
    assert traffic.received_s is not None
    return [
        received - sent
        for seed, times in traffic.received_s.items()
        for sent, received in zip(sent_s.get(str(seed), ()), times, strict=False)
        if sent >= since_s
    ]


async def _still_running(task: asyncio.Task[None], wait_s: float) -> None:
    """Wait; raise what ended the task, if it did not go on all the time."""
    await asyncio.wait([task], timeout=wait_s)
    if task.done():
        error = task.exception()
        raise UnavailableError(f"a stream ended: {error}") from error


@contextlib.asynccontextmanager
async def _process(*role: str) -> AsyncIterator[tuple[Process, str]]:
    """Run one of `gateway_processes`; it ends with this context."""
    command = (sys.executable, "-m", "cluster.bench.gateway_processes", *role)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, limit=_MAX_LINE_BYTES
    )
    try:
        yield process, (await _read_line(process))["address"]
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _read_line(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(_START_TIMEOUT_S):
        line = await process.stdout.readline()
    if not line:
        raise UnavailableError(f"benchmark process {process.pid} ended: see its output above")
    answer: dict[str, Any] = json.loads(line)
    return answer
