"""Every metric's name, unit and buckets.

Objects, not globals: whoever serves owns a `Metrics` and its registry. What replicas count
themselves travels to the gateways as `ReplicaLoad`; `REPLICA_METRICS` says how it is exposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.types import ReplicaLoad, StoreState

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_ROUTE_BUCKETS_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025)
_RATIO_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


class KeptCounter(Collector):
    """A counter that its owner keeps; a scrape reads it. 0 until `set_function`."""

    def __init__(self, name: str, description: str, *, registry: CollectorRegistry) -> None:
        self._name = name
        self._description = description
        self._read: Callable[[], float] = float
        registry.register(self)

    def set_function(self, read: Callable[[], float]) -> None:
        """Set what a scrape calls."""
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield the one family."""
        yield CounterMetricFamily(self._name, self._description, value=self._read())


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
        self.resumptions = Counter(
            "sluice_resumptions_total",
            "Times that an answer went on at another replica (lost, moved), or for a client that "
            "had come back (client).",
            ["cause"],
            registry=registry,
        )
        self.gap = Histogram(
            "sluice_gap_seconds",
            "From the last token before such a cut to the first one behind it, by cause.",
            ["cause"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.quarantined = Counter(
            "sluice_quarantined_requests_total",
            "Requests that failed because replicas had died of them.",
            registry=registry,
        )
        self.superseded = Counter(
            "sluice_superseded_requests_total",
            "Calls that ended because their client went on with the request in another one.",
            registry=registry,
        )
        self.journals_dropped = Counter(
            "sluice_journals_dropped_total",
            "Journals that cannot be resumed any more, by why: they made room within "
            "store.journal_bytes (finished, live), had gone from the store (gone), are another "
            "tenant's (foreign), too long alone (full), or waited too long for a store that was "
            "away (pending).",
            ["state"],
            registry=registry,
        )
        self.journal_errors = Counter(
            "sluice_journal_errors_total",
            "Writes of journals that the store did not take; they are tried again.",
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
        self.goodput = Counter(
            "sluice_goodput_total",
            "Valid requests with an objective, by whether they finished within it: those that were "
            "refused, failed or cancelled did not.",
            ["met"],
            registry=registry,
        )
        self.admission = Counter(
            "sluice_admission_total",
            "Decisions of admission by outcome and class; a queued request gets a second one when "
            "it leaves the queue.",
            ["outcome", "service_class"],
            registry=registry,
        )
        self.queue = Histogram(
            "sluice_queue_seconds",
            "That requests without a replica waited for one at the gateway, in vain or not.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.ttft_prediction = Histogram(
            "sluice_ttft_prediction_ratio",
            "Seconds from a request's dispatch to its first token over those predicted (median).",
            buckets=_RATIO_BUCKETS,
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
            "Hashing a prompt and deciding where it goes, or whether.",
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
        self.index_dropped = KeptCounter(
            "sluice_prefix_index_dropped_total",
            "Blocks that the prefix index had no room for.",
            registry=registry,
        )
        self.watch_resyncs = KeptCounter(
            "sluice_watch_resyncs_total",
            "Watches opened anew because a message was missing, repeated or out of order.",
            registry=registry,
        )
        self.quarantines = KeptCounter(
            "sluice_replicas_quarantined_total",
            "Times that a replica was left out for a while because its report could not be true.",
            registry=registry,
        )


CONTROL_STORE_STATE = "sluice_control_store_state"
"""Gauge, 1 for the present state: this gateway's circuit breaker of leases and records."""


@dataclass(frozen=True, slots=True)
class ReplicaMetric:
    """One number of every replica, or one for each value of a label."""

    name: str  # a counter's ends in _total
    description: str
    read: Callable[[ReplicaLoad], float | Mapping[str, float]]
    label: str = ""  # whose values are the keys of what is read; empty: it is one number

    @property
    def is_counter(self) -> bool:
        """Whether it only grows in the life of a replica."""
        return self.name.endswith("_total")


def _hits(load: ReplicaLoad) -> dict[str, float]:
    host, store = load.cache.num_host_hit_tokens, load.cache.num_store_hit_tokens
    device = max(0, load.num_prefix_hit_tokens - host - store)  # that counts hits of every tier
    return {"device": device, "host": host, "store": store}


def _evictions(load: ReplicaLoad) -> dict[str, float]:
    return {"device": load.cache.num_device_evictions, "host": load.cache.num_host_evictions}


def _states(load: ReplicaLoad) -> dict[str, float]:
    return {state.value: float(state is load.cache.store_state) for state in StoreState}


REPLICA_METRICS = (
    ReplicaMetric("sluice_running_sequences", "In the batch.", lambda load: load.num_running),
    ReplicaMetric(
        "sluice_waiting_sequences", "Waiting for blocks or a place.", lambda load: load.num_waiting
    ),
    ReplicaMetric(
        "sluice_queued_prefill_tokens",
        "Prompt tokens not computed yet.",
        lambda load: load.num_queued_prefill_tokens,
    ),
    ReplicaMetric(
        "sluice_generated_tokens_total", "Of all answers.", lambda load: load.num_generated_tokens
    ),
    ReplicaMetric(
        "sluice_prefix_query_tokens_total",
        "Prompt tokens looked up in the caches.",
        lambda load: load.num_prefix_query_tokens,
    ),
    ReplicaMetric(
        "sluice_prefix_hit_tokens_total",
        "Of these, found, by the tier that they came from.",
        _hits,
        label="tier",
    ),
    ReplicaMetric("sluice_kv_blocks", "Of the KV cache.", lambda load: load.num_blocks),
    ReplicaMetric(
        "sluice_kv_free_blocks", "Of these, free or evictable.", lambda load: load.num_free_blocks
    ),
    ReplicaMetric(
        "sluice_host_slots",
        "Blocks that the host tier can hold.",
        lambda load: load.cache.num_host_slots,
    ),
    ReplicaMetric(
        "sluice_host_blocks", "Of these, in use.", lambda load: load.cache.num_host_blocks
    ),
    ReplicaMetric(
        "sluice_evicted_blocks_total",
        "Blocks that made room for others, by tier.",
        _evictions,
        label="tier",
    ),
    ReplicaMetric(
        "sluice_stored_blocks_total",
        "Blocks written to the store.",
        lambda load: load.cache.num_stored_blocks,
    ),
    ReplicaMetric(
        "sluice_fetched_blocks_total",
        "Blocks read from the store.",
        lambda load: load.cache.num_fetched_blocks,
    ),
    ReplicaMetric(
        "sluice_stored_bytes_total",
        "Bytes of one worker written to the store.",
        lambda load: load.cache.stored_bytes,
    ),
    ReplicaMetric(
        "sluice_fetched_bytes_total",
        "Bytes of one worker read from the store.",
        lambda load: load.cache.fetched_bytes,
    ),
    ReplicaMetric(
        "sluice_store_rejected_total",
        "Writes dropped because too many were on their way.",
        lambda load: load.cache.num_rejected,
    ),
    ReplicaMetric(
        "sluice_store_late_total",
        "Requests that went on without the blocks that they had waited for.",
        lambda load: load.cache.num_late,
    ),
    ReplicaMetric(
        "sluice_store_failed_total",
        "Operations that the store did not answer well.",
        lambda load: load.cache.num_failed,
    ),
    ReplicaMetric(
        "sluice_store_corrupt_total",
        "Blocks that did not verify.",
        lambda load: load.cache.num_corrupt,
    ),
    ReplicaMetric(
        "sluice_saved_prefill_seconds_total",
        "Prefill that hits in host tier and store made needless, predicted.",
        lambda load: load.cache.saved_s,
    ),
    ReplicaMetric(
        "sluice_store_state",
        "1 for how the store of KV blocks does: exact, degraded or off.",
        _states,
        label="state",
    ),
)
"""Each has the label `replica_id`."""
