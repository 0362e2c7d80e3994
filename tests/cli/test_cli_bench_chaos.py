"""`sluice bench chaos`, as its users call it; the run itself is in tests/bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench import chaos
from cluster.bench.chaos_load import Tally
from cluster.bench.chaos_plan import ChaosPlan
from cluster.bench.chaos_run import Listener
from tests.cli.cli_run import error_of, run

FIGURES: dict[str, Any] = {
    "plan": {"seed": 5},
    "begin_s": 1.0,
    "load_s": 60.0,
    "reference": {"num_unstable": 0},
    "streams": {
        "num_streams": 3,
        "num_tokens": 90,
        "num_resumptions": 1,
        "verdicts": {"exact": 3},
        "refusals": {},
        "failures": [],
    },
    "faults": {"each": [], "kinds": {}, "num_waited": 0, "num_never": 0, "not_done": []},
    "leaks": {"found": [], "memory": {}},
    "misses": [],
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ChaosPlan, Any]]:
    """Replace the run by one that takes no time; a seed of 13 finds something."""
    found: list[tuple[ChaosPlan, Any]] = []

    def run_chaos(plan: ChaosPlan, overrides: Any, listener: Listener) -> dict[str, Any]:
        found.append((plan, overrides))
        print("a process was killed")  # as Ray does
        listener.tell("starting [it]")
        listener.strike("1.0 s  kill-leader [r1]")
        listener.count(Tally(), 0.0)
        not_clean = ["no stream is exact"] if plan.seed == 13 else []
        return FIGURES | {"not_clean": not_clean, "is_clean": not not_clean}

    monkeypatch.setattr(chaos, "run_chaos", run_chaos)
    return found


def test_bench_chaos_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    assert "choose from kill-leader,stop-leader" in error_of("bench", "chaos", "--faults=fire")
    assert "never takes the last one" in error_of("bench", "chaos", "--replicas=1")
    assert "no room for a fault" in error_of("bench", "chaos", "--minutes=0.1")
    (tmp_path / "file").touch()
    assert "name a folder" in error_of("bench", "chaos", f"--out={tmp_path / 'file'}")


def test_bench_chaos_passes_on_what_it_is_told(runs: list[tuple[ChaosPlan, Any]]) -> None:
    arguments = ("--minutes=2", "--seed=3", "--interval=5", "--replicas=4", "--gateways=3")
    more = ("--streams=8", "--requests=9", "--faults=cut-network", "--set", "cache.block_size=8")
    assert run("bench", "chaos", *arguments, *more).exit_code == 0
    ((plan, overrides),) = runs
    assert (plan.minutes, plan.seed, plan.interval_s) == (2.0, 3, 5.0)
    assert (plan.num_replicas, plan.num_gateways) == (4, 3)
    assert (plan.num_streams, plan.num_asks) == (8, 9)
    assert [kind.name for kind in plan.kinds] == ["cut-network"]
    assert overrides == ["cache.block_size=8"]


def test_bench_chaos_prints_one_object_and_writes_its_report(
    runs: list[tuple[ChaosPlan, Any]], tmp_path: Path
) -> None:
    result = run("bench", "chaos", "--json", f"--out={tmp_path / 'new' / 'out'}")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["benchmark"] == "chaos" and printed["provenance"]["commit"]
    written = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    assert written == printed
    assert (tmp_path / "new" / "out" / "gaps.png").read_bytes().startswith(b"\x89PNG")


def test_bench_chaos_fails_where_a_run_is_not_clean(runs: list[tuple[ChaosPlan, Any]]) -> None:
    assert run("bench", "chaos").exit_code == 0
    result = run("bench", "chaos", "--seed=13")
    assert result.exit_code == 1 and "not clean: no stream is exact" in result.stdout
    assert "a process was killed" not in result.stdout
