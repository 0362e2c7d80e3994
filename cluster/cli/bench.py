"""`sluice bench serve | gateway`: measure a cluster as clients see it, or the gateway alone."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.bench_batching import bench_batching
from cluster.cli.bench_engine import bench_engine
from cluster.cli.bench_store import bench_store
from cluster.cli.bench_techniques import bench_techniques
from cluster.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    ApiKeyFile,
    AsJson,
    CaFile,
    CertFile,
    KeyFile,
    bar_options,
    print_json,
    read_api_key,
    tls_of,
)
from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.bench.load import LoadPlan
    from cluster.bench.serve import ServeBench, ServeBenchResult
    from cluster.bench.statistics import RequestRecord

bench = typer.Typer(
    help="Measure: a cluster, the gateway, the engine, the store.", no_args_is_help=True
)
bench.command("engine")(bench_engine)
bench.command("techniques")(bench_techniques)
bench.command("batching")(bench_batching)
bench.command("store")(bench_store)

_DEFAULT_NUM_REQUESTS = 100
_LOAD = "Load"
_REQUEST = "Requests"
_OBJECTIVE = "Objective"


@bench.command("serve")
def bench_serve(
    address: Address = DEFAULT_ADDRESS,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    api_key_file: ApiKeyFile = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Poisson arrivals per second.", rich_help_panel=_LOAD),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests under way at any time.", rich_help_panel=_LOAD),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, help="At most; 100 without --duration.", rich_help_panel=_LOAD),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds in which requests are sent.", rich_help_panel=_LOAD),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before, not counted.", rich_help_panel=_LOAD)
    ] = 4,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Deadline of a request.", rich_help_panel=_LOAD)
    ] = 600.0,
    model: Annotated[
        str, typer.Option(help="Name; needed where several are served.", rich_help_panel=_REQUEST)
    ] = "",
    input_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_REQUEST)] = 256,
    output_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_REQUEST)] = 64,
    shared_prefix_tokens: Annotated[
        int,
        typer.Option(min=0, help="Of the prompt, common to all.", rich_help_panel=_REQUEST),
    ] = 0,
    seed: Annotated[
        int, typer.Option(help="Of prompts and arrivals.", rich_help_panel=_REQUEST)
    ] = 0,
    ttft_slo_s: Annotated[float, typer.Option(min=0, rich_help_panel=_OBJECTIVE)] = math.inf,
    tpot_slo_s: Annotated[float, typer.Option(min=0, rich_help_panel=_OBJECTIVE)] = math.inf,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Drive a serving cluster with random prompts; goodput counts refusals and failures."""
    from cluster.bench.load import RequestShape
    from cluster.bench.serve import ServeBench
    from cluster.bench.statistics import LatencyObjective

    plan = _load_plan(rate, concurrency, num_requests, duration, timeout_s)
    shape = RequestShape(input_tokens, output_tokens, shared_prefix_tokens, seed)
    objective = LatencyObjective(ttft_slo_s, tpot_slo_s)
    tls = tls_of(ca_file, cert_file, key_file)
    api_key = read_api_key(api_key_file)
    measurement = ServeBench(address, plan, shape, objective, warmup, model, tls, api_key)
    _report_serve(measurement, _run_with_progress(measurement), plot, json)


def _load_plan(
    rate: float | None,
    concurrency: int | None,
    num_requests: int | None,
    duration: float | None,
    timeout_s: float,
) -> LoadPlan:
    from cluster.bench.load import LoadPlan

    if (rate is None) == (concurrency is None):
        raise InvalidArgumentError(
            f"--rate={rate} --concurrency={concurrency}: give exactly one of the two", field="rate"
        )
    if num_requests is None and duration is None:
        num_requests = _DEFAULT_NUM_REQUESTS
    return LoadPlan(num_requests, duration, rate, concurrency, timeout_s)


def _run_with_progress(measurement: ServeBench) -> ServeBenchResult:
    from cluster.bench.serve import run_serve_bench

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Redrawn twice a second: the bar shares a core with the client that is measured.
    with Progress(*columns, TimeElapsedColumn(), refresh_per_second=2, **bar_options()) as progress:
        task = progress.add_task("requests", total=measurement.plan.num_requests)
        num_failed = 0

        def on_record(record: RequestRecord) -> None:
            nonlocal num_failed
            num_failed += not record.is_ok
            failed = f", {num_failed} failed" if num_failed else ""
            progress.update(task, advance=1, description=f"requests{failed}")

        return asyncio.run(run_serve_bench(measurement, on_record))


def _report_serve(
    measurement: ServeBench, result: ServeBenchResult, plot: Path | None, json: bool
) -> None:
    from cluster.bench.provenance import provenance
    from cluster.bench.report import serve_report

    if plot is not None:
        from cluster.bench.plot import plot_run

        title = f"{result.figures['model']} at {measurement.address}"
        plot_run(result.records, measurement.objective, plot, title)
    if json:
        print_json({"benchmark": "serve", **result.figures, "provenance": provenance()})
    else:
        Console().print(serve_report(result.figures["result"]))


@bench.command("gateway")
def bench_gateway(
    streams: Annotated[int, typer.Option(min=1, max=1024, help="Streams at once.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 5.0,
    rate_per_s: Annotated[
        float, typer.Option(min=1, help="Messages per second, all streams, where paced.")
    ] = 300.0,
    json: AsJson = False,
) -> None:
    """Measure the gateway alone, before an engine that makes tokens from nothing."""
    from cluster.bench.gateway import GatewayBench, run_gateway_bench
    from cluster.bench.provenance import provenance
    from cluster.bench.report import gateway_report

    with Console(stderr=True).status("measuring"):
        figures = asyncio.run(run_gateway_bench(GatewayBench(streams, seconds, rate_per_s)))
    if json:
        print_json({"benchmark": "gateway", **figures, "provenance": provenance()})
    else:
        Console().print(gateway_report(figures))
