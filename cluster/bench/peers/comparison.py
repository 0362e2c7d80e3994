"""What the runs say: medians over the rounds, and ratios of runs of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.bench.peers.peers import SLUICE
from cluster.bench.peers.rows import Row

FIGURES = (
    "out_tokens_per_s",
    "single_stream_tokens_per_s",
    "ttft_s",
    "peak_rss_bytes",
    "load_s",
)
"""What is compared. More is better in the first two, less in the others."""


@dataclass(frozen=True, slots=True)
class Run:
    """One peer in one row and round, in a process of its own."""

    row: str  # name of the row
    peer: str
    round: int  # from 1
    figures: dict[str, Any] = field(default_factory=dict)  # empty where it failed
    error: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class Entry:
    """One peer in one row, over all rounds."""

    row: str
    peer: str
    num_runs: int  # that gave figures
    medians: dict[str, float]  # by figure; empty without a run
    ratios: dict[str, float]  # Sluice's figure / the peer's, median over rounds that have both
    note: str  # why it failed; empty where it did not


def compare(runs: Sequence[Run], rows: Sequence[Row]) -> list[Entry]:
    """Return one entry for each peer of each row, in their order; a failed peer has one too."""
    return [_entry(runs, row, peer) for row in rows for peer in row.peers]


def _entry(runs: Sequence[Run], row: Row, peer: str) -> Entry:
    mine = [run for run in runs if (run.row, run.peer) == (row.name, peer)]
    good = [run for run in mine if not run.error]
    ours = {
        run.round: run.figures
        for run in runs
        if (run.row, run.peer) == (row.name, SLUICE) and not run.error
    }
    medians: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for figure in FIGURES:
        if values := [run.figures[figure] for run in good]:
            medians[figure] = statistics.median(values)
        paired = [run for run in good if run.round in ours and peer != SLUICE]
        if paired:
            each = (ours[run.round][figure] / run.figures[figure] for run in paired)
            ratios[figure] = statistics.median(each)
    note = next((run.error for run in mine if run.error), "" if mine else "not run")
    return Entry(row.name, peer, len(good), medians, ratios, note)
