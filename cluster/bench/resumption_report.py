"""The figures of `bench resumption` as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

ASKED_S = {
    "replica": {"p50": 0.3, "p99": 1.5},  # from the last token before a death to the next one
    "gateway": {"p50": 1.0},
}
_MAX_FINDINGS = 12  # printed; all of them are in the JSON


def resumption_report(figures: dict[str, Any]) -> RenderableType:
    """Return the table of one `resumption.run_resumption_bench` result, and what went wrong."""
    load, asked = figures["load"], ASKED_S[figures["load"]["kind"]]
    aims = ", ".join(f"{name} at most {aim_s * 1e3:.0f} ms" for name, aim_s in asked.items())
    indexes = "every token index" if load["every"] == 1 else f"every {load['every']}th token index"
    table = Table(
        *("", "indexes", "same", "differ", "failed", "missed", "p50", "p99", "max"),
        title=f"kill -9 of a {load['kind']} at {indexes}, {load['dtype']}; gaps in ms\n"
        f"asked: all the same, {aims}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),  # narrow enough for 80 columns
    )
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for case in figures["cases"]:
        counts = (case["num_indexes"], case["num_identical"])
        wrong = (len(case["different"]), len(case["failed"]), len(case["missed"]))
        table.add_row(case["name"], *map(str, (*counts, *wrong)), *_gaps(case["gap_s"], asked))
    totals = ("num_identical", "num_different", "num_failed", "num_missed")
    cells = [str(figures[name]) for name in totals]
    table.add_row("all", "", *cells, *_gaps(figures["gap_s"], asked), style="bold")
    return Group(table, *_findings(figures))


def misses(figures: dict[str, Any]) -> list[str]:
    """Return what falls short of what is asked, in words; whether streams differ only in float32.

    Args:
        figures: Of `resumption.run_resumption_bench`.
    """
    load, gap_s = figures["load"], figures["gap_s"]
    found = [
        f"{figures[name]} streams {what}"
        for name, what in (("num_different", "differ"), ("num_failed", "failed"))
        if figures[name] and (name == "num_failed" or load["dtype"] == "float32")
    ]
    for case in figures["cases"]:
        if case["undisturbed_difference"] and load["dtype"] == "float32":
            what = case["undisturbed_difference"]
            found.append(f"{case['name']}: two undisturbed streams differ: {what}")
    if figures["num_missed"]:
        found.append(f"{figures['num_missed']} indexes were not met")
    if figures["ended"]:
        found.append(f"ended though nobody killed them: {', '.join(figures['ended'])}")
    for name, aim_s in ASKED_S[load["kind"]].items():
        if gap_s[name] is None or gap_s[name] > aim_s:
            got = "not known" if gap_s[name] is None else f"{gap_s[name] * 1e3:.0f} ms"
            found.append(f"gap {name} is {got}, asked: {aim_s * 1e3:.0f} ms")
    return found


def _gaps(gap_s: dict[str, float | None], asked: dict[str, float]) -> list[str]:
    cells = []
    for name in ("p50", "p99", "max"):
        value_s = gap_s[name]
        text = "-" if value_s is None else f"{value_s * 1e3:.0f}"
        is_late = value_s is not None and value_s > asked.get(name, value_s)
        cells.append(f"[red]{text}[/red]" if is_late else text)
    return cells


def _findings(figures: dict[str, Any]) -> list[Text]:
    lines = [
        f"{case['name']} at {_place(finding)}: {finding.get('error') or finding['difference']}"
        for case in figures["cases"]
        for finding in (*case["failed"], *case["different"])
    ]
    more = len(lines) - _MAX_FINDINGS
    shown = [*lines[:_MAX_FINDINGS], *([f"... and {more} more"] if more > 0 else [])]
    return [Text(line) for line in shown]


def _place(finding: dict[str, Any]) -> int:
    cut_index: int | None = finding["cut_index"]
    return finding["aimed_index"] if cut_index is None else cut_index
