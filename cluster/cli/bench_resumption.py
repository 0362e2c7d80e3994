"""`sluice bench resumption`: kill processes under streams and compare what clients get."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import AsJson, bar_options, print_json

if TYPE_CHECKING:
    from cluster.bench.resumption import OnProgress


class Kind(StrEnum):
    """What is killed."""

    REPLICA = "replica"
    GATEWAY = "gateway"


class Dtype(StrEnum):
    """Of the model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def bench_resumption(
    kind: Annotated[Kind, typer.Option(help="What is killed.")] = Kind.REPLICA,
    cases: Annotated[
        str, typer.Option(help="Requests, in a list with commas; empty: all.", show_default="all")
    ] = "",
    every: Annotated[
        int, typer.Option(min=1, help="Kill at each N-th token, and at the last.", metavar="N")
    ] = 1,
    tokens: Annotated[int, typer.Option(min=16, max=512, help="Of an answer, about.")] = 64,
    min_step_ms: Annotated[
        float,
        typer.Option(
            min=0, max=1000, help="Of an engine's step, so that a kill meets the index aimed at."
        ),
    ] = 10.0,
    dtype: Annotated[
        Dtype, typer.Option(help="With bfloat16 differing answers are counted, no more.")
    ] = Dtype.FLOAT32,
    json: AsJson = False,
) -> None:
    """Kill -9 at every token index: identity of the streams, and the gaps that clients see.

    Ends with status 1 where something falls short of what is asked.
    """
    from cluster.bench.provenance import provenance
    from cluster.bench.resumption import ResumptionBench, run_resumption_bench
    from cluster.bench.resumption_cases import CASES
    from cluster.bench.resumption_report import misses, resumption_report

    bench = ResumptionBench(
        kind.value,
        tuple(name.strip() for name in cases.split(",")) if cases else CASES,
        num_tokens=tokens,
        every=every,
        dtype=dtype.value,
        min_step_s=min_step_ms / 1e3,
    )
    with _bar() as on_progress:
        figures = asyncio.run(run_resumption_bench(bench, on_progress))
    found = misses(figures)
    if json:
        print_json(
            {
                "benchmark": "resumption",
                **figures,
                "misses": found,
                "provenance": provenance(),
            }
        )
    else:
        Console().print(resumption_report(figures))
        for miss in found:
            Console().print(f"[red]{escape(miss)}[/red]")
    if found:
        raise typer.Exit(1)


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
