"""What goes into the global scheduler and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from cluster.types import NO_SLO, SLO, ServiceClass

KeysOf = Callable[[str, int], Sequence[int]]
"""Router keys of a prompt's full blocks, by fingerprint (hex) and block size (tokens)."""


class RouteRequest(NamedTuple):
    """What the global scheduler has to know of a request."""

    request_id: str
    num_prompt_tokens: int  # and of its answer, where that goes on
    keys: KeysOf  # replicas that differ in model, dtype or layout know the prompt by other keys
    arrived_s: float  # at the gateway, by its clock
    slo: SLO = NO_SLO
    service_class: ServiceClass = ServiceClass.STANDARD
    tenant: str = ""
    tenant_weight: float = 1.0
    session: str = ""  # prefers the replica that served it before; empty: none
    model: str = ""  # name; empty: any
    expires_s: float = math.inf  # the client's deadline, by the gateway's clock
    excluded: tuple[str, ...] = ()  # replicas that have failed it
    fingerprint: str = ""  # of the model that began its answer, hex; empty: any goes
    is_resumed: bool = False  # it was admitted before: it goes first, and is not refused


class Candidate(NamedTuple):
    """A replica that could take the request; a tuple, because a decision makes several."""

    replica_id: str
    score: float  # of the policy, less is better; seconds where the policy predicts
    num_cached_tokens: int  # of the prompt, at this replica
    num_uncached_tokens: int  # of the prompt, to be computed by this replica, >= 1
    wait_s: float = 0.0  # predicted: other prompts before this one
    ttft_p50_s: float = 0.0  # predicted, from now on: exceeded by half of all requests
    ttft_high_s: float = 0.0  # likewise, a higher quantile: what admission believes
    tpot_s: float = 0.0  # predicted seconds per further token
    num_requests: int = 0  # running and waiting there, those sent and not reported included
    own_s: float = 0.0  # predicted: the uncached part of this prompt


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and the best of what was weighed."""

    candidates: tuple[Candidate, ...]  # the chosen one first, then the next best; at least one
    num_candidates: int  # replicas that were weighed
    num_excluded: int  # replicas that drain, are quarantined or serve another model
    meets_slo: bool  # whether the chosen one is predicted to keep the objective
    is_full: bool = False  # whether at every one it could only wait behind others

    @property
    def chosen(self) -> Candidate:
        """The replica that gets the request."""
        return self.candidates[0]

    @property
    def replica_id(self) -> str:
        """Id of the replica that gets the request."""
        return self.candidates[0].replica_id


class OutcomeKind(StrEnum):
    """What becomes of a request."""

    DISPATCHED = "dispatched"  # it is given to a replica
    DEGRADED = "degraded"  # likewise, without its objective, which could not be met
    QUEUED = "queued"  # it waits at the gateway
    REFUSED = "refused"  # it cannot be served in time, or there is no room for it
    EXPIRED = "expired"  # its deadline passed, or the queue's time, while it waited


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a request now."""

    kind: OutcomeKind
    reason: str = ""  # in words, with the figures; of a refusal: what to do
    decision: Decision | None = None  # of those that are dispatched; others may have one
    slo: SLO = NO_SLO  # the objective that the replica gets
    position: int = 0  # in the queue: requests before it
    estimate_s: float | None = None  # predicted seconds in the queue; None: unknown
    retry_after_s: float = 1.0  # of a refusal: when it is worth to try again

    @property
    def is_dispatched(self) -> bool:
        """Whether it goes to `decision.replica_id` now."""
        return self.kind in (OutcomeKind.DISPATCHED, OutcomeKind.DEGRADED)
