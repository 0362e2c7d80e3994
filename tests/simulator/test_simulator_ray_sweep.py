"""A sweep on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray

from cluster.errors import ConfigError, InvalidArgumentError, UnavailableError
from cluster.simulator.ray_sweep import run_on_ray
from cluster.simulator.scenario import Scenario, make_settings, run_point
from cluster.simulator.sweep import GridPoint, SweepPoint, make_grid

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SMALL = Scenario(workload="poisson:rate=10,duration=5,input=100,output=20", num_replicas=2)


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _figures(point: SweepPoint) -> dict[str, object]:
    """Return what one seed fixes: all but the time that it took."""
    changing = ("wall_s", "virtual_s_per_wall_s")
    return {name: value for name, value in point.report.items() if name not in changing}


def test_sweep_ends_the_ray_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not ray.is_initialized()
    (point,) = run_on_ray(SMALL, make_grid(["random"], [1.0], [0]))
    assert point.report["num_requests"] > 0
    assert not ray.is_initialized()


def test_sweep_on_ray_gives_the_reports_of_this_process(own_ray: None) -> None:
    grid = make_grid(["slo", "round_robin"], [1.0, 2.0], [3])
    told: list[tuple[int, int]] = []
    points = run_on_ray(SMALL, grid, lambda _, num_done, total: told.append((num_done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(p.policy, p.rate_scale, p.seed) for p in points] == [
        (p.policy, p.rate_scale, p.seed) for p in grid
    ]
    here = run_point(SMALL, grid[3])
    assert _figures(points[3]) == _figures(SweepPoint("round_robin", 2.0, 3, here))
    assert ray.is_initialized()  # it was here before


def test_sweep_takes_the_trace_along(own_ray: None, tmp_path: Path) -> None:
    trace = tmp_path / "own.csv"
    rows = [f"2024-05-10 00:00:{i:02d}.0,{100 + i},5\n" for i in range(20)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    scenario = Scenario(trace=str(trace), num_replicas=2)
    (point,) = run_on_ray(scenario, make_grid(["slo"], [1.0], [0]))
    assert point.report["workload"] == point.report["settings"]["trace"] == "own.csv"
    assert point.report["num_requests"] == 20
    json.dumps(point.report, allow_nan=False)


def test_sweep_keeps_files_of_one_name_apart(own_ray: None, tmp_path: Path) -> None:
    trace, fit = tmp_path / "traces" / "own", tmp_path / "fits" / "own"
    for path in (trace, fit):
        path.parent.mkdir()
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.0,100,5\n")
    cost = asdict(make_settings(SMALL).cost.step)
    fit.write_text(json.dumps({"cost": cost, "model": "demo"}))
    scenario = Scenario(trace=str(trace), cost_model=str(fit), num_replicas=2)
    (point,) = run_on_ray(scenario, make_grid(["slo"], [1.0], [0]))
    settings = point.report["settings"]
    assert (settings["trace"], settings["cost_model"]) == ("own", "own")
    assert settings["cost"].startswith("measured")
    assert point.report["num_requests"] == 1


def test_sweep_names_the_point_that_failed(own_ray: None) -> None:
    wrong = replace(SMALL, fails=("7@1",))  # there are two replicas
    with pytest.raises(InvalidArgumentError, match=r"policy=slo rate_scale=1 seed=0: .*7"):
        run_on_ray(wrong, make_grid(["slo"], [1.0], [0]))


def test_sweep_gives_up_on_points_that_do_not_end(own_ray: None) -> None:
    long = replace(SMALL, workload="poisson:rate=200,duration=2000")
    with pytest.raises(UnavailableError, match="policy=slo rate_scale=1 seed=0"):
        run_on_ray(long, [GridPoint("slo", 1.0, 0)], max_silence_s=0.5)


def test_sweep_without_its_trace_fails_before_any_task(own_ray: None) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/x\.jsonl"):
        run_on_ray(Scenario(trace="/nowhere/x.jsonl"), make_grid(["slo"], [1.0], [0]))
