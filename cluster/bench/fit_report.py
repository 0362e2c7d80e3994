"""What `bench engine --fit` found, as tables for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cluster.bench.fit import Fit, FitQuality
from cluster.bench.report import figure_table


def fit_report(fit: Fit, figures: dict[str, Any], path: Path) -> RenderableType:
    """Return the tables of one fit.

    Args:
        fit: What was found.
        figures: From `fit.fit_figures`.
        path: Where it was written.
    """
    cost = fit.cost
    hinges = ", ".join(f"+{_us(more_s)} beyond {tokens}" for tokens, more_s in cost.hinges)
    costs = figure_table(
        {
            "model": escape(figures["model"]),
            "machine": f"{escape(figures['machine'])}, {figures['threads']} threads",
            "any step": _us(cost.floor_s),
            "per token": _us(cost.token_s) + (f", {hinges}" if hinges else ""),
            "per sequence": _us(cost.sequence_s),
            "per 1000 tokens of a decode's context": _us(1000 * cost.context_s),
            "per 1000 tokens x context of prompts": _us(1000 * cost.prompt_work_s),
            "the engine around a step": _us(fit.overhead_s),
            "measured": f"{len(fit.steps)} steps, in {escape(str(path))}",
        }
    )
    table = Table("held out steps", title="|predicted / measured - 1|", title_justify="left")
    for name in ("number", "median", "p90"):
        table.add_column(name, justify="right")
    for kind, quality in {"all": fit.quality, **fit.quality_by_kind}.items():
        table.add_row(kind, *_quality_cells(quality))
    return Group(costs, table)


def _quality_cells(quality: FitQuality) -> list[str]:
    errors = (quality.error_p50, quality.error_p90)
    return [str(quality.num_steps), *("-" if e is None else f"{e:.1%}" for e in errors)]


def _us(value_s: float) -> str:
    return f"{value_s * 1e6:.1f} µs"
