"""What `sluice bench chaos` watches: its processes, its network, whether it is quiet."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any, cast

import pytest

from cluster.bench.chaos_cluster import ChaosCluster
from cluster.bench.chaos_leaks import why_not_quiet
from cluster.bench.chaos_network import ClientNetwork
from cluster.bench.chaos_processes import Family, ProcessSample
from cluster.bench.chaos_watch import Watch
from cluster.client import CacheLoad, ClusterState, ReplicaState
from cluster.clock import VirtualClock


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(100):
        writer.write(piece)
    writer.close()


async def test_network_holds_what_it_does_not_let_pass_and_loses_nothing() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    network = ClientNetwork("127.0.0.1", server.sockets[0].getsockname()[1])
    one, other = await network.start(2)
    assert one != other
    reader, writer = await asyncio.open_connection(*one.split(":"))
    writer.write(b"before")
    assert await reader.readexactly(6) == b"before"
    network.hold()
    writer.write(b"held")
    late_reader, late_writer = await asyncio.open_connection(*other.split(":"))
    late_writer.write(b"late")
    reading = asyncio.gather(reader.readexactly(4), late_reader.readexactly(4))
    done, _ = await asyncio.wait([reading], timeout=0.1)
    assert not done
    network.release()
    assert list(await asyncio.wait_for(reading, 5.0)) == [b"held", b"late"]
    network.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), 5.0)
    again_reader, again_writer = await asyncio.open_connection(*one.split(":"))
    again_writer.write(b"again")
    assert await again_reader.readexactly(5) == b"again"
    await network.close()
    server.close()
    for each in (writer, late_writer, again_writer):
        each.transport.abort()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "redis-server"])


def test_family_is_what_was_started_since_and_nobody_else() -> None:
    older = sleeper()
    family = Family()
    child = sleeper()
    try:
        (sample,) = family.sample()
        assert (sample.pid, sample.kind) == (child.pid, "redis") and sample.rss_bytes > 0
        assert 0.0 <= sample.age_s < 60.0
        assert family.has(child.pid) and not family.has(older.pid)
        for pid in (older.pid, os.getpid(), os.getppid()):
            with pytest.raises(ProcessLookupError):
                family.signal(pid, signal.SIGKILL)
        family.signal(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert not family.has(child.pid), "it cannot do anything"
        assert family.end_rest(0.0) == [f"redis {child.pid}"]
        assert child.wait(5.0) == -signal.SIGKILL and older.poll() is None
        assert family.sample() == [] and family.end_rest(0.0) == []
    finally:
        for process in (older, child):
            process.kill()
            process.wait()


ACCEPTS = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
held = []
while True:
    held.append(server.accept())
    print("accepted", flush=True)
"""
CONNECTS = """
import socket, sys, time
held = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
time.sleep(60)
"""


def test_workers_of_a_leader_are_those_connected_to_it() -> None:
    family = Family()
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    def line_of(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    try:
        first, other = run(ACCEPTS), run(ACCEPTS)
        ports = {leader: line_of(leader) for leader in (first, other)}
        workers = []
        for leader in (first, other, first):
            workers.append(run(CONNECTS, "ray::WorkerActor.run", ports[leader]))
            assert line_of(leader) == "accepted"
        run(CONNECTS, "ray::IDLE", ports[first])
        assert line_of(first) == "accepted"
        family.sample()
        assert family.workers_of(first.pid) == [workers[0].pid, workers[2].pid]
        assert family.workers_of(other.pid) == [workers[1].pid]
        assert family.workers_of(workers[0].pid) == []
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_life_begins_with_a_process_or_when_it_becomes_somebody() -> None:
    clock = VirtualClock(100.0)
    watch = Watch(cast(ChaosCluster, None), clock.now)

    def look(*kinds: str) -> None:
        samples = [
            ProcessSample(pid, 5.0, clock.now() - 95.0, kind, 1000 + pid)
            for pid, kind in enumerate(kinds)
        ]
        watch.add(samples)
        clock.advance(2.0)

    look("gateway", "ray")
    look("gateway", "leader", "leader")
    look("gateway", "leader")
    lives = {(life.pid, life.kind): (life.born_s, life.times_s) for life in watch.lives}
    assert lives == {
        (0, "gateway"): (95.0, [100.0, 102.0, 104.0]),
        (1, "ray"): (95.0, [100.0]),
        (1, "leader"): (102.0, [102.0, 104.0]),
        (2, "leader"): (95.0, [102.0]),
    }
    assert [life.born_s for life in watch.lives] == [95.0, 95.0, 95.0, 102.0]
    assert watch.lives[0].rss_bytes == [1000, 1000, 1000]


def replica(**changes: Any) -> ReplicaState:
    fields: dict[str, Any] = dict.fromkeys(ReplicaState.__annotations__, 0) | {
        "replica_id": "r1",
        "state": "ready",
        "model": "m",
        "num_blocks": 8,
        "num_free_blocks": 8,
        "address": "a:1",
        "cache": CacheLoad(),
    }
    return ReplicaState(**(fields | changes))


def test_quiet_is_when_nobody_holds_anything() -> None:
    quiet = ClusterState("g1", 0, 0, (replica(),))
    assert why_not_quiet([quiet], 1, 1) == []
    assert why_not_quiet([quiet], 2, 1) == ["1 of 2 gateways answer"]
    blind = replace(quiet, replicas=(replica(), replica(state="connecting")))
    assert why_not_quiet([quiet, blind], 2, 1) == []
    assert why_not_quiet([blind], 1, 2) == ["gateway g1 has 1 of 2 replicas"]
    busy = replace(quiet, num_inflight=2, num_queued=1)
    held = replica(num_running=1, num_waiting=2, num_free_blocks=5)
    assert why_not_quiet([replace(busy, replicas=(held,))], 1, 1) == [
        "num_inflight of gateway g1 is 2",
        "num_queued of gateway g1 is 1",
        "replica r1 has 3 requests",
        "replica r1 holds 3 KV blocks",
    ]
