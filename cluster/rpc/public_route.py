"""What clients tell the global scheduler, and what it tells them, in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from cluster.errors import InvalidArgumentError
from cluster.rpc.public_cache import check_text
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import ServiceClass

ClassName = ServiceClass | Literal["interactive", "standard", "batch"]

_CLASSES = {
    ServiceClass.INTERACTIVE: inference_pb2.SERVICE_CLASS_INTERACTIVE,
    ServiceClass.STANDARD: inference_pb2.SERVICE_CLASS_STANDARD,
    ServiceClass.BATCH: inference_pb2.SERVICE_CLASS_BATCH,
}


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for a replica."""

    position: int  # requests before it
    estimate_s: float | None = None  # predicted until it is given to one; None: unknown


@dataclass(frozen=True, slots=True)
class RouteCandidate:
    """A replica that could have taken a request."""

    replica_id: str
    score: float  # of the policy, less is better; seconds where the policy predicts
    cached_tokens: int  # of the prompt
    uncached_tokens: int  # of the prompt, to be computed
    wait_s: float  # predicted: other prompts before this one
    ttft_p50_s: float  # predicted from the decision on: exceeded by half of all requests
    ttft_high_s: float  # likewise, a higher quantile: what admission believes
    tpot_s: float  # predicted seconds per further token
    num_requests: int  # running and waiting there


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request went where it went."""

    request_id: str
    policy: str
    outcome: str  # dispatched, degraded, queued or refused
    reason: str  # in words
    candidates: tuple[RouteCandidate, ...]  # best first; of all weighed, the best few
    num_candidates: int  # replicas that were weighed
    num_excluded: int  # that drain, serve another model, or have too short a context
    age_s: float  # since the decision
    ttft_slo_s: float | None  # objective; None is none
    tpot_slo_s: float | None  # objective; None is none
    ttft_s: float | None  # as it was, from arrival; None before the first token

    @property
    def chosen(self) -> RouteCandidate | None:
        """The replica that got the request; None where none did."""
        return self.candidates[0] if self.outcome in ("dispatched", "degraded") else None


def set_route(
    message: inference_pb2.GenerateRequest,
    *,
    service_class: ClassName | None = None,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    session: str = "",
) -> None:
    """Write into a request what decides about its place in queues and about its replica.

    Args:
        message: Of the request.
        service_class: Whose objective it gets.
        ttft_s: An objective of its own, seconds to the first token.
        tpot_s: Likewise, seconds per further token.
        session: Requests with the same one prefer the same replica; empty is none.

    Raises:
        InvalidArgumentError: A class and times are both given, the class is unknown, or a value
            cannot be one.
    """
    check_text("session", session)
    message.session = session
    times_s = {"ttft_s": ttft_s, "tpot_s": tpot_s}
    given_s = {name: value for name, value in times_s.items() if value is not None}
    if service_class is None:
        for name, value in given_s.items():
            _set_time(message.latency, name, value)
        return
    if given_s:
        shown = ", ".join(f"{name}={value:g}" for name, value in given_s.items())
        raise InvalidArgumentError(
            f"service_class={service_class} and {shown}: a class has an objective of its own, "
            "give either the class or the times",
            field="service_class",
        )
    if service_class not in list(ServiceClass):
        raise InvalidArgumentError(
            f"service_class={service_class!r} is unknown: take {', '.join(ServiceClass)}",
            field="service_class",
        )
    message.service_class = _CLASSES[ServiceClass(service_class)]


def _set_time(latency: inference_pb2.LatencyObjective, name: str, value_s: float) -> None:
    if not 0 < value_s < math.inf:
        raise InvalidArgumentError(
            f"{name}={value_s:g}, it is a finite time above 0, seconds: change it or leave it out",
            field=name,
        )
    setattr(latency, name, value_s)


def queued_from_proto(message: inference_pb2.Queued) -> Queued:
    """Return a place in the queue."""
    return Queued(message.position, message.estimate_s if message.HasField("estimate_s") else None)


def explanation_from_proto(message: inference_pb2.ExplainResponse) -> Explanation:
    """Return a decision."""
    values = {field.name: getattr(message, field.name) for field in fields(Explanation)}
    for name in ("ttft_slo_s", "tpot_slo_s", "ttft_s"):
        values[name] = values[name] if message.HasField(name) else None
    outcome = inference_pb2.AdmissionOutcome.Name(message.outcome)
    values["outcome"] = outcome.removeprefix("ADMISSION_OUTCOME_").lower()
    values["candidates"] = tuple(_candidate(candidate) for candidate in message.candidates)
    return Explanation(**values)


def _candidate(message: inference_pb2.RouteCandidate) -> RouteCandidate:
    return RouteCandidate(**{f.name: getattr(message, f.name) for f in fields(RouteCandidate)})
