"""A picture of the ablation: tokens per second from row to row, and what each step gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.bench.canvas import open_pyplot, write_png

_GAIN, _LOSS, _FIRST, _FAILED = "#2a7f62", "#b5543a", "#7a7a7a", "#cccccc"


def plot_techniques(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG of a `techniques.run_techniques` result: one bar per technique, log scale.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = open_pyplot()
    rows = figures["rows"]
    height = 1.6 + 0.42 * len(rows)
    figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
    total = figures["total"]
    gain = f": {total['gain']:.1f}x over {total['first']}" if total["gain"] else ""
    axes.set_title(f"{figures['model']}, {figures['threads']} threads{gain}", loc="left")
    _plot_bars(axes, rows)
    axes.set(xlabel="output tokens/s, log scale", yticks=range(len(rows)))
    axes.set_yticklabels([row["title"] for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    write_png(pyplot, figure, path)


def _plot_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw each row from the rate of the row before it to its own, as a waterfall."""
    rates = [row["out_tokens_per_s"] for row in rows if not row["error"]]
    floor = min(rates, default=1.0) / 2
    axes.set_xscale("log")
    axes.set_xlim(floor, 3 * max(rates, default=1.0))
    before: float | None = None
    for index, row in enumerate(rows):
        if row["error"]:
            axes.text(floor * 1.05, index, "failed", va="center", color=_LOSS)
            continue
        rate = row["out_tokens_per_s"]
        axes.barh(index, rate - floor, left=floor, color=_FAILED, height=0.66, alpha=0.45)
        if before is None:
            axes.barh(index, rate - floor, left=floor, color=_FIRST, height=0.66)
        else:
            low, high = sorted((before, rate))
            color = _GAIN if rate >= before else _LOSS
            axes.barh(index, high - low, left=low, color=color, height=0.66)
        axes.text(max(rate, before or rate) * 1.06, index, _label(row), va="center", fontsize=9)
        before = rate


def _label(row: dict[str, Any]) -> str:
    label = f"{row['out_tokens_per_s']:.1f}"
    if row["gain_over_previous"]:
        label += f"   {row['gain_over_previous']:.2f}x"
    claim = row["literature"]
    return label + (f"   (literature {claim['low']:g}-{claim['high']:g}x)" if claim else "")
