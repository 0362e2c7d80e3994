"""Decisions as clients are told of them."""

from __future__ import annotations

import math
from pathlib import Path

import grpc
import pytest
from gateway_fakes import FakeLeader, stage
from tenant_files import KEYS, auth_config, bearer

from cluster.errors import NotFoundError
from cluster.gateway.explain import check_visible, explanation_to_proto
from cluster.gateway.identity import Caller
from cluster.router.dispatcher import Explanation
from cluster.router.route import Candidate, Decision, Outcome, OutcomeKind, RouteRequest
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import SLO, ReplicaLoad


def _explanation(outcome: Outcome, **fields: float) -> Explanation:
    request = RouteRequest("r", 100, lambda *kind: [], 5.0, SLO(ttft_s=2.0), tenant="alice")
    return Explanation(request, outcome, 10.0, **fields)


def test_message_has_every_figure_of_the_decision() -> None:
    candidates = (
        Candidate("a", 0.5, 64, 36, 0.1, 0.2, 0.3, 0.04, 7),
        Candidate("b", 0.75, 0, 100),
    )
    outcome = Outcome(
        OutcomeKind.DEGRADED, "ttft_s=2 cannot be kept", Decision(candidates, 5, 2, False)
    )
    message = explanation_to_proto(_explanation(outcome, ttft_s=0.25), policy="slo", now_s=12.5)
    first = pb.RouteCandidate(
        replica_id="a",
        score=0.5,
        cached_tokens=64,
        uncached_tokens=36,
        wait_s=0.1,
        ttft_p50_s=0.2,
        ttft_high_s=0.3,
        tpot_s=0.04,
        num_requests=7,
    )
    assert message == pb.ExplainResponse(
        request_id="r",
        policy="slo",
        outcome=pb.ADMISSION_OUTCOME_DEGRADED,
        reason="ttft_s=2 cannot be kept",
        candidates=[first, pb.RouteCandidate(replica_id="b", score=0.75, uncached_tokens=100)],
        num_candidates=5,
        num_excluded=2,
        age_s=2.5,
        ttft_slo_s=2.0,
        ttft_s=0.25,
    )


@pytest.mark.parametrize("kind", OutcomeKind)
def test_every_outcome_has_a_name(kind: OutcomeKind) -> None:
    message = explanation_to_proto(_explanation(Outcome(kind)), policy="slo", now_s=12.5)
    assert message.outcome != pb.ADMISSION_OUTCOME_UNSPECIFIED
    assert not message.HasField("ttft_s") and not message.candidates


def test_request_is_shown_to_its_tenant_and_to_administrators() -> None:
    found = _explanation(Outcome(OutcomeKind.QUEUED))
    assert check_visible(found, "r", Caller("alice", is_admin=False)) is found
    assert check_visible(found, "r", Caller("root", is_admin=True)) is found
    with pytest.raises(NotFoundError) as other:
        check_visible(found, "r", Caller("bob", is_admin=False))
    with pytest.raises(NotFoundError) as unknown:
        check_visible(None, "r", Caller("bob", is_admin=False))
    assert str(other.value) == str(unknown.value)


@pytest.mark.integration
async def test_served_request_is_explained_to_its_tenant_alone(tmp_path: Path) -> None:
    auth = auth_config(tmp_path).model_dump()
    busy = FakeLeader("b")
    busy.load = ReplicaLoad(num_running=3, num_blocks=100, num_free_blocks=100, late_s=9.0)
    request = pb.GenerateRequest(
        request_id="mine",
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.SamplingParams(max_tokens=2),
        latency=pb.LatencyObjective(ttft_s=60.0),
    )
    async with (
        stage(FakeLeader("a"), busy, auth=auth) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = InferenceStub(channel)
        await stub.Generate(request, metadata=bearer(KEYS["alice"]))
        ask = pb.ExplainRequest(request_id="mine")
        told = await stub.Explain(ask, metadata=bearer(KEYS["alice"]))
        for metadata in (bearer(KEYS["bob"]), [], bearer("wrong")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Explain(ask, metadata=metadata)
            known = metadata == bearer(KEYS["bob"])
            code = grpc.StatusCode.NOT_FOUND if known else grpc.StatusCode.UNAUTHENTICATED
            assert refused.value.code() is code
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            ask = pb.ExplainRequest(request_id="x" * 129)
            await stub.Explain(ask, metadata=bearer(KEYS["alice"]))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (told.request_id, told.policy) == ("mine", "slo")
    assert told.outcome == pb.ADMISSION_OUTCOME_DISPATCHED
    assert [candidate.replica_id for candidate in told.candidates] == ["a", "b"]
    assert (told.num_candidates, told.num_excluded) == (2, 0)
    assert told.candidates[0].uncached_tokens == 3
    assert told.ttft_slo_s == 60.0 and not told.HasField("tpot_slo_s")
    assert 0 < told.ttft_s < 60 and 0 <= told.age_s < 60
    assert math.isfinite(told.candidates[0].score)
