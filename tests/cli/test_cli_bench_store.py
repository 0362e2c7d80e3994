"""`sluice bench store`, as its users call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench import store_fault_kinds, store_faults
from tests.cli.cli_run import error_of, run

SMALL = ("--rounds=1", "--prompt-len=128", "--streams=2", "--stream-len=64", "--requests=6")


def figures_of(*arguments: str) -> dict[str, Any]:
    result = run("bench", "store", *arguments, "--json")
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def test_bench_store_refuses_unknown_parts_and_redis_with_faults() -> None:
    assert "choose from raw,budget" in error_of("bench", "store", "--parts=speed")
    assert "leave --redis out" in error_of("bench", "store", "--faults", "--redis=redis://h:1")
    assert "hunter2" not in error_of("bench", "store", "--redis=redis://:hunter2@h:1")


def test_bench_store_refuses_a_prompt_beyond_the_context() -> None:
    line = error_of("bench", "store", "--parts=ttft", "--prompt-len=2047")
    assert "2049" in line and "2048" in line


@pytest.mark.integration
def test_bench_store_measures_the_parts_that_need_a_model(tmp_path: Path) -> None:
    picture = tmp_path / "store.png"
    figures = figures_of("--parts=ttft,decode,prefix", *SMALL, f"--plot={picture}")
    result = figures["result"]
    assert figures["benchmark"] == "store" and figures["provenance"]["commit"]
    assert result.keys() == {"ttft", "decode", "prefix"}
    kinds = result["ttft"]["kinds"]
    assert list(kinds) == ["cold", "local", "host", "store"]
    assert kinds["cold"]["cached_tokens"] == 0 and len(kinds["cold"]["rounds_ttft_s"]) == 2
    assert kinds["local"]["cached_tokens"] == kinds["host"]["cached_tokens"] == 112
    assert kinds["local"]["whole_hits"] == 1
    decode = result["decode"]
    assert decode["rounds"][0]["moved"]["stored_bytes"] > 0
    assert decode["rounds"][0]["moving"]["num_steps"] >= 5
    assert decode["p99_ratio_while_moving"] > 0
    ways = result["prefix"]["ways"]
    assert ways["without"]["times"] == 1.0 and ways["without"]["cached_token_share"] == 0
    assert ways["local"]["cached_token_share"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.integration
def test_bench_store_prints_tables() -> None:
    result = run("bench", "store", "--parts=ttft,decode,prefix", *SMALL)
    assert result.exit_code == 0, result.output
    for text in ("TTFT of 128 tokens", "Decode steps of 2 streams", "6 requests of 16 tokens"):
        assert text in result.stdout


@pytest.mark.integration
def test_bench_store_faults_reports_each_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store_faults, "MAX_RECOVERY_S", 1.0)
    picture = tmp_path / "faults.png"
    figures = figures_of(
        "--faults", "--phase-s=0.5", "--streams=2", "--requests=4", f"--plot={picture}"
    )
    names = [fault["name"] for fault in figures["result"]["faults"]]
    assert len(names) == len(set(names)) == 6
    assert f"answers after {store_fault_kinds.DELAY_S} s" in names
    assert figures["result"]["num_failed"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
