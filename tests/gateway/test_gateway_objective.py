from __future__ import annotations

import math

import grpc
import pytest
from gateway_fakes import FakeLeader, stage

from cluster.config import EngineConfig, LatencyConfig
from cluster.errors import InvalidArgumentError
from cluster.gateway.objective import read_slo
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import SLO, ServiceClass

CONFIG = EngineConfig(
    interactive=LatencyConfig(ttft_s=0.5, tpot_s=0.05), batch=LatencyConfig(tpot_s=2.0)
)


def test_request_that_says_nothing_is_standard_without_objective() -> None:
    assert read_slo(pb.GenerateRequest(), CONFIG) == (SLO(None, None), ServiceClass.STANDARD)


def test_class_has_the_operators_figures() -> None:
    interactive = pb.GenerateRequest(service_class=pb.SERVICE_CLASS_INTERACTIVE)
    assert read_slo(interactive, CONFIG) == (SLO(0.5, 0.05), ServiceClass.INTERACTIVE)
    batch = pb.GenerateRequest(service_class=pb.SERVICE_CLASS_BATCH)
    assert read_slo(batch, CONFIG) == (SLO(None, 2.0), ServiceClass.BATCH)
    standard = pb.GenerateRequest(service_class=pb.SERVICE_CLASS_STANDARD)
    figures = SLO(CONFIG.standard.ttft_s, CONFIG.standard.tpot_s)
    assert read_slo(standard, CONFIG) == (figures, ServiceClass.STANDARD)


def test_own_figures_stand_for_themselves_and_are_interactive() -> None:
    latency = pb.LatencyObjective(tpot_s=0.3)
    slo, service_class = read_slo(pb.GenerateRequest(latency=latency), CONFIG)
    assert (slo, service_class) == (SLO(None, 0.3), ServiceClass.INTERACTIVE)
    latency = pb.LatencyObjective(ttft_s=2, tpot_s=0.3)
    assert read_slo(pb.GenerateRequest(latency=latency), CONFIG)[0] == SLO(2.0, 0.3)


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1.1e6, math.inf, -math.inf, math.nan])
def test_time_that_is_none_is_refused_with_its_path(name: str, value: float) -> None:
    message = pb.GenerateRequest(latency=pb.LatencyObjective(**{name: value}))
    with pytest.raises(InvalidArgumentError) as caught:
        read_slo(message, CONFIG)
    assert caught.value.field == f"latency.{name}"
    assert name in str(caught.value)


def test_latency_without_a_time_is_refused() -> None:
    message = pb.GenerateRequest(latency=pb.LatencyObjective())
    with pytest.raises(InvalidArgumentError, match="give ttft_s or tpot_s") as caught:
        read_slo(message, CONFIG)
    assert caught.value.field == "latency"


def test_unknown_class_is_refused() -> None:
    message = pb.GenerateRequest()
    message.service_class = 99  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match="service_class=99") as caught:
        read_slo(message, CONFIG)
    assert caught.value.field == "service_class"


@pytest.mark.integration
async def test_objective_reaches_the_leader() -> None:
    leader = FakeLeader()
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.SamplingParams(max_tokens=2),
        latency=pb.LatencyObjective(ttft_s=60.0, tpot_s=30.0),
    )
    async with stage(leader) as running, grpc.aio.insecure_channel(running.address) as channel:
        await InferenceStub(channel).Generate(request, timeout=20)
        bad = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1]), latency=pb.LatencyObjective(tpot_s=-1)
        )
        with pytest.raises(grpc.aio.AioRpcError, match="tpot_s=-1") as caught:
            await InferenceStub(channel).Generate(bad, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (submitted,) = leader.submitted
    assert submitted.slo.ttft_s is not None
    assert 40.0 < submitted.slo.ttft_s <= 60.0, "what the gateway took is off it"
    assert submitted.slo.tpot_s == 30.0
    assert submitted.service_class is ServiceClass.INTERACTIVE
