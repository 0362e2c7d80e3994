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

from cluster.replica import guardian, guardian_start
from cluster.replica.guardian_start import ANSWER_TIMEOUT_S, GuardianHandle
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
        self.tell(line)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n"

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


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


@contextlib.contextmanager
def busy_processor() -> Iterator[tuple[int, list[subprocess.Popen[bytes]]]]:
    """Number of a processor, and what keeps it busy."""
    cpu = max(os.sched_getaffinity(0))
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        for spinner in spinners:
            os.sched_setaffinity(spinner.pid, {cpu})
        yield cpu, spinners
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


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


def test_busy_process_is_left_alone_and_keeps_its_guardian(name: str) -> None:
    with ward(name, timeout_s=1.5) as running:
        running.do(f"until = time.monotonic() + {ANSWER_TIMEOUT_S + 2.0}")
        running.do("while time.monotonic() < until: pass")
        assert running.process.poll() is None and not is_gone(running.child)
        assert not is_gone(running.guardian), "it has answered all the time"


def test_process_that_gets_no_processor_is_left_alone(name: str) -> None:
    with ward(name) as running, busy_processor() as (cpu, spinners):
        wait_until(lambda: ignores(running.guardian, (signal.SIGTERM,)), "it has started")
        process = psutil.Process(running.process.pid)
        for thread in process.threads():
            os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setaffinity(thread.id, {cpu})
        running.tell("while True: pass")
        before_s = process.cpu_times().user
        time.sleep(5 * TIMEOUT_S)
        assert process.cpu_times().user - before_s < TIMEOUT_S, "it was starved"
        assert running.process.poll() is None
        for spinner in spinners:
            spinner.kill()
        os.kill(running.process.pid, signal.SIGSTOP)
        assert running.process.wait(SLACK_S) == -signal.SIGKILL, "stopped, it needs no processor"


@pytest.mark.parametrize(
    ("num_wanted", "share", "is_spared"),
    [
        (1, 0.1, True),
        (1, 0.9, False),  # it runs, and nobody beats
        (2, 0.9, True),
        (2, 1.9, False),
        (0, 0.0, False),  # stopped, or waiting for a lock
    ],
)
@pytest.mark.parametrize("tick_s", [0.1, 1.0])  # the guardian itself comes late on a busy machine
def test_silence_counts_unless_there_was_no_processor(
    monkeypatch: pytest.MonkeyPatch, num_wanted: int, share: float, is_spared: bool, tick_s: float
) -> None:
    used_s = 0.0
    monkeypatch.setattr(guardian, "num_wanted", lambda _: num_wanted)
    monkeypatch.setattr(guardian, "used_s", lambda _: used_s)
    watching = guardian.Guardian(0, -1, -1)
    watching._take(["limit", "1.5"])
    num_ticks = 0
    while not watching.is_too_silent:
        num_ticks += 1
        assert num_ticks < 1000, "nobody is spared for ever"
        used_s += share * tick_s
        watching._tick(tick_s)
    spared_s = 1.5 * guardian.MAX_SPARED if is_spared else 0.0
    assert watching._spared_s == pytest.approx(spared_s, abs=tick_s)


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


def test_stopped_guardian_is_replaced_by_one_that_watches(name: str) -> None:
    with ward(name) as running:
        running.guardian.suspend()
        wait_until(lambda: is_gone(running.guardian), "it is killed")
        running.do(f"while guardian.pid in (None, {running.guardian.pid}): time.sleep(0.01)")
        assert (Path("/dev/shm") / name).exists() and not is_gone(running.child)
        running.child.suspend()
        os.kill(running.process.pid, signal.SIGSTOP)
        assert running.process.wait(SLACK_S) == -signal.SIGKILL
        wait_until(lambda: is_gone(running.child), "the child ends")
        wait_until(lambda: not (Path("/dev/shm") / name).exists(), "the name goes")


def test_guardian_goes_on_where_nobody_reads_its_answers(name: str) -> None:
    unread, answers = os.pipe()
    os.set_blocking(answers, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(answers, bytes(65536))
    os.set_blocking(answers, True)
    command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=answers) as process:
        try:
            process.communicate(f"name {name}\n".encode(), timeout=SLACK_S)
        finally:
            process.kill()
    os.close(unread)
    os.close(answers)
    assert not (Path("/dev/shm") / name).exists()


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


def has_guardian(handle: GuardianHandle) -> bool:
    """Return whether there is one that is not a test's."""
    with contextlib.suppress(psutil.Error):
        return handle.pid is not None and sys.executable in psutil.Process(handle.pid).cmdline()
    return False


def test_guardian_that_cannot_start_is_told_of_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nonexistent/python")
        handle = GuardianHandle()
        handle.arm(60.0)
        assert handle.pid is None and "no guardian: [Errno 2]" in caplog.text
    wait_until(lambda: has_guardian(handle), "there is one")
    handle.close()
    assert len(caplog.records) == 1


def test_guardian_that_ends_at_once_is_tried_again_more_and_more_seldom(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    starts, program = tmp_path / "starts", tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho >> {starts}\nexit 3\n")
    program.chmod(0o755)
    began_s = time.monotonic()
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", str(program))
        handle = GuardianHandle()
        handle.add_name(name)
        wait_until(lambda: starts.exists() and len(starts.read_text()) >= 4, "4 were started")
        assert time.monotonic() - began_s >= 0.2 + 0.4 + 0.8
    assert [record.args for record in caplog.records] == [("it ended with status 3",)]
    wait_until(lambda: has_guardian(handle), "there is one that lasts")
    handle.close()
    assert not (Path("/dev/shm") / name).exists()


def test_guardian_that_lasted_is_told_of_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guardian_start, "MAX_DELAY_S", 0.4)
    handle = GuardianHandle()

    def is_told_of_twice() -> bool:
        wait_until(lambda: has_guardian(handle), "there is one")
        lasts_until_s = time.monotonic() + 1.0
        wait_until(lambda: time.monotonic() > lasts_until_s, "it lasts")
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGKILL)
        return len(caplog.records) >= 2

    wait_until(is_told_of_twice, "it was no failure to start")
    handle.close()


def test_identity_tells_a_process_from_those_that_ended() -> None:
    with subprocess.Popen(["sleep", "3600"]) as process:
        before = ProcessId.of(process.pid)
        assert before == ProcessId.of(process.pid) != ProcessId.of(os.getpid())
        process.kill()
    assert ProcessId.of(process.pid).start == ""
