"""Starts and ends the processes of `resumption_processes`, from the side of the bench."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import cluster
from cluster.errors import UnavailableError

_START_TIMEOUT_S = 120.0  # of a process; the nursery imports torch
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Member:
    """A leader or a gateway that runs."""

    name: str  # replica id, or gateway id
    address: str  # host:port
    process: psutil.Process = field(repr=False)

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.process.is_running()

    def kill(self) -> None:
        """End it as `kill -9` does; gone already is fine."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()

    async def wait_gone(self, timeout_s: float) -> None:
        """Return when its process has ended.

        Raises:
            UnavailableError: It has not in that time.
        """
        try:
            await asyncio.to_thread(self.process.wait, timeout_s)
        except psutil.TimeoutExpired as error:
            raise UnavailableError(f"{self.name} still runs after {timeout_s:g} s") from error


class Nursery:
    """The process that forks members.

    Raises:
        UnavailableError: It did not start.
    """

    def __init__(self) -> None:
        paths = [str(Path(cluster.__file__).parents[1]), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.bench.resumption_processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._unread = b""
        self._num_started = 0
        try:
            self._read("nursery")
        except UnavailableError:
            self.close()
            raise

    def start(self, role: str, order: dict[str, Any]) -> Member:
        """Start a member; return when it serves.

        Args:
            role: leader or gateway.
            order: The rest of what `resumption_processes` is told, without a name.

        Raises:
            UnavailableError: It did not start.
        """
        assert self._process.stdin is not None, "it is a pipe"
        self._num_started += 1
        name = f"{role}-{self._num_started}"
        line = json.dumps({"role": role, "name": name, **order})
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        report = self._read(name)
        return Member(name, report["address"], psutil.Process(report["pid"]))

    def close(self) -> None:
        """End it; members that still run end themselves."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self, name: str) -> dict[str, Any]:
        """Return a process's report; others', which have failed since they started, are skipped."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            report: dict[str, Any] = json.loads(self._read_line(name, deadline_s))
            if report["name"] != name:
                continue
            if "error" in report:
                raise UnavailableError(f"{name} did not start: {report['error']}")
            return report

    def _read_line(self, name: str, deadline_s: float) -> bytes:
        assert self._process.stdout is not None, "it is a pipe"
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline_s - time.monotonic())
            is_ready = select.select([pipe], [], [], left_s)[0]
            data = os.read(pipe, 2**16) if is_ready else b""
            if not data:
                reason = "the nursery has ended" if is_ready else f"not in {_START_TIMEOUT_S:g} s"
                raise UnavailableError(f"{name} did not start: {reason}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line
