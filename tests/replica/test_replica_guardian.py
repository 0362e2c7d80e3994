"""Guardians of real processes that are killed, stopped, or end well."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.processes import ProcessId

pytestmark = [pytest.mark.timeout(120)]

TIMEOUT_S = 0.4
SLACK_S = 10.0  # of a busy machine; what is waited for comes at once on an idle one
MAX_BYTES = 16 * 2**20  # of a guardian

# Prints the numbers of its child and of its guardian, then does what it is told, line by line.
WARD = """
import json, subprocess, sys, time
from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.processes import ProcessId
guardian = GuardianHandle()
child = subprocess.Popen(["sleep", "3600"])
guardian.add_child(ProcessId.of(child.pid))
guardian.add_name(sys.argv[1])
guardian.arm(float(sys.argv[2]))
print(json.dumps([child.pid, guardian.pid]), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Ward:
    """A process that has a guardian, a child, and a name in shared memory."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WARD, name, str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.child, self.guardian = map(psutil.Process, json.loads(self.process.stdout.readline()))

    def do(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def name() -> Iterator[str]:
    """Name of shared memory that is there."""
    path = Path("/dev/shm") / f"sluice-guardian-test-{os.getpid()}"
    path.touch()
    yield path.name
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def ward(name: str, timeout_s: float = TIMEOUT_S) -> Iterator[Ward]:
    running = Ward(name, timeout_s)
    try:
        yield running
    finally:
        for process in (running.child, running.guardian, running.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.process.wait()


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ignores(process: psutil.Process, numbers: tuple[signal.Signals, ...]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(status.partition("SigIgn:")[2].split()[0], 16)
    return all(mask >> (number - 1) & 1 for number in numbers)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + SLACK_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def check_nothing_remains(running: Ward, name: str) -> None:
    wait_until(lambda: is_gone(running.child), "the child ends")
    wait_until(lambda: is_gone(running.guardian), "the guardian ends")
    assert not (Path("/dev/shm") / name).exists()


def test_killed_process_takes_its_stopped_child_with_it(name: str) -> None:
    with ward(name) as running:
        running.child.suspend()
        running.process.kill()
        check_nothing_remains(running, name)


def test_stopped_process_is_killed_with_all_that_belongs_to_it(name: str) -> None:
    with ward(name) as running:
        running.child.suspend()
        os.kill(running.process.pid, signal.SIGSTOP)
        assert running.process.wait(SLACK_S) == -signal.SIGKILL
        check_nothing_remains(running, name)


def test_busy_process_is_left_alone(name: str) -> None:
    with ward(name, timeout_s=1.5) as running:
        running.do("until = time.monotonic() + 4.0")
        running.do("while time.monotonic() < until: pass")
        assert running.process.poll() is None and not is_gone(running.child)


def test_process_that_ends_well_needs_no_killing(name: str) -> None:
    with ward(name) as running:
        running.do("child.kill(); child.wait(); guardian.close()")
        check_nothing_remains(running, name)
        assert running.process.poll() is None


def test_guardian_outlasts_the_signals_that_end_others(name: str) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with ward(name) as running:
        wait_until(lambda: ignores(running.guardian, numbers), "it has started")
        for number in numbers:
            running.guardian.send_signal(number)
        running.process.kill()
        check_nothing_remains(running, name)


def test_killed_guardian_is_replaced_by_one_that_knows_as_much(name: str) -> None:
    with ward(name) as running:
        running.guardian.kill()
        wait_until(lambda: is_gone(running.guardian), "it is killed")
        running.do(f"while guardian.pid in (None, {running.guardian.pid}): time.sleep(0.01)")
        running.child.suspend()
        os.kill(running.process.pid, signal.SIGSTOP)
        assert running.process.wait(SLACK_S) == -signal.SIGKILL
        wait_until(lambda: is_gone(running.child), "the child ends")


def test_guardian_is_small(name: str) -> None:
    with ward(name) as running:
        assert running.guardian.memory_info().rss < MAX_BYTES


def test_number_that_another_process_has_now_is_not_killed() -> None:
    with subprocess.Popen(["sleep", "3600"]) as bystander:
        try:
            guardian = GuardianHandle()
            now = ProcessId.of(bystander.pid)
            guardian.add_child(replace(now, start=str(int(now.start) - 1)))  # of the one before it
            guardian.add_child(replace(now, space="of another machine"))
            guardian.close()
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_group_without_a_guardian_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    guardian = GuardianHandle()
    guardian.arm(TIMEOUT_S)
    assert guardian.pid is None and "no guardian" in caplog.text
    guardian.close()


def test_identity_tells_a_process_from_those_that_ended() -> None:
    with subprocess.Popen(["sleep", "3600"]) as process:
        before = ProcessId.of(process.pid)
        assert before == ProcessId.of(process.pid) != ProcessId.of(os.getpid())
        process.kill()
    assert ProcessId.of(process.pid).start == ""
