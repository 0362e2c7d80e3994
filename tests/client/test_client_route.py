"""What clients tell the global scheduler, and what it tells them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from cluster.client import AsyncClient, Client, Explanation, Queued, RouteCandidate
from cluster.errors import InvalidArgumentError, NotFoundError, OverloadedError
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.types import ServiceClass
from tests.client.client_fakes import EVENTS, FakeInference, serving

pytestmark = pytest.mark.integration


@pytest.fixture
def server() -> Iterator[tuple[str, FakeInference]]:
    with serving() as served:
        yield served


@pytest.mark.parametrize("is_async", [False, True])
def test_request_carries_class_or_times_and_session(
    server: tuple[str, FakeInference], is_async: bool
) -> None:
    address, servicer = server
    options: list[dict[str, Any]] = [
        {"service_class": "batch"},
        {"service_class": ServiceClass.INTERACTIVE, "session": "s"},
        {"ttft_s": 0.5, "tpot_s": 0.05},
        {"tpot_s": 0.05},
        {},
    ]
    if is_async:

        async def ask() -> None:
            async with AsyncClient(address) as client:
                for chosen in options:
                    await client.generate("x", **chosen)
                    assert [event async for event in client.stream("x", **chosen)]

        asyncio.run(ask())
    else:
        with Client(address) as client:
            for chosen in options:
                client.generate("x", **chosen)
                assert list(client.stream("x", **chosen))
    expected = [
        pb.GenerateRequest(text="x", service_class=pb.SERVICE_CLASS_BATCH),
        pb.GenerateRequest(text="x", service_class=pb.SERVICE_CLASS_INTERACTIVE, session="s"),
        pb.GenerateRequest(text="x", latency=pb.LatencyObjective(ttft_s=0.5, tpot_s=0.05)),
        pb.GenerateRequest(text="x", latency=pb.LatencyObjective(tpot_s=0.05)),
        pb.GenerateRequest(text="x"),
    ]
    for request in servicer.requests:
        assert request.HasField("sampling")
        assert request.request_id
        request.ClearField("sampling")
        request.ClearField("request_id")
    assert servicer.requests[::2] == servicer.requests[1::2] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"service_class": "batch", "ttft_s": 0.5}, "service_class=batch and ttft_s=0.5"),
        ({"service_class": "urgent"}, "'urgent' is unknown: take interactive, standard, batch"),
        ({"ttft_s": 0.0}, "ttft_s=0, it is a finite time above 0"),
        ({"tpot_s": math.nan}, "tpot_s=nan"),
        ({"tpot_s": math.inf}, "tpot_s=inf"),
        ({"session": "\udc00"}, "session is no text"),
    ],
)
def test_request_with_an_objective_that_cannot_be_one_is_not_sent(
    server: tuple[str, FakeInference], options: dict[str, Any], message: str
) -> None:
    address, servicer = server
    with Client(address) as client:
        with pytest.raises(InvalidArgumentError, match=message):
            client.generate("x", **options)
        with pytest.raises(InvalidArgumentError, match=message):
            list(client.stream("x", **options))
    assert not servicer.requests


def test_request_with_an_unknown_option_is_refused(server: tuple[str, FakeInference]) -> None:
    with Client(server[0]) as client, pytest.raises(TypeError, match="max_tokens"):
        client.generate("x", max_tokens=3)  # type: ignore[call-arg]


def test_queued_event_has_place_and_estimate(server: tuple[str, FakeInference]) -> None:
    waits = pb.GenerateStreamResponse(seq=0, queued=pb.Queued(position=4, estimate_s=0.0))
    server[1].events = [waits, *EVENTS[1:]]
    with Client(server[0]) as client:
        assert next(client.stream("x")) == Queued(4, 0.0)
        server[1].events = EVENTS
        assert next(client.stream("x")) == Queued(2, None)


def test_refusal_says_when_to_try_again(server: tuple[str, FakeInference]) -> None:
    packed = AnyMessage()
    packed.Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)))
    server[1].refusal = Status(code=8, message="come back later", details=[packed])
    with Client(server[0]) as client, pytest.raises(OverloadedError) as caught:
        client.generate("x")
    assert caught.value.retry_after_s == 2.5


@pytest.mark.parametrize("is_async", [False, True])
def test_explanation_is_read(server: tuple[str, FakeInference], is_async: bool) -> None:
    address, servicer = server
    candidate = pb.RouteCandidate(replica_id="a", score=0.5, cached_tokens=32, num_requests=3)
    servicer.explanation = pb.ExplainResponse(
        request_id="r",
        policy="slo",
        outcome=pb.ADMISSION_OUTCOME_DISPATCHED,
        reason="least",
        candidates=[candidate],
        num_candidates=2,
        num_excluded=1,
        age_s=4.0,
        ttft_slo_s=0.0,
        ttft_s=0.25,
    )
    if is_async:

        async def ask() -> Explanation:
            async with AsyncClient(address) as client:
                return await client.explain("r")

        found = asyncio.run(ask())
    else:
        with Client(address) as client:
            found = client.explain("r")
    expected = RouteCandidate("a", 0.5, 32, 0, 0.0, 0.0, 0.0, 0.0, 3)
    assert found == Explanation(
        "r", "slo", "dispatched", "least", (expected,), 2, 1, 4.0, 0.0, None, 0.25
    )
    assert found.chosen == expected


def test_explanation_of_a_refusal_chose_nobody(server: tuple[str, FakeInference]) -> None:
    server[1].explanation = pb.ExplainResponse(
        outcome=pb.ADMISSION_OUTCOME_REFUSED, candidates=[pb.RouteCandidate(replica_id="a")]
    )
    with Client(server[0]) as client:
        assert client.explain("r").chosen is None


def test_request_that_nobody_remembers_is_not_found(server: tuple[str, FakeInference]) -> None:
    with Client(server[0]) as client:
        with pytest.raises(NotFoundError, match="gone is not remembered"):
            client.explain("gone")
        with pytest.raises(InvalidArgumentError, match="request_id is no text"):
            client.explain("\udc00")
