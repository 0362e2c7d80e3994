"""A registered prefix on its way into a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, stage
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tenant_files import KEYS, auth_config, bearer

from cluster.gateway.identity import Authenticator
from cluster.gateway.tokenizer import Tokenizer
from cluster.rpc.sluice.v1 import cache_pb2, cache_pb2_grpc
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.integration

PREFIX = tuple(range(100, 140))
ALICE, BOB = bearer(KEYS["alice"]), bearer(KEYS["bob"])


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Stage]:
    """Run a gateway with one leader; alice has registered `tools`."""
    auth = auth_config(tmp_path).model_dump()
    async with stage(FakeLeader(max_model_len=64), auth=auth) as running:
        async with grpc.aio.insecure_channel(running.address) as channel:
            request = cache_pb2.RegisterPrefixRequest(
                name="tools", token_ids=pb.TokenIds(ids=PREFIX)
            )
            await cache_pb2_grpc.CacheStub(channel).RegisterPrefix(request, metadata=ALICE)
        running.leaders[0].submitted.clear()
        yield running


async def _refusal(
    running: Stage, request: pb.GenerateRequest, metadata: list[tuple[str, str | bytes]] = ALICE
) -> tuple[grpc.StatusCode, str, str]:
    """Return a refused call's code, message, and the field that it names."""
    async with grpc.aio.insecure_channel(running.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await InferenceStub(channel).Generate(request, metadata=metadata)
    bad, field = error_details_pb2.BadRequest(), ""
    for detail in rpc_status.from_call(refused.value).details:
        if detail.Unpack(bad):
            field = bad.field_violations[0].field
    return refused.value.code(), refused.value.details() or "", field


async def test_tokens_of_the_prefix_come_before_the_prompts_own(running: Stage) -> None:
    tokenizer = Tokenizer.load(running.config.model)
    text = await tokenizer.encode("def f():", continues=True)
    sampling = pb.SamplingParams(max_tokens=2)
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        requests = [
            pb.GenerateRequest(prefix="tools", token_ids=pb.TokenIds(ids=[7, 8])),
            pb.GenerateRequest(prefix="tools", text="def f():"),
        ]
        for request in requests:
            request.sampling.CopyFrom(sampling)
            response = await stub.Generate(request, metadata=ALICE)
            assert len(response.token_ids) == 2
        assert response.usage.prompt_tokens == len(PREFIX) + len(text)
    first, second = running.leaders[0].submitted
    assert first.prompt_token_ids == (*PREFIX, 7, 8)
    assert second.prompt_token_ids == PREFIX + text
    salt = Authenticator(running.config.auth).salt_of("alice")
    assert first.salt == second.salt == salt


async def test_text_after_a_prefix_gets_nothing_that_begins_a_prompt(
    running: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def encode(self: Tokenizer, text: str, *, continues: bool = False) -> tuple[int, ...]:
        asked.append((text, continues))
        return (7,)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        await stub.Generate(pb.GenerateRequest(prefix="tools", text="x"), metadata=ALICE)
        await stub.Generate(pb.GenerateRequest(text="y"), metadata=ALICE)
    assert asked == [("x", True), ("y", False)]


async def test_prefix_of_another_tenant_is_not_found(running: Stage) -> None:
    request = pb.GenerateRequest(prefix="tools", token_ids=pb.TokenIds(ids=[7]))
    code, _, _ = await _refusal(running, request, BOB)  # of the same group, at that
    assert code is grpc.StatusCode.NOT_FOUND
    code, _, _ = await _refusal(running, pb.GenerateRequest(prefix="unknown", text="x"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert not running.leaders[0].submitted


async def test_prefix_alone_is_no_prompt(running: Stage) -> None:
    code, _, field = await _refusal(running, pb.GenerateRequest(prefix="tools"))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")


@pytest.mark.parametrize(
    ("num_own_tokens", "max_tokens", "said", "field"),
    [
        (24, 1, "64 tokens, 40 of them the prefix's, limit=63", "prefix"),
        (64, 1, "104 tokens, 40 of them the prefix's, limit=63", "token_ids"),
        (10, 15, "50 tokens + max_tokens=15 = 65, limit=64", "sampling.max_tokens"),
    ],
)
async def test_context_counts_the_prefix(
    running: Stage, num_own_tokens: int, max_tokens: int, said: str, field: str
) -> None:
    request = pb.GenerateRequest(
        prefix="tools",
        token_ids=pb.TokenIds(ids=[7] * num_own_tokens),
        sampling=pb.SamplingParams(max_tokens=max_tokens),
    )
    code, message, named = await _refusal(running, request)
    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert said in message
    assert running.server.num_inflight == 0
