"""`sluice bench router` runs whole on a small cluster, and its figures hang together."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.bench.router import RouterBench, run_router_bench
from cluster.bench.router_content import make_content, make_load
from cluster.bench.router_gateway import BenchGateway
from cluster.bench.router_report import router_report
from cluster.cli.app import app
from cluster.router.plausible import check_load


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_router_bench(RouterBench((4, 20), 4000, 10, 60, seed=3))


def test_router_bench_decides_among_each_number_of_replicas(figures: dict[str, Any]) -> None:
    assert [part["num_replicas"] for part in figures["decisions"]] == [4, 20]
    for part in figures["decisions"]:
        assert part["num_dispatched"] == 60
        assert part["num_blocks"] == 4000
        assert 2000 < part["num_keys"] < 4000, "documents are shared"
        for name in ("decide_s", "match_s", "report_s"):
            assert 0 < part[name]["p50"] <= part[name]["p99"] <= part[name]["max"]
        assert part["match_s"]["p50"] < part["decide_s"]["p50"]


def test_router_bench_measures_the_index(figures: dict[str, Any]) -> None:
    memory, sync = figures["memory"], figures["sync"]
    assert (memory["num_blocks"], memory["num_dropped"]) == (4000, 0)
    # A key, and its place in a table that is between a third and two thirds full.
    assert 4000 * (48 + 27) < memory["num_bytes"] < 4000 * (48 + 108) + 20_000
    assert sync["num_blocks"] == 4000
    assert 0 < sync["index_s"] < sync["total_s"]
    assert sync["index_blocks_per_s"] == pytest.approx(4000 / sync["index_s"])
    assert sync["sweep_s"]["max"] > 0
    assert figures["keys_s"]["p50"] > 0


def test_router_bench_report_has_every_round(figures: dict[str, Any]) -> None:
    screen = io.StringIO()
    Console(file=screen, width=120).print(router_report(figures))
    for words in ("decision among 4 replicas", "decision among 20 replicas", "4 snapshots"):
        assert words in screen.getvalue()


def test_bench_router_command_prints_json() -> None:
    arguments = "bench router --replicas 3 --blocks 90 --prompt-blocks 5 --requests 8 --json"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["benchmark"] == "router"
    assert figures["load"] == {
        "num_replicas": [3],
        "num_blocks": 90,
        "num_prompt_blocks": 5,
        "num_requests": 8,
        "seed": 0,
    }
    assert len(figures["decisions"]) == 1
    assert figures["provenance"]["commit"]


def test_router_bench_of_the_smallest_cluster_runs() -> None:
    figures = run_router_bench(RouterBench((1,), 1, 1, 1))
    assert figures["decisions"][0]["num_dispatched"] == 1


def test_content_is_chains_that_share_documents() -> None:
    content = make_content(5, 1000, 10, random.Random(1))
    assert [len(cache) for cache in content.caches] == [200] * 5
    heads = [cache[at] for cache in content.caches for at in range(0, 200, 10)]
    tails = [cache[at + 9] for cache in content.caches for at in range(0, 200, 10)]
    assert len(set(heads)) < len(heads)
    assert len(set(tails)) == len(tails)


def test_prompt_follows_a_chain_and_is_new_then() -> None:
    rng = random.Random(2)
    content = make_content(2, 400, 10, rng)
    held = {key: place for cache in content.caches for place, key in enumerate(cache)}
    known_lengths = set()
    for _ in range(200):
        prompt = content.prompt(rng)
        assert len(prompt) == 10
        known = [key in held for key in prompt]
        assert known == sorted(known, reverse=True), "nothing is known again after a new block"
        known_lengths.add(sum(known))
    assert known_lengths == set(range(11))


def test_bench_gateway_lets_requests_begin_and_end() -> None:
    rng = random.Random(3)
    content = make_content(2, 400, 10, rng)
    gateway = BenchGateway(content, rng)
    for number in range(40):  # ten seconds
        assert gateway.decide(f"request-{number}", content.prompt(rng)) > 0
        assert all(elapsed_s > 0 for elapsed_s in gateway.go_on())
    dispatcher = gateway.dispatcher
    assert gateway.num_dispatched == 40
    assert dispatcher.table.column("num_open").sum() == 15, "those of the last four seconds"
    assert len([*dispatcher.take_prediction_errors()]) == 39
    dispatcher.index.check_invariants()
    dispatcher.table.check_invariants()


def test_bench_load_is_plausible() -> None:
    rng = random.Random(4)
    assert all(check_load(make_load(100, rng)) is None for _ in range(50))
