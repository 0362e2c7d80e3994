"""What a simulation remembers: one record per request, one per replica, and how it was run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from cluster.simulator.arrival import Arrival


class End(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    REFUSED = "refused"  # by admission
    EXPIRED = "expired"  # its deadline, or the queue's time
    FAILED = "failed"  # its replica died, or the engine refused it
    CUT = "cut"  # the simulation was over before it was


@dataclass(slots=True)
class RequestRecord:
    """One request; times are seconds of virtual time."""

    arrival: Arrival
    arrived_s: float  # at the gateway; for one that follows another, when that had ended
    end: End = End.CUT
    gateway: int = 0  # index
    replica_id: str = ""  # the last that it was sent to; empty: none
    dispatched_s: float | None = None  # the last time
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, as the engine found them
    num_predicted_cached_tokens: int = 0  # of the prompt, as the router believed
    predicted_ttft_s: float | None = None  # p50, from dispatch, of the policies that predict
    predicted_ttft_high_s: float | None = None  # likewise, what admission believed
    reason: str = ""  # of a refusal or failure

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token; None without one."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def meets_slo(self) -> bool:
        """Whether it finished within its objective; what has none and finished does."""
        if self.end is not End.FINISHED:
            return False
        slo, ttft_s, tpot_s = self.arrival.slo, self.ttft_s, self.tpot_s
        if slo.ttft_s is not None and (ttft_s is None or ttft_s > slo.ttft_s):
            return False
        return slo.tpot_s is None or tpot_s is None or tpot_s <= slo.tpot_s


@dataclass(slots=True)
class ReplicaRecord:
    """One simulated replica group."""

    replica_id: str
    started_s: float = 0.0  # ready to serve
    ended_s: float | None = None  # died or scaled down; None: ran to the end
    busy_s: float = 0.0  # in steps
    num_requests: int = 0  # sent to it
    num_steps: int = 0
    num_prefill_tokens: int = 0  # computed
    num_output_tokens: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class SimulationResult:
    """All that a simulation tells."""

    policy: str
    seed: int
    workload: str  # name
    rate_scale: float
    duration_s: float  # virtual, from 0 to the last event
    wall_s: float  # that the simulation took
    requests: list[RequestRecord]  # in order of arrival
    replicas: list[ReplicaRecord]  # by id; those that ended too
    num_gateways: int = 1
    # (virtual seconds, replicas that serve) whenever the number changed
    num_replicas_over_time: list[tuple[float, int]] = field(default_factory=list)
    # (virtual seconds, requests queued at gateways, waiting in replicas, running), regularly
    load_over_time: list[tuple[float, int, int, int]] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)  # what else it was run with
