"""Where a figure comes from: commit, machine, versions, command line, time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from cluster.machine import cpu_name

_VERSIONED = ("sluice", "torch", "ray", "grpcio", "transformers")


def provenance() -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement, as plain data."""
    return {
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _VERSIONED},
    }


def _commit() -> str:
    """Return the checkout's commit, marked where files differ from it, else the version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return f"version {_version('sluice')}"
    try:
        commit = _git(root, "rev-parse", "HEAD")
        is_changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return f"version {_version('sluice')}"
    return f"{commit} with changes" if is_changed else commit


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
