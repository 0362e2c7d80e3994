"""Parts of a report: latencies, groups of requests, spread over replicas, errors of prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.simulator.record import End, ReplicaRecord, RequestRecord


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one latency, seconds."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The requests of one service class or of one tenant."""

    num_requests: int
    num_finished: int
    num_refused: int
    goodput: float | None  # as of all
    num_computed_tokens: int  # of prompts that were not cached, and of answers
    ttft_p50_s: float | None
    ttft_p90_s: float | None


@dataclass(frozen=True, slots=True)
class SpreadReport:
    """The busiest replica over the mean of all: 1 is even."""

    busy_s: float | None
    num_requests: float | None
    num_computed_tokens: float | None


@dataclass(frozen=True, slots=True)
class PredictionReport:
    """What the router believed, against what came; of requests that had a first token."""

    num_predicted: int  # with a predicted TTFT
    ttft_ratio_p10: float | None  # actual over predicted p50, both from dispatch
    ttft_ratio_p50: float | None
    ttft_ratio_p90: float | None
    above_high_share: float | None  # took longer than the high prediction
    predicted_cached_share: float | None  # of prompt tokens, as the router believed
    cached_share: float | None  # likewise, as the engines found them


def ratio(part: float, whole: float) -> float | None:
    """Return part over whole; None where the whole is nothing."""
    return part / whole if whole > 0 else None


def end_to_end_s(record: RequestRecord) -> float | None:
    """Return seconds from arrival to the last token; None without one."""
    return None if record.last_token_s is None else record.last_token_s - record.arrived_s


def from_dispatch_s(record: RequestRecord) -> float | None:
    """Return seconds from dispatch to the first token; None without either."""
    if record.first_token_s is None or record.dispatched_s is None:
        return None
    return record.first_token_s - record.dispatched_s


def ttft_pair_s(record: RequestRecord) -> tuple[float, float] | None:
    """Return predicted (p50) and actual seconds from dispatch to the first token.

    None where no first token came, or nothing was predicted: policies that do not, say 0.
    """
    actual_s = from_dispatch_s(record)
    if actual_s is None or not record.predicted_ttft_s:
        return None
    return record.predicted_ttft_s, actual_s


def distribution(values: Iterable[float | None]) -> Distribution:
    """Return mean and percentiles of the values that are known."""
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else None
    return Distribution(mean, *_percentiles(known, (50, 90, 95, 99)))


def _percentiles(values: Sequence[float], percents: tuple[int, ...]) -> list[float | None]:
    """Return percentiles, linear between the two nearest values; None each without values."""
    if not values:
        return [None] * len(percents)
    return [float(value) for value in np.percentile(values, percents)]


def group_reports(
    requests: Sequence[RequestRecord], key_of: Callable[[RequestRecord], str]
) -> dict[str, GroupReport]:
    """Return the figures of each group of requests, by the name that `key_of` gives it."""
    members: dict[str, list[RequestRecord]] = {}
    for record in requests:
        members.setdefault(key_of(record), []).append(record)
    return {key: _group(members[key]) for key in sorted(members)}


def _group(requests: Sequence[RequestRecord]) -> GroupReport:
    finished = [record for record in requests if record.end is End.FINISHED]
    computed = [
        record.arrival.num_prompt_tokens - record.num_cached_tokens + record.num_output_tokens
        for record in requests
        if record.first_token_s is not None
    ]
    latencies = [record.ttft_s for record in finished if record.ttft_s is not None]
    p50_s, p90_s = _percentiles(latencies, (50, 90))
    return GroupReport(
        num_requests=len(requests),
        num_finished=len(finished),
        num_refused=sum(record.end is End.REFUSED for record in requests),
        goodput=ratio(sum(record.meets_slo for record in requests), len(requests)),
        num_computed_tokens=sum(computed),
        ttft_p50_s=p50_s,
        ttft_p90_s=p90_s,
    )


def spread_report(replicas: Sequence[ReplicaRecord]) -> SpreadReport:
    """Return how evenly replicas were used."""

    def over_mean(values: Sequence[float]) -> float | None:
        return ratio(max(values) * len(values), sum(values)) if values else None

    return SpreadReport(
        busy_s=over_mean([replica.busy_s for replica in replicas]),
        num_requests=over_mean([replica.num_requests for replica in replicas]),
        num_computed_tokens=over_mean(
            [replica.num_prefill_tokens + replica.num_output_tokens for replica in replicas]
        ),
    )


def prediction_report(served: Sequence[RequestRecord]) -> PredictionReport:
    """Return how well was predicted what became of requests that had a first token."""
    pairs = [pair for record in served if (pair := ttft_pair_s(record)) is not None]
    p10, p50, p90 = _percentiles([actual / said for said, actual in pairs], (10, 50, 90))
    is_above = [
        actual_s > record.predicted_ttft_high_s
        for record in served
        if record.predicted_ttft_high_s and (actual_s := from_dispatch_s(record)) is not None
    ]
    prompt_tokens = sum(record.arrival.num_prompt_tokens for record in served)
    return PredictionReport(
        num_predicted=len(pairs),
        ttft_ratio_p10=p10,
        ttft_ratio_p50=p50,
        ttft_ratio_p90=p90,
        above_high_share=ratio(sum(is_above), len(is_above)),
        predicted_cached_share=ratio(
            sum(record.num_predicted_cached_tokens for record in served), prompt_tokens
        ),
        cached_share=ratio(sum(record.num_cached_tokens for record in served), prompt_tokens),
    )
