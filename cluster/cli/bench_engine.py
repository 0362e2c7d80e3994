"""`sluice bench engine`: measure the engine in this process, without Ray or a network."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import AsJson, Overrides, bar_options, print_json
from cluster.config import load_config

if TYPE_CHECKING:
    from cluster.bench.engine import EngineBenchResult, EngineLoad
    from cluster.config import ClusterConfig

_LOAD = "Load"
_ENGINE = "Engine"


def bench_engine(
    model: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint, or 'demo'.")] = "demo",
    requests: Annotated[
        int, typer.Option(min=1, max=4096, help="Given at once.", rich_help_panel=_LOAD)
    ] = 16,
    input_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt.", rich_help_panel=_LOAD)
    ] = 256,
    output_len: Annotated[
        int, typer.Option(min=2, help="Tokens of an answer.", rich_help_panel=_LOAD)
    ] = 64,
    shared_prefix_len: Annotated[
        int, typer.Option(min=0, help="Tokens that all prompts share.", rich_help_panel=_LOAD)
    ] = 0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Of the whole load; medians count.", rich_help_panel=_LOAD)
    ] = 1,
    warmup: Annotated[
        int, typer.Option(min=0, help="Rounds of short requests before.", rich_help_panel=_LOAD)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts.", rich_help_panel=_LOAD)] = 0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=_ENGINE)
    ] = "auto",
    quantization: Annotated[
        str, typer.Option(help="none, int8, int4, fp8.", rich_help_panel=_ENGINE)
    ] = "none",
    group_size: Annotated[
        int, typer.Option(help="Of int4: 32, 64, 128.", rich_help_panel=_ENGINE)
    ] = 128,
    cache_dtype: Annotated[
        str, typer.Option(help="auto, int8: of keys and values.", rich_help_panel=_ENGINE)
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda.", rich_help_panel=_ENGINE)] = "cpu",
    threads: Annotated[
        int, typer.Option(min=0, help="0: one per core.", rich_help_panel=_ENGINE)
    ] = 0,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a step; as configured by default.", rich_help_panel=_ENGINE),
    ] = None,
    num_blocks: Annotated[
        int, typer.Option(min=0, help="KV blocks; 0: what it needs.", rich_help_panel=_ENGINE)
    ] = 0,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time goes, in one more round.")
    ] = False,
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Instead: measure steps of many shapes, write what they cost, for the simulator.",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Measure the engine alone in this process: rates, latencies, shares of the hardware."""
    from cluster.bench.engine import EngineLoad

    settings: dict[str, Any] = {
        "model.path": model,
        "model.dtype": dtype,
        "model.quantization": quantization,
        "model.quantization_group_size": group_size,
        "model.device": device,
        "cache.dtype": cache_dtype,
        "parallel.threads_per_worker": threads,
    }
    if max_num_batched_tokens is not None:
        settings["engine.max_num_batched_tokens"] = max_num_batched_tokens
    if fit is not None:
        if num_blocks:
            settings["cache.num_blocks"] = num_blocks
        _run_fit(_configured(settings, overrides), fit, rounds, seed, json)
        return
    load = EngineLoad(requests, input_len, output_len, shared_prefix_len, rounds, warmup, seed)
    settings |= {"engine.max_num_seqs": requests, "engine.max_num_waiting": requests}
    block_size = load_config(None, overrides).cache.block_size
    settings["cache.num_blocks"] = num_blocks or load.num_blocks(block_size)
    result, profiled = _run(_configured(settings, overrides), load, profile)
    _report(result, profiled, json)


def _configured(settings: dict[str, Any], overrides: list[str] | None) -> ClusterConfig:
    own = [f"{name}={json_module.dumps(value)}" for name, value in settings.items()]
    return load_config(None, [*own, *(overrides or [])])


def _run(
    config: ClusterConfig, load: EngineLoad, is_profiled: bool
) -> tuple[EngineBenchResult, list[dict[str, Any]]]:
    from cluster.bench.engine import profile_round, run_engine_bench

    with _progress() as on_progress:
        result = run_engine_bench(config, load, on_progress)
        rows = profile_round(result.bench, config.model.device) if is_profiled else []
    return result, rows


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Redrawn twice a second: the bar shares the cores with what is measured.
    with Progress(*columns, TimeElapsedColumn(), refresh_per_second=2, **bar_options()) as bar:
        task = bar.add_task("starting", total=None)

        def on_progress(label: str, num_done: int, total: int) -> None:
            bar.update(task, description=escape(label), completed=num_done, total=total)

        yield on_progress


def _run_fit(config: ClusterConfig, path: Path, rounds: int, seed: int, json: bool) -> None:
    from cluster.bench.fit import check_writable, fit_figures, run_fit, write_fit
    from cluster.bench.fit_report import fit_report
    from cluster.bench.provenance import provenance

    check_writable(path)
    with _progress() as on_progress:
        fit = run_fit(config, num_rounds=rounds, seed=seed, on_progress=on_progress)
    figures = fit_figures(fit, config)
    write_fit(fit, figures, path)
    if json:
        counted = {"num_steps": len(fit.steps), "file": str(path), "provenance": provenance()}
        print_json({"benchmark": "engine-fit", **figures, **counted})
    else:
        Console().print(fit_report(fit, figures, path))


def _report(result: EngineBenchResult, rows: list[dict[str, Any]], json: bool) -> None:
    from cluster.bench.engine_report import engine_report, profile_table
    from cluster.bench.provenance import provenance

    if json:
        profiled = {"profile": rows} if rows else {}
        figures = {**result.figures, **profiled, "provenance": provenance()}
        print_json({"benchmark": "engine", **figures})
        return
    console = Console()
    console.print(engine_report(result.figures))
    if rows:
        console.print(profile_table(rows))
