"""`sluice bench techniques`: what each technique gains, one added at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import AsJson, bar_options, print_json

if TYPE_CHECKING:
    from cluster.bench.techniques_workload import Workload


def bench_techniques(
    model: Annotated[str, typer.Option(metavar="DIR", help="bf16 checkpoint, or 'demo'.")] = "demo",
    requests: Annotated[
        int | None, typer.Option(min=1, help="At most, per technique; 1000 by default.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="Per technique: no request begins later; 40 by default."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: one per core.")] = 0,
    technique: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this one; may be repeated."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few short requests: shows that it works.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the gains.")] = None,
    json: AsJson = False,
) -> None:
    """Add one technique at a time to a naive server; each runs in a process of its own.

    The exit status is 1 where a row failed; the others are reported all the same.
    """
    from cluster.bench.provenance import provenance
    from cluster.bench.techniques_report import techniques_report
    from cluster.bench.techniques_workload import QUICK, Workload

    workload = QUICK if quick else Workload()
    if requests is not None:
        workload = replace(workload, num_requests=requests)
    if seconds is not None:
        workload = replace(workload, budget_s=seconds)
    figures = _run(model, workload, threads, technique or [])
    if plot is not None:
        from cluster.bench.plot_techniques import plot_techniques

        plot_techniques(figures, plot)
    if json:
        print_json({"benchmark": "techniques", **figures, "provenance": provenance()})
    else:
        Console().print(techniques_report(figures))
    if any(row["error"] for row in figures["rows"]):
        raise typer.Exit(1)


def _run(model: str, workload: Workload, threads: int, names: list[str]) -> dict[str, Any]:
    from cluster.bench.techniques import run_techniques

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Redrawn once a second: the bar shares the cores with what is measured.
    with Progress(*columns, TimeElapsedColumn(), refresh_per_second=1, **bar_options()) as bar:
        task = bar.add_task("starting", total=None)

        def on_row(title: str, index: int, total: int) -> None:
            bar.update(task, description=escape(title), completed=index, total=total)

        return run_techniques(model, workload, threads=threads, names=names, on_row=on_row)
