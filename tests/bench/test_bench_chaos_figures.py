"""Gaps, leaks and figures of `sluice bench chaos`, from records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.bench.chaos_checker import Finding, Verdict
from cluster.bench.chaos_clean import why_not_clean
from cluster.bench.chaos_figures import fault_figures, misses, not_done, stream_figures
from cluster.bench.chaos_gaps import FaultRecord, Trace, victim_gaps_s
from cluster.bench.chaos_leaks import Inventory, inventory_leaks
from cluster.bench.chaos_load import Outcome
from cluster.bench.chaos_memory import MIB
from cluster.bench.chaos_report import chaos_report, plot_chaos
from cluster.bench.chaos_requests import Manner
from cluster.bench.chaos_schedule import PlannedFault, fault_kinds


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


def test_stream_whose_last_arrival_was_on_its_way_is_no_victim() -> None:
    killed = fault("kill-leader", "r0", 10.05)
    assert victim_gaps_s(killed, [trace([8.0, 9.9, 10.06, 10.09])]) == []
    for end_s, gap_s in ((10.12, 0.22), (13.0, 3.1)):
        only_its_end_is_left = trace([8.0, 9.9, end_s])
        assert victim_gaps_s(killed, [only_its_end_is_left]) == pytest.approx([gap_s])


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
        *(fault("cut-network") for _ in range(8)),
    ]
    each, kinds = fault_figures(faults, outcomes)
    figures = {
        "plan": {"seed": 7},
        "begin_s": 2.0,
        "load_s": 60.0,
        "reference": {"num_asks": 9, "num_unstable": 1},
        "streams": stream_figures(outcomes, 60.0),
        "faults": {
            "each": each,
            "kinds": kinds,
            "num_planned": 10,
            "num_waited": 1,
            "num_never": 0,
            "not_done": not_done(faults, [], 2.0),
        },
        "leaks": {"found": leaks, "memory": {}},
        "misses": misses(kinds),
    }
    return figures | {"not_clean": why_not_clean(figures)}


def test_figures_count_verdicts_and_tell_of_each_kind_of_fault() -> None:
    refused = Finding(Verdict.REFUSED, "RESOURCE_EXHAUSTED: the queue is full")
    outcomes = [outcome(Finding(Verdict.EXACT), 0.4), outcome(refused, 0.8)]
    outcomes += [outcome(Finding(Verdict.EXACT), 0.6) for _ in range(8)]
    figures = figures_of(outcomes, [])
    streams, kinds = figures["streams"], figures["faults"]["kinds"]
    assert (streams["verdicts"]["exact"], streams["verdicts"]["refused"]) == (9, 1)
    assert streams["refusals"] == {"RESOURCE_EXHAUSTED": 1} and streams["failures"] == []
    assert list(kinds) == ["cut-network", "kill-leader"]
    killed = kinds["kill-leader"]
    assert (killed["num_faults"], killed["num_not_done"], killed["num_victims"]) == (2, 1, 10)
    assert killed["gap_s"]["p50"] == pytest.approx(0.6)
    assert killed["whole_after_p50_s"] == pytest.approx(10.0)
    assert (killed["aim_p50_s"], killed["aim_p99_s"]) == (0.3, 1.5)
    assert kinds["cut-network"]["whole_after_p50_s"] is None
    assert why_not_clean(figures) == []


def test_faults_that_were_not_brought_about_are_listed_with_the_reason() -> None:
    (kind,) = fault_kinds("kill-gateway")
    faults = [fault("cut-network"), fault("flush-redis", begin_s=12.0, error="OSError: full")]
    faults[1].number = 3
    assert not_done(faults, [PlannedFault(1, kind, 30.0, 0.5)], 2.0) == [
        {"number": 1, "kind": "kill-gateway", "planned_s": 32.0, "why": "it never was its turn"},
        {"number": 3, "kind": "flush-redis", "planned_s": 12.0, "why": "OSError: full"},
    ]


def test_gaps_that_are_longer_than_aimed_at_are_named() -> None:
    def kinds_of(pause_s: float) -> dict[str, dict[str, Any]]:
        faults = [fault("kill-leader", "r0", 10.05), fault("kill-gateway", "g0", 10.05)]
        resumptions = [(10.0, 10.0 + pause_s)]
        streams = [trace(steady(pause_s), resumptions=resumptions)]
        finding = Finding(Verdict.EXACT)
        outcomes = [Outcome("id", "greedy", Manner.STAYS, 41, finding, one) for one in streams]
        return fault_figures(faults, outcomes)[1]

    assert misses(kinds_of(0.25)) == []
    assert misses(kinds_of(0.5)) == ["kill-leader: p50 of the gaps is 0.50 s, aim 0.3 s"]
    assert misses(kinds_of(1.6)) == [
        "kill-gateway: p50 of the gaps is 1.60 s, aim 1 s",
        "kill-leader: p50 of the gaps is 1.60 s, aim 0.3 s",
        "kill-leader: p99 of the gaps is 1.60 s, aim 1.5 s",
    ]
    nobody = fault_figures([fault("kill-gateway", "g0", 10.05)], [])[1]
    assert misses(nobody) == ["kill-gateway: p50 of the gaps is unknown, nobody was hit"]


def test_report_shows_what_went_wrong() -> None:
    wrong = outcome(Finding(Verdict.WRONG, "token 3 is 5, not [6]"))
    figures = figures_of([wrong], ["4 leader processes, 3 before"])
    console = Console(width=160, record=True)
    console.print(chaos_report(figures))
    text = console.export_text()
    assert "wrong: greedy, stays, from 6.0 s on: token 3 is 5, not [6]" in text
    assert "leak: 4 leader processes, 3 before" in text and "p50 0.3, p99 1.5" in text
    assert "2 (1 failed)" in text
    assert "not brought about: kill-leader of 10.0 s: NOT_FOUND: gone" in text
    assert "aim missed: kill-leader: p50 of the gaps is 0.40 s, aim 0.3 s" in text
    assert "not clean: 1 streams are wrong" in text and "not clean: 1 leaks" in text
    assert "memory of leaders" not in text


def test_report_says_what_was_measured_of_memory() -> None:
    figures = figures_of([outcome(Finding(Verdict.EXACT))], [])
    row = {"num_lives": 9, "num_measured": 0, "growth_max_bytes_per_min": None}
    none = row | {"allowed_min_bytes_per_min": None, "equal_age_s": 60.0, "difference_bytes": None}
    some = none | {
        "num_measured": 2,
        "growth_max_bytes_per_min": 1.5 * MIB,
        "allowed_min_bytes_per_min": 5.0 * MIB,
        "difference_bytes": -3.0 * MIB,
    }
    figures["leaks"]["memory"] = {"gateway": some, "leader": none}
    console = Console(width=160, record=True)
    console.print(chaos_report(figures))
    text = console.export_text()
    assert "2 of 9 lives long enough, at most +1.5 MiB a minute, limit 5.0" in text
    assert "gateways 60 s old, last third of the run" in text
    assert "-3.0 MiB against the first" in text
    assert "0 of 9 lives long enough " in text


def test_picture_is_drawn_with_and_without_gaps(tmp_path: Path) -> None:
    figures = figures_of([outcome(Finding(Verdict.EXACT))], [])
    plot_chaos(figures, tmp_path / "gaps.png")
    plot_chaos(figures_of([], []), tmp_path / "none.png")
    for name in ("gaps.png", "none.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
