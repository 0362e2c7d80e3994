"""`sluice bench chaos` against a real cluster: a replica is killed, a gateway is stopped."""

from __future__ import annotations

import pytest

from cluster.bench.chaos import run_chaos
from cluster.bench.chaos_plan import ChaosPlan
from cluster.bench.chaos_schedule import fault_kinds

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]


def test_chaos_finds_every_stream_exact_though_a_leader_is_killed_and_a_gateway_stopped() -> None:
    plan = ChaosPlan(
        minutes=0.25,
        seed=2,
        interval_s=5.0,
        num_replicas=2,
        num_streams=4,
        num_asks=7,
        kinds=fault_kinds("kill-leader,stop-gateway"),
    )
    figures = run_chaos(plan)
    faults, streams = figures["faults"], figures["streams"]
    assert {fault["kind"] for fault in faults["each"]} == {"kill-leader", "stop-gateway"}
    assert not any(fault["error"] for fault in faults["each"]) and not faults["num_never"]
    assert all(fault["victim"] and fault["whole_after_s"] for fault in faults["each"])
    assert streams["num_streams"] > 10 and streams["num_tokens"] > 300
    assert streams["verdicts"]["exact"] == streams["num_streams"], streams["failures"]
    assert figures["leaks"]["found"] == [] and figures["is_clean"], figures["not_clean"]
    assert figures["faults"]["num_planned"] == 2 and figures["faults"]["not_done"] == []
    assert figures["leaks"]["memory"]["leader"]["num_lives"] > 2
    before, after = figures["leaks"]["before"], figures["leaks"]["after"]
    for kind, num in (("leader", 2), ("gateway", 2), ("redis", 1)):
        assert before["num_processes"][kind] == after["num_processes"][kind] == num
