"""Movers in processes of their own, over a real Redis."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis
from mover_fakes import HASHES, NBYTES, PREFIX, carry_out, host_memory, receive, send, spec_of
from redis_server import RedisServer

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.engine.mover import Move, MoveKind
from cluster.kvstore.block_key import block_keys
from cluster.replica.channel import ChannelListener
from cluster.replica.host_memory import HostMemory
from cluster.replica.mover_link import MoverLink
from cluster.replica.mover_start import NICENESS, MoverHandle, start_mover

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

GONE_S = 1.0  # what died together is gone within


@contextlib.contextmanager
def mover_process(store: StoreConfig, memory: HostMemory) -> Iterator[MoverHandle]:
    handle = start_mover(spec_of(store, block_nbytes=memory.block_nbytes), memory)
    assert handle is not None and handle.pid is not None
    try:
        yield handle
    finally:
        handle.close()
        assert not psutil.pid_exists(handle.pid)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pid: int, timeout_s: float = GONE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_gone(pid):
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.005)


def test_blocks_go_from_one_process_to_another(redis_server: RedisServer) -> None:
    store = StoreConfig(url=redis_server.url, namespace="mover-travel")
    slots = (7, 0, 3)
    with host_memory() as here, host_memory() as there:
        here.slots.random_(256)
        with mover_process(store, here) as writer, mover_process(store, there) as reader:
            assert carry_out(reader, MoveKind.FIND, HASHES[:3]).found == (False,) * 3
            put = carry_out(writer, MoveKind.PUT, HASHES[:3], slots)
            assert (put.found, put.num_bytes, put.error) == ((True,) * 3, 3 * NBYTES, "")
            assert carry_out(writer, MoveKind.PUT, HASHES[:3], slots).num_bytes == 0
            assert carry_out(reader, MoveKind.FIND, HASHES[:4]).found == (True,) * 3 + (False,)
            got = carry_out(reader, MoveKind.GET, HASHES[:4], (1, 2, 4, 5))
            assert got.found == (True,) * 3 + (False,) and got.num_bytes == 3 * NBYTES
        for source, target in zip(slots, (1, 2, 4), strict=True):
            assert there.slots[target].equal(here.slots[source])
        assert not there.slots[[0, 3, 5, 6, 7]].any()


def test_value_that_does_not_verify_is_a_miss(redis_server: RedisServer) -> None:
    store = StoreConfig(url=redis_server.url, namespace="mover-corrupt")
    with host_memory() as memory, mover_process(store, memory) as mover:
        memory.slots.fill_(3)
        carry_out(mover, MoveKind.PUT, HASHES[:4], (0, 1, 2, 3))
        client = redis.Redis.from_url(redis_server.url)
        names = [
            next(n for n in client.scan_iter(b"*mover-corrupt*") if n.endswith(key))
            for key in block_keys(PREFIX, HASHES[:4])
        ]
        value = client.get(names[0])
        assert isinstance(value, bytes)
        client.set(names[0], value[:-1] + bytes([value[-1] ^ 1]))
        client.set(names[1], value[:-1])
        client.set(names[2], value)  # another block's
        memory.slots.fill_(9)
        got = carry_out(mover, MoveKind.GET, HASHES[:4], (0, 1, 2, 3))
        assert (got.found, got.num_corrupt) == ((False,) * 3 + (True,), 3)
        assert [row[0].item() for row in memory.slots[:4]] == [9, 9, 9, 3]


def test_store_that_accepts_and_never_answers_costs_one_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, host_memory() as memory:
        url = f"redis://:hunter2@127.0.0.1:{silent.getsockname()[1]}/0"
        with mover_process(StoreConfig(url=url, timeout_s=0.2), memory) as mover:
            assert "hunter2" not in " ".join(psutil.Process(mover.pid).cmdline())
            for kind in MoveKind:
                result = carry_out(mover, kind, slots=(0, 1))
                assert result.error and "hunter2" not in result.error
                assert result.elapsed_s < 1.0
            send(mover, Move(0, MoveKind.GET, HASHES[:1], (0,)))  # it ends in the middle of this


def test_mover_is_small_and_gives_way(redis_server: RedisServer) -> None:
    store = StoreConfig(url=redis_server.url)
    with host_memory() as memory, mover_process(store, memory) as mover:
        carry_out(mover, MoveKind.FIND)
        process = psutil.Process(mover.pid)
        files = " ".join(item.path for item in process.memory_maps())
        assert "/torch/" not in files and "/ray/" not in files
        assert process.memory_info().rss < 100 * 2**20
        own = os.nice(0)
        gives_way = process.nice() - own >= NICENESS
        assert gives_way or os.sched_getscheduler(process.pid) == os.SCHED_IDLE


def test_killed_mover_fails_what_is_open_and_harms_nobody(redis_server: RedisServer) -> None:
    store = StoreConfig(url=redis_server.url)
    with host_memory() as memory, mover_process(store, memory) as mover:
        link = MoverLink([mover.channel], timeout_s=0.5, clock=WallClock())
        link.submit(Move(0, MoveKind.FIND, HASHES))
        assert [r.error for r in link.collect(10.0)] == [""]
        assert mover.pid is not None
        os.kill(mover.pid, signal.SIGSTOP)
        link.submit(Move(1, MoveKind.FIND, HASHES))
        os.kill(mover.pid, signal.SIGKILL)
        (result,) = link.collect(5.0)
        assert result.move_id == 1 and "is gone" in result.error
        link.submit(Move(2, MoveKind.FIND, HASHES))
        assert link.collect(0.0)[0].error


STARTER = """
    import sys, time
    from cluster.config import StoreConfig
    from cluster.replica.host_memory import HostMemory
    from cluster.replica.mover_start import MoverSpec, start_mover

    memory = HostMemory(8, 64)
    spec = MoverSpec(StoreConfig(url=sys.argv[1]).model_dump(), b"0123456789", 64)
    mover = start_mover(spec, memory)
    mover.channel.send("move", 0, "find", (b"h" * 16,), (), False)
    mover.channel.receive()
    print(mover.pid, flush=True)
    time.sleep(60)
"""


def test_mover_of_a_killed_starter_is_gone_within_a_second(redis_server: RedisServer) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STARTER), redis_server.url],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert not is_gone(pid)
        starter.kill()
        wait_gone(pid)
    finally:
        starter.kill()
        starter.wait()


def test_mover_of_a_group_serves_its_leader_and_ends_with_its_worker(
    redis_server: RedisServer,
) -> None:
    listener = ChannelListener("127.0.0.1", 1)
    spec = replace(
        spec_of(StoreConfig(url=redis_server.url, namespace="mover-group")),
        leader_address=listener.address,
        auth_key=listener.auth_key,
    )
    with host_memory() as memory:
        for ends_first in ("leader", "worker"):
            mover = start_mover(spec, memory)
            assert mover is not None and mover.pid is not None
            (channel,) = listener.accept_all(
                timeout_s=20, send_timeout_s=1.0, on_ready=lambda *_: None
            )
            at_leader = MoverHandle(channel, None)
            send(at_leader, Move(3, MoveKind.PUT, HASHES[:1], (5,)))
            assert receive(at_leader).found == (True,)
            (channel if ends_first == "leader" else mover.channel).close()
            wait_gone(mover.pid)
            channel.close()
            mover.close()
    listener.close()


def test_specification_does_not_show_its_secrets() -> None:
    spec = replace(spec_of(StoreConfig(url="redis://:hunter2@host/0")), auth_key=b"sesame")
    assert "hunter2" not in repr(spec) and "sesame" not in repr(spec)


def test_no_mover_where_nothing_is_stored() -> None:
    with host_memory() as memory:
        assert start_mover(spec_of(StoreConfig(kv_url="off")), memory) is None


def test_mover_that_cannot_be_started_is_no_store_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    store = StoreConfig(url="redis://user:secret@127.0.0.1:1/0")
    with host_memory() as memory:
        assert start_mover(spec_of(store, block_nbytes=memory.block_nbytes), memory) is None
    assert "does not start" in caplog.text and "secret" not in caplog.text
