"""`sluice bench batching` on a machine whose step times are known, under a virtual clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from cluster.bench.batching import (
    MODES,
    BatchingBench,
    BatchingLoad,
    BatchingRunner,
    MixedRun,
    check_load,
    figures_of,
)
from cluster.bench.batching_report import batching_report, plot_batching
from cluster.clock import VirtualClock
from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.step_time import StepTimeModel
from cluster.errors import InvalidArgumentError
from cluster.types import StepShape
from tests.cli.cli_run import error_of
from tests.fakes import TimedExecutor
from tests.model.model_fakes import save_model

LOAD = BatchingLoad(stream_output_tokens=60, num_prompts=3, prompt_tokens=600)


def machine_s(shape: StepShape) -> float:
    return max(0.040, 0.0227 + 0.00208 * shape.num_tokens)


@pytest.fixture(scope="module")
def runner() -> BatchingRunner:
    clock = VirtualClock()

    def make_engine(config: EngineConfig, executor: Executor, model: StepTimeModel) -> Engine:
        return Engine(
            config,
            executor=executor,
            block_size=16,
            max_model_len=4096,
            fingerprint=b"model",
            eos_token_ids=frozenset(),
            vocab_size=1000,
            prefix_caching=False,
            clock=clock,
            step_time=model,
        )

    bench = BatchingBench(LOAD, EngineConfig(), 0.0, 5.0, 32, num_rounds=2)
    return BatchingRunner(
        bench,
        make_engine=make_engine,
        executor=TimedExecutor(clock, machine_s),
        clock=clock,
        vocab_size=1000,
    )


@pytest.fixture(scope="module")
def runs(runner: BatchingRunner) -> list[MixedRun]:
    return runner.run()


def test_modes_take_turns_on_the_same_work(runs: list[MixedRun]) -> None:
    assert [run.mode for run in runs] == [*MODES, *MODES]
    for run in runs:
        computed = sum(s.num_prompt_tokens + s.num_decodes for s in run.steps)
        # The last token of each stream and prompt is chosen, not computed.
        assert computed == LOAD.num_tokens - LOAD.num_streams - LOAD.num_prompts
        assert sum(len(times) for times in run.token_times_s.values()) == 8 * 60


def test_objective_is_a_multiple_of_the_undisturbed_pace(
    runner: BatchingRunner, runs: list[MixedRun]
) -> None:
    assert runner.tpot_slo_s == pytest.approx(5 * machine_s(StepShape(8)))


def test_figures_tell_the_modes_apart(runner: BatchingRunner, runs: list[MixedRun]) -> None:
    bench = BatchingBench(LOAD, EngineConfig(), 0.0, 5.0, 32, num_rounds=2)
    figures = figures_of(bench, runs, runner.tpot_slo_s)
    free, paced, static = (figures["modes"][mode] for mode in MODES)
    assert free["gap_s"]["p99"] > runner.tpot_slo_s >= paced["gap_s"]["p99"]
    assert paced["tpot_s"]["p99"] <= runner.tpot_slo_s
    assert free["throughput_ratio"] == 1.0
    assert paced["throughput_ratio"] >= 0.9
    assert static["prompts_s"] > paced["prompts_s"] > free["prompts_s"]
    assert free["prompt_tokens_per_mixed_step"]["max"] == 504
    assert static["prompt_tokens_per_mixed_step"]["max"] <= 32
    assert paced["gaps_within_slo"] == 1.0


def test_gaps_are_those_beside_prompts() -> None:
    run = MixedRun("adaptive", prompts_from_s=1.0, prompts_until_s=2.0)
    run.token_times_s = {"stream0": [0.5, 1.0, 1.25, 2.5, 2.6], "prompt0": [1.0, 2.0]}
    assert run.stream_gaps_s() == [[0.25, 1.25]]


def test_report_and_plot_show_every_mode(
    runner: BatchingRunner, runs: list[MixedRun], tmp_path: Path
) -> None:
    bench = BatchingBench(LOAD, EngineConfig(), 0.0, 5.0, 32, num_rounds=2)
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(batching_report(figures_of(bench, runs, runner.tpot_slo_s)))
    text = console.export_text()
    assert all(mode in text for mode in MODES)
    plot_batching(runs, runner.tpot_slo_s, tmp_path / "plot.png", "model")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_load_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="601 tokens, limit=512") as caught:
        check_load(LOAD, 512)
    assert caught.value.field == "prompt-tokens"


def test_engine_that_this_machine_cannot_hold_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model("llama", tmp_path)
    monkeypatch.setattr("cluster.model.footprint.available_bytes", lambda: 10_000)
    load = ("--stream-tokens=4", "--prompt-tokens=32")
    assert "10000 are free" in error_of("bench", "batching", f"--model={folder}", *load)
