"""`sluice serve` as a person runs it: a process of its own, ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SLUICE = [sys.executable, "-m", "cluster.cli"]


def first_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(timeout_s), "nothing was printed in time"
    return process.stdout.readline()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    overrides = ["gateway.port=0", "parallel.tp=2", f"store.namespace=cli{os.getpid()}"]
    command = [*SLUICE, "serve", "--json"]
    for item in overrides:
        command += ["--set", item]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        start_new_session=True,  # Ctrl-C reaches the whole group, as in a terminal
    )
    try:
        yield process, json.loads(first_line(process, 180))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.fixture
def before_serving() -> set[str]:
    return shared_memory_files()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_serve_ends_on_a_signal_and_leaves_nothing(
    before_serving: set[str],
    serving: tuple[subprocess.Popen[str], dict[str, Any]],
    number: signal.Signals,
) -> None:
    process, ready = serving
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    generate = [*SLUICE, "generate", "import os", "--address", ready["address"], "--json"]
    answer = subprocess.run(
        [*generate, "--max-tokens", "8"], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr

    if number is signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(90) == 0
    deadline_s = time.monotonic() + 20
    while left := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline_s, [p.cmdline() for p in left]
        time.sleep(0.1)
    assert shared_memory_files() <= before_serving


def test_serve_refuses_a_bad_configuration_in_one_line() -> None:
    command = [*SLUICE, "serve", "--set", "parallel.tp=3", "--set", "gateway.port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "parallel.tp=3" in done.stderr
