"""Charts of a sweep: goodput, hits, latency and refusals against the rate, one line per policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.simulator.chart import Chart, new_axes, scale_log, to_chart
from cluster.simulator.sweep import Knee, SweepPoint, figure_by_rate

_MARKERS = "osD^vPX*<>"


def sweep_charts(points: Sequence[SweepPoint], knees: Mapping[str, Knee]) -> list[Chart]:
    """Return the charts of a sweep.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return [
        _goodput_chart(points, knees),
        _chart(points, knees, "Prefix hit rate", lambda report: report["prefix_hit_rate"]),
        _chart(points, knees, "TTFT p90, seconds", lambda report: report["ttft_s"]["p90"], True),
        _chart(points, knees, "Refused, of all requests", lambda report: report["refused_share"]),
    ]


def _goodput_chart(points: Sequence[SweepPoint], knees: Mapping[str, Knee]) -> Chart:
    figure, (axes,) = new_axes()
    lines = _lines(axes, points, knees, lambda report: report["goodput"])
    for policy, knee in knees.items():
        if knee.rate_scale is None:
            continue
        axes.axvline(knee.rate_scale, color=lines[policy].get_color(), linestyle=":", linewidth=1)
        arrow = ">" if knee.is_beyond_grid else ""
        lines[policy].set_label(f"{policy}, {arrow}{knee.rate_scale:.2f} x")
    target = next(iter(knees.values())).target
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"{target:.0%}")
    axes.set(xlabel="rate scale", ylabel="goodput", ylim=(-0.02, 1.02))
    _legend(axes)
    return to_chart("Goodput against the rate; dotted: the highest that holds", figure)


def _chart(
    points: Sequence[SweepPoint],
    knees: Mapping[str, Knee],
    name: str,
    figure_of: Callable[[dict[str, Any]], float | None],
    is_log: bool = False,
) -> Chart:
    figure, (axes,) = new_axes()
    _lines(axes, points, knees, figure_of)
    axes.set(xlabel="rate scale", ylabel=name)
    if is_log:
        scale_log(axes, "y")
    else:
        axes.set_ylim(bottom=-0.02)
    _legend(axes)
    return to_chart(f"{name}, against the rate", figure)


def _lines(
    axes: Any,
    points: Sequence[SweepPoint],
    knees: Mapping[str, Knee],
    figure_of: Callable[[dict[str, Any]], float | None],
) -> dict[str, Any]:
    lines = {}
    for index, policy in enumerate(knees):
        by_rate = figure_by_rate(points, policy, figure_of)
        marker = _MARKERS[index % len(_MARKERS)]
        rates, figures = [rate for rate, _ in by_rate], [figure for _, figure in by_rate]
        (lines[policy],) = axes.plot(rates, figures, marker=marker, markersize=4, label=policy)
    return lines


def _legend(axes: Any) -> None:
    # Beside the lines: nine policies would cover them.
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
