"""What a list of finished requests says: latencies, rates, goodput. Pure functions.

scheduled_s          first message    last message   end_s
    |---- ttft_s ---------|--- tpot_s x (n - 1) --|
    |---- e2e_s ------------------------------------|
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.types import SLO

TRUNCATED = "TRUNCATED"
"""Status of a stream that ended without its final event, or with fewer tokens than it says."""

REFUSED = "RESOURCE_EXHAUSTED"
"""Status of a request that was not let in."""


@dataclass(frozen=True, slots=True)
class LatencyObjective:
    """What a request must keep to count as good."""

    ttft_s: float = math.inf  # time to the first token, at most
    tpot_s: float = math.inf  # time per further token, at most

    @classmethod
    def of(cls, slo: SLO) -> LatencyObjective:
        """Return what a request with this objective is held against."""
        return cls(
            math.inf if slo.ttft_s is None else slo.ttft_s,
            math.inf if slo.tpot_s is None else slo.tpot_s,
        )

    def is_met(self, record: RequestRecord) -> bool:
        """Return whether the whole answer came and came in time."""
        if not record.is_ok or record.ttft_s is None or record.ttft_s > self.ttft_s:
            return False
        return record.tpot_s is None or record.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it. Times are seconds since the start of the run."""

    scheduled_s: float  # when it was due: waiting in the client counts as latency
    end_s: float  # when its stream ended, well or not
    status: str  # "OK", the name of a gRPC status, or TRUNCATED
    message_times_s: tuple[float, ...] = ()  # arrival of each message that brought tokens
    num_tokens: int = 0  # tokens of the answer that arrived
    num_prompt_tokens: int = 0  # as the server counted them
    num_cached_tokens: int = 0  # of the prompt, from the prefix cache
    request_id: str = ""  # in the run's workload
    service_class: str = ""  # that it is in; empty: none
    objective: LatencyObjective | None = None  # its own; None: that of its run
    reason: str = ""  # of a failure, where the server gives a stable one
    retry_after_s: float | None = None  # of a refusal, where the server says it

    @property
    def is_ok(self) -> bool:
        """Whether the whole answer arrived."""
        return self.status == "OK"

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, seconds; None where none came."""
        return self.message_times_s[0] - self.scheduled_s if self.message_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first message's, seconds; None below two tokens."""
        if self.num_tokens < 2:
            return None
        return (self.message_times_s[-1] - self.message_times_s[0]) / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Time to the end of the answer, seconds."""
        return self.end_s - self.scheduled_s

    @property
    def itl_s(self) -> list[float]:
        """Gaps between messages that brought tokens, seconds: what a reader sees stutter."""
        times = self.message_times_s
        return [later - earlier for earlier, later in pairwise(times)]


NO_OBJECTIVE = LatencyObjective()
"""Whatever ended well is good."""


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the percentile, linear between the two nearest values; None without values.

    Args:
        values: In any order.
        percent: In [0, 100].
    """
    assert 0 <= percent <= 100, f"{percent=}"
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, p50, p90, p99 and max of the values; each None without values."""
    quantiles = {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    mean = sum(values) / len(values) if values else None
    return {"mean": mean, **quantiles, "max": max(values, default=None)}


def goodput_share(records: Sequence[RequestRecord], objective: LatencyObjective) -> float:
    """Return the share of all requests, refused and failed ones included, that were good."""
    return num_good(records, objective) / len(records) if records else 0.0


def num_good(records: Sequence[RequestRecord], objective: LatencyObjective) -> int:
    """Return how many requests kept their own objective or, without one, this one."""
    return sum((record.objective or objective).is_met(record) for record in records)


def summarize(
    records: Sequence[RequestRecord], objective: LatencyObjective = NO_OBJECTIVE
) -> dict[str, Any]:
    """Return the figures of one run; latencies are those of the requests that ended well.

    The window of the rates runs from the first request's due time to the last one's end.

    Args:
        records: Of the run.
        objective: Of the requests that have none of their own.
    """
    good = [record for record in records if record.is_ok]
    start_s = min((record.scheduled_s for record in records), default=0.0)
    window_s = max((record.end_s for record in records), default=0.0) - start_s
    out_tokens = sum(record.num_tokens for record in good)
    prompt_tokens = sum(record.num_prompt_tokens for record in good)
    cached_tokens = sum(record.num_cached_tokens for record in good)

    def per_s(amount: float) -> float:
        return amount / window_s if window_s > 0 else 0.0

    return {
        "num_requests": len(records),
        "num_ok": len(good),
        "refusals": _refusals(records),
        "status": dict(sorted(Counter(record.status for record in records).items())),
        "window_s": window_s,
        "requests_per_s": per_s(len(good)),
        "out_tokens_per_s": per_s(out_tokens),
        "total_tokens_per_s": per_s(out_tokens + prompt_tokens),
        "goodput": goodput_share(records, objective),
        "good_requests_per_s": per_s(num_good(records, objective)),
        "cached_token_share": cached_tokens / prompt_tokens if prompt_tokens else 0.0,
        "ttft_s": spread([r.ttft_s for r in good if r.ttft_s is not None]),
        "tpot_s": spread([r.tpot_s for r in good if r.tpot_s is not None]),
        "itl_s": spread([gap for r in good for gap in r.itl_s]),
        "e2e_s": spread([r.e2e_s for r in good]),
    }


def summarize_classes(records: Sequence[RequestRecord]) -> dict[str, dict[str, Any]]:
    """Return the figures of each service class, by name; of requests without one, by ""."""
    names = sorted({record.service_class for record in records})
    return {name: summarize([r for r in records if r.service_class == name]) for name in names}


def _refusals(records: Sequence[RequestRecord]) -> dict[str, Any]:
    refused = [record for record in records if record.status == REFUSED]
    return {
        "num_requests": len(refused),
        "reasons": dict(sorted(Counter(record.reason for record in refused).items())),
        "retry_after_s": spread([r.retry_after_s for r in refused if r.retry_after_s is not None]),
    }
