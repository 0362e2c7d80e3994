"""Compare the simulator with a real cluster of the demo model on this machine.

Run by scripts/validate_simulator, which installs what it needs. Exit status 0 only if all that is
compared is within 15 %.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.bench.provenance import provenance
from cluster.bench.validation import is_within, parse_loads, point_figures
from cluster.bench.validation_report import plot_validation, validation_table
from cluster.bench.validation_run import Validation, ValidationPlan, validate, with_fixed_cache
from cluster.cli.options import print_json
from cluster.config import ClusterConfig, load_config
from cluster.errors import SluiceError
from cluster.gateway import app

NUM_BLOCKS = 2048


def run(config: ClusterConfig, plan: ValidationPlan, console: Console) -> Validation:
    """Start a cluster, validate on it, stop it."""

    def tell(message: str) -> None:
        console.print(message, markup=False, highlight=False)

    app.check(config)
    # Ray prints to standard output on its own account: there, JSON has to be alone.
    with contextlib.redirect_stdout(sys.stderr), app.start(config, on_progress=tell) as cluster:
        return asyncio.run(validate(cluster.address, config, plan, tell))


def main(
    loads: Annotated[str, typer.Option(help="Shares of the capacity.")] = "0.3,0.6,0.9",
    rounds: Annotated[int, typer.Option(min=1, help="Of all loads.")] = 3,
    duration_s: Annotated[float, typer.Option(min=1, help="Of a load in a round.")] = 12.0,
    replicas: Annotated[int, typer.Option(min=2, help="Groups that serve the model.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, prompts and policy.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw measured and predicted.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON only.")] = False,
) -> None:
    """Measure a real cluster at several loads and predict what was measured."""
    console = Console(stderr=json)
    settings = ["gateway.port=0", f"replica.num_replicas={replicas}", "store.kv_url=off"]
    try:
        plan = ValidationPlan(parse_loads(loads), rounds, duration_s, seed=seed)
        config = with_fixed_cache(load_config(None, settings), NUM_BLOCKS)
        validation = run(config, plan, console)
        points = validation.points()
        if plot is not None:
            plot_validation(points, plot, f"{config.model.served_name}, {replicas} replicas")
    except SluiceError as error:
        console.print(f"validate_simulator: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    if json:
        measured = [asdict(one) for one in validation.measured]
        figures = [point_figures(point) for point in points]
        where = provenance()
        print_json({"points": figures, "calibrations": measured, "provenance": where})
    else:
        console.print(validation_table(points))
    raise typer.Exit(int(not all(is_within(r) for p in points for r in p.ratios.values())))


if __name__ == "__main__":
    typer.run(main)
