"""Charts of one simulation: latencies, goodput, load and replicas over time, predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.simulator.chart import Chart, new_axes, scale_log, shares, to_chart
from cluster.simulator.record import End, RequestRecord, SimulationResult
from cluster.simulator.report_parts import ttft_pair_s
from cluster.types import SLO

_MINUTE_S = 60.0
_INTERVALS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)  # of goodput over time: the longest of ...
_MIN_INTERVALS = 20  # ... which there are so many
_MAX_LINES = 3  # objectives drawn one by one; more are a band
_MAX_DOTS = 4000  # of the scatter
_MAX_NAMES = 32  # replicas named below their bars


def run_charts(result: SimulationResult) -> list[Chart]:
    """Return the charts for which the simulation has figures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    requests = result.requests
    charts = [
        _latency_chart("TTFT", requests, lambda timed: timed.ttft_s),
        _latency_chart("TPOT", requests, lambda timed: timed.tpot_s),
        _goodput_chart(result),
        _load_chart(result),
        _replicas_chart(result),
        _balance_chart(result),
        _prediction_chart(requests),
    ]
    return [chart for chart in charts if chart is not None]


def _latency_chart(
    name: str, requests: Sequence[RequestRecord], figure_of: Callable[[RequestRecord | SLO], Any]
) -> Chart | None:
    """Return what share of all requests was so fast: refused ones never are.

    Args:
        name: Of the latency.
        requests: All.
        figure_of: Gives the latency of a record, or its bound in an objective.
    """
    finished = [record for record in requests if record.end is End.FINISHED]
    pairs = [(figure_of(record), figure_of(record.arrival.slo)) for record in finished]
    pairs = [(value_s, bound_s) for value_s, bound_s in pairs if value_s is not None]
    if not pairs:
        return None
    bounds_s = sorted({bound_s for _, bound_s in pairs if bound_s is not None})
    has_many = len(bounds_s) > _MAX_LINES
    figure, panels = new_axes(2 if has_many else 1)
    axes = panels[0]
    axes.step(*shares([value_s for value_s, _ in pairs], len(requests)), where="post", label=name)
    if has_many:
        label = f"objectives, {bounds_s[0]:.3g} to {bounds_s[-1]:.3g} s"
        axes.axvspan(bounds_s[0], bounds_s[-1], color="tab:red", alpha=0.15, label=label)
        times = [value_s / bound_s for value_s, bound_s in pairs if bound_s]
        panels[1].step(*shares(times, len(requests)), where="post", label=name)
        panels[1].axvline(1.0, color="tab:red", linestyle="--", label="objective")
        panels[1].set(xlabel=f"{name} / objective of the request")
    for bound_s in () if has_many else bounds_s:
        label = f"objective, {bound_s:.3g} s"
        axes.axvline(bound_s, color="tab:red", linestyle="--", label=label)
    axes.set(xlabel=f"{name}, seconds")
    for axes in panels:
        axes.set(ylabel="share of all requests", ylim=(0, 1.02))
        scale_log(axes, "x")
        axes.legend()
    return to_chart(f"{name}: share of all requests that was at least so fast", figure)


def _goodput_chart(result: SimulationResult) -> Chart | None:
    """Return the shares of good and of refused requests by the time at which they arrived."""
    if not result.requests:
        return None
    fitting = [s for s in _INTERVALS_S if s * _MIN_INTERVALS <= result.requests[-1].arrived_s]
    width_s = max(fitting, default=_INTERVALS_S[0])
    intervals: dict[int, list[RequestRecord]] = {}
    for record in result.requests:
        intervals.setdefault(int(record.arrived_s / width_s), []).append(record)
    middles = [(index + 0.5) * width_s / _MINUTE_S for index in intervals]
    good = [_share([r.meets_slo for r in arrived]) for arrived in intervals.values()]
    refused = [_share([r.end is End.REFUSED for r in arrived]) for arrived in intervals.values()]
    figure, (axes,) = new_axes()
    axes.plot(middles, good, ".-", label="met their objective")
    axes.plot(middles, refused, ".-", color="tab:red", label="refused")
    axes.set(xlabel="arrived, minutes", ylabel="share of arrivals", ylim=(-0.02, 1.02))
    axes.legend()
    return to_chart(f"Goodput over time, of every {width_s:g} s", figure)


def _share(is_counted: Sequence[bool]) -> float:
    return sum(is_counted) / len(is_counted)


def _load_chart(result: SimulationResult) -> Chart | None:
    if not result.load_over_time:
        return None
    times_s, *loads = zip(*result.load_over_time, strict=True)
    minutes = [time_s / _MINUTE_S for time_s in times_s]
    figure, (axes,) = new_axes()
    names = ("queued at gateways", "waiting in replicas", "running")
    for name, load in zip(names, loads, strict=True):
        axes.plot(minutes, load, linewidth=1, label=name)
    axes.set(xlabel="minutes", ylabel="requests")
    axes.set_ylim(bottom=0)
    axes.legend()
    return to_chart("Load over time", figure)


def _replicas_chart(result: SimulationResult) -> Chart | None:
    if not result.num_replicas_over_time:
        return None
    changes = dict(result.num_replicas_over_time)  # of several at one time the last one holds
    times_s, numbers = [*changes, result.duration_s], list(changes.values())
    numbers.append(numbers[-1])
    figure, (axes,) = new_axes()
    axes.step([time_s / _MINUTE_S for time_s in times_s], numbers, where="post")
    axes.set(xlabel="minutes", ylabel="replicas that serve", ylim=(0, 1.1 * max(numbers) + 0.5))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return to_chart("Replicas over time", figure)


def _balance_chart(result: SimulationResult) -> Chart | None:
    """Return how many tokens each replica computed, beside their mean."""
    replicas = result.replicas
    if not replicas:
        return None
    prefill = [replica.num_prefill_tokens / 1e3 for replica in replicas]
    output = [replica.num_output_tokens / 1e3 for replica in replicas]
    places = list(range(len(replicas)))
    figure, (axes,) = new_axes()
    axes.bar(places, prefill, label="of prompts")
    axes.bar(places, output, bottom=prefill, label="of answers")
    mean = (sum(prefill) + sum(output)) / len(replicas)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1, label="mean of both")
    if len(replicas) <= _MAX_NAMES:
        axes.set_xticks(places, [replica.replica_id for replica in replicas], rotation=90)
    axes.set(xlabel="replica", ylabel="computed tokens, thousands")
    axes.set_ylim(top=1.35 * max(map(sum, zip(prefill, output, strict=True))) or 1.0)
    axes.legend(ncols=3, loc="upper center")
    return to_chart("Load by replica", figure)


def _prediction_chart(requests: Sequence[RequestRecord]) -> Chart | None:
    pairs = [pair for record in requests if (pair := ttft_pair_s(record)) is not None]
    # A first token in no time has no place on a logarithmic axis.
    pairs = [(said_s, actual_s) for said_s, actual_s in pairs if actual_s > 0]
    if not pairs:
        return None
    figure, (dots, errors) = new_axes(2)
    _scatter(dots, pairs)
    _histogram(errors, [actual_s / said_s for said_s, actual_s in pairs])
    return to_chart("TTFT from dispatch: predicted and actual", figure)


def _scatter(axes: Any, pairs: Sequence[tuple[float, float]]) -> None:
    stride = -(-len(pairs) // _MAX_DOTS)
    shown = pairs[::stride]
    label = "requests" if stride == 1 else f"requests, one of {stride}"
    # Thousands of dots as shapes would make the page many times as large.
    axes.scatter(*zip(*shown, strict=True), s=5, alpha=0.4, linewidths=0, label=label).set(
        rasterized=True
    )
    ends_s = [min(map(min, shown)), max(map(max, shown))]
    axes.plot(ends_s, ends_s, color="black", linestyle="--", linewidth=1, label="as predicted")
    axes.set(xlabel="predicted (p50), seconds", ylabel="actual, seconds")
    scale_log(axes, "x", "y")
    axes.legend()


def _histogram(axes: Any, ratios: Sequence[float]) -> None:
    import numpy as np

    bins = np.logspace(-1, 1, 61)
    inside = np.clip(ratios, bins[0], bins[-1])
    axes.hist(inside, bins=bins, label="requests")
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1, label="as predicted")
    axes.set(xlabel="actual / predicted; what lies beyond is at the ends", ylabel="requests")
    scale_log(axes, "x")
    axes.legend(loc="upper left")
