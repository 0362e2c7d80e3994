"""`sluice simulate`, as its users call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.simulator import scenario
from cluster.simulator.record import SimulationResult
from cluster.simulator.settings import Fault, SimulationSettings
from cluster.simulator.workload import Workload
from tests.cli.cli_run import error_of, run
from tests.simulator.simulation_results import refused, request, result

SPEC = "--workload=poisson:rate=10,duration=5,input=100,output=20"


class FakeSimulator:
    """Remembers what it was given; goodput falls with the rate, faster where there is no slo."""

    def __init__(self) -> None:
        self.runs: list[tuple[Workload, SimulationSettings]] = []

    def __call__(
        self,
        workload: Workload,
        settings: SimulationSettings,
        on_progress: Callable[[float], None] | None = None,
    ) -> SimulationResult:
        self.runs.append((workload, settings))
        policy = settings.config.router.policy
        if on_progress is not None:
            on_progress(2.5)
        num_good = 19 if policy == "slo" or len(self.runs) % 2 else 10
        requests = [request(i) for i in range(num_good)]
        requests += [refused(i) for i in range(num_good, 20)]
        return result(requests, policy=policy, settings=dict(settings.extra))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSimulator:
    simulator = FakeSimulator()
    monkeypatch.setattr(scenario, "simulate", simulator)
    return simulator


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "three.csv"
    rows = [f"2024-05-10 00:00:{i:02d}.0,{100 + i},5\n" for i in range(3)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    return str(path)


def json_of(*arguments: str) -> dict[str, Any]:
    done = run("simulate", *arguments, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    figures: dict[str, Any] = json.loads(line)
    return figures


def test_simulate_runs_a_trace_under_a_policy_at_a_rate(fake: FakeSimulator, trace: str) -> None:
    asked = ("--trace", trace, "--replicas", "16", "--policy", "least_tokens", "--rate-scale", "2")
    figures = json_of(*asked)
    ((workload, settings),) = fake.runs
    assert [arrival.arrived_s for arrival in workload.arrivals] == [0.0, 0.5, 1.0]
    assert settings.num_replicas == 16
    assert settings.config.router.policy == figures["policy"] == "least_tokens"
    assert settings.config.router.admission == "off"
    assert figures["rate_scale"] == 2.0
    assert figures["goodput"] == 19 / 20 and figures["num_refused"] == 1
    assert figures["ttft_s"]["p90"] == 1.0
    assert figures["settings"]["num_replicas"] == 16
    assert figures["provenance"]["commit"]


def test_simulate_hands_every_option_on(fake: FakeSimulator, tmp_path: Path) -> None:
    json_of(
        *(SPEC, "--num-requests=7", "--seed=3", "--policy=slo", "--admission=off"),
        *("--engine-order=fcfs", "--replicas=3", "--gateways=2", "--event-delay-ms=20"),
        *("--prefill-tokens-per-s=5000", "--decode-step-ms=40", "--num-blocks=99"),
        *("--block-size=64", "--max-num-batched-tokens=1024", "--set=engine.max_num_seqs=8"),
        *("--fail=1@10:5", "--fail=2@11", "--slow=0@1:2", "--autoscale=2:4"),
        *("--slo-ttft-s=1", "--slo-ttft-ms-per-token=1", "--slo-tpot-ms=20", "--usd-per-hour=9"),
    )
    ((workload, settings),) = fake.runs
    config = settings.config
    assert len(workload.arrivals) == 7
    arrival = workload.arrivals[0]
    assert arrival.slo.ttft_s == pytest.approx(1 + 0.001 * arrival.num_prompt_tokens)
    assert arrival.slo.tpot_s == pytest.approx(0.02)
    assert (settings.seed, settings.num_replicas, settings.num_gateways) == (3, 3, 2)
    assert settings.event_delay_s == pytest.approx(0.02)
    assert settings.cost.step.floor_s == pytest.approx(0.04)
    assert settings.cost.step.hinges == ((200, 1 / 5000),)
    assert (config.router.admission, config.engine.order) == ("off", "fcfs")
    assert (config.cache.num_blocks, config.cache.block_size) == (99, 64)
    assert (config.engine.max_num_batched_tokens, config.engine.max_num_seqs) == (1024, 8)
    assert settings.faults == (Fault(1, 10.0, 5.0), Fault(2, 11.0), Fault(0, 1.0, None, 2.0))
    assert settings.autoscaling is not None and settings.autoscaling.max_replicas == 4


def test_simulate_prints_tables(fake: FakeSimulator) -> None:
    done = run("simulate", SPEC, "--usd-per-hour=2")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""  # no bar where there is no terminal
    for text in ("95.0% of all requests", "TTFT", "Replicas", "USD per million tokens"):
        assert text in done.stdout


def test_simulate_writes_a_page(fake: FakeSimulator, tmp_path: Path) -> None:
    html = tmp_path / "run.html"
    json_of(SPEC, f"--html={html}")
    assert "95.0% of all requests" in html.read_text()


def test_simulate_sweep_finds_the_rates_that_hold(fake: FakeSimulator, tmp_path: Path) -> None:
    html = tmp_path / "sweep.html"
    figures = json_of(
        *(SPEC, "--sweep", "--serial", "--policy=slo,random", "--rate-scale=1:2:1"),
        f"--html={html}",
    )
    # Its third run is random at 1, good; its fourth random at 2, of which half is.
    assert figures["knees"]["slo"]["is_beyond_grid"]
    assert figures["knees"]["random"]["grid_rate_scale"] == 1.0
    assert figures["knees"]["random"]["rate_scale"] == pytest.approx(1 + 0.05 / 0.45)
    assert [(p["policy"], p["rate_scale"]) for p in figures["points"]] == [
        ("slo", 1.0),
        ("slo", 2.0),
        ("random", 1.0),
        ("random", 2.0),
    ]
    orders = [settings.config.engine.order for _, settings in fake.runs]
    assert orders == ["slack", "slack", "fcfs", "fcfs"]
    assert "policy" not in figures["settings"]
    assert "above 2.00 x" in html.read_text()


def test_simulate_sweep_prints_tables(fake: FakeSimulator) -> None:
    done = run("simulate", SPEC, "--sweep", "--serial", "--rate-scale=1,2", "--target=0.95")
    assert done.exit_code == 0, done.output
    for text in ("at least 95%", "above 2.00 x", "Prefix hit rate, by rate"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--trace= --workload="),
        (("--trace=/nowhere.jsonl",), "/nowhere.jsonl"),
        (("--workload=nonsense",), "nonsense"),
        ((SPEC, "--policy=fastest"), "'fastest'"),
        ((SPEC, "--policy=slo,random"), "add --sweep"),
        ((SPEC, "--rate-scale=1:4:1"), "add --sweep"),
        ((SPEC, "--rate-scale=fast"), "--rate-scale=fast"),
        ((SPEC, "--rate-scale=-1"), "--rate-scale=-1"),
        ((SPEC, "--sweep", "--policy=slo,fastest"), "'fastest'"),
        ((SPEC, "--sweep", "--policy=slo,slo"), "--policy=slo,slo"),
        ((SPEC, "--seed=x"), "--seed=x"),
        ((SPEC, "--admission=maybe"), "maybe"),
        ((SPEC, "--engine-order=lifo"), "lifo"),
        ((SPEC, "--replicas=0"), "--replicas"),
        ((SPEC, "--fail=1"), "--fail=1"),
        ((SPEC, "--slow=1@2"), "--slow=1@2"),
        ((SPEC, "--autoscale=x"), "--autoscale=x"),
        ((SPEC, "--hardware=tpu"), "tpu"),
        ((SPEC, "--slo-ttft-s=inf"), "slo_ttft_s=inf"),
        ((SPEC, "--cost-model=/nowhere.json"), "/nowhere.json"),
        ((SPEC, "--set=router.x=1"), "router.x"),
        ((SPEC, "--html=/nowhere/page.html"), "/nowhere"),
    ],
)
def test_simulate_refuses_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in error_of("simulate", *arguments)


def test_simulate_real_run_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    html = tmp_path / "run.html"
    asked = (SPEC, "--replicas=2", "--policy=slo", "--usd-per-hour=2.5", f"--html={html}")
    first, second = json_of(*asked), json_of(*asked)
    for figures in (first, second):
        for changing in ("wall_s", "virtual_s_per_wall_s", "provenance"):
            del figures[changing]
    assert first == second
    ends = ("num_finished", "num_refused", "num_expired", "num_failed", "num_cut")
    assert sum(first[end] for end in ends) == first["num_requests"] > 20
    assert 0 < first["goodput"] <= 1
    assert first["output_tokens_per_s"] > 0
    assert first["replica_hours"] == pytest.approx(2 * first["duration_s"] / 3600)
    assert html.read_text().count("data:image/svg+xml") >= 6
