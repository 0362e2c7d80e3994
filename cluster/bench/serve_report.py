"""The figures of `bench serve` as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cluster.bench.report import figure_table, serve_report


def full_report(figures: dict[str, Any]) -> RenderableType:
    """Return the tables of one `serve.run_serve_bench` result."""
    parts: list[RenderableType] = []
    if "clipped" in figures:
        parts.append(_replay_table(figures))
    parts.append(serve_report(figures["result"]))
    refusals = figures["result"]["refusals"]
    if refusals["num_requests"]:
        parts.append(_refusal_table(refusals, figures["result"]["num_requests"]))
    if len(figures["classes"]) > 1:
        parts.append(_class_table(figures["classes"]))
    return Group(*parts)


def _replay_table(figures: dict[str, Any]) -> Table:
    load, lost = figures["load"], figures["clipped"]
    rows = {
        "workload": f"{escape(load['workload'])} x {load['rate_scale']:g}",
        "clipped to the model's context": (
            f"{lost['num_requests']} of {load['num_requests']} requests"
        ),
        "of these, prompts": f"{lost['num_prompts']}, by {lost['num_prompt_tokens']} tokens",
        "of these, answers": f"{lost['num_outputs']}, by {lost['num_output_tokens']} tokens",
    }
    if load["num_skipped"]:
        rows["rows skipped as invalid"] = str(load["num_skipped"])
    return figure_table(rows)


def _refusal_table(refusals: dict[str, Any], num_requests: int) -> Table:
    rows = {"refused": f"{refusals['num_requests']} of {num_requests} requests"}
    for reason, count in refusals["reasons"].items():
        rows[f"refused, {reason or 'no reason given'}"] = str(count)
    retry_s = refusals["retry_after_s"]
    if retry_s["p50"] is not None:
        rows["told to try again in, p50 / max"] = f"{retry_s['p50']:.1f} / {retry_s['max']:.1f} s"
    return figure_table(rows)


def _class_table(classes: dict[str, dict[str, Any]]) -> Table:
    table = Table("class")
    for name in ("requests", "refused", "goodput", "tokens/s", "TTFT p50 / p90", "TPOT p50 / p90"):
        table.add_column(name, justify="right")
    for name, figures in classes.items():
        table.add_row(
            name or "none",
            str(figures["num_requests"]),
            str(figures["refusals"]["num_requests"]),
            f"{figures['goodput']:.1%}",
            f"{figures['total_tokens_per_s']:.1f}",
            _pair_ms(figures["ttft_s"]),
            _pair_ms(figures["tpot_s"]),
        )
    return table


def _pair_ms(values_s: dict[str, float | None]) -> str:
    low_s, high_s = values_s["p50"], values_s["p90"]
    return "-" if low_s is None or high_s is None else f"{low_s * 1e3:.1f} / {high_s * 1e3:.1f} ms"
