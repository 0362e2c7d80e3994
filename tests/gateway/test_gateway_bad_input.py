"""Bad input over the wire: each gets a precise status, and the gateway goes on serving."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, stage
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.integration


@pytest.fixture
async def running() -> AsyncIterator[Stage]:
    async with stage(FakeLeader(max_model_len=64)) as running:
        yield running


def _request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "x", **fields})


def _sampling(**fields: Any) -> pb.GenerateRequest:
    return _request(sampling=pb.SamplingParams(**fields))


BAD = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (_request(text=""), "text"),
    "no tokens": (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
    "prompt too long": (_request(text="word " * 100), "text"),
    "tokens too long": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 64)), "token_ids"),
    "too many tokens": (_sampling(max_tokens=64), "sampling.max_tokens"),
    "max_tokens 0": (_sampling(max_tokens=0), "sampling.max_tokens"),
    "max_tokens over": (_sampling(max_tokens=65), "sampling.max_tokens"),
    "negative temperature": (_sampling(temperature=-1), "sampling.temperature"),
    "temperature NaN": (_sampling(temperature=float("nan")), "sampling.temperature"),
    "token id": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 4096])),
        "token_ids.ids[1]",
    ),
    "10,000 stops": (_sampling(stop=["x"] * 10_000), "sampling.stop"),
    "request id": (_request(request_id="x" * 129), "request_id"),
}


async def _status(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Return how a call failed: its code and its details by type."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    status = rpc_status.from_call(caught.value)
    details = {}
    for packed in status.details if status else []:
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        details[type(detail).__name__] = detail
    return caught.value.code(), details


async def test_bad_requests_name_their_field_in_both_methods(running: Stage) -> None:
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        for name, (request, field) in BAD.items():
            stream = stub.GenerateStream(pb.GenerateStreamRequest(request=request))
            for call in (stub.Generate(request), stream):
                code, details = await _status(call)
                assert code is grpc.StatusCode.INVALID_ARGUMENT, name
                assert details["BadRequest"].field_violations[0].field == field, name
                assert details["ErrorInfo"].reason == "INVALID_ARGUMENT"
                assert details["ErrorInfo"].domain == "sluice"
        assert (await stub.Generate(_sampling(max_tokens=1))).token_ids
    assert running.server.num_inflight == 0
    assert len(running.leaders[0].submitted) == 1


async def test_unknown_model_is_not_found(running: Stage) -> None:
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        for call in (
            stub.Generate(_request(model="gpt")),
            stub.GenerateStream(pb.GenerateStreamRequest(request=_request(model="gpt"))),
            stub.Tokenize(pb.TokenizeRequest(model="gpt", text="x")),
        ):
            code, details = await _status(call)
            assert code is grpc.StatusCode.NOT_FOUND
            assert details["ErrorInfo"].reason == "NOT_FOUND"


async def test_strings_that_are_not_utf8_are_named(running: Stage) -> None:
    text = b"\x1a\x02\xff\xfe"  # field 3, two bytes
    stops = b"\x2a\x07\x5a\x01a\x5a\x02\xff\xff"  # field 5: field 11 twice
    nested = b"\x0a" + bytes([len(text)]) + text
    cases = [
        ("Generate", text, "text"),
        ("Generate", stops, "sampling.stop[1]"),
        ("GenerateStream", nested, "text"),
        ("Tokenize", b"\x12\x01\xff", "text"),
    ]
    async with grpc.aio.insecure_channel(running.address) as channel:
        for method, data, field in cases:
            call = channel.unary_unary(f"/sluice.v1.Inference/{method}")(data)
            code, details = await _status(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details["BadRequest"].field_violations[0].field == field
        code, _ = await _status(channel.unary_unary("/sluice.v1.Inference/Generate")(b"\xff\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_message_of_50_mb_is_refused_and_the_connection_goes_on(running: Stage) -> None:
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        code, _ = await _status(stub.Generate(_request(text="x" * 50_000_000)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Generate(_sampling(max_tokens=1))).token_ids


async def test_smaller_message_limit_is_kept_and_the_server_goes_on() -> None:
    async with (
        stage(FakeLeader(), max_message_bytes=64 * 1024) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = InferenceStub(channel)
        code, _ = await _status(stub.Generate(_request(text="x" * 65_600)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        code, _ = await _status(stub.Generate(_request(text="x" * 65_400)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT, "read, and longer than the context"
        assert (await stub.Generate(_sampling(max_tokens=1))).token_ids


async def test_bug_is_internal_and_shows_no_prompt(
    running: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("boom")

    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        monkeypatch.setattr("cluster.gateway.generation.Generation.run", fail)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(_request(text="my secret", request_id="r-7"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "r-7" in (caught.value.details() or "")
        assert "boom" not in (caught.value.details() or "")
    assert "boom" in caplog.text
    assert "secret" not in caplog.text
    assert running.server.num_inflight == 0


async def test_overload_says_when_to_come_back(running: Stage) -> None:
    running.leaders[0].refusal = "RESOURCE_EXHAUSTED: 9 requests wait, limit=9: try again later"
    async with grpc.aio.insecure_channel(running.address) as channel:
        code, details = await _status(InferenceStub(channel).Generate(_request()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["RetryInfo"].retry_delay.ToNanoseconds() > 0
