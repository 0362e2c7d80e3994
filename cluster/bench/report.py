"""Figures as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

_LATENCIES = (
    ("TTFT", "ttft_s", "to the first token"),
    ("TPOT", "tpot_s", "per further token"),
    ("ITL", "itl_s", "between messages"),
    ("E2E", "e2e_s", "whole answer"),
)


def latency_table(result: dict[str, Any]) -> Table:
    """Return TTFT, TPOT, ITL and E2E of a `statistics.summarize` result, milliseconds."""
    table = Table("ms", "p50", "p90", "p99", "mean", "max", "")
    for column in table.columns[1:6]:
        column.justify = "right"
    for name, key, meaning in _LATENCIES:
        cells = [_ms(result[key][column]) for column in ("p50", "p90", "p99", "mean", "max")]
        table.add_row(name, *cells, meaning)
    return table


def serve_report(result: dict[str, Any]) -> RenderableType:
    """Return the tables of one `bench serve` result."""
    rates = figure_table(
        {
            "requests": f"{result['num_ok']} of {result['num_requests']} ok",
            "window": f"{result['window_s']:.1f} s",
            "requests/s": f"{result['requests_per_s']:.2f}",
            "out tokens/s": f"{result['out_tokens_per_s']:.1f}",
            "total tokens/s": f"{result['total_tokens_per_s']:.1f}",
            "goodput": f"{result['goodput']:.1%} of all requests",
            "cached prompt tokens": f"{result['cached_token_share']:.1%}",
            **{f"status {name}": str(n) for name, n in result["status"].items() if name != "OK"},
        }
    )
    return Group(rates, latency_table(result))


def figure_table(figures: dict[str, str]) -> Table:
    """Return a table with a name and a value per row."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in figures.items():
        table.add_row(name, value)
    return table


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f}"


def gateway_report(figures: dict[str, Any]) -> RenderableType:
    """Return the table of one `bench gateway` result."""
    fast, paced = figures["unthrottled"], figures["paced"]
    delivery = paced["delivery_s"]
    return figure_table(
        {
            f"messages/s, {figures['load']['num_streams']} streams": (
                f"{fast['messages_per_s']:.0f} ({fast['tokens_per_s']:.0f} tokens/s)"
            ),
            f"CPU per message at {paced['messages_per_s']:.0f}/s": (
                f"{paced['cpu_ms_per_message']:.2f} ms"
            ),
            "delivery p50 / p99": f"{_ms(delivery['p50'])} / {_ms(delivery['p99'])} ms",
            "TTFT added, p50": f"{_ms(paced['ttft_added_p50_s'])} ms",
        }
    )
