"""The validation of the simulator as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.bench.canvas import open_pyplot, write_png
from cluster.bench.validation import COMPARED, TOLERANCE, LoadPoint, RunFigures, is_within

_SHOWN = {  # what it is called, and its factor to the unit shown
    "ttft_p50_s": ("TTFT p50, ms", 1e3),
    "tpot_p50_s": ("TPOT p50, ms", 1e3),
    "out_tokens_per_s": ("output tokens/s", 1.0),
}


def validation_table(points: Sequence[LoadPoint]) -> Table:
    """Return measured and predicted figures of every load; what is off is red."""
    table = Table("load", "requests/s", "", title="simulator against real cluster")
    for name in ("measured", "predicted", "predicted / measured"):
        table.add_column(name, justify="right")
    for point in points:
        for name in COMPARED:
            label, factor = _SHOWN[name]
            ratio = point.ratios[name]
            style = "green" if is_within(ratio) else "red"
            is_first = name == COMPARED[0]
            table.add_row(
                f"{point.load:g}" if is_first else "",
                f"{point.rate_per_s:.2f}" if is_first else "",
                label,
                f"{factor * getattr(point.measured, name):.1f}",
                f"{factor * getattr(point.predicted, name):.1f}",
                f"[{style}]{ratio:.2f}[/]",
            )
        table.add_section()
    return table


def plot_validation(points: Sequence[LoadPoint], path: Path, title: str) -> None:
    """Write a PNG of measured and predicted figures over the load, with the tolerance.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = open_pyplot()
    figure, all_axes = pyplot.subplots(1, len(COMPARED), figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    loads = [point.load for point in points]
    for axes, name in zip(all_axes, COMPARED, strict=True):
        label, factor = _SHOWN[name]
        measured = [factor * _value(point.measured, name) for point in points]
        low = [(1 - TOLERANCE) * value for value in measured]
        high = [(1 + TOLERANCE) * value for value in measured]
        axes.fill_between(loads, low, high, alpha=0.2, label=f"measured, {TOLERANCE:.0%} around")
        axes.plot(loads, measured, marker="o", label="measured")
        predicted: list[Any] = [factor * _value(point.predicted, name) for point in points]
        axes.plot(loads, predicted, marker="x", linestyle="--", label="predicted")
        axes.set(xlabel="load, share of the capacity", ylabel=label, ylim=(0, None))
    all_axes[0].legend()
    write_png(pyplot, figure, path)


def _value(figures: RunFigures, name: str) -> float:
    return float(getattr(figures, name))
