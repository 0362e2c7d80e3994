"""Starts a guardian (guardian.py) beside this process, and beats for it from a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading

from cluster.replica import guardian
from cluster.replica.processes import ProcessId

logger = logging.getLogger(__name__)

BEAT_S = 0.2
END_TIMEOUT_S = 2.0  # for a guardian to remove what is left, and to end


class GuardianHandle:
    """A guardian of this process; where it is killed another one takes its place.

    Loading a model may keep every thread from running for seconds: until `arm` a silence kills
    nobody. That this process has ended is always noticed.
    """

    def __init__(self) -> None:
        self._me = ProcessId.of(os.getpid())
        self._told: dict[bytes, None] = {}  # lines that the next guardian has to know
        self._children: list[ProcessId] = []  # likewise; those that have ended go
        self._lock = threading.Lock()  # of all fields
        self._process: subprocess.Popen[bytes] | None = None
        self._is_over = threading.Event()
        with self._lock:
            self._start()
        self._thread = threading.Thread(target=self._beat, name="guardian", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the guardian; None where there is none."""
        return self._process.pid if self._process is not None else None

    def arm(self, timeout_s: float) -> None:
        """Have this process killed where its threads do not run for so long, seconds."""
        self._tell(f"limit {timeout_s:g}")

    def add_child(self, process: ProcessId) -> None:
        """Have a process killed that is still there when this one has ended.

        One of another machine, or of another container, is left to its own guardian.
        """
        if not process.start or process.space != self._me.space:
            return
        with self._lock:
            self._children = [c for c in self._children if ProcessId.of(c.pid) == c]
            self._children.append(process)
            self._write(_child(process))

    def add_name(self, name: str) -> None:
        """Have shared memory of this name removed when this process has ended."""
        assert name and not set(name) & set("/ \n"), name
        self._tell(f"name {name}")

    def close(self) -> None:
        """Dismiss the guardian, which removes what is left first; again is fine."""
        self._is_over.set()
        self._thread.join()
        with self._lock:
            self._end()

    def _tell(self, line: str) -> None:
        data = f"{line}\n".encode()
        with self._lock:
            self._told[data] = None
            self._write(data)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            with self._lock:
                if not self._write(b"beat\n"):
                    self._end()
                    self._start()
                if self._process is None:
                    return

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, str(self._me.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a signal to this process's group is not for it
            )
        except OSError as error:
            logger.warning("no guardian: %s", error)
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a stopped one stops nobody else
        self._write(b"".join([*self._told, *map(_child, self._children)]))

    def _write(self, data: bytes) -> bool:
        """Write lines at once, if they fit; return whether there is a guardian to read them."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            os.write(self._process.stdin.fileno(), data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _end(self) -> None:
        """Reap a guardian that has ended, or is about to."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _child(process: ProcessId) -> bytes:
    return f"child {process.pid} {process.start}\n".encode()
