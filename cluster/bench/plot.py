"""A picture of one run: latencies as cumulative shares, and requests over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.bench.canvas import open_pyplot, write_png
from cluster.bench.statistics import LatencyObjective, RequestRecord


def plot_run(
    records: Sequence[RequestRecord], objective: LatencyObjective, path: Path, title: str
) -> None:
    """Write a PNG of the run's TTFT and TPOT distributions and of TTFT over time.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = open_pyplot()
    figure, (shares, over_time) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    figure.suptitle(title)
    _plot_shares(shares, "TTFT", [r.ttft_s for r in records if r.is_ok], objective.ttft_s)
    _plot_shares(shares, "TPOT", [r.tpot_s for r in records if r.is_ok], objective.tpot_s)
    shares.set(xlabel="seconds", ylabel="share of answers", xscale="log", ylim=(0, 1.02))
    shares.legend()
    _plot_over_time(over_time, records)
    write_png(pyplot, figure, path)


def _plot_shares(axes: Any, name: str, values: Sequence[float | None], bound_s: float) -> None:
    ordered = sorted(value for value in values if value is not None)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    (line,) = axes.step(ordered, shares, where="post", label=name)
    if bound_s != float("inf"):
        label = f"{name} objective"
        axes.axvline(bound_s, color=line.get_color(), linestyle=":", label=label)


def _plot_over_time(axes: Any, records: Sequence[RequestRecord]) -> None:
    good = [(r.scheduled_s, r.ttft_s) for r in records if r.is_ok and r.ttft_s is not None]
    failed = [r.scheduled_s for r in records if not r.is_ok]
    axes.scatter([s for s, _ in good], [t for _, t in good], s=8, label="TTFT")
    axes.scatter(failed, [0.0] * len(failed), marker="x", color="red", label="failed")
    axes.set(xlabel="due, seconds from the start", ylabel="TTFT, seconds")
    axes.legend()
