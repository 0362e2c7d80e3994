"""The figures of simulations as rows of text: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from cluster.simulator.report import Report
from cluster.simulator.report_parts import GroupReport
from cluster.simulator.sweep import Knee, SweepPoint, figure_by_rate

UNKNOWN = "-"
"""In place of a figure that nothing stands for."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table; its first column are names, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report_tables(report: Report) -> list[TextTable]:
    """Return the tables of one simulation."""
    tables = [_requests(report), _latencies(report), _replicas(report)]
    if report.reasons:
        rows = tuple((reason, str(count)) for reason, count in report.reasons.items())
        title = "Why requests were refused, expired or failed (the most frequent reasons)"
        tables.insert(1, TextTable(title, ("", "requests"), rows))
    if report.prediction.num_predicted:
        tables.append(_prediction(report))
    if len(report.classes) > 1:
        tables.append(_groups("Service classes", report.classes))
    if len(report.tenants) > 1:
        tables.append(_groups("Tenants", report.tenants))
    return tables


def sweep_tables(points: Sequence[SweepPoint], knees: Mapping[str, Knee]) -> list[TextTable]:
    """Return the tables of a sweep: what rate each policy holds, and each policy at each rate."""
    rates = sorted({point.rate_scale for point in points})
    held = tuple(
        (policy, _rate(knee, knee.rate_scale), _rate(knee, knee.grid_rate_scale))
        for policy, knee in knees.items()
    )
    target = next(iter(knees.values())).target if knees else 0.0
    tables = [
        TextTable(
            f"Highest rate with a goodput of at least {target:.0%}",
            ("policy", "between rates of the grid", "of the grid"),
            held,
        )
    ]
    for title, show, figure_of in _BY_RATE:
        by_policy = [dict(figure_by_rate(points, policy, figure_of)) for policy in knees]
        rows = (
            (f"{rate:g}", *(show(by_rate.get(rate)) for by_rate in by_policy)) for rate in rates
        )
        tables.append(TextTable(title, ("rate scale", *knees), tuple(rows)))
    return tables


def percent(value: float | None) -> str:
    """Return a share as a reader writes it."""
    return UNKNOWN if value is None else f"{value:.1%}"


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure with so many digits after the point."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


_BY_RATE: tuple[
    tuple[str, Callable[[float | None], str], Callable[[dict[str, Any]], float | None]], ...
] = (
    ("Goodput, by rate", percent, lambda report: report["goodput"]),
    ("Refused, by rate", percent, lambda report: report["refused_share"]),
    ("Prefix hit rate, by rate", percent, lambda report: report["prefix_hit_rate"]),
    ("TTFT p90, seconds, by rate", number, lambda report: report["ttft_s"]["p90"]),
)


def _rate(knee: Knee, rate_scale: float | None) -> str:
    if rate_scale is None:
        return "none"
    return f"{'above ' if knee.is_beyond_grid else ''}{rate_scale:.2f} x"


def _requests(report: Report) -> TextTable:
    counts = {
        "refused": report.num_refused,
        "expired": report.num_expired,
        "failed": report.num_failed,
        "cut": report.num_cut,
    }
    rows = {
        "requests": f"{report.num_requests} at {number(report.offered_per_s)} per second",
        "finished": str(report.num_finished),
        **{name: str(count) for name, count in counts.items() if count},
        "goodput": f"{percent(report.goodput)} of all requests",
        "good requests per second": number(report.goodput_per_s),
        "input tokens per second": number(report.input_tokens_per_s, 0),
        "output tokens per second": number(report.output_tokens_per_s, 0),
        "prefix hit rate": percent(report.prefix_hit_rate),
    }
    title = f"{report.workload}, {report.policy}, rate x {report.rate_scale:g}"
    return TextTable(title, ("", ""), tuple(rows.items()))


def _latencies(report: Report) -> TextTable:
    named = {"TTFT": report.ttft_s, "TPOT": report.tpot_s, "end to end": report.end_to_end_s}
    rows = (
        (name, *(number(value, 3) for value in astuple(latency))) for name, latency in named.items()
    )
    columns = ("seconds", "mean", "p50", "p90", "p95", "p99")
    return TextTable("Latencies of finished requests", columns, tuple(rows))


def _replicas(report: Report) -> TextTable:
    spread = report.spread
    rows = {
        "replicas, mean / max": f"{number(report.num_replicas_mean)} / {report.num_replicas_max}",
        "busy time, max / mean": number(spread.busy_s, 3),
        "requests, max / mean": number(spread.num_requests, 3),
        "computed tokens, max / mean": number(spread.num_computed_tokens, 3),
        "preemptions": str(report.num_preemptions),
        "replica hours": number(report.replica_hours),
    }
    if report.usd_per_hour is not None:
        rows["USD per million tokens"] = number(report.usd_per_million_tokens, 4)
        rows["USD per million good output tokens"] = number(
            report.usd_per_million_good_output_tokens, 4
        )
    rows["simulated"] = f"{report.duration_s:,.1f} s in {report.wall_s:,.1f} s"
    return TextTable("Replicas", ("", ""), tuple(rows.items()))


def _prediction(report: Report) -> TextTable:
    errors = report.prediction
    ratios = (errors.ttft_ratio_p10, errors.ttft_ratio_p50, errors.ttft_ratio_p90)
    rows = {
        "TTFT, actual / predicted, p10, p50, p90": "  ".join(map(number, ratios)),
        "TTFT above the high prediction": percent(errors.above_high_share),
        "prompt tokens cached, predicted": percent(errors.predicted_cached_share),
        "prompt tokens cached, found": percent(errors.cached_share),
    }
    return TextTable("Predictions", ("", ""), tuple(rows.items()))


def _groups(title: str, groups: Mapping[str, GroupReport]) -> TextTable:
    rows = (
        (
            name or "(none)",
            str(group.num_requests),
            str(group.num_refused),
            percent(group.goodput),
            number(group.ttft_p50_s, 3),
            number(group.ttft_p90_s, 3),
            str(group.num_computed_tokens),
        )
        for name, group in groups.items()
    )
    columns = ("", "requests", "refused", "goodput", "TTFT p50, s", "p90, s", "computed tokens")
    return TextTable(title, columns, tuple(rows))
