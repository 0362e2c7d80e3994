"""`sluice bench store`: measure the tiers below the KV cache, without Ray."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import AsJson, ConfigFile, Overrides, bar_options, print_json
from cluster.config import load_config
from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.bench.store import OnProgress
    from cluster.config import ClusterConfig

_LOAD = "Load"
_FAULTS = "Faults"


def bench_store(
    model: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint, or 'demo'.")] = "demo",
    config: ConfigFile = None,
    overrides: Overrides = None,
    redis: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Of a Redis, or env:NAME; a redis-server is started without it."
        ),
    ] = None,
    parts: Annotated[
        str, typer.Option(help="What to measure, in a list with commas.")
    ] = "raw,budget,ttft,decode,prefix",
    rounds: Annotated[int, typer.Option(min=1, help="Medians count.", rich_help_panel=_LOAD)] = 3,
    threads: Annotated[
        int, typer.Option(min=0, help="Of torch; 0: one per core.", rich_help_panel=_LOAD)
    ] = 0,
    prompt_len: Annotated[
        int, typer.Option(min=64, help="Tokens, of ttft.", rich_help_panel=_LOAD)
    ] = 2000,
    streams: Annotated[
        int, typer.Option(min=1, max=64, help="Of decode and faults.", rich_help_panel=_LOAD)
    ] = 16,
    stream_len: Annotated[
        int, typer.Option(min=16, help="Tokens of a stream's answer.", rich_help_panel=_LOAD)
    ] = 192,
    requests: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of prefix; 0: 1000 with the demo model, else 64. With --faults different ones; "
            "0: 96.",
            rich_help_panel=_LOAD,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of all prompts.", rich_help_panel=_LOAD)] = 0,
    faults: Annotated[
        bool,
        typer.Option("--faults", help="Let Redis fail under a load.", rich_help_panel=_FAULTS),
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0, help="Repeat the faults so long.", rich_help_panel=_FAULTS)
    ] = 0.0,
    phase_s: Annotated[
        float, typer.Option(min=0.5, help="Of a fault, and between.", rich_help_panel=_FAULTS)
    ] = 8.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
    json: AsJson = False,
) -> None:
    """Measure host tier and store: bytes, first tokens, running streams, budget, faults."""

    own = {"model.path": model, "parallel.threads_per_worker": threads}
    settings = [f"{name}={json_module.dumps(value)}" for name, value in own.items()]
    cluster = load_config(config, [*settings, *(overrides or [])])
    if faults:
        load = {"num_streams": streams, "phase_s": phase_s, "minutes": minutes}
        if requests:
            load["num_requests"] = requests
        figures = _run_faults(cluster, redis, load, seed)
    else:
        figures = _run_parts(
            cluster,
            redis,
            {
                "parts": tuple(part for part in parts.split(",") if part),
                "num_rounds": rounds,
                "prompt_tokens": prompt_len,
                "seed": seed,
            },
            decode={"num_streams": streams, "stream_output_tokens": stream_len},
            num_requests=requests or (1000 if cluster.model.path == "demo" else 64),
        )
    _report(figures, faults, plot, json)


def _run_parts(
    config: ClusterConfig,
    redis: str | None,
    fields: dict[str, Any],
    *,
    decode: dict[str, int],
    num_requests: int,
) -> dict[str, Any]:
    from cluster.bench.store import StoreBench, run_store_bench
    from cluster.bench.store_decode import DecodeLoad
    from cluster.bench.store_prefix import PrefixLoad

    bench = StoreBench(
        decode=DecodeLoad(**decode), prefix=PrefixLoad(num_requests=num_requests), **fields
    )
    with _bar() as on_progress:
        return run_store_bench(config, bench, redis, on_progress)


def _run_faults(
    config: ClusterConfig, redis: str | None, load: dict[str, Any], seed: int
) -> dict[str, Any]:
    from cluster.bench.store import run_store_faults
    from cluster.bench.store_faults import FaultLoad

    if redis is not None:
        raise InvalidArgumentError(
            "--faults with --redis: it kills and restarts a server of its own; leave --redis out",
            field="redis",
        )
    with _bar() as on_progress:
        return run_store_faults(config, FaultLoad(**load), seed, on_progress)


def _report(figures: dict[str, Any], faults: bool, plot: Path | None, json: bool) -> None:
    from cluster.bench.provenance import provenance
    from cluster.bench.store_report import fault_report, plot_faults, plot_store, store_report

    if plot is not None:
        (plot_faults if faults else plot_store)(figures, plot)
    if json:
        name = "store faults" if faults else "store"
        print_json({"benchmark": name, **figures, "provenance": provenance()})
    else:
        Console().print(fault_report(figures) if faults else store_report(figures))


@contextmanager
def _bar() -> Iterator[OnProgress]:
    """Yield what moves a bar on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Redrawn twice a second: the bar shares the cores with what is measured.
    with Progress(*columns, TimeElapsedColumn(), refresh_per_second=2, **bar_options()) as bar:
        task = bar.add_task("starting", total=None)

        def on_progress(label: str, num_done: int, total: int) -> None:
            bar.update(task, description=escape(label), completed=num_done, total=total)

        yield on_progress
