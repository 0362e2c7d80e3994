"""Starts a guardian (guardian.py) beside this process, and beats for it from a thread.

started ──► answers ──┬──► has ended ─────────────┬──► 0.2 s, 0.4 s ... 30 s later: started
   ▲                  └──► stands still: killed ──┘                            │
   └───────────────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time

from cluster.replica import guardian
from cluster.replica.liveness import Silence
from cluster.replica.processes import ProcessId

logger = logging.getLogger(__name__)

BEAT_S = 0.2
ANSWER_TIMEOUT_S = 5.0  # a guardian that is silent for longer stands still
MIN_DELAY_S = 0.2  # from a guardian's end to the next one's start; doubled each time
MAX_DELAY_S = 30.0  # one that lasts for so long was no failure
END_TIMEOUT_S = 2.0  # for a guardian to remove what is left, and to end


class GuardianHandle:
    """A guardian of this process; where it ends or stands still another one takes its place.

    Loading a model may keep every thread from running for seconds: until `arm` a silence kills
    nobody. That this process has ended is always noticed.
    """

    def __init__(self) -> None:
        self._me = ProcessId.of(os.getpid())
        self._told: dict[bytes, None] = {}  # lines that the next guardian has to know
        self._children: list[ProcessId] = []  # likewise; those that have ended go
        self._lock = threading.Lock()  # of all fields
        self._running: _Running | None = None
        self._began_s = 0.0  # the one that runs; by time.monotonic(), as the next
        self._due_s = 0.0  # when there is to be another one
        self._delay_s = MIN_DELAY_S
        self._silence = Silence(ANSWER_TIMEOUT_S, BEAT_S)
        self._is_over = threading.Event()
        with self._lock:
            self._start(time.monotonic())
        self._thread = threading.Thread(target=self._beat, name="guardian", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the guardian; None where there is none."""
        running = self._running
        return running.pid if running is not None else None

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
            if self._running is not None:
                self._running.dismiss()
                self._running = None

    def _tell(self, line: str) -> None:
        data = f"{line}\n".encode()
        with self._lock:
            self._told[data] = None
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._running is not None:
            self._running.write(data)

    def _beat(self) -> None:
        before_s = time.monotonic()
        while not self._is_over.wait(BEAT_S):
            now_s = time.monotonic()
            with self._lock:
                self._tick(now_s, now_s - before_s)
            before_s = now_s

    def _tick(self, now_s: float, elapsed_s: float) -> None:
        """Beat for the guardian, and see to it that there is one that answers."""
        running = self._running
        if running is None:
            if now_s >= self._due_s:
                self._start(now_s)
            return
        running.write(b"beat\n")
        self._silence.tick(elapsed_s)
        if running.has_answered():
            self._silence.heard()
        if running.status is not None:
            self._lose(now_s, f"it ended with status {running.status}")
        elif self._silence.is_too_long:
            self._lose(now_s, f"it did not answer for {ANSWER_TIMEOUT_S:g} s")
        elif now_s - self._began_s >= MAX_DELAY_S:
            self._delay_s = MIN_DELAY_S

    def _start(self, now_s: float) -> None:
        try:
            self._running = _Running(self._me.pid)
        except OSError as error:
            self._lose(now_s, str(error))
            return
        self._began_s = now_s
        self._silence.heard()
        self._write(b"".join([*self._told, *map(_child, self._children)]))

    def _lose(self, now_s: float, reason: str) -> None:
        """Be without a guardian for a while; the first time in a row this is told."""
        if self._running is not None:
            self._running.kill()
            self._running = None
        if self._delay_s == MIN_DELAY_S:
            logger.warning("no guardian: %s: it is tried again, more and more seldom", reason)
        self._due_s = now_s + self._delay_s
        self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)


class _Running:
    """One guardian, from its start to its end.

    Args:
        ward_pid: Of the process that it watches.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, ward_pid: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(ward_pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a signal to this process's group is not for it
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._lines, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._lines, self._answers):  # a stopped one stops nobody else
            os.set_blocking(pipe.fileno(), False)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """With which it has ended; None: it has not."""
        return self._process.poll()

    def write(self, data: bytes) -> None:
        """Write lines at once, if they fit and there is somebody to read them."""
        with contextlib.suppress(OSError):
            os.write(self._lines.fileno(), data)

    def has_answered(self) -> bool:
        """Return whether it has said something since it was asked last."""
        try:
            return bool(os.read(self._answers.fileno(), 65536))
        except BlockingIOError:
            return False

    def dismiss(self) -> None:
        """Let it remove what is left, and end."""
        self._lines.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def kill(self) -> None:
        """End it without a word: it must not take the end of the lines for that of its ward."""
        self._process.kill()
        self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        for pipe in (self._lines, self._answers):
            pipe.close()


def _child(process: ProcessId) -> bytes:
    return f"child {process.pid} {process.start}\n".encode()
