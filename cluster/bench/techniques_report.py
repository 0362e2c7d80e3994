"""The ablation as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_GIB = 2**30


def techniques_report(figures: dict[str, Any]) -> RenderableType:
    """Return the table of a `techniques.run_techniques` result, and what it comes to."""
    workload = figures["workload"]
    title = (
        f"{escape(figures['model'])}, {figures['threads']} threads: prompts of "
        f"{workload['num_prefix_tokens']} shared + {_range(workload['own_tokens'])} own tokens, "
        f"answers of {_range(workload['output_tokens'])}, {workload['num_users']} users"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, title_justify="left")
    table.add_column("technique", no_wrap=True)
    for name in (
        "re-\nquests",
        "out\ntok/s",
        "total\ntok/s",
        "TTFT, s\np50 / p99",
        "TPOT, ms\np50 / p99",
        "peak\nGiB",
        "gain",
        f"over\n{'naive' if figures['total']['first'] == 'naive' else 'first'}",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in figures["rows"]:
        table.add_row(*_cells(row))
    return Group(table, *_remarks(figures["rows"]), _total(figures["total"]))


def _cells(row: dict[str, Any]) -> list[str]:
    if row["error"]:
        return [row["title"], "failed", *["-"] * 7]
    ttft_s, tpot_s = row["ttft_s"], row["tpot_s"]
    return [
        row["title"],
        str(row["num_requests"]),
        f"{row['out_tokens_per_s']:.1f}",
        f"{row['total_tokens_per_s']:.0f}",
        f"{ttft_s['p50']:.1f} / {ttft_s['p99']:.1f}",
        f"{tpot_s['p50'] * 1e3:.0f} / {tpot_s['p99'] * 1e3:.0f}",
        f"{row['peak_rss_bytes'] / _GIB:.2f}",
        _factor(row["gain_over_previous"]),
        _factor(row["gain_over_first"]),
    ]


def _remarks(rows: list[dict[str, Any]]) -> list[Text]:
    """Say what the figures alone do not: what failed, what is no gain, what others claim."""
    failed = [row for row in rows if row["error"]]
    found = [Text(f"{row['title']} failed: {row['error']}", style="red") for row in failed]
    losses = [row["title"] for row in rows if row["is_gain"] is False]
    if losses:
        found.append(Text(f"no gain over the row before: {', '.join(losses)}"))
    claims = [
        f"{row['title']} {claim['low']:g}-{claim['high']:g}x ({claim['claim']})"
        for row in rows
        if (claim := row["literature"])
    ]
    if claims:
        found.append(Text(f"the literature claims: {', '.join(claims)}"))
    return found


def _total(total: dict[str, Any]) -> Text:
    claim = total["literature"]
    if total["gain"] is None:
        return Text("no row could be measured")
    return Text(
        f"together: {total['gain']:.1f}x over {total['first']}, at {total['best']}; "
        f"the literature claims {claim['low']:g}-{claim['high']:g}x"
    )


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _range(bounds: list[int] | tuple[int, int]) -> str:
    return f"{bounds[0]} to {bounds[1]}"
