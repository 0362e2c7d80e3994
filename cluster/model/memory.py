"""What this process holds in memory, from the kernel's own books (Linux)."""

from __future__ import annotations

from pathlib import Path


def rss_bytes() -> int:
    """Return the resident memory of this process, mapped file pages included, bytes."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Return the most that `rss_bytes` has been since the process began or `reset_peak_rss`."""
    return _status_bytes("VmHWM")


def reset_peak_rss() -> None:
    """Make the present resident memory the peak, to measure what comes next."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
