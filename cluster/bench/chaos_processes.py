"""The processes of a cluster that this process has started: who they are and what they hold.

Every one of them is a descendant of the benchmark when it is first seen; it is remembered with
its start time, so that one whose parent died is still known, and a recycled pid is not.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

_SHARED_MEMORY = "/dev/shm/"
# The first that a command line contains; Ray writes an actor's deployment into it.
_KINDS = (
    ("cluster.replica.mover_start", "mover"),
    ("guardian", "guardian"),
    ("ServeReplica:sluice:gateway", "gateway"),
    ("ServeReplica:sluice:replica-group", "leader"),
    ("WorkerActor", "worker"),
    ("redis-server", "redis"),
    ("ray::", "ray"),
    ("/raylet/raylet", "ray"),
    ("gcs_server", "ray"),
    ("ray/_private/", "ray"),
    ("ray/dashboard/", "ray"),
)
_Ends = tuple[tuple[object, ...], tuple[object, ...]]  # of a connection: host and port of each
_OTHER = "other"  # of this process's own, as multiprocessing's tracker


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process at one moment."""

    pid: int
    started_s: float  # unix time
    age_s: float  # since it started
    kind: str
    rss_bytes: int


class Family:
    """All that this process starts from now on, and what they start; threads may share it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, float], psutil.Process] = {}
        self._older = set(_descendants())

    def sample(self) -> list[ProcessSample]:
        """Return who lives, oldest first."""
        for key, process in _descendants().items():
            if key not in self._older:
                self._known.setdefault(key, process)
        samples = []
        for (pid, started_s), process in list(self._known.items()):
            found = _sample(process, started_s)
            if found is None:
                del self._known[pid, started_s]
            else:
                samples.append(found)
        return sorted(samples, key=lambda sample: (sample.started_s, sample.pid))

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one of them.

        Raises:
            ProcessLookupError: It has ended, or is none of them.
        """
        living = {process.pid: process for process in list(self._known.values()) if _lives(process)}
        if pid not in living:
            raise ProcessLookupError(f"no process {pid} of this cluster")
        living[pid].send_signal(number)

    def workers_of(self, leader_pid: int) -> list[int]:
        """Return the workers that are connected to a leader, by process id; oldest first."""
        ends = self._connections(leader_pid)
        return [
            sample.pid
            for sample in self.sample()
            if sample.kind == "worker"
            and any((there, here) in ends for here, there in self._connections(sample.pid))
        ]

    def has(self, pid: int) -> bool:
        """Return whether one of them with this id lives and can be scheduled."""
        return any(
            process.pid == pid and _lives(process) and process.status() != psutil.STATUS_STOPPED
            for process in list(self._known.values())
        )

    def num_ports(self) -> int:
        """Return how many TCP ports they listen on."""
        num_ports = 0
        for process in list(self._known.values()):
            with contextlib.suppress(psutil.Error):
                connections = process.net_connections("tcp")
                num_ports += sum(c.status == psutil.CONN_LISTEN for c in connections)
        return num_ports

    def _connections(self, pid: int) -> set[_Ends]:
        """Return both ends, its own first, of the TCP connections of one of them."""
        ends: set[_Ends] = set()
        for process in list(self._known.values()):
            if process.pid == pid:
                with contextlib.suppress(psutil.Error):
                    found = process.net_connections("tcp")
                    ends |= {(tuple(c.laddr), tuple(c.raddr)) for c in found if c.raddr}
        return ends

    def shared_names(self) -> set[str]:
        """Return the named files in shared memory that they map."""
        names: set[str] = set()
        for process in list(self._known.values()):
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                paths = [line.split(maxsplit=5)[-1] for line in maps.splitlines()]
                names |= {p for p in paths if p.startswith(_SHARED_MEMORY)}
        return {name for name in names if not name.endswith(" (deleted)")}

    def end_rest(self, timeout_s: float) -> list[str]:
        """Wait for the cluster's processes to end; kill those that do not, and return them."""
        deadline_s = time.monotonic() + timeout_s
        while rest := [sample for sample in self.sample() if sample.kind != _OTHER]:
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.1)
        found = []
        for sample in rest:
            with contextlib.suppress(ProcessLookupError):
                self.signal(sample.pid, signal.SIGKILL)
                found.append(f"{sample.kind} {sample.pid}")
        return found


def _descendants() -> dict[tuple[int, float], psutil.Process]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[process.pid, process.create_time()] = process
    return found


def count_kinds(samples: list[ProcessSample]) -> dict[str, int]:
    """Return how many processes of each kind there are."""
    return dict(sorted(Counter(sample.kind for sample in samples).items()))


def _sample(process: psutil.Process, started_s: float) -> ProcessSample | None:
    try:
        if not _lives(process):
            return None
        # Ray renames its processes when they become somebody: this is asked each time.
        command = " ".join(process.cmdline())
        kind = next((name for text, name in _KINDS if text in command), _OTHER)
        age_s = time.time() - started_s
        return ProcessSample(process.pid, started_s, age_s, kind, process.memory_info().rss)
    except psutil.Error:
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
