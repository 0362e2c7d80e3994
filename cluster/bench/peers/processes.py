"""Run one command in a process of its own, to its end or its deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from cluster.bench.peers.peers import Command
from cluster.errors import SluiceError

STOP_S = 10.0
"""Seconds a process gets to end after it was killed."""


class RunFailedError(SluiceError):
    """A peer could not be installed, converted for, or measured; the others go on."""


def run_command(command: Command, log: Path, timeout_s: float) -> str:
    """Run a command and return its standard output; its standard error goes to the file `log`.

    Raises:
        RunFailedError: It failed or took longer than `timeout_s`; all its processes are gone.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command.args,
            cwd=command.folder,
            env=os.environ | command.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            reason = f"took more than {timeout_s:g} s: raise --timeout-s, or see {log}"
            raise RunFailedError(reason) from None
        finally:
            _end(process)
    if process.returncode != 0:
        cause = _last_line(log) or "no message"
        raise RunFailedError(f"exit status {process.returncode}: {cause} (all of it: {log})")
    return output


def last_object(output: str) -> dict[str, Any]:
    """Return the JSON object in the last line of a program's output.

    Raises:
        RunFailedError: There is none.
    """
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunFailedError(f"printed no figures, but {(lines or [''])[-1][:200]!r}")
    return found


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(STOP_S)


def _last_line(log: Path) -> str:
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return next((line[:300] for line in reversed(lines) if line), "")
