"""One span per request, for collectors that exist only here."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, stage
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cluster.errors import OverloadedError
from cluster.gateway import grpc_server
from cluster.gateway.identity import Caller
from cluster.gateway.tracing import Tracing, describe, open_provider
from cluster.router.dispatcher import Explanation
from cluster.router.route import Candidate, Decision, Outcome, OutcomeKind, RouteRequest
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")]


class Collector:
    """Keeps spans in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def span(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        self.exporter.clear()
        return span


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setattr(grpc_server, "open_provider", lambda gateway_id: collector.provider)
    yield collector
    collector.provider.shutdown()


async def _generate(running: Stage, **fields: Any) -> None:
    request = pb.GenerateRequest(
        request_id="mine",
        text="def secret():",
        sampling=pb.SamplingParams(max_tokens=2, stop=["secret"]),
        **fields,
    )
    async with grpc.aio.insecure_channel(running.address) as channel:
        await InferenceStub(channel).Generate(request, metadata=PARENT)


def test_span_belongs_to_the_callers_trace_and_fails_with_the_request() -> None:
    collector = Collector()
    tracing = Tracing(collector.provider)
    with tracing.request(PARENT, "r", Caller("alice")):
        pass
    span = collector.span()
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert dict(span.attributes or {}) == {
        "sluice.request_id": "r",
        "sluice.tenant": "alice",
        "sluice.status": "OK",
    }
    for error, status in (
        (OverloadedError("full"), "RESOURCE_EXHAUSTED"),
        (KeyError(), "INTERNAL"),
    ):
        with pytest.raises(type(error)), tracing.request([], "r", Caller()):
            raise error
        span = collector.span()
        assert span.parent is None
        assert (span.attributes or {})["sluice.status"] == status
        assert span.status.status_code is StatusCode.ERROR
        assert not span.events, "an error's text is for its client"
    with pytest.raises(asyncio.CancelledError), tracing.request([], "r", Caller()):
        raise asyncio.CancelledError
    assert collector.span().status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("header", ["", "rubbish", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_parent_that_is_none_begins_a_trace(header: str) -> None:
    collector = Collector()
    with Tracing(collector.provider).request([("traceparent", header)], "r", Caller()):
        pass
    assert collector.span().parent is None


def test_without_a_provider_nothing_is_recorded() -> None:
    with Tracing().request(PARENT, "r", Caller()) as span:
        assert not span.is_recording()


def test_refusal_is_described_with_what_was_weighed() -> None:
    collector = Collector()
    request = RouteRequest("r", 3, lambda *kind: [], 0.0)
    decision = Decision((Candidate("a", 0.1234567, 2, 1, ttft_high_s=3.0),), 1, 0, False)
    outcome = Outcome(OutcomeKind.REFUSED, "too late", decision)
    with Tracing(collector.provider).request([], "r", Caller()) as span:
        describe(span, Explanation(request, outcome, 0.0), policy="slo")
        describe(span, None, policy="forgotten")
    attributes = dict(collector.span().attributes or {})
    assert attributes["sluice.route.policy"] == "slo"
    assert attributes["sluice.admission.outcome"] == "refused"
    assert attributes["sluice.admission.reason"] == "too late"
    assert "sluice.route.replica_id" not in attributes
    (candidate,) = json.loads(str(attributes["sluice.route.candidates"]))
    assert candidate == {
        "replica_id": "a",
        "score": 0.123457,
        "cached_tokens": 2,
        "wait_s": 0.0,
        "ttft_p50_s": 0.0,
        "ttft_high_s": 3.0,
    }


@pytest.mark.integration
async def test_request_has_one_span_with_its_decision(collector: Collector) -> None:
    async with stage(FakeLeader("a"), FakeLeader("b")) as running:
        await _generate(running)
        span = collector.span()
    attributes = dict(span.attributes or {})
    assert span.name == "sluice.request"
    assert span.parent is not None and f"{span.parent.span_id:016x}" == PARENT_ID
    assert attributes["sluice.request_id"] == "mine"
    assert attributes["sluice.admission.outcome"] == "dispatched"
    candidates = json.loads(str(attributes["sluice.route.candidates"]))
    assert attributes["sluice.route.replica_id"] == candidates[0]["replica_id"]
    assert {candidate["replica_id"] for candidate in candidates} == {"a", "b"}
    ttft_s = attributes["sluice.ttft_s"]
    assert isinstance(ttft_s, float) and 0 < ttft_s < 60
    assert "secret" not in str(attributes)


@pytest.mark.integration
async def test_request_that_is_wrong_has_a_span_without_a_decision(collector: Collector) -> None:
    async with stage(FakeLeader()) as running:
        with pytest.raises(grpc.aio.AioRpcError):
            await _generate(running, session="x" * 129)
        span = collector.span()
    assert (span.attributes or {})["sluice.status"] == "INVALID_ARGUMENT"
    assert "sluice.admission.outcome" not in (span.attributes or {})


@pytest.mark.integration
async def test_replica_that_answered_in_the_second_attempt_is_the_one_of_the_span(
    collector: Collector,
) -> None:
    leaders = [FakeLeader("a"), FakeLeader("b")]
    for leader in leaders:
        leader.refusal = "RESOURCE_EXHAUSTED: 8 requests wait, limit=8: try again later"
    async with stage(*leaders) as running:
        with pytest.raises(grpc.aio.AioRpcError):
            await _generate(running)
        attributes = dict(collector.span().attributes or {})
        candidates = json.loads(str(attributes["sluice.route.candidates"]))
        # The second decision is the one that is told, and it knows of no other replica.
        assert [attributes["sluice.route.replica_id"]] == [c["replica_id"] for c in candidates]


class FakeCollector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Takes spans over OTLP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.mark.integration
async def test_spans_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, server = FakeCollector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    async with stage(FakeLeader()) as running:
        await _generate(running)
    await server.stop(None)
    ((names, span),) = fake.spans
    assert (names["service.name"], names["service.instance.id"]) == ("sluice", "gateway-1")
    assert span.trace_id.hex() == TRACE_ID


def test_nothing_is_sent_where_the_environment_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert open_provider("g") is None


def test_missing_extra_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    exporter = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    assert open_provider("g") is None
    assert "extra `tracing`" in caplog.text
