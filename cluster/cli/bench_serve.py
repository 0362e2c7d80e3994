"""`sluice bench serve`: measure a cluster as clients see it, under synthetic load or a workload."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import (
    DEFAULT_ADDRESS,
    OBJECTIVE,
    Address,
    ApiKeyFile,
    AsJson,
    CaFile,
    CertFile,
    ConfigFile,
    KeyFile,
    OfClass,
    Overrides,
    TpotS,
    TtftS,
    bar_options,
    print_json,
    read_api_key,
    tls_of,
)
from cluster.config import load_config
from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.bench.load import LoadPlan
    from cluster.bench.objectives import Objectives
    from cluster.bench.replay import ReplayPlan
    from cluster.bench.serve import ServeBench, ServeBenchResult
    from cluster.bench.statistics import RequestRecord

_DEFAULT_NUM_REQUESTS = 100
_LOAD = "Load: one of --rate, --concurrency, --trace, --workload"
_REQUEST = "Requests of --rate and --concurrency"


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
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Mooncake JSONL or Azure CSV, replayed.", rich_help_panel=_LOAD
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="As of `sluice simulate`, replayed.", rich_help_panel=_LOAD
        ),
    ] = None,
    rate_scale: Annotated[
        float, typer.Option(help="Replay at so many times the rate.", rich_help_panel=_LOAD)
    ] = 1.0,
    skip_invalid: Annotated[
        bool,
        typer.Option("--skip-invalid", help="Of a trace: leave bad rows.", rich_help_panel=_LOAD),
    ] = False,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most; 100 without --duration, all of a replay.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds in which requests are sent; of a replay before --rate-scale.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before, not counted.", rich_help_panel=_LOAD)
    ] = 4,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Deadline of a request.", rich_help_panel=_LOAD)
    ] = 600.0,
    model: Annotated[str, typer.Option(help="Name; needed where several are served.")] = "",
    input_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_REQUEST)] = 256,
    output_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_REQUEST)] = 64,
    shared_prefix_tokens: Annotated[
        int,
        typer.Option(min=0, help="Of the prompt, common to all.", rich_help_panel=_REQUEST),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, arrivals, classes, workload.")] = 0,
    service_class: OfClass = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS=SHARE,...", help="Drawn for each request.", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    ttft_s: TtftS = None,
    tpot_s: TpotS = None,
    ttft_ms_per_token: Annotated[
        float,
        typer.Option(
            min=0, help="More than --ttft-s for each prompt token.", rich_help_panel=OBJECTIVE
        ),
    ] = 0.0,
    config: ConfigFile = None,
    overrides: Overrides = None,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write one line per request.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Drive a serving cluster; goodput counts refusals and failures.

    Objectives are sent with the requests, and goodput holds the answers against them. Those
    of classes are in the configuration (--config, --set): give the cluster's.
    """
    from cluster.bench.load import RequestShape
    from cluster.bench.objectives import choose_objectives
    from cluster.bench.records import write_records
    from cluster.bench.serve import ServeBench

    is_replay = _is_replay(rate, concurrency, trace, workload, rate_scale)
    engine = load_config(config, overrides).engine
    times = (ttft_s, tpot_s, ttft_ms_per_token)
    objectives = choose_objectives(service_class, classes, times, engine)
    bounds = Bounds(num_requests, duration, timeout_s)
    plan: LoadPlan | ReplayPlan
    if is_replay:
        source = Source(trace, workload, skip_invalid, rate_scale, seed)
        plan = _replay_plan(source, objectives, bounds)
    else:
        plan = _load_plan(rate, concurrency, bounds)
    measurement = ServeBench(
        address,
        plan,
        RequestShape(input_tokens, output_tokens, shared_prefix_tokens, seed),
        objectives.mix(input_tokens, seed),
        warmup,
        model,
        tls_of(ca_file, cert_file, key_file),
        read_api_key(api_key_file),
    )
    if records is not None:
        write_records([], records)  # a file that cannot be written is an error before the run
    result = _run_with_progress(measurement)
    if records is not None:
        write_records(result.records, records)
    _report(measurement, result, plot, json)


class Bounds(NamedTuple):
    """How much is sent, whatever the load is."""

    num_requests: int | None  # at the most
    duration_s: float | None  # none is sent later
    timeout_s: float  # of a request


class Source(NamedTuple):
    """What is replayed."""

    trace: Path | None
    workload: str | None  # in place of a trace
    skip_invalid: bool  # rows of the trace
    rate_scale: float
    seed: int


def _is_replay(
    rate: float | None,
    concurrency: int | None,
    trace: Path | None,
    workload: str | None,
    rate_scale: float,
) -> bool:
    given = {"rate": rate, "concurrency": concurrency, "trace": trace, "workload": workload}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        shown = " ".join(f"--{name}={value}" for name, value in given.items())
        raise InvalidArgumentError(f"{shown}: give exactly one of these", field="rate")
    is_replay = chosen[0] in ("trace", "workload")
    if rate_scale != 1 and not is_replay:
        raise InvalidArgumentError(
            f"--rate-scale={rate_scale:g} with --{chosen[0]}: it scales a --trace or a --workload",
            field="rate-scale",
        )
    return is_replay


def _load_plan(rate: float | None, concurrency: int | None, bounds: Bounds) -> LoadPlan:
    from cluster.bench.load import LoadPlan

    num_requests, duration_s, timeout_s = bounds
    if num_requests is None and duration_s is None:
        num_requests = _DEFAULT_NUM_REQUESTS
    return LoadPlan(num_requests, duration_s, rate, concurrency, timeout_s)


def _replay_plan(source: Source, objectives: Objectives, bounds: Bounds) -> ReplayPlan:
    from cluster.bench.replay import ReplayPlan
    from cluster.simulator.synthetic import from_spec
    from cluster.simulator.traces import read_trace
    from cluster.simulator.workload import first, scaled

    if source.trace is not None:
        workload = read_trace(source.trace, skip_invalid=source.skip_invalid)
    else:
        workload = from_spec(source.workload or "", seed=source.seed)
    workload = first(workload, num_requests=bounds.num_requests, duration_s=bounds.duration_s)
    workload = objectives.given_to(workload, source.seed)
    return ReplayPlan(
        scaled(workload, source.rate_scale),
        source.rate_scale,
        bounds.timeout_s,
        source.seed,
        objectives.config,
        sends_standard=bool(objectives.shares),
    )


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


def _report(
    measurement: ServeBench, result: ServeBenchResult, plot: Path | None, json: bool
) -> None:
    from cluster.bench.provenance import provenance
    from cluster.bench.serve_report import full_report

    if plot is not None:
        from cluster.bench.plot import plot_run

        title = f"{result.figures['model']} at {measurement.address}"
        plot_run(result.records, measurement.common_objective, plot, title)
    if json:
        print_json({"benchmark": "serve", **result.figures, "provenance": provenance()})
    else:
        Console().print(full_report(result.figures))
