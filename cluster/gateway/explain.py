"""Why a request went where it went, for clients."""

from __future__ import annotations

from cluster.errors import NotFoundError
from cluster.gateway.identity import Caller
from cluster.router.dispatcher import Explanation
from cluster.router.route import Candidate, OutcomeKind
from cluster.rpc.sluice.v1 import inference_pb2

_OUTCOMES = {
    OutcomeKind.DISPATCHED: inference_pb2.ADMISSION_OUTCOME_DISPATCHED,
    OutcomeKind.DEGRADED: inference_pb2.ADMISSION_OUTCOME_DEGRADED,
    OutcomeKind.QUEUED: inference_pb2.ADMISSION_OUTCOME_QUEUED,
    OutcomeKind.REFUSED: inference_pb2.ADMISSION_OUTCOME_REFUSED,
    OutcomeKind.EXPIRED: inference_pb2.ADMISSION_OUTCOME_REFUSED,
}


def check_visible(explanation: Explanation | None, request_id: str, caller: Caller) -> Explanation:
    """Return what is remembered of a request, if the caller may see it.

    Raises:
        NotFoundError: Nothing is remembered, or the request was another tenant's; which of the two
            is not told.
    """
    is_own = explanation is not None and explanation.request.tenant == caller.tenant
    if explanation is None or not (is_own or caller.is_admin):
        raise NotFoundError(
            f"request_id={request_id!r} is not remembered by this gateway: ask the one that served "
            "it, and soon"
        )
    return explanation


def explanation_to_proto(
    explanation: Explanation, *, policy: str, now_s: float
) -> inference_pb2.ExplainResponse:
    """Return the message of a decision.

    Args:
        explanation: Of the dispatcher.
        policy: Name of the one that decided.
        now_s: By the gateway's clock.
    """
    request, outcome, decision = (
        explanation.request,
        explanation.outcome,
        explanation.outcome.decision,
    )
    return inference_pb2.ExplainResponse(
        request_id=request.request_id,
        policy=policy,
        outcome=_OUTCOMES[outcome.kind],
        reason=outcome.reason,
        candidates=[] if decision is None else [_candidate(c) for c in decision.candidates],
        num_candidates=0 if decision is None else decision.num_candidates,
        num_excluded=0 if decision is None else decision.num_excluded,
        age_s=max(0.0, now_s - explanation.decided_s),
        ttft_slo_s=request.slo.ttft_s,
        tpot_slo_s=request.slo.tpot_s,
        ttft_s=explanation.ttft_s,
    )


def _candidate(candidate: Candidate) -> inference_pb2.RouteCandidate:
    return inference_pb2.RouteCandidate(
        replica_id=candidate.replica_id,
        score=candidate.score,
        cached_tokens=candidate.num_cached_tokens,
        uncached_tokens=candidate.num_uncached_tokens,
        wait_s=candidate.wait_s,
        ttft_p50_s=candidate.ttft_p50_s,
        ttft_high_s=candidate.ttft_high_s,
        tpot_s=candidate.tpot_s,
        num_requests=candidate.num_requests,
    )
