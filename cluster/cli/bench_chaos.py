"""`sluice bench chaos`: faults against a running cluster under load; every stream is checked."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import AsJson, Overrides, bar_options, print_json
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.bench.chaos_load import Tally
    from cluster.bench.chaos_run import Listener

_CLUSTER = "The cluster, which this command starts and ends"


def bench_chaos(
    minutes: Annotated[float, typer.Option(min=0.1, help="Of load and faults.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Of faults, requests and clients.")] = 0,
    interval: Annotated[
        float, typer.Option(min=1.0, help="Seconds between two faults, on average.")
    ] = 10.0,
    faults: Annotated[
        str, typer.Option(metavar="LIST", help="Kinds, with commas; empty: all.")
    ] = "",
    streams: Annotated[int, typer.Option(min=1, max=256, help="At once.")] = 16,
    requests: Annotated[
        int, typer.Option(min=1, help="Different ones; they are asked again and again.")
    ] = 70,
    replicas: Annotated[
        int, typer.Option(min=1, max=16, help="Groups.", rich_help_panel=_CLUSTER)
    ] = 3,
    gateways: Annotated[
        int, typer.Option(min=1, max=8, help="On one port.", rich_help_panel=_CLUSTER)
    ] = 2,
    workers: Annotated[
        int, typer.Option(min=1, max=8, help="Of a group: its ranks.", rich_help_panel=_CLUSTER)
    ] = 1,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Gets report.json and gaps.png."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Kill, stop, drain, cut off; hold every stream against an undisturbed run.

    Exit status 1: a stream was wrong, duplicated, truncated or lost, something leaked, or too
    little happened to say so.
    """
    from cluster.bench.chaos import run_chaos
    from cluster.bench.chaos_plan import ChaosPlan
    from cluster.bench.chaos_report import chaos_report
    from cluster.bench.chaos_schedule import fault_kinds
    from cluster.bench.provenance import provenance

    plan = ChaosPlan(
        minutes=minutes,
        seed=seed,
        interval_s=interval,
        num_replicas=replicas,
        num_gateways=gateways,
        num_streams=streams,
        num_asks=requests,
        num_workers=workers,
        kinds=fault_kinds(faults, workers),
    )
    if out is not None:
        _make(out)
    with _progress(plan.seconds) as listener, _silenced():
        figures = run_chaos(plan, overrides, listener)
    found = {"benchmark": "chaos", **figures, "provenance": provenance()}
    if out is not None:
        _write(found, out)
    if json:
        print_json(found)
    else:
        Console().print(chaos_report(figures))
    if not figures["is_clean"]:
        raise typer.Exit(1)


def _make(folder: Path) -> None:
    """Create the folder now: a run is long, and not to be lost at its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out={folder}: {error.strerror}: name a folder that can be written", field="out"
        ) from error


def _write(figures: dict[str, Any], folder: Path) -> None:
    from cluster.bench.chaos_report import plot_chaos

    text = json_module.dumps(figures, indent=1, default=str, allow_nan=False)
    (folder / "report.json").write_text(text + "\n")
    plot_chaos(figures, folder / "gaps.png")


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep what Ray prints of every process that was killed, a paragraph each, off the output."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _progress(total_s: float) -> Iterator[Listener]:
    """Yield what shows how a run goes: a bar, and above it every fault as it happens."""
    from cluster.bench.chaos_run import Listener

    columns = (TextColumn("{task.description}"), BarColumn())
    # Redrawn twice a second: the bar shares the cores with what is measured.
    with Progress(*columns, TimeElapsedColumn(), refresh_per_second=2, **bar_options()) as bar:
        task = bar.add_task("starting", total=None)

        def tell(text: str) -> None:
            bar.update(task, description=escape(text), total=None)

        def strike(text: str) -> None:
            if not bar.disable:
                bar.console.print(escape(text), highlight=False)

        def count(tally: Tally, seconds: float) -> None:
            rate = f"{tally.num_streams / seconds:.1f} streams/s" if seconds else ""
            verdicts = ", ".join(f"{n} {verdict}" for verdict, n in tally.verdicts.items())
            text = f"{rate}  {verdicts}"
            bar.update(task, description=text, completed=min(seconds, total_s), total=total_s)

        yield Listener(tell, strike, count)
