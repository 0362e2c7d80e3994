"""The validation of the simulator: what a calibration says, and what is compared with what."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cluster.bench.statistics import RequestRecord
from cluster.bench.validation import (
    LoadPoint,
    RunFigures,
    is_within,
    make_workload,
    parse_loads,
    point_figures,
    predict,
)
from cluster.bench.validation_calibration import (
    Calibration,
    DecodeRun,
    Measured,
    PromptRun,
    calibrate,
)
from cluster.bench.validation_experiments import Stream, decode_runs
from cluster.bench.validation_report import plot_validation, validation_table
from cluster.bench.validation_run import with_fixed_cache
from cluster.config import ClusterConfig, load_config
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.types import StepCost, StepShape

COST = StepCost(5e-3, 1e-4, (), 1e-4, 1e-6, 1e-8)
WAY_S = 3e-3
ALONE = 0.8


def config_of(num_blocks: int = 2048) -> ClusterConfig:
    return with_fixed_cache(load_config(None, ["replica.num_replicas=2"]), num_blocks)


def seconds(num_streams: int = 0, context: float = 0.0, prompt: int = 0) -> float:
    """What a step costs where COST is the whole truth."""
    n = num_streams or 1
    tokens = prompt or num_streams
    return COST.seconds(StepShape(tokens, n, int(num_streams * context), prompt * prompt / 2))


def measured_of(slowness: float = 1.0) -> Measured:
    def decode(n: int, context: float, factor: float = 1.0) -> DecodeRun:
        return DecodeRun(n, context, factor * slowness * seconds(n, context), 0.2)

    def prompt(n: int, factor: float = 1.0) -> PromptRun:
        return PromptRun(n, WAY_S + factor * slowness * seconds(prompt=n))

    return Measured(
        decode(1, 56, ALONE),
        [prompt(n, ALONE) for n in (64, 256, 480)],
        [decode(n, context) for n, context in ((1, 56), (3, 56), (10, 56), (4, 424))],
        [prompt(n) for n in (64, 256)],
        10.0,
    )


def figures(ttft_s: float = 0.1, tpot_s: float = 0.01, rate: float = 500.0) -> RunFigures:
    return RunFigures(ttft_s, tpot_s, rate, 10)


def point(predicted: RunFigures) -> LoadPoint:
    return LoadPoint(0.6, 12.0, 10, figures(), predicted, 0.9)


def test_workload_is_what_its_seed_says() -> None:
    workload = make_workload(400, 10.0, seed=3)
    assert workload == make_workload(400, 10.0, seed=3) != make_workload(400, 10.0, seed=4)
    prompts = [arrival.num_prompt_tokens for arrival in workload.arrivals]
    outputs = [arrival.num_output_tokens for arrival in workload.arrivals]
    assert (min(prompts), max(prompts)) >= (50, 500) and max(prompts) <= 600
    assert min(outputs) >= 16 and max(outputs) <= 96
    shared = [arrival for arrival in workload.arrivals if len(arrival.runs) == 2]
    assert 120 < len(shared) < 240 and len({arrival.runs[0] for arrival in shared}) == 6
    assert workload.arrivals[-1].arrived_s == pytest.approx(40.0, rel=0.2)


def test_workload_of_a_burst_comes_at_once() -> None:
    assert {arrival.arrived_s for arrival in make_workload(5, 0.0, seed=0).arrivals} == {0.0}


def test_calibration_finds_what_the_measurements_were_made_of() -> None:
    calibration = calibrate([measured_of()])
    assert calibration.alone_factor == pytest.approx(ALONE, rel=0.05)
    assert calibration.way_s == pytest.approx(WAY_S, abs=1.5e-3)
    assert calibration.jitter == pytest.approx(0.2)
    for shape in (StepShape(4, 4, 4000, 0.0), StepShape().with_chunk(300, 0)):
        assert calibration.cost.seconds(shape) == pytest.approx(COST.seconds(shape), rel=0.1)


def test_calibration_is_the_mean_of_its_measurements() -> None:
    shape = StepShape(4, 4, 1000, 0.0)
    both = calibrate([measured_of(1.0), measured_of(1.5)]).cost.seconds(shape)
    assert both == pytest.approx(1.25 * COST.seconds(shape), rel=0.1)


def test_cost_follows_how_busy_the_others_are() -> None:
    calibration = Calibration(COST, ALONE, WAY_S, 0.0, 10.0)
    assert calibration.cost_at(1.0).floor_s == pytest.approx(COST.floor_s)
    assert calibration.cost_at(0.0).floor_s == pytest.approx(ALONE * COST.floor_s)


def test_jitter_leaves_the_mean_of_a_step() -> None:
    calibration = Calibration(COST, 1.0, WAY_S, 0.5, 10.0)
    mean_s = calibration.cost_at(1.0).floor_s * math.exp(0.5**2 / 2)
    assert mean_s == pytest.approx(COST.floor_s)


def test_prediction_knows_an_idle_cluster_to_the_millisecond() -> None:
    calibration = Calibration(COST, ALONE, WAY_S, 0.0, 10.0)
    workload = make_workload(2, 0.1, seed=4)
    prediction = predict(workload, config_of(), calibration, max_model_len=2048)
    record = prediction.result.requests[1]  # the first waits until the gateway knows replicas
    chunk = StepShape().with_chunk(record.arrival.num_prompt_tokens, 0)
    share = prediction.busy_share
    assert 0.0 < share < 0.2
    assert record.ttft_s is not None and record.arrival.num_prompt_tokens <= 512
    step_s = record.ttft_s - WAY_S
    assert step_s == pytest.approx(calibration.cost_at(share).seconds(chunk), rel=0.01)


def test_prediction_is_slower_under_more_load() -> None:
    calibration = Calibration(COST, ALONE, WAY_S, 0.1, 10.0)
    runs = [
        RunFigures.of_results(
            [
                predict(
                    make_workload(40, r, seed=1), config_of(), calibration, max_model_len=2048
                ).result
            ]
        )
        for r in (2.0, 12.0)
    ]
    assert runs[0].num_finished == runs[1].num_finished == 40
    assert runs[0].ttft_p50_s < runs[1].ttft_p50_s and runs[0].tpot_p50_s < runs[1].tpot_p50_s
    assert runs[0].out_tokens_per_s < runs[1].out_tokens_per_s


def test_figures_of_real_runs_are_pooled() -> None:
    def record(due_s: float, first_s: float, last_s: float) -> RequestRecord:
        return RequestRecord(due_s, last_s, "OK", (first_s, last_s), 11)

    runs = [[record(0.0, 0.2, 1.0), record(1.0, 1.4, 2.0)], [record(0.0, 0.3, 2.0)]]
    pooled = RunFigures.of_records(runs)
    assert pooled.ttft_p50_s == pytest.approx(0.3)
    assert pooled.tpot_p50_s == pytest.approx(0.08)
    assert pooled.out_tokens_per_s == pytest.approx(33 / (2.0 + 2.0))


def test_figures_of_nothing_are_an_error() -> None:
    failed = RequestRecord(0.0, 1.0, "UNAVAILABLE")
    with pytest.raises(UnavailableError, match="no request of a run finished"):
        RunFigures.of_records([[failed]])


def test_decode_runs_are_of_the_time_in_which_all_decode() -> None:
    early = Stream(0.0, "a", [1.5, 1.6, 2.0, 3.0, 4.0])
    late = Stream(0.0, "b", [2.0, 2.5, 3.0, 3.5, 9.0])
    also = Stream(0.0, "b", [2.0, 2.5, 3.0, 3.5, 9.0])
    alone, pair = decode_runs([early, late, also], 100)
    assert (alone.num_streams, pair.num_streams) == (1, 2)
    assert alone.gap_s == pytest.approx(1.0) and pair.gap_s == pytest.approx(0.5)
    assert alone.context_tokens == pytest.approx(124)


def test_ratio_is_within_fifteen_percent_or_not() -> None:
    assert is_within(0.86) and is_within(1.14)
    assert not is_within(0.84) and not is_within(1.16)
    good, bad = point(figures(0.11)), point(figures(0.13))
    assert point_figures(good)["is_within"] is True and point_figures(bad)["is_within"] is False
    assert point_figures(bad)["ratios"]["ttft_p50_s"] == pytest.approx(1.3)


@pytest.mark.parametrize("text", ["", "0.3,x", "0", "-1", "nan", "2.1", "inf"])
def test_loads_that_are_none_are_errors(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="loads="):
        parse_loads(text)


def test_loads_are_numbers_with_commas() -> None:
    assert parse_loads("0.3, 0.9") == [0.3, 0.9]


def test_cache_is_one_tier_of_fixed_size() -> None:
    cache = config_of(77).cache
    assert (cache.num_blocks, cache.host_memory_bytes) == (77, 0)


def test_report_names_what_is_off(tmp_path: Path) -> None:
    points = [point(figures(0.13))]
    table = validation_table(points)
    [ratios] = [column for column in table.columns if "/" in str(column.header)][-1:]
    cells = list(ratios.cells)
    assert cells == ["[red]1.30[/]", "[green]1.00[/]", "[green]1.00[/]"]
    path = tmp_path / "plot.png"
    plot_validation(points, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
