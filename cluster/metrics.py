"""Every metric's name, unit and buckets.

Objects, not globals: whoever serves owns a `Metrics` and its registry.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_ROUTE_BUCKETS_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025)


class Metrics:
    """Metrics of one gateway, registered with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "sluice_requests_total",
            "Requests that ended, by gRPC status code.",
            ["code"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "sluice_prompt_tokens_total", "Prompt tokens of finished requests.", registry=registry
        )
        self.cached_tokens = Counter(
            "sluice_cached_tokens_total",
            "Prompt tokens of finished requests that came from a prefix cache.",
            registry=registry,
        )
        self.completion_tokens = Counter(
            "sluice_completion_tokens_total", "Tokens of finished answers.", registry=registry
        )
        self.ttft = Histogram(
            "sluice_ttft_seconds",
            "From a request's arrival to its first token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "sluice_tpot_seconds",
            "Mean time per token after the first one.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.slo = Counter(
            "sluice_slo_total",
            "Finished requests with an objective (ttft or tpot), by whether it was met.",
            ["objective", "met"],
            registry=registry,
        )
        self.duration = Histogram(
            "sluice_request_duration_seconds",
            "From a finished request's arrival to its last token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.route = Histogram(
            "sluice_route_seconds",
            "Hashing a prompt and picking its replica.",
            buckets=_ROUTE_BUCKETS_S,
            registry=registry,
        )
        self.inflight = Gauge(
            "sluice_inflight_requests", "Requests that have not ended.", registry=registry
        )
        self.queued = Gauge(
            "sluice_queued_requests", "Requests that wait for a replica.", registry=registry
        )
        self.replicas = Gauge(
            "sluice_connected_replicas", "Replicas that can be routed to.", registry=registry
        )
        self.index = Gauge(
            "sluice_prefix_index_bytes", "Estimated size of the prefix index.", registry=registry
        )
