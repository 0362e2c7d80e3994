"""Turns, failures and the estimate of the rounds; what is chosen on the command line."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import typer

from cluster.bench.peers.comparison import Run
from cluster.bench.peers.processes import RunFailedError
from cluster.bench.peers.rounds import Estimate, run_rounds, turns
from cluster.bench.peers.rows import ROWS, Row, Work
from scripts.bench_peers import chosen_rows

SMALL = Row("bf16", "bf16", Work(2, 8, 4), ("sluice", "vllm"))
OTHER = Row("int8", "int8", Work(2, 8, 4), ("sluice",))
EVERYONE = ["sluice", "vllm", "openvino", "transformers", "llama.cpp"]


def test_peers_take_turns_in_every_round() -> None:
    order = [(turn.round, turn.row.name, turn.peer) for turn in turns([SMALL, OTHER], 2)]
    one = [("bf16", "sluice"), ("bf16", "vllm"), ("int8", "sluice")]
    assert order == [(number, *rest) for number in (1, 2) for rest in one]


def test_failed_peer_does_not_end_the_rest_and_is_not_tried_again() -> None:
    tried: list[tuple[str, str, int]] = []
    seen: list[Run] = []

    def measure(row: Row, peer: str, number: int) -> Mapping[str, float]:
        tried.append((row.name, peer, number))
        if (row.name, peer) == ("bf16", "sluice"):
            raise RunFailedError("no figures")
        return {"out_tokens_per_s": 1.0}

    runs = run_rounds(list(turns([SMALL, OTHER], 2)), measure, seen.append)
    assert runs == seen
    assert [run.error for run in runs if run.peer == "sluice" and run.row == "bf16"] == [
        "no figures"
    ]
    assert tried.count(("bf16", "vllm", 1)) == tried.count(("bf16", "vllm", 2)) == 1
    assert ("int8", "sluice", 2) in tried
    assert ("bf16", "sluice", 2) not in tried


def test_interrupt_keeps_what_was_measured() -> None:
    def measure(row: Row, peer: str, number: int) -> Mapping[str, float]:
        if peer == "vllm":
            raise KeyboardInterrupt
        return {"out_tokens_per_s": 1.0}

    runs = run_rounds(list(turns([SMALL, OTHER], 2)), measure, lambda run: None)
    assert [(run.peer, run.error) for run in runs] == [("sluice", "")]


def test_estimate_follows_what_was_measured() -> None:
    due, estimate = list(turns([SMALL], 2)), Estimate()
    guessed_s = estimate.remaining_s(due)
    assert guessed_s > 0
    estimate.record("bf16", "sluice", 7.0)
    assert estimate.remaining_s(due) == pytest.approx(guessed_s / 2 + 14.0)
    estimate.record("bf16", "vllm", 20.0)
    assert estimate.remaining_s(due[1:]) == 47.0
    assert estimate.remaining_s([]) == 0


def test_rows_are_those_of_the_comparison() -> None:
    rows = chosen_rows(["bf16", "int8", "int4", "long"], EVERYONE, 0, 0, 0)
    assert rows == list(ROWS)
    assert rows[0].title == "bf16 16 x (256 in, 64 out)"
    assert rows[-1].title == "bf16 32 x (1,024 in, 128 out)"


def test_rows_can_be_fewer_and_smaller() -> None:
    rows = chosen_rows(["bf16", "int8"], ["sluice", "vllm"], 4, 0, 8)
    assert [(row.name, row.work, row.peers) for row in rows] == [
        ("bf16", Work(4, 256, 8), ("sluice", "vllm")),
        ("int8", Work(4, 256, 8), ("sluice",)),
    ]


@pytest.mark.parametrize(
    ("rows", "peers", "message"),
    [
        (["fp8"], ["sluice"], "fp8: unknown"),
        (["bf16"], ["sglang"], "sglang: unknown"),
        (["int8"], ["vllm"], "takes part"),
    ],
)
def test_unknown_rows_and_peers_are_refused(
    rows: list[str], peers: list[str], message: str
) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        chosen_rows(rows, peers, 0, 0, 0)
