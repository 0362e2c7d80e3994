"""Starts a mover beside a worker: a process of its own, or a thread where the store needs Ray.

    worker ──socket: specification──► mover ──► its leader, where that is not the worker itself
       └────file of the host tier───────┘

A process shares no interpreter lock with the thread that computes, has a low priority, and imports
neither torch nor ray. It ends when the socket's other end is gone, so nobody has to end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster
from cluster.config import StoreConfig
from cluster.errors import SluiceError, UnavailableError
from cluster.kvstore.block_store import BlockStore
from cluster.replica.channel import Channel, channel_of, channel_pair, connect
from cluster.replica.mover import Mover

if TYPE_CHECKING:  # a mover's process needs no torch
    from cluster.replica.host_memory import HostMemory

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0  # messages are short, and fewer than a socket's buffer takes
END_TIMEOUT_S = 1.0  # for a mover to end by itself
NICENESS = 13
"""Of a mover, above its worker's: a twentieth of a core that the computation wants too, so that
steps, which wait for their slowest thread, take hardly longer; and all that the computation leaves.
"""

MAX_NICENESS = 19  # there is none beyond

OpenStore = Callable[[], BlockStore]


@dataclass(frozen=True)
class MoverSpec:
    """What a mover has to know; travels over its socket, since the URL may hold a password."""

    store: dict[str, Any] = field(repr=False)  # StoreConfig as plain data
    prefix: bytes  # of the worker's keys
    block_nbytes: int
    leader_address: tuple[str, int] | None = None  # None: the leader is who starts the mover
    auth_key: bytes = field(default=b"", repr=False)  # of the leader's listener
    index: int = 0  # of the worker

    @property
    def config(self) -> StoreConfig:
        """The store's configuration."""
        return StoreConfig.model_validate(self.store)


class MoverHandle:
    """A mover that runs.

    Args:
        channel: To the mover; moves go over it where its starter is the leader.
        process: That it runs in; None for a thread.
    """

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes] | None) -> None:
        self.channel = channel
        self._process = process

    @property
    def pid(self) -> int | None:
        """Of the mover's process; None for a thread."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the mover; it does so by itself where this is never called."""
        self.channel.close()
        if self._process is None:
            return
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_mover(
    spec: MoverSpec, memory: HostMemory, open_store: OpenStore | None = None
) -> MoverHandle | None:
    """Return a mover for a worker's slots; None where no blocks are stored, or it does not start.

    Args:
        spec: What it does.
        memory: Where the blocks are; stays mapped in the mover until that has ended.
        open_store: Makes the store, in a thread of this process; None goes by `spec.store`.

    Raises:
        ConfigError: The environment variable that the store's URL names is not set.
    """
    url = spec.config.resolved_kv_url
    if open_store is None and url == "off":
        return None
    channel, theirs = channel_pair(SEND_TIMEOUT_S)
    if open_store is not None or url == "embedded":
        peer = channel_of(theirs.detach(), send_timeout_s=SEND_TIMEOUT_S)
        arguments = (peer, memory.view(), spec, open_store)
        threading.Thread(target=_run, args=arguments, name="mover", daemon=True).start()
        return MoverHandle(channel, None)
    try:
        with theirs:
            process = _start_process(theirs.fileno(), memory.fd)
        channel.send("spec", asdict(spec))
    except (OSError, UnavailableError) as error:  # a replica can do without
        logger.warning("no blocks are stored or fetched: the mover does not start: %s", error)
        channel.close()
        return None
    return MoverHandle(channel, process)


def _start_process(socket_fd: int, memory_fd: int) -> subprocess.Popen[bytes]:
    root = str(Path(cluster.__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.replica.mover_start", str(socket_fd), str(memory_fd)],
        pass_fds=(socket_fd, memory_fd),
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, known] if known else [root])},
    )


def _run(
    starter: Channel, slots: memoryview, spec: MoverSpec, open_store: OpenStore | None
) -> None:
    """Be the mover, until its starter or its leader is gone."""
    try:
        asyncio.run(_serve(starter, slots, spec, open_store))
    except SluiceError as error:
        logger.warning("the mover of worker %d ends: %s", spec.index, error)
    finally:
        starter.close()


async def _serve(
    starter: Channel, slots: memoryview, spec: MoverSpec, open_store: OpenStore | None
) -> None:
    channel = starter
    if spec.leader_address is not None:
        channel = connect(spec.leader_address, spec.auth_key, send_timeout_s=SEND_TIMEOUT_S)
        channel.send("hello", spec.index)
        channel.send("ready", spec.index, {})
    mover = Mover(
        channel,
        slots,
        block_nbytes=spec.block_nbytes,
        store=open_store() if open_store else _open_store(spec.config),
        prefix=spec.prefix,
        config=spec.config,
    )
    if channel is not starter:
        # Nothing is ever sent there again: it becomes readable when the starter is gone.
        asyncio.get_running_loop().add_reader(starter.fileno(), mover.end)
    await mover.serve()


def _open_store(config: StoreConfig) -> BlockStore:
    from cluster.kvstore.open import open_block_store

    # Without a circuit breaker: the engine has one, which sees every worker's failures.
    store = open_block_store(config, guarded=False)
    assert store is not None, "a mover was started for no store"
    return store


def _give_way() -> None:
    """Let the computation go first."""
    if os.nice(0) + NICENESS <= MAX_NICENESS or not hasattr(os, "SCHED_IDLE"):
        os.nice(NICENESS)
    else:  # Ray's workers have 15 themselves: the few steps left would not be enough
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who started us
    _give_way()
    logging.basicConfig(level=logging.WARNING)
    starter = channel_of(int(sys.argv[1]), send_timeout_s=SEND_TIMEOUT_S)
    with contextlib.suppress(UnavailableError):  # the starter is gone already
        _, fields = starter.receive()
        memory = mmap.mmap(int(sys.argv[2]), 0)
        _run(starter, memoryview(memory), MoverSpec(**fields), None)
    # At once: threads that resolve a name would be waited for, longer than a starter waits.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    _main()
