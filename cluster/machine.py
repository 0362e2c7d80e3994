"""The machine of this process: its processor's name, and where to keep what is made once."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return ``$SLUICE_CACHE_DIR/name``, without the variable ``~/.cache/sluice/name``.

    Raises:
        RuntimeError: Neither the variable nor a home folder is there.
    """
    root = os.environ.get("SLUICE_CACHE_DIR", "")
    return (Path(root) if root else Path.home() / ".cache" / "sluice") / name


@contextmanager
def locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Hold a lock between processes; the system frees it when its holder dies.

    Raises:
        TimeoutError: Another process held it for that long.
    """
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{path} has been locked by another process for {timeout_s:g} s"
                    ) from None
                time.sleep(0.1)
        yield


def cpu_name() -> str:
    """Return the processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
