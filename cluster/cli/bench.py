"""`sluice bench`: its commands, and `sluice bench gateway`: measure the gateway alone."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.bench_batching import bench_batching
from cluster.cli.bench_chaos import bench_chaos
from cluster.cli.bench_engine import bench_engine
from cluster.cli.bench_resumption import bench_resumption
from cluster.cli.bench_router import bench_router
from cluster.cli.bench_serve import bench_serve
from cluster.cli.bench_store import bench_store
from cluster.cli.bench_techniques import bench_techniques
from cluster.cli.options import AsJson, print_json

bench = typer.Typer(
    help="Measure: a cluster, the gateway, the router, the engine, the store.", no_args_is_help=True
)
bench.command("engine")(bench_engine)
bench.command("techniques")(bench_techniques)
bench.command("batching")(bench_batching)
bench.command("store")(bench_store)
bench.command("router")(bench_router)
bench.command("serve")(bench_serve)
bench.command("resumption")(bench_resumption)
bench.command("chaos")(bench_chaos)


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
