"""Gaps, leaks and figures of `sluice bench chaos`, from records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.bench.chaos_checker import Finding, Verdict
from cluster.bench.chaos_figures import fault_figures, is_clean, stream_figures
from cluster.bench.chaos_gaps import FaultRecord, Trace, victim_gaps_s
from cluster.bench.chaos_leaks import MIB, Inventory, Life, inventory_leaks, memory_leaks
from cluster.bench.chaos_load import Outcome
from cluster.bench.chaos_report import chaos_report, plot_chaos
from cluster.bench.chaos_requests import Manner
from cluster.bench.chaos_schedule import fault_kinds


def fault(name: str, victim: str = "", begin_s: float = 10.0, **fields: Any) -> FaultRecord:
    (kind,) = fault_kinds(name)
    return FaultRecord(0, kind, victim, begin_s, begin_s, begin_s + kind.lasts_s, **fields)


def trace(times_s: list[float], replica: str = "r0", **fields: Any) -> Trace:
    return Trace(times_s[0], times_s[-1], [times_s], [(times_s[0], replica)], **fields)


def steady(pause_s: float) -> list[float]:
    """Tokens from 8 s on, ten a second, with one pause from 10 s on."""
    before = [8.0 + n / 10 for n in range(21)]
    return before + [10.0 + pause_s + n / 10 for n in range(20)]


def test_gap_of_a_killed_leader_is_that_of_the_streams_on_it() -> None:
    traces = [trace(steady(0.4)), trace(steady(0.9)), trace(steady(3.0), replica="r1")]
    gaps = victim_gaps_s(fault("kill-leader", "r0", 10.05), traces)
    assert gaps == pytest.approx([0.4, 0.9])
    assert victim_gaps_s(fault("kill-leader", "r2", 10.05), traces) == []
    failed = fault("kill-leader", "r0", 10.05, error="ProcessLookupError")
    assert victim_gaps_s(failed, traces) == []


def test_victim_is_on_the_replica_that_had_it_when_the_fault_came() -> None:
    moved = trace(steady(0.4))
    moved.replicas.append((10.3, "r1"))
    assert victim_gaps_s(fault("kill-leader", "r0", 10.05), [moved]) == pytest.approx([0.4])
    assert victim_gaps_s(fault("kill-leader", "r1", 10.05), [moved]) == []
    assert victim_gaps_s(fault("kill-leader", "r1", 11.0), [moved]) == pytest.approx([0.1])


def test_stream_that_had_all_but_its_end_is_no_victim() -> None:
    ending, going = trace([8.0, 9.9, 10.06]), trace([8.0, 9.9, 10.06, 10.08])
    assert victim_gaps_s(fault("kill-leader", "r0", 10.05), [ending]) == []
    assert victim_gaps_s(fault("kill-leader", "r0", 10.05), [going]) == pytest.approx([0.16])


def test_gap_of_a_killed_gateway_is_that_of_the_clients_that_went_on_elsewhere() -> None:
    hit = trace(steady(0.8), resumptions=[(10.0, 10.8)])
    late = trace(steady(0.8), resumptions=[(16.0, 16.5)])
    beside = trace(steady(0.8))
    gaps = victim_gaps_s(fault("kill-gateway", "g0", 10.05), [hit, late, beside])
    assert gaps == pytest.approx([0.8])


def test_gap_of_the_store_is_that_of_everybody_who_was_there() -> None:
    over, later = trace([1.0, 9.0]), trace([11.0, 12.0])
    gaps = victim_gaps_s(fault("stop-redis"), [over, later, trace(steady(0.2))])
    assert gaps == pytest.approx([0.2])


def test_a_gap_that_a_client_wished_for_is_none() -> None:
    away = Trace(8.0, 14.0, [[8.0, 9.9], [12.0, 12.1]], [(8.0, "r0")])
    assert victim_gaps_s(fault("kill-leader", "r0", 9.0), [away]) == pytest.approx([1.9])
    assert victim_gaps_s(fault("kill-leader", "r0", 10.5), [away]) == pytest.approx([0.1])


def test_fault_covers_streams_that_lived_until_it_was_made_good() -> None:
    going = FaultRecord(0, fault_kinds("restart-redis")[0], "", 10.0, 10.0)
    assert going.covers(Trace(5.0, 10.0)) and not going.covers(Trace(5.0, 9.9))
    assert going.covers(Trace(10.9, 20.0)) and not going.covers(Trace(11.1, 20.0))


def life(kind: str, seconds: float, growth_mib_per_min: float) -> Life:
    found = Life(kind, 1)
    for step in range(int(seconds / 2) + 1):
        warm_up_bytes = min(step * 2.0, 60.0) * 5 * MIB
        grown_bytes = growth_mib_per_min * MIB * step * 2.0 / 60
        found.add(step * 2.0, int(warm_up_bytes + grown_bytes))
    return found


def test_memory_leaks_where_a_process_grows_behind_its_warm_up() -> None:
    assert memory_leaks([life("leader", 300, 3.0), life("gateway", 300, 0.0)]) == []
    assert memory_leaks([life("gateway", 300, 5.0)]) == ["gateway 1 grows by 5.0 MiB a minute"]
    assert life("gateway", 300, 5.0).growth_bytes_per_min() == pytest.approx(5 * MIB, rel=0.01)
    assert life("leader", 140, 50.0).growth_bytes_per_min() is None, "too short a life"


def inventory(**changes: Any) -> Inventory:
    fields: dict[str, Any] = {
        "num_processes": {"leader": 3, "gateway": 2, "ray": 9},
        "num_ports": 30,
        "shared_names": ("/dev/shm/a",),
        "redis_bytes": 10 * MIB,
    }
    return Inventory(**(fields | changes))


def test_leaks_are_what_there_is_more_of_than_before() -> None:
    before = inventory()
    same = inventory(num_processes={"leader": 3, "gateway": 2, "ray": 12}, num_ports=29)
    assert inventory_leaks(before, same, 5 * MIB) == []
    after = inventory(
        num_processes={"leader": 4, "gateway": 2},
        num_ports=31,
        shared_names=("/dev/shm/a", "/dev/shm/b"),
        redis_bytes=16 * MIB,
    )
    assert inventory_leaks(before, after, 5 * MIB) == [
        "4 leader processes, 3 before",
        "31 ports are listened on, 30 before",
        "in shared memory: /dev/shm/b",
        f"Redis has {16 * MIB} bytes, its budgets are {5 * MIB}",
    ]


def outcome(finding: Finding, pause_s: float = 0.4) -> Outcome:
    return Outcome("id", "greedy", Manner.STAYS, 41, finding, trace(steady(pause_s)))


def figures_of(outcomes: list[Outcome], leaks: list[str]) -> dict[str, Any]:
    faults = [
        fault("kill-leader", "r0", 10.05, whole_s=20.05),
        fault("kill-leader", "r1", 12.0, error="NOT_FOUND: gone"),
        fault("cut-network"),
    ]
    each, kinds = fault_figures(faults, outcomes)
    return {
        "plan": {"seed": 7},
        "begin_s": 2.0,
        "load_s": 60.0,
        "reference": {"num_unstable": 0},
        "streams": stream_figures(outcomes, 60.0),
        "faults": {"each": each, "kinds": kinds, "num_waited": 1, "num_never": 0},
        "leaks": {"found": leaks},
    }


def test_figures_count_verdicts_and_tell_of_each_kind_of_fault() -> None:
    refused = Finding(Verdict.REFUSED, "RESOURCE_EXHAUSTED: the queue is full")
    outcomes = [outcome(Finding(Verdict.EXACT), 0.4), outcome(refused, 0.8)]
    figures = figures_of(outcomes, [])
    streams, kinds = figures["streams"], figures["faults"]["kinds"]
    assert streams["verdicts"]["exact"] == streams["verdicts"]["refused"] == 1
    assert streams["refusals"] == {"RESOURCE_EXHAUSTED": 1} and streams["failures"] == []
    assert list(kinds) == ["cut-network", "kill-leader"]
    killed = kinds["kill-leader"]
    assert (killed["num_faults"], killed["num_not_done"], killed["num_victims"]) == (2, 1, 2)
    assert killed["gap_s"]["p50"] == pytest.approx(0.6)
    assert killed["whole_after_p50_s"] == pytest.approx(10.0)
    assert (killed["aim_p50_s"], killed["aim_p99_s"]) == (0.3, 1.5)
    assert kinds["cut-network"]["whole_after_p50_s"] is None
    assert is_clean(figures)


@pytest.mark.parametrize("verdict", [v for v in Verdict if v not in ("exact", "refused")])
def test_a_run_is_not_clean_with_a_stream_that_failed(verdict: Verdict) -> None:
    figures = figures_of([outcome(Finding(verdict, "why"))], [])
    assert not is_clean(figures)
    (failure,) = figures["streams"]["failures"]
    assert (failure["verdict"], failure["detail"]) == (verdict, "why")


def test_a_run_is_not_clean_with_a_leak() -> None:
    assert is_clean(figures_of([], [])) and not is_clean(figures_of([], ["4 leader processes"]))


def test_report_and_picture_show_what_went_wrong(tmp_path: Path) -> None:
    wrong = outcome(Finding(Verdict.WRONG, "token 3 is 5, not [6]"))
    figures = figures_of([wrong], ["4 leader processes, 3 before"])
    console = Console(width=160, record=True)
    console.print(chaos_report(figures))
    text = console.export_text()
    assert "wrong: greedy, stays, from 6.0 s on: token 3 is 5, not [6]" in text
    assert "leak: 4 leader processes, 3 before" in text and "p50 0.3, p99 1.5" in text
    assert "2 (1 failed)" in text
    plot_chaos(figures, tmp_path / "gaps.png")
    plot_chaos(figures_of([], []), tmp_path / "none.png")
    for name in ("gaps.png", "none.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
