from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InvalidArgumentError
from cluster.simulator import scenario as scenario_module
from cluster.simulator.scenario import (
    Scenario,
    at_point,
    check_scenario,
    load_workload,
    make_settings,
    run_point,
)
from cluster.simulator.settings import Fault, SimulationSettings
from cluster.simulator.sweep import GridPoint
from cluster.simulator.workload import Workload
from cluster.types import NO_SLO, SLO, ServiceClass
from tests.simulator.simulation_results import request, result

POISSON = Scenario(workload="poisson:rate=10,duration=20,input=100")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "four.jsonl"
    rows = [
        {"timestamp": 2000 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, i + 1]}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("policy", "admission", "order"), [("slo", "on", "slack"), ("round_robin", "off", "fcfs")]
)
def test_scenario_runs_each_policy_as_its_system_would(
    policy: str, admission: str, order: str
) -> None:
    config = make_settings(replace(POISSON, policy=policy)).config
    assert config.router.policy == policy
    assert config.router.admission == admission
    assert config.engine.order == order


def test_scenario_says_otherwise_where_it_is_told() -> None:
    told = replace(
        POISSON, admission="off", engine_order="fcfs", overrides=("cache.block_size=64",)
    )
    settings = make_settings(told)
    assert settings.config.router.admission == "off"
    assert settings.config.engine.order == "fcfs"
    assert settings.config.cache.block_size == 64


def test_scenario_settings_are_those_of_the_figures_by_default() -> None:
    settings = make_settings(POISSON)
    assert settings.num_replicas == 16 and settings.num_gateways == 1
    assert settings.config.cache.num_blocks == 800 and settings.config.cache.block_size == 512
    assert settings.config.engine.max_num_batched_tokens == 2048
    assert settings.event_delay_s == 0.005
    assert settings.cost.step.floor_s == 0.03
    assert settings.extra["cost"] == settings.cost.source
    json.dumps(settings.extra, allow_nan=False)


def test_scenario_survives_json() -> None:
    full = replace(
        POISSON, fails=("1@2",), slows=("0@1:2",), overrides=("a.b=1",), usd_per_hour=2.0
    )
    assert Scenario.from_dict(json.loads(json.dumps(asdict(full)))) == full


def test_scenario_gives_requests_their_objective_by_length(trace: str) -> None:
    workload = load_workload(Scenario(trace=trace))
    assert workload.name == "four.jsonl"
    assert {arrival.slo for arrival in workload.arrivals} == {SLO(2 + 600e-4, 0.05)}
    # As a gateway takes requests with an objective of their own.
    assert {a.service_class for a in workload.arrivals} == {ServiceClass.INTERACTIVE}


def test_scenario_leaves_batch_work_without_objective() -> None:
    workload = load_workload(Scenario(workload="overload_classes:duration=10"))
    by_class = {a.service_class: a.slo for a in workload.arrivals}
    assert by_class[ServiceClass.BATCH] == NO_SLO
    assert by_class[ServiceClass.INTERACTIVE] != NO_SLO


def test_scenario_without_objectives_sets_none(trace: str) -> None:
    workload = load_workload(Scenario(trace=trace, slo_ttft_s=0, slo_tpot_s=0))
    assert {arrival.slo for arrival in workload.arrivals} == {NO_SLO}


def test_scenario_cuts_a_workload_before_it_scales_it(trace: str) -> None:
    short = Scenario(trace=trace, duration_s=4.1, rate_scale=2.0)
    assert [a.arrived_s for a in load_workload(short).arrivals] == [0.0, 1.0, 2.0]
    fewer = replace(short, num_requests=2, duration_s=None)
    assert [a.arrived_s for a in load_workload(fewer).arrivals] == [0.0, 1.0]


def test_scenario_injects_faults() -> None:
    faulty = replace(POISSON, fails=("3@600", "4@1.5:60"), slows=("0@10:2.5", "1@10:3:30"))
    assert make_settings(faulty).faults == (
        Fault(3, 600.0),
        Fault(4, 1.5, 60.0),
        Fault(0, 10.0, None, 2.5),
        Fault(1, 10.0, 30.0, 3.0),
    )


def test_scenario_autoscales_between_two_numbers() -> None:
    settings = make_settings(
        replace(POISSON, autoscale="2:8", overrides=("replica.autoscaling.target_load=3",))
    )
    assert settings.autoscaling is not None
    assert (settings.autoscaling.min_replicas, settings.autoscaling.max_replicas) == (2, 8)
    assert settings.autoscaling.target_load == 3
    assert settings.num_replicas == 2


def test_scenario_estimates_hardware_and_reads_fits(tmp_path: Path) -> None:
    estimate = make_settings(replace(POISSON, hardware="h100", num_devices=2)).cost
    assert estimate.source.startswith("estimate: 2 x H100")
    cost = asdict(make_settings(POISSON).cost.step)
    fit = tmp_path / "fit.json"
    fit.write_text(json.dumps({"cost": cost, "model": "demo"}))
    assert make_settings(replace(POISSON, cost_model=str(fit))).cost.source.startswith("measured")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trace": "x.jsonl"}, "exactly one"),
        ({"workload": ""}, "exactly one"),
        ({"workload": "nonsense"}, "nonsense"),
        ({"trace": "/nowhere/x.jsonl", "workload": ""}, "/nowhere/x.jsonl"),
        ({"policy": "fastest"}, "router.policy"),
        ({"hardware": "tpu"}, "tpu"),
        ({"cost_model": "/nowhere.json"}, "/nowhere.json"),
        ({"cost_model": "/nowhere.json", "hardware": "h100"}, "give one of them"),
        ({"fails": ("x@1",)}, "--fail=x@1"),
        ({"fails": ("1@1.2.3",)}, "--fail=1@1.2.3"),
        ({"fails": ("99@1",)}, "99"),
        ({"slows": ("1@1",)}, "--slow=1@1"),
        ({"slows": ("1@1:0",)}, "factor 0"),
        ({"slows": ("1@1:-2",)}, "--slow=1@1:-2"),
        ({"autoscale": "8"}, "--autoscale=8"),
        ({"autoscale": "8:2"}, "min_replicas"),
        ({"autoscale": "2:4", "num_replicas": 9}, "--replicas=9"),
        ({"num_replicas": 0}, "num_replicas=0"),
        ({"event_delay_s": -1.0}, "event_delay_s"),
        ({"overrides": ("engine.nonsense=1",)}, "nonsense"),
        ({"rate_scale": -1.0}, "rate_scale"),
        ({"slo_ttft_s": -1.0}, "ttft_s"),
        ({"slo_ttft_s": 0.0, "slo_ttft_per_token_s": 1e-3}, "--slo-ttft-ms-per-token=1 with"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_scenario_refuses_what_cannot_be_simulated(changes: dict[str, Any], words: str) -> None:
    wrong = replace(POISSON, **changes)
    point = GridPoint(wrong.policy, wrong.rate_scale, wrong.seed)
    with pytest.raises(InvalidArgumentError) as caught:
        check_scenario(wrong, [point])
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["prefill_tokens_per_s", "slo_tpot_s", "usd_per_hour"])
def test_scenario_refuses_numbers_that_are_none(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        Scenario.from_dict({**asdict(POISSON), name: value})


def test_scenario_of_a_point_is_what_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Workload, SimulationSettings]] = []

    def fake(workload: Workload, settings: SimulationSettings, on_progress: object) -> Any:
        seen.append((workload, settings))
        return result([request()])

    monkeypatch.setattr(scenario_module, "simulate", fake)
    point = GridPoint("random", 2.0, 5)
    report = run_point(replace(POISSON, usd_per_hour=3.0), point)
    ((workload, settings),) = seen
    assert settings.config.router.policy == "random" and settings.seed == 5
    assert workload == load_workload(at_point(POISSON, point))
    assert workload.arrivals[-1].arrived_s <= 10.0  # 20 s at twice the rate
    assert report["rate_scale"] == 2.0 and report["usd_per_hour"] == 3.0
