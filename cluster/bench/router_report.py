"""The figures of `sluice bench router` as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from cluster.bench.report import figure_table


def router_report(figures: dict[str, Any]) -> RenderableType:
    """Return the tables of one `router.run_router_bench` result."""
    times = Table("microseconds", "p50", "p90", "p99", "max")
    for column in times.columns[1:]:
        column.justify = "right"
    for round_ in figures["decisions"]:
        among = f"among {round_['num_replicas']} replicas"
        times.add_row(f"decision {among}", *_cells(round_["decide_s"]))
        times.add_row(f"match {among}", *_cells(round_["match_s"]))
        times.add_row(f"load and delta {among}", *_cells(round_["report_s"]))
    times.add_row("call while a lost replica is swept", *_cells(figures["sync"]["sweep_s"]))
    times.add_row("hashing a prompt, before its decision", *_cells(figures["keys_s"]))
    memory, sync = figures["memory"], figures["sync"]
    sizes = figure_table(
        {
            f"index of {memory['num_blocks']} different blocks": _mib(memory["num_bytes"]),
            "the same, by the process": _mib(memory["rss_bytes"]),
            "of these blocks, beyond the budget": str(memory["num_dropped"]),
            f"{sync['num_replicas']} snapshots, {sync['num_blocks']} blocks": (
                f"{sync['total_s']:.2f} s"
            ),
            "of these, indexing": f"{sync['index_s']:.2f} s",
            "blocks indexed/s": f"{sync['index_blocks_per_s']:.0f}",
        }
    )
    return Group(times, sizes)


def _cells(figures_s: dict[str, float]) -> list[str]:
    return [f"{figures_s[name] * 1e6:.0f}" for name in ("p50", "p90", "p99", "max")]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
