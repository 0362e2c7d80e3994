"""One process of a group is killed, stopped or starved: the group fails as a whole, all of it goes.

The time from a fault to the moment in which a gateway knows that the request is lost has to be two
seconds; LIMIT_S leaves as much again for a machine whose cores are shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import psutil
import pytest
from fault_gang import BUSY_S, Gang, cmdline, is_alive, running_gang, start_process
from ray.util.placement_group import placement_group_table
from redis_server import RedisServer
from waiting import wait_until

from cluster.client import Client
from cluster.config import load_config
from cluster.errors import ReplicaLostError
from cluster.gateway.app import check as check_configuration
from cluster.gateway.app import start
from cluster.gateway.leader_link import LeaderLink
from cluster.gateway.stream import OutputStream
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.rpc.sluice.internal.v1 import engine_pb2, engine_pb2_grpc
from cluster.types import EngineRequest, SamplingParams

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

LIMIT_S = 4.0
STUCK_LIMIT_S = 8.0  # replica.stuck_timeout_s is four of them
REBUILD_S = 180.0
TP = ("parallel.tp=2",)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is missing: no tensor parallelism"
)


def options(redis_server: RedisServer, *more: str) -> list[str]:
    store = [f"store.url={redis_server.url}", f"store.namespace=gang{os.getpid()}"]
    return ["model.dtype=float32", *store, *more]


async def loss(stream: OutputStream) -> str:
    """Return what a stream is told when its replica is lost."""
    while True:
        try:
            outputs = await stream.take()
        except ReplicaLostError as error:
            return str(error)
        for output in outputs:
            assert output.finish_reason is None, "the fault came too late"
            if output.error is not None:
                assert output.error.startswith("LOST: "), output.error
                return output.error


@contextlib.asynccontextmanager
async def streaming(gang: Gang, num_tokens: int) -> AsyncIterator[OutputStream]:
    """Connect to a group as a gateway does, and stream; the first tokens have come."""
    link = LeaderLink(
        gang.info,
        table=ReplicaTable(),
        index=PrefixIndex(),
        silence_s=gang.config.replica.heartbeat_timeout_s,
        on_change=lambda: None,
    )
    try:
        async with asyncio.timeout(60):
            while not link.is_connected:  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.01)
            sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
            stream = link.submit(EngineRequest("a", (1, 2, 3), sampling))
            await stream.take()
        yield stream
    finally:
        await link.stop()


async def seconds_to_loss(gang: Gang, fault: Callable[[], None], limit_s: float) -> float:
    """Stream from a group, do something to it; return when the stream has heard of it."""
    async with streaming(gang, num_tokens=2000) as stream:
        began_s = time.monotonic()
        fault()
        async with asyncio.timeout(limit_s):
            print(await loss(stream))
        return time.monotonic() - began_s


async def longest_gap_s(gang: Gang, disturb: Callable[[], None]) -> float:
    """Stream from a group, do something to it; return the longest time without a token."""
    async with streaming(gang, num_tokens=300) as stream:
        disturb()
        gap_s, last_s, is_over = 0.0, time.monotonic(), False
        while not is_over:
            async with asyncio.timeout(60):
                outputs = await stream.take()
            now_s = time.monotonic()
            gap_s, last_s = max(gap_s, now_s - last_s), now_s
            assert not any(output.error for output in outputs), outputs
            is_over = any(output.finish_reason is not None for output in outputs)
        return gap_s


@dataclass(frozen=True)
class Fault:
    """What is done to a group, and how long it may take."""

    strike: Callable[[Gang], object]
    lost_s: float = LIMIT_S  # until the gateway knows
    gone_s: float = 2 * LIMIT_S  # until nothing is left of it


def check(gang: Gang, name: str, fault: Fault) -> None:
    """Do something to a group; it fails in time, and nothing of it is left."""
    shared = gang.shared_memory()
    lost_s = asyncio.run(seconds_to_loss(gang, lambda: fault.strike(gang), fault.lost_s))
    began_s = time.monotonic()
    gang.wait_gone(fault.gone_s - lost_s)
    gone_s = lost_s + time.monotonic() - began_s
    print(f"{name}: lost after {lost_s:.2f} s, gone after {gone_s:.2f} s")
    assert not [path for path in shared if path.exists()], "memory is left"


FAULTS_OF_ONE = {
    "killed leader": Fault(lambda gang: gang.leader.kill()),
    "stopped leader": Fault(lambda gang: gang.leader.suspend()),
    "stopped leader and mover": Fault(
        lambda gang: [gang.named("mover_start")[0].suspend(), gang.leader.suspend()]
    ),
    "engine out of memory": Fault(lambda gang: gang.leader.send_signal(signal.SIGUSR1)),
    "event loop that hangs": Fault(lambda gang: gang.leader.send_signal(signal.SIGUSR2)),
}

FAULTS_OF_TWO = {
    "killed worker": Fault(lambda gang: gang.workers[1].kill()),
    "stopped worker": Fault(lambda gang: gang.workers[0].suspend()),
    "worker out of memory": Fault(lambda gang: gang.workers[1].send_signal(signal.SIGUSR1)),
    "worker that waits for ever": Fault(
        lambda gang: gang.workers[1].send_signal(signal.SIGUSR2), STUCK_LIMIT_S, 2 * STUCK_LIMIT_S
    ),
    "killed leader": Fault(lambda gang: gang.leader.kill()),
    "stopped leader": Fault(lambda gang: gang.leader.suspend()),
    "killed leader and stopped worker": Fault(
        lambda gang: [gang.workers[0].suspend(), gang.leader.kill()]
    ),
}


@pytest.mark.parametrize("name", FAULTS_OF_ONE)
def test_group_of_one_fails_as_a_whole(redis_server: RedisServer, name: str) -> None:
    with running_gang(*options(redis_server)) as gang:
        assert len(gang.named("mover_start")) == len(gang.named("guardian")) == 1
        check(gang, name, FAULTS_OF_ONE[name])


@needs_compiler
@pytest.mark.parametrize("name", FAULTS_OF_TWO)
def test_group_of_two_ranks_fails_as_a_whole(redis_server: RedisServer, name: str) -> None:
    with running_gang(*options(redis_server, *TP)) as gang:
        assert len(gang.workers) == len(gang.named("mover_start")) == 2
        assert len(gang.named("guardian")) == 3
        assert len(gang.shared_memory()) >= 2, "each rank has a buffer"
        check(gang, name, FAULTS_OF_TWO[name])


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=needs_compiler)])
def test_step_that_computes_for_long_is_not_dead(redis_server: RedisServer, tp: int) -> None:
    with running_gang(*options(redis_server, f"parallel.tp={tp}")) as gang:
        replica = gang.config.replica
        assert max(replica.heartbeat_timeout_s, replica.stuck_timeout_s) < BUSY_S
        busy = gang.leader if tp == 1 else gang.workers[1]
        gap_s = asyncio.run(longest_gap_s(gang, lambda: busy.send_signal(signal.SIGRTMIN)))
        assert gap_s > 0.9 * BUSY_S, "there was a long step"
        assert gang.left() == gang.members, "all of it is there"


def family(leader_pid: int) -> list[psutil.Process]:
    """Return what belongs to a group of two stages under Ray: workers are no children there.

    Only descendants of this process are looked at: other Rays of the machine are none of ours.
    """
    leader = psutil.Process(leader_pid)
    ours = psutil.Process().children(recursive=True)
    workers = [process for process in ours if "ray::WorkerActor" in cmdline(process)]
    assert len(workers) == 2, workers
    return [member for p in (leader, *workers) for member in (p, *p.children(recursive=True))]


def test_group_under_ray_is_built_anew_and_leaves_nothing(redis_server: RedisServer) -> None:
    more = ("parallel.pp=2", "parallel.num_cpus_per_worker=0.1", "gateway.port=0")
    config = load_config(None, [*options(redis_server, *more), "cache.num_blocks=200"])
    check_configuration(config)
    with start(config) as cluster, Client(cluster.address) as client:
        for strike in (os.kill, ask_to_leave):
            check_rebuilt(client, strike)


def check_rebuilt(client: Client, strike: Callable[[int, int], None]) -> None:
    """Do something to the leader of the only group: nothing is left, and there is another one."""

    def leaders() -> list[int]:
        return [r.leader_pid for r in client.status().replicas if r.state == "ready"]

    (before,) = leaders()
    members = family(before)
    assert sum("guardian.py" in cmdline(member) for member in members) == 3
    strike(before, signal.SIGKILL)
    gone_s = wait_until(lambda: not any(map(is_alive, members)), 2 * LIMIT_S, "all of it ends")
    rebuilt_s = wait_until(lambda: leaders() not in ([], [before]), REBUILD_S, "there is another")
    print(f"{strike.__name__}: gone after {gone_s:.2f} s, another one {rebuilt_s:.1f} s later")
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    assert len(client.generate(token_ids=[1, 2], sampling=sampling, timeout_s=60).token_ids) == 4
    states = [group["state"] for group in placement_group_table().values()]
    assert states.count("CREATED") == 1 and set(states) <= {"CREATED", "REMOVED"}


def ask_to_leave(leader_pid: int, _: int) -> None:
    """Have a replica drain, as `sluice drain` does."""
    ports = [
        connection.laddr.port
        for connection in psutil.Process(leader_pid).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    for port in ports:  # its own, and those of Ray
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                engine_pb2_grpc.EngineStub(channel).Drain(engine_pb2.DrainRequest(), timeout=2.0)
            except grpc.RpcError:
                continue
            return
    raise AssertionError(f"no leader listens on {ports}")


@needs_compiler
def test_full_shared_memory_at_the_start_leaves_nothing_behind() -> None:
    """A /dev/shm of 64 KiB, in a mount namespace of its own; DeepSpeed wants megabytes."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 9; "
    prefix = ["unshare", "--mount", "sh", "-c", mount + '"$@"; ls -A /dev/shm; echo end', "sh"]
    if subprocess.run([*prefix[:4], mount], check=False).returncode:
        pytest.skip("no right to mount")
    overrides = ["model.dtype=float32", "store.kv_url='off'", *TP]
    process = start_process(overrides, prefix)
    members: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        lines: list[str] = []
        deadline_s = time.monotonic() + 300
        while "end\n" not in lines and time.monotonic() < deadline_s:
            members = psutil.Process(process.pid).children(recursive=True) or members
            if process.poll() is not None:
                lines += process.stdout.readlines()
            time.sleep(0.2)
        wait_until(lambda: not any(map(is_alive, members)), LIMIT_S, "its processes end")
        assert lines == ["end\n"], "the group started, or left something"
    finally:
        for member in filter(is_alive, members):
            member.kill()
        process.kill()
        process.wait()
