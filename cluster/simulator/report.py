"""What a simulation amounts to: latencies, goodput, hits, spread, errors of prediction, cost.

arrived_s     dispatched_s     first_token_s          last_token_s
    |-- at the gateway --|             |                     |
    |------------- ttft_s -------------|-- tpot_s x (n - 1) --|
    |---------------------- end_to_end_s --------------------|
                         |-- predicted --|

A figure that nothing stands for (a mean of no values, a price that nobody gave) is None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from cluster.simulator.record import End, RequestRecord, SimulationResult
from cluster.simulator.report_parts import (
    Distribution,
    GroupReport,
    PredictionReport,
    SpreadReport,
    distribution,
    end_to_end_s,
    group_reports,
    prediction_report,
    ratio,
    spread_report,
)

_SECONDS_PER_HOUR = 3600.0
_MILLION = 1e6
_MAX_REASONS = 5
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one simulation. Rates are over its whole virtual time."""

    policy: str
    workload: str
    rate_scale: float
    seed: int
    num_gateways: int
    num_requests: int  # that arrived
    num_finished: int
    num_refused: int
    num_expired: int
    num_failed: int
    num_cut: int  # unfinished when the simulation was over
    reasons: dict[str, int]  # why requests were refused, expired or failed; the most frequent
    refused_share: float | None  # of all that arrived
    goodput: float | None  # finished within their objective, of all that arrived
    goodput_per_s: float | None  # such requests per second
    offered_per_s: float | None  # requests per second while they arrived
    classes: dict[str, GroupReport]  # by service class
    tenants: dict[str, GroupReport]  # by tenant
    ttft_s: Distribution  # of finished requests, as the other two
    tpot_s: Distribution
    end_to_end_s: Distribution
    input_tokens_per_s: float | None  # of prompts that had a first token, cached ones too
    output_tokens_per_s: float | None
    prefix_hit_rate: float | None  # of prompt tokens that the engines looked up
    spread: SpreadReport
    prediction: PredictionReport
    num_preemptions: int
    num_replicas_mean: float | None  # that served, over time
    num_replicas_max: int
    replica_hours: float
    usd_per_hour: float | None  # of one replica
    usd_per_million_tokens: float | None  # input and output
    usd_per_million_good_output_tokens: float | None  # of requests that met their objective
    duration_s: float  # virtual
    wall_s: float
    virtual_s_per_wall_s: float | None
    settings: dict[str, object]  # what else it was run with

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data that JSON holds."""
        return asdict(self)


def make_report(result: SimulationResult, *, usd_per_hour: float | None = None) -> Report:
    """Return the figures of a simulation.

    Args:
        result: Of the simulation.
        usd_per_hour: Price of one replica; None leaves the cost out.
    """
    requests, replicas = result.requests, result.replicas
    ends = Counter(record.end for record in requests)
    finished = [record for record in requests if record.end is End.FINISHED]
    good = [record for record in finished if record.meets_slo]
    served = [record for record in requests if record.first_token_s is not None]
    input_tokens = sum(record.arrival.num_prompt_tokens for record in served)
    output_tokens = sum(record.num_output_tokens for record in requests)
    good_output_tokens = sum(record.num_output_tokens for record in good)
    hours = _replica_hours(result)
    usd = None if usd_per_hour is None else usd_per_hour * hours
    seconds = result.duration_s
    return Report(
        policy=result.policy,
        workload=result.workload,
        rate_scale=result.rate_scale,
        seed=result.seed,
        num_gateways=result.num_gateways,
        num_requests=len(requests),
        num_finished=len(finished),
        num_refused=ends[End.REFUSED],
        num_expired=ends[End.EXPIRED],
        num_failed=ends[End.FAILED],
        num_cut=ends[End.CUT],
        reasons=_reasons(requests),
        refused_share=ratio(ends[End.REFUSED], len(requests)),
        goodput=ratio(len(good), len(requests)),
        goodput_per_s=ratio(len(good), seconds),
        offered_per_s=_offered_per_s(requests),
        classes=group_reports(requests, lambda record: record.arrival.service_class.value),
        tenants=group_reports(requests, lambda record: record.arrival.tenant),
        ttft_s=distribution(record.ttft_s for record in finished),
        tpot_s=distribution(record.tpot_s for record in finished),
        end_to_end_s=distribution(map(end_to_end_s, finished)),
        input_tokens_per_s=ratio(input_tokens, seconds),
        output_tokens_per_s=ratio(output_tokens, seconds),
        prefix_hit_rate=ratio(
            sum(replica.num_prefix_hit_tokens for replica in replicas),
            sum(replica.num_prefix_query_tokens for replica in replicas),
        ),
        spread=spread_report(replicas),
        prediction=prediction_report(served),
        num_preemptions=sum(replica.num_preemptions for replica in replicas),
        num_replicas_mean=_mean_replicas(result),
        num_replicas_max=max((number for _, number in result.num_replicas_over_time), default=0),
        replica_hours=hours,
        usd_per_hour=usd_per_hour,
        usd_per_million_tokens=_per_million(usd, input_tokens + output_tokens),
        usd_per_million_good_output_tokens=_per_million(usd, good_output_tokens),
        duration_s=seconds,
        wall_s=result.wall_s,
        virtual_s_per_wall_s=ratio(seconds, result.wall_s),
        settings=dict(result.settings),
    )


def _reasons(requests: Sequence[RequestRecord]) -> dict[str, int]:
    """Return how often each kind of reason was given, most frequent first.

    Reasons that differ in their numbers alone are of one kind: a # stands for each of them.
    """
    kinds = Counter(
        _NUMBER.sub("#", record.reason) or "no reason given"
        for record in requests
        if record.end in (End.REFUSED, End.EXPIRED, End.FAILED)
    )
    return dict(kinds.most_common(_MAX_REASONS))


def _offered_per_s(requests: Sequence[RequestRecord]) -> float | None:
    """Return arrivals after the first per second: the gaps between them are what a rate is."""
    if len(requests) < 2:
        return None
    return ratio(len(requests) - 1, requests[-1].arrived_s - requests[0].arrived_s)


def _replica_hours(result: SimulationResult) -> float:
    """Return the time that replicas were there: it is paid for, used or not."""
    present_s = 0.0
    for replica in result.replicas:
        until_s = result.duration_s if replica.ended_s is None else replica.ended_s
        present_s += max(0.0, until_s - replica.started_s)
    return present_s / _SECONDS_PER_HOUR


def _mean_replicas(result: SimulationResult) -> float | None:
    if not result.num_replicas_over_time:
        return None
    changes = [*result.num_replicas_over_time, (result.duration_s, 0)]
    total = sum(number * (to_s - from_s) for (from_s, number), (to_s, _) in pairwise(changes))
    return ratio(total, result.duration_s)


def _per_million(usd: float | None, tokens: int) -> float | None:
    return None if usd is None else ratio(usd, tokens / _MILLION)
