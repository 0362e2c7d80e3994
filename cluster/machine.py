"""The machine of this process: its processor's name, and where to keep what is made once."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return ``$SLUICE_CACHE_DIR/name``, without the variable ``~/.cache/sluice/name``.

    Raises:
        RuntimeError: Neither the variable nor a home folder is there.
    """
    root = os.environ.get("SLUICE_CACHE_DIR", "")
    return (Path(root) if root else Path.home() / ".cache" / "sluice") / name


def cpu_name() -> str:
    """Return the processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
