"""The figures of `sluice bench batching` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.bench.batching import MODES, MixedRun
from cluster.bench.canvas import open_pyplot, write_png


def batching_report(figures: dict[str, Any]) -> Table:
    """Return one row per mode."""
    slo_ms = figures["tpot_slo_s"] * 1e3
    table = Table("", title=f"TPOT objective of the streams: {slo_ms:.1f} ms", title_justify="left")
    for name in (
        *("tokens/s", "ratio", "TPOT p50", "TPOT p99", "gap p99", "gaps in time"),
        *("prompt tokens/step", "prompts took"),
    ):
        table.add_column(name, justify="right")
    for mode, row in figures["modes"].items():
        sizes = row["prompt_tokens_per_mixed_step"]
        table.add_row(
            mode,
            f"{row['total_tokens_per_s']:.0f}",
            f"{row['throughput_ratio']:.2f}",
            _ms(row["tpot_s"]["p50"]),
            _ms(row["tpot_s"]["p99"]),
            _ms(row["gap_s"]["p99"]),
            f"{row['gaps_within_slo']:.1%}",
            "-" if sizes["p50"] is None else f"{sizes['p50']:.0f} (max {sizes['max']:.0f})",
            f"{row['prompts_s']:.1f} s",
        )
    return table


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def plot_batching(runs: Sequence[MixedRun], tpot_slo_s: float, path: Path, title: str) -> None:
    """Write a PNG: how the streams' gaps are distributed, and each step's prompt tokens.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = open_pyplot()
    figure, (shares, over_time) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    figure.suptitle(title)
    for mode in MODES:
        of_mode = [run for run in runs if run.mode == mode]
        gaps = sorted(gap for run in of_mode for stream in run.stream_gaps_s() for gap in stream)
        shares.step(gaps, [(i + 1) / len(gaps) for i in range(len(gaps))], where="post", label=mode)
        steps = of_mode[-1].steps
        over_time.plot(
            [s.end_s for s in steps], [s.num_prompt_tokens for s in steps], ".", ms=3, label=mode
        )
    shares.axvline(tpot_slo_s, color="black", linestyle=":", label="objective")
    shares.set(xlabel="seconds between a stream's tokens", ylabel="share", xscale="log")
    over_time.set(xlabel="seconds from the start", ylabel="prompt tokens of a step")
    for axes in (shares, over_time):
        axes.legend()
    write_png(pyplot, figure, path)
