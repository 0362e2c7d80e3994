"""`sluice bench batching`: long prompts beside running streams, without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cluster.cli.options import AsJson, ConfigFile, Overrides, print_json

if TYPE_CHECKING:
    from cluster.bench.batching import BatchingBench, BatchingLoad, BatchingRunner, MixedRun
    from cluster.config import ClusterConfig

_LOAD = "Load"


def bench_batching(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or 'demo'.")] = "demo",
    config: ConfigFile = None,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option(min=0, help="Of torch; 0: one per core.")] = 0,
    streams: Annotated[int, typer.Option(min=1, max=256, rich_help_panel=_LOAD)] = 8,
    stream_tokens: Annotated[
        int, typer.Option(min=2, help="Of each stream's answer.", rich_help_panel=_LOAD)
    ] = 192,
    prompts: Annotated[
        int, typer.Option(min=1, help="Long ones, in all.", rich_help_panel=_LOAD)
    ] = 12,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of each.", rich_help_panel=_LOAD)
    ] = 768,
    prompts_at_once: Annotated[int, typer.Option(min=1, rich_help_panel=_LOAD)] = 2,
    tpot_slo_s: Annotated[
        float, typer.Option(min=0, help="Of the streams; 0: --slo-factor.")
    ] = 0.0,
    slo_factor: Annotated[
        float, typer.Option(min=1, help="Objective as a multiple of the undisturbed TPOT.")
    ] = 4.0,
    static_tokens: Annotated[
        int, typer.Option(min=1, help="Token budget of the static run's steps.")
    ] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="The three runs take turns.")] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the runs.")] = None,
    json: AsJson = False,
) -> None:
    """Measure how running streams fare while long prompts are computed."""
    from cluster.bench.batching import BatchingBench, BatchingLoad
    from cluster.config import load_config

    settings = load_config(config, [f"model.path={model}", *(overrides or [])])
    load = BatchingLoad(
        num_streams=streams,
        stream_output_tokens=stream_tokens,
        num_prompts=prompts,
        prompts_at_once=prompts_at_once,
        prompt_tokens=prompt_tokens,
    )
    bench = BatchingBench(load, settings.engine, tpot_slo_s, slo_factor, static_tokens, rounds)
    runner = _make_runner(settings, bench, threads or os.cpu_count() or 1)
    with Console(stderr=True).status("warming up") as status:

        def on_run(run: MixedRun) -> None:
            status.update(f"{run.mode}: {run.wall_s:.1f} s")

        runs = runner.run(on_run)
    _report(settings, bench, runner, runs, plot, json)


def _make_runner(settings: ClusterConfig, bench: BatchingBench, threads: int) -> BatchingRunner:
    from cluster.bench.batching import BatchingRunner, check_load
    from cluster.clock import WallClock
    from cluster.config import EngineConfig, ParallelConfig, ReplicaConfig
    from cluster.engine.engine import Engine
    from cluster.engine.executor import Executor
    from cluster.engine.step_time import StepTimeModel
    from cluster.model.checkpoint import inspect_checkpoint
    from cluster.model.footprint import check_fits
    from cluster.replica.build import load_whole, make_engine, max_model_len_of
    from cluster.replica.executor import InProcessExecutor

    model = inspect_checkpoint(settings.model.folder)
    max_model_len = max_model_len_of(settings, model)
    check_load(bench.load, max_model_len)
    num_blocks = _blocks_needed(bench.load, settings.cache.block_size)
    alone = {"replica": ReplicaConfig(), "parallel": ParallelConfig()}
    cache = settings.cache.model_copy(update={"num_blocks": num_blocks})
    check_fits(model, settings.model_copy(update={**alone, "cache": cache}))
    executor = InProcessExecutor(
        load_whole(
            settings, num_blocks=num_blocks, max_model_len=max_model_len, num_threads=threads
        )
    )
    uncached = settings.cache.model_copy(update={"prefix_caching": False})

    def build(config: EngineConfig, executor: Executor, step_time: StepTimeModel) -> Engine:
        of_run = settings.model_copy(update={"engine": config, "cache": uncached})
        return make_engine(of_run, model, executor, WallClock(), step_time)

    return BatchingRunner(
        bench,
        make_engine=build,
        executor=executor,
        clock=WallClock(),
        vocab_size=model.vocab_size,
    )


def _blocks_needed(load: BatchingLoad, block_size: int) -> int:
    """Return the blocks of all that is under way at once: no run is to wait for memory."""
    stream_tokens = load.stream_input_tokens + load.stream_output_tokens
    stream_blocks = -(-stream_tokens // block_size)
    prompt_blocks = -(-(load.prompt_tokens + 1) // block_size)
    return load.num_streams * stream_blocks + load.prompts_at_once * prompt_blocks


def _report(
    settings: ClusterConfig,
    bench: BatchingBench,
    runner: BatchingRunner,
    runs: list[MixedRun],
    plot: Path | None,
    json: bool,
) -> None:
    from dataclasses import asdict

    from cluster.bench.batching import figures_of
    from cluster.bench.batching_report import batching_report, plot_batching
    from cluster.bench.provenance import provenance

    name = settings.model.served_name
    figures: dict[str, Any] = figures_of(bench, runs, runner.tpot_slo_s)
    if plot is not None:
        plot_batching(runs, runner.tpot_slo_s, plot, name)
    if json:
        cost = runner.step_time.cost
        fitted = None if cost is None else asdict(cost)
        head = {"benchmark": "batching", "model": name}
        print_json({**head, "result": figures, "step_cost": fitted, "provenance": provenance()})
    else:
        Console().print(batching_report(figures))
