"""What tells one process from another for ever, though their numbers are used again."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.replica.guardian import start_of


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, told apart from all others before and after it."""

    pid: int
    start: str  # in ticks of its machine's clock; nothing where it has ended
    space: str  # of the numbers: processes of one machine and container have the same

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the identity of a process on this machine."""
        return cls(pid, start_of(pid), _space())


class ThreadClock:
    """Processor time of the thread that makes it; may be read by every other one."""

    def __init__(self) -> None:
        # Only for a thread that surely lives: of one that has ended it is undefined. The clock
        # itself is read safely for ever.
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._last_s = 0.0

    def read(self) -> float:
        """Return seconds; of a thread that has ended those that were read last."""
        with contextlib.suppress(OSError):
            self._last_s = time.clock_gettime(self._clock)
        return self._last_s


def _space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
