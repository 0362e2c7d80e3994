"""The comparison as a table: for the terminal, and in Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from cluster.bench.peers.comparison import Entry
from cluster.bench.peers.rows import Row

_FIGURES = (
    ("out tok/s", "out_tokens_per_s", 1.0, ".1f"),
    ("one stream, tok/s", "single_stream_tokens_per_s", 1.0, ".1f"),
    ("TTFT, ms", "ttft_s", 1e3, ".0f"),
    ("peak RSS, MiB", "peak_rss_bytes", 2**-20, ".0f"),
    ("load, s", "load_s", 1.0, ".1f"),
)
_RATIOS = ("out_tokens_per_s", "single_stream_tokens_per_s", "ttft_s")
_NOTE_CHARS = 160


def header() -> list[str]:
    """Return the names of the columns; a ratio is Sluice's figure over the peer's."""
    names = ["row", "peer"]
    for title, key, _, _ in _FIGURES:
        names.append(title)
        if key in _RATIOS:
            names.append("Sluice /")
    return [*names, "runs", "note"]


def cells(entry: Entry, title: str) -> list[str]:
    """Return an entry's line of the table."""
    line = [title, entry.peer]
    for _, key, scale, form in _FIGURES:
        value = entry.medians.get(key)
        line.append("-" if value is None else f"{value * scale:{form}}")
        if key in _RATIOS:
            ratio = entry.ratios.get(key)
            line.append("" if ratio is None else f"{ratio:.2f}")
    note = entry.note if len(entry.note) <= _NOTE_CHARS else f"{entry.note[:_NOTE_CHARS]}..."
    return [*line, str(entry.num_runs), note]


def rich_table(entries: Sequence[Entry], rows: Sequence[Row]) -> Table:
    """Return the table for the terminal."""
    table = Table(*header(), title="Medians; ratios of runs in the same round")
    for column in table.columns[2:-1]:
        column.justify = "right"
    titles = {row.name: row.title for row in rows}
    previous = ""
    for entry in entries:
        if previous and entry.row != previous:
            table.add_section()
        table.add_row(*cells(entry, titles[entry.row] if entry.row != previous else ""))
        previous = entry.row
    return table


def markdown(entries: Sequence[Entry], rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """Return the table in Markdown, and under it what is needed to repeat it."""
    titles = {row.name: row.title for row in rows}
    names = header()
    rule = ["---" if name in ("row", "peer", "note") else "---:" for name in names]
    lines = [names, rule, *(cells(entry, titles[entry.row]) for entry in entries)]
    table = "\n".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines
    )
    machine, versions = provenance["machine"], provenance["versions"]
    return "\n".join(
        [
            table,
            "",
            "Medians; `Sluice /` is Sluice's figure over the peer's in the same round.",
            "",
            f"- commit: {provenance['commit']}, {provenance['time']}",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
            "- versions: " + ", ".join(f"{name} {text}" for name, text in versions.items()),
            f"- command: `{provenance['command']}`",
            "",
        ]
    )
