"""`sluice bench gateway` runs whole, and its figures hang together."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest

from cluster.bench.gateway import GatewayBench, run_gateway_bench

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    figures = asyncio.run(run_gateway_bench(GatewayBench(4, 0.5, 100.0)))
    assert not psutil.Process().children(), "the benchmark's processes have ended"
    return figures


@pytest.mark.parametrize("phase", ["unthrottled", "paced"])
def test_gateway_bench_counts_are_consistent(figures: dict[str, Any], phase: str) -> None:
    window = figures[phase]
    assert window["num_tokens"] >= window["num_messages"] > 0
    assert window["messages_per_s"] == pytest.approx(window["num_messages"] / window["window_s"])
    spent_ms = sum(window["cpu_s"].values()) * 1e3
    assert window["cpu_ms_per_message"] == pytest.approx(spent_ms / window["num_messages"])
    assert set(window["cpu_s"]) == {"client", "gateway", "leader"}


def test_gateway_bench_paces_the_leader(figures: dict[str, Any]) -> None:
    # One message per stream and step; the pace is an upper bound on any machine.
    assert figures["paced"]["messages_per_s"] <= 100.0 * 1.2
    assert figures["unthrottled"]["messages_per_s"] > figures["paced"]["messages_per_s"]


def test_gateway_bench_measures_delivery_and_first_tokens(figures: dict[str, Any]) -> None:
    paced = figures["paced"]
    assert 0 < paced["delivery_s"]["p50"] <= paced["delivery_s"]["p99"]
    assert paced["num_probe_prompt_tokens"] > 100
    assert paced["ttft_gateway_s"]["p50"] > paced["ttft_direct_s"]["p50"] > 0
    assert paced["ttft_added_p50_s"] > 0
