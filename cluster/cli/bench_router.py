"""`sluice bench router`: measure the global scheduler in this process, without a network."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.options import AsJson, print_json


def bench_router(
    replicas: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=4096, help="To decide among; may be repeated.", show_default="64, 1024"
        ),
    ] = None,
    blocks: Annotated[
        int, typer.Option(min=1, max=10**7, help="Cached, of all replicas together.")
    ] = 1_000_000,
    prompt_blocks: Annotated[
        int, typer.Option(min=1, max=8191, help="Of each prompt, 16 tokens each.")
    ] = 100,
    requests: Annotated[
        int, typer.Option(min=1, max=10**6, help="Decisions of each number of replicas.")
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Of caches, loads and prompts.")] = 0,
    json: AsJson = False,
) -> None:
    """Measure what a decision costs, and what the prefix index takes and how fast it fills."""
    from cluster.bench.provenance import provenance
    from cluster.bench.router import RouterBench, run_router_bench
    from cluster.bench.router_report import router_report

    what = RouterBench(tuple(replicas or (64, 1024)), blocks, prompt_blocks, requests, seed)
    with Console(stderr=True).status("measuring") as status:
        figures = run_router_bench(what, lambda label: status.update(f"measuring: {label}"))
    if json:
        print_json({"benchmark": "router", **figures, "provenance": provenance()})
    else:
        Console().print(router_report(figures))
