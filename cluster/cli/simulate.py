"""`sluice simulate`: a cluster in virtual time, once or over a grid of policies and rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.cli import simulate_options as option
from cluster.cli.options import AsJson, Overrides, bar_options, print_json
from cluster.errors import ConfigError, InvalidArgumentError

if TYPE_CHECKING:
    from cluster.simulator.scenario import Scenario
    from cluster.simulator.sweep import GridPoint, SweepPoint
    from cluster.simulator.tables import TextTable


def simulate(
    trace: option.Trace = None,
    workload: option.WorkloadSpec = "",
    skip_invalid: option.SkipInvalid = False,
    num_requests: option.NumRequests = None,
    duration: option.Duration = None,
    rate_scale: option.RateScale = "1",
    policy: option.Policy = "slo",
    admission: option.Admission = None,
    engine_order: option.Order = None,
    replicas: option.Replicas = None,
    gateways: option.Gateways = 1,
    autoscale: option.Autoscale = "",
    seed: option.Seeds = "0",
    event_delay_ms: option.EventDelayMs = 5.0,
    overrides: Overrides = None,
    prefill_tokens_per_s: option.PrefillRate = 9000.0,
    decode_step_ms: option.DecodeStepMs = 30.0,
    cost_model: option.CostModelFile = None,
    hardware: option.HardwareName = "",
    num_parameters: option.NumParameters = 8.03e9,
    kv_bytes_per_token: option.KvBytesPerToken = 131072,
    num_devices: option.NumDevices = 1,
    num_blocks: option.NumBlocks = 800,
    block_size: option.BlockSize = 512,
    max_num_batched_tokens: option.MaxBatchedTokens = 2048,
    fails: option.Fails = None,
    slows: option.Slows = None,
    slo_ttft_s: option.SloTtftS = 2.0,
    slo_ttft_ms_per_token: option.SloTtftMsPerToken = 0.1,
    slo_tpot_ms: option.SloTpotMs = 50.0,
    sweep: option.IsSweep = False,
    serial: option.IsSerial = False,
    target: option.Target = 0.9,
    usd_per_hour: option.UsdPerHour = None,
    html: option.HtmlFile = None,
    json: AsJson = False,
) -> None:
    """Replay a trace or a synthetic workload in virtual time, over the code that serves.

    Give --trace or --workload. The defaults are a replica that prefills 9,000 tokens/s and decodes
    in steps of 30 ms. Goodput is what finished within its objective of all that arrived.
    """
    from cluster.simulator.scenario import Scenario

    scenario = Scenario(
        trace="" if trace is None else str(trace),
        workload=workload,
        skip_invalid=skip_invalid,
        num_requests=num_requests,
        duration_s=duration,
        admission=admission or "",
        engine_order=engine_order or "",
        num_replicas=replicas,
        num_gateways=gateways,
        autoscale=autoscale,
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_step_s=decode_step_ms / 1e3,
        cost_model="" if cost_model is None else str(cost_model),
        hardware=hardware,
        num_parameters=num_parameters,
        kv_bytes_per_token=kv_bytes_per_token,
        num_devices=num_devices,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        slo_ttft_s=slo_ttft_s,
        slo_ttft_per_token_s=slo_ttft_ms_per_token / 1e3,
        slo_tpot_s=slo_tpot_ms / 1e3,
        event_delay_s=event_delay_ms / 1e3,
        fails=tuple(fails or ()),
        slows=tuple(slows or ()),
        overrides=tuple(overrides or ()),
        usd_per_hour=usd_per_hour,
    )
    grid = _grid(policy, rate_scale, seed, is_sweep=sweep)
    _check_page(html)
    if sweep:
        points = _run_sweep(scenario, grid, serial, quiet=json)
        _report_sweep(scenario, points, target, html, json)
    else:
        _run_one(scenario, grid[0], html, json)


def _grid(policy: str, rate_scale: str, seed: str, *, is_sweep: bool) -> list[GridPoint]:
    from cluster.simulator.sweep import make_grid, parse_rates

    try:
        seeds = [int(part) for part in seed.split(",")]
    except ValueError:
        raise InvalidArgumentError(
            f"--seed={seed}: give a whole number, or several as 0,1,2", field="seed"
        ) from None
    grid = make_grid(policy.split(","), parse_rates(rate_scale), seeds)
    if len(grid) > 1 and not is_sweep:
        raise InvalidArgumentError(
            f"--policy={policy} --rate-scale={rate_scale} --seed={seed}: these are {len(grid)} "
            "simulations: add --sweep, or give one of each",
            field="sweep",
        )
    return grid


def _check_page(html: Path | None) -> None:
    """Say what stands in the way of the page now, not after a long simulation."""
    if html is None:
        return
    from cluster.simulator.page import require_page

    require_page()
    if not html.parent.is_dir():
        raise ConfigError(f"--html {html}: there is no folder {html.parent}", field="html")


def _run_one(scenario: Scenario, point: GridPoint, html: Path | None, json: bool) -> None:
    from cluster.bench.provenance import provenance
    from cluster.simulator.page import run_page
    from cluster.simulator.report import make_report
    from cluster.simulator.scenario import at_point, load_workload, run_workload
    from cluster.simulator.tables import report_tables
    from cluster.simulator.workload import begin_times_s

    own = at_point(scenario, point)
    workload = load_workload(own)
    with _bar("virtual seconds", quiet=json) as (bar, task):
        bar.update(task, total=int(max(begin_times_s(workload.arrivals))))
        result = run_workload(own, workload, lambda now_s: bar.update(task, completed=int(now_s)))
    report = make_report(result, usd_per_hour=scenario.usd_per_hour)
    if html is not None:
        _write(html, run_page(result, report))
    if json:
        print_json({**report.to_dict(), "provenance": provenance()})
    else:
        _print(report_tables(report))


def _run_sweep(
    scenario: Scenario, grid: list[GridPoint], serial: bool, *, quiet: bool
) -> list[SweepPoint]:
    from cluster.simulator.scenario import check_scenario, run_point
    from cluster.simulator.sweep import run_serial

    check_scenario(scenario, grid)
    with _bar("simulations", quiet=quiet) as (bar, task):
        bar.update(task, total=len(grid))

        def on_point(point: SweepPoint, num_done: int, total: int) -> None:
            label = f"{point.policy} at {point.rate_scale:g} x: {point.report['goodput'] or 0:.1%}"
            bar.update(task, completed=num_done, total=total, description=escape(label))

        if serial:
            return run_serial(grid, lambda point: run_point(scenario, point), on_point)
        from cluster.simulator.ray_sweep import run_on_ray

        return run_on_ray(scenario, grid, on_point)


def _report_sweep(
    scenario: Scenario,
    points: Sequence[SweepPoint],
    target: float,
    html: Path | None,
    json: bool,
) -> None:
    from cluster.bench.provenance import provenance
    from cluster.simulator.page import sweep_page
    from cluster.simulator.sweep import knees
    from cluster.simulator.tables import sweep_tables

    found = knees(points, target)
    settings: dict[str, Any] = asdict(scenario)
    for name in ("policy", "rate_scale", "seed"):
        del settings[name]  # what the points differ in
    if html is not None:
        _write(html, sweep_page(points, found, settings))
    if json:
        figures = {
            "knees": {policy: asdict(knee) for policy, knee in found.items()},
            "points": [point.to_dict() for point in points],
            "settings": settings,
        }
        print_json({**figures, "provenance": provenance()})
    else:
        _print(sweep_tables(points, found))


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error}", field="html") from error


def _print(tables: Sequence[TextTable]) -> None:
    console = Console()
    for made in tables:
        console.print(f"[italic]{escape(made.title)}[/]")  # a table's own title has its width
        table = Table(show_header=any(made.columns))
        for index, name in enumerate(made.columns):
            table.add_column(escape(name), justify="right" if index else "left")
        for row in made.rows:
            table.add_row(*map(escape, row))
        console.print(table)


@contextmanager
def _bar(label: str, *, quiet: bool) -> Iterator[tuple[Progress, Any]]:
    """Yield a bar on standard error, and its task; nothing is shown where it is quiet."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    options = bar_options()
    options["disable"] = options["disable"] or quiet
    with Progress(*columns, TimeElapsedColumn(), refresh_per_second=2, **options) as bar:
        yield bar, bar.add_task(label, total=None)
