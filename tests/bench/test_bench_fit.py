"""The grid of `sluice bench engine --fit` on an engine whose steps cost what a formula says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.fit import HELD_OUT, as_rows, fit_steps, learn, measure_quality
from cluster.bench.fit_grid import FitGrid, make_grid
from cluster.bench.fit_run import GridRun, MeasuredStep, StepWatch
from cluster.clock import VirtualClock
from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.step_time import MAX_KINDS, StepTimeModel
from cluster.errors import ConfigError
from cluster.simulator.cost_model import read_cost
from cluster.step import StepPlan
from cluster.types import StepCost, StepShape
from tests.cli.cli_run import error_of, run
from tests.fakes import TimedExecutor
from tests.model.model_fakes import save_model

COST = StepCost(4e-3, 1e-4, ((64, 5e-5),), 2e-5, 3e-7, 5e-8)
OVERHEAD_S = 1e-3
BLOCK_SIZE = 16


class SlowToSubmit(TimedExecutor):
    """An executor beside which the engine takes a while."""

    def __init__(
        self, clock: VirtualClock, seconds: Callable[[StepShape], float], num_blocks: int
    ) -> None:
        super().__init__(clock, seconds, num_blocks)
        self.clock = clock

    def submit(self, plan: StepPlan) -> None:
        self.clock.advance(OVERHEAD_S)
        super().submit(plan)


def grid_of(max_tokens: int = 1024, max_num_seqs: int = 16) -> FitGrid:
    return make_grid(
        max_sequence_tokens=max_tokens,
        max_step_tokens=256,
        max_num_seqs=max_num_seqs,
        block_size=BLOCK_SIZE,
    )


def measure(
    grid: FitGrid, *, num_blocks: int = 2048, num_rounds: int = 1, **options: Any
) -> list[MeasuredStep]:
    clock, watch = VirtualClock(), StepWatch()
    executor = SlowToSubmit(clock, COST.seconds, num_blocks)
    engine = Engine(
        EngineConfig(max_num_batched_tokens=256, max_num_seqs=16),
        executor=executor,
        block_size=BLOCK_SIZE,
        max_model_len=1024,
        fingerprint=b"model",
        eos_token_ids=frozenset(),
        vocab_size=500,
        prefix_caching=True,
        clock=clock,
        step_time=watch,
    )
    steps = GridRun(engine, watch, grid, clock=clock, vocab_size=500, **options).run(num_rounds)
    engine.check_invariants()
    assert not engine.has_work
    assert len(steps) < len(executor.shapes), "the warm-up is not among them"
    assert [step.shape for step in steps] == executor.shapes[-len(steps) :]
    return steps


@pytest.fixture(scope="module")
def steps() -> list[MeasuredStep]:
    return measure(grid_of())


def test_grid_doubles_up_to_the_limits_and_leaves_room_for_answers() -> None:
    grid = grid_of()
    assert grid.chunks == (8, 16, 32, 64, 128, 256)
    assert grid.batches == (16, 8, 4, 2, 1)
    assert all(context % BLOCK_SIZE == 0 for context in grid.contexts)
    assert 1024 - BLOCK_SIZE - 257 < grid.contexts[-1] <= 1024 - 257
    assert grid.contexts[-1] + grid.stream_tokens <= 1024
    assert grid_of(max_num_seqs=12).batches == (12, 8, 4, 2, 1)


def test_grid_says_what_sequences_are_too_short_for() -> None:
    grid = grid_of(max_tokens=100)
    assert grid.contexts and grid.contexts[-1] + grid.stream_tokens <= 100
    with pytest.raises(ConfigError, match=r"up to 40 tokens .*, at least \d+ are needed"):
        grid_of(max_tokens=40)


def test_grid_run_computes_every_chunk_after_every_context(steps: list[MeasuredStep]) -> None:
    grid = grid_of()
    shapes = {step.shape for step in steps}
    for chunk in grid.chunks:
        for context in (0, *grid.contexts):
            assert StepShape(chunk, 1, 0, chunk * (context + chunk / 2)) in shapes


def test_grid_run_decodes_with_every_batch_at_every_context(steps: list[MeasuredStep]) -> None:
    grid = grid_of()
    decodes = [step.shape for step in steps if step.kind == "decode"]
    assert all(shape.num_tokens == shape.num_sequences for shape in decodes)
    for context in grid.contexts:
        near = [s for s in decodes if 0 <= s.context_tokens / s.num_sequences - context < 60]
        assert {shape.num_sequences for shape in near} >= set(grid.batches)
    mixed = [step.shape for step in steps if step.kind == "mixed"]
    assert {shape.num_sequences for shape in mixed} >= {batch + 1 for batch in (8, 4, 2, 1)}
    assert {8, 64} <= {shape.num_tokens - shape.num_sequences + 1 for shape in mixed}


def test_grid_run_repeats_its_points_in_every_round() -> None:
    grid = grid_of(max_tokens=300)
    labels: list[tuple[str, int, int]] = []
    steps = measure(grid, num_rounds=2, on_progress=lambda *told: labels.append(told))
    points = [step.point for step in steps]
    assert set(points) == set(range(1, grid.num_points + 1))
    assert points.count(1) == 2, "one chunk without a context, in each round"
    assert [told for told in labels if told[0] == "round 2 of 2"] == [
        ("round 2 of 2", point, grid.num_points) for point in range(grid.num_points)
    ]


def test_grid_run_asks_for_no_more_streams_than_find_blocks() -> None:
    grid = grid_of()
    steps = measure(grid, num_blocks=130)  # of 16 tokens: two streams of 752 and their answers
    before_last = grid.num_points - len(grid.batches)
    at_longest = {step.point - before_last for step in steps if step.point > before_last}
    assert at_longest == {grid.batches.index(2) + 1, grid.batches.index(1) + 1}
    assert max(step.shape.num_sequences for step in steps) == 16


def test_fit_finds_what_steps_cost(steps: list[MeasuredStep]) -> None:
    fit = fit_steps(steps)
    assert fit.overhead_s == pytest.approx(OVERHEAD_S)
    assert set(fit.quality_by_kind) == {"prompt", "decode", "mixed"}
    assert fit.quality.num_steps == sum(of.num_steps for of in fit.quality_by_kind.values())
    assert fit.quality.num_steps == sum(step.point % HELD_OUT == 0 for step in steps) > 20
    assert fit.quality.error_p90 is not None and fit.quality.error_p90 < 0.03
    unseen = StepShape(200, 9, 3000, 190 * 500.0)
    assert fit.cost.seconds(unseen) == pytest.approx(COST.seconds(unseen), rel=0.03)


def test_fit_of_all_points_fits_into_the_memory_of_the_model(steps: list[MeasuredStep]) -> None:
    model = StepTimeModel()
    model.restore(as_rows(steps))
    assert len(model._kinds) < MAX_KINDS, "or the first points would be forgotten"


def test_quality_is_the_error_of_the_prediction() -> None:
    shape = StepShape(8, 8, 100, 0.0)
    measured_s = COST.seconds(shape)
    steps = [MeasuredStep(0, shape, measured_s * factor, 0.0) for factor in (0.5, 1.0, 2.0)]
    quality = measure_quality(COST, steps)
    assert (quality.num_steps, quality.error_p50) == (3, pytest.approx(0.5))
    assert quality.error_p90 == pytest.approx(0.9)  # of 0, 0.5 and 1
    assert measure_quality(COST, []).error_p50 is None


def test_quality_is_that_of_a_fit_that_has_not_seen_the_steps() -> None:
    shape = StepShape(8, 8, 100, 0.0)
    known = [MeasuredStep(point, shape, 0.01, 0.0) for point in (1, 2, 3)]
    slower = [MeasuredStep(HELD_OUT, shape, 0.02, 0.0)]
    assert fit_steps(known + slower).quality.error_p50 == pytest.approx(0.5, abs=0.01)
    assert learn(known).num_steps == 3


SMALL = ["--threads=1", "--dtype=float32", "--num-blocks=64", "--max-num-batched-tokens=32"]
FEW = "--set=engine.max_num_seqs=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.integration
def test_bench_engine_fit_writes_what_the_simulator_reads(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    command = ["bench", "engine", f"--model={folder}", *SMALL, FEW, f"--fit={path}"]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert (content["layout"], content["threads"]) == ({"tp": 1, "pp": 1}, 1)
    assert content["overhead_s"] > 0
    assert len(content["steps"]) == figures["num_steps"] > 50
    assert all(len(row) == 5 and row[4] > 0 for row in content["steps"])
    assert max(row[1] for row in content["steps"]) <= 4
    assert content["cost"]["num_steps"] == len(content["steps"])
    assert figures["quality"]["num_steps"] > 10 and figures["quality"]["error_p50"] > 0
    assert figures["benchmark"] == "engine-fit" and "steps" not in figures
    model = read_cost(path)
    assert model.step.floor_s == content["cost"]["floor_s"]
    assert model.overhead_s == content["overhead_s"]


@pytest.mark.integration
def test_bench_engine_fit_prints_costs_and_errors(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    result = run("bench", "engine", f"--model={folder}", *SMALL, FEW, f"--fit={path}")
    assert result.exit_code == 0, result.output
    assert "any step" in result.stdout and "held out steps" in result.stdout
    assert "mixed" in result.stdout


@pytest.mark.integration
def test_bench_engine_fit_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    command = ("bench", "engine", f"--model={folder}", *SMALL)
    path = f"--fit={tmp_path / 'fit.json'}"
    assert "are needed" in error_of(*command, path, "--num-blocks=2")
    assert "parallel.tp=2" in error_of(*command, path, "--set=parallel.tp=2")
    assert "/nowhere/fit.json" in error_of(*command, FEW, "--fit=/nowhere/fit.json")
