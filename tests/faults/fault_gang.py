"""One replica group without Ray, in processes of its own that can be killed, stopped and starved.

test ──stdout: what was registered── leader ──children── workers, movers
  └────────internal gRPC service───────┘     all with guardians
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from waiting import wait_until

import cluster
from cluster.clock import WallClock
from cluster.config import ClusterConfig, StoreConfig, load_config
from cluster.engine.executor import Executor
from cluster.kvstore.embedded import EmbeddedStore
from cluster.model.checkpoint import inspect_checkpoint
from cluster.replica.build import load_whole
from cluster.replica.channel import Channel
from cluster.replica.executor import GroupExecutor, InProcessExecutor
from cluster.replica.group import GroupLifecycle, GroupState
from cluster.replica.group_tiers import GroupTiers
from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.leader import Leader
from cluster.replica.local_tiers import LocalTiers
from cluster.replica.muster import Muster
from cluster.replica.processes import ProcessId
from cluster.replica.worker import WorkerSpec, run_worker
from cluster.step import StepResult
from cluster.types import ReplicaInfo

HOST = "127.0.0.1"
NUM_BLOCKS = 256
MAX_MODEL_LEN = 2048
SHARED_MEMORY = "/dev/shm/"
BUSY_S = 8.0  # of a step that computes for long: more than any of the limits


class Gang:
    """The processes of a group that is ready.

    Args:
        process: Of the leader, or of who started it.
        info: What the leader would have registered.
        config: Of the group.
    """

    def __init__(
        self, process: subprocess.Popen[str], info: ReplicaInfo, config: ClusterConfig
    ) -> None:
        self._process = process
        self.info = info
        self.config = config
        self.leader = psutil.Process(info.pid)
        self.members = [self.leader, *self.leader.children(recursive=True)]

    def named(self, name: str) -> list[psutil.Process]:
        """Return the processes whose command line has this word in it."""
        return [member for member in self.members if name in cmdline(member)]

    @property
    def workers(self) -> list[psutil.Process]:
        """In the order in which they were started."""
        return self.named("spawn_main")

    def shared_memory(self) -> set[Path]:
        """Return the named memory that its processes map, or have mapped and unlinked."""
        found = set()
        for member in filter(is_alive, self.members):
            for line in Path(f"/proc/{member.pid}/maps").read_text().splitlines():
                path = line.split(maxsplit=5)[-1].removesuffix(" (deleted)")
                if path.startswith(SHARED_MEMORY):
                    found.add(Path(path))
        return found

    def left(self) -> list[psutil.Process]:
        """Return what is left of it: zombies, whom nobody has buried yet, are not."""
        return [member for member in self.members if is_alive(member)]

    def wait_gone(self, timeout_s: float) -> None:
        """Wait until no process is left, and nobody listens."""
        deadline_s = time.monotonic() + timeout_s
        wait_until(lambda: not self.left(), timeout_s, f"the group is gone, not {self.left()}")
        # A zombie's other threads may still be closing what it had.
        left_s = deadline_s - time.monotonic()
        wait_until(lambda: not self._is_listening(), left_s, "nobody listens any more")

    def _is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, int(self.info.address.rpartition(":")[2]))) == 0

    def end(self) -> None:
        """Kill what is left."""
        for member in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.kill()
        self._process.wait()


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs or is stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def cmdline(process: psutil.Process) -> str:
    """Return the command line of a process; nothing where it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def start_process(overrides: Sequence[str], prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a leader, which starts its workers.

    Args:
        overrides: Of the configuration.
        prefix: Of the command.
    """
    paths = [str(Path(cluster.__file__).parents[1]), str(Path(__file__).parents[1])]
    return subprocess.Popen(
        [*prefix, sys.executable, __file__, *overrides],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


@contextlib.contextmanager
def running_gang(*overrides: str) -> Iterator[Gang]:
    """Start a group; what a test has left of it is killed."""
    process = start_process(overrides)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the group did not start"
        gang = Gang(process, ReplicaInfo(**json.loads(line)), load_config(None, [*overrides]))
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        yield gang
    finally:
        gang.end()


class FailingExecutor(InProcessExecutor):
    """Fails as a signal says."""

    error: Exception | None = None
    is_long = False  # the next step

    def collect(self, timeout_s: float) -> StepResult:
        if self.error is not None:
            raise self.error
        if self.is_long:
            self.is_long = False
            compute_for_long()
        return super().collect(timeout_s)


def compute_for_long(*_: Any) -> None:
    """Use the processor, as a long prompt does."""
    matrix, until_s = torch.ones(256, 256), time.monotonic() + BUSY_S
    while time.monotonic() < until_s:
        matrix = matrix @ matrix / 256


def failing_worker(spec: WorkerSpec) -> None:
    """Work, and run out of memory, wait for ever, or compute for long, when a signal says so."""

    def fail(*_: Any) -> None:
        raise MemoryError("no memory for a test")

    signal.signal(signal.SIGUSR1, fail)
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))
    signal.signal(signal.SIGRTMIN, compute_for_long)
    run_worker(spec)


class _Group:
    """What `ray_actors.ReplicaGroup` does, in a process of a test."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._model = inspect_checkpoint(config.model.folder)
        self._guardian = GuardianHandle()
        self._beats: list[Channel] = []
        self._lifecycle = GroupLifecycle(
            config.parallel.world_size,
            start_timeout_s=config.replica.start_timeout_s,
            drain_timeout_s=config.replica.drain_timeout_s,
            clock=WallClock(),
        )

    async def serve(self) -> None:
        """Serve until the group ends, and the process with it."""
        config = self._config
        single = config.parallel.world_size == 1
        executor = self._start_alone() if single else await self._start_workers()
        leader = Leader(
            config,
            model=self._model,
            executor=executor,
            lifecycle=self._lifecycle,
            store=EmbeddedStore(StoreConfig(), WallClock()),
            replica_id=f"gang-{os.getpid()}",
            node_id="",
            public_host=HOST,
            on_end=self._end,
            tiers=self._tiers.tiers,
            beats=self._beats,
        )
        info = await leader.start()
        self._guardian.arm(config.replica.heartbeat_timeout_s)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, lambda: time.sleep(3600))
        print(json.dumps(asdict(info)), flush=True)
        await asyncio.Event().wait()

    def _end(self, reason: str) -> None:
        logging.warning("the group ends: %s", reason)
        os._exit(0 if self._lifecycle.state is GroupState.STOPPED else 1)

    def _start_alone(self) -> Executor:
        self._tiers: LocalTiers | GroupTiers = LocalTiers(
            self._config,
            self._model,
            on_mover=lambda pid: self._guardian.add_child(ProcessId.of(pid)),
        )
        runner = load_whole(
            self._config,
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            num_threads=1,
            slots=self._tiers.slots,
        )
        self._lifecycle.worker_ready(0)
        executor = FailingExecutor(runner)

        def fail() -> None:
            executor.error = RuntimeError("can't allocate memory: you tried to allocate 1 byte")

        def take_long() -> None:
            executor.is_long = True

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, fail)
        asyncio.get_running_loop().add_signal_handler(signal.SIGRTMIN, take_long)
        return executor

    async def _start_workers(self) -> Executor:
        config = self._config
        self._tiers = tiers = GroupTiers(config, self._model, HOST)
        muster = Muster(config, HOST, self._guardian)
        template = WorkerSpec(
            index=0,
            config=config.model_dump(),
            leader_address=("", 0),
            auth_key=b"",
            stage_port=0,
            pipeline_address=("", 0),
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            num_threads=1,
        )
        context = multiprocessing.get_context("spawn")
        endpoints = [(HOST, port) for port in _free_ports(config.parallel.world_size)]
        for index in range(config.parallel.world_size):
            spec = muster.spec(template, index, endpoints, tiers.of_worker(index))
            context.Process(target=failing_worker, args=(spec,), daemon=True).start()
        connections = await muster.gather(self._lifecycle)
        await asyncio.to_thread(tiers.connect)
        self._beats = connections.beats
        return GroupExecutor(
            connections.plans, num_blocks=NUM_BLOCKS, num_stages=config.parallel.pp
        )


def _free_ports(num_ports: int) -> list[int]:
    probes = [socket.create_server((HOST, 0)) for _ in range(num_ports)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(_Group(load_config(None, sys.argv[1:])).serve())
