"""Tenants before a real gateway: who gets in, and that a salt is lost on no way (FACTS.md 6.17)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import BLOCK_SIZE, FINGERPRINT, FakeLeader, Stage, stage
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tenant_files import KEYS, auth_config, bearer, make_key, sign, write_tenants
from tls_files import make_certificate

from cluster.gateway.identity import Authenticator
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.rpc.sluice.v1 import cache_pb2, cache_pb2_grpc
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

PROMPT = tuple(range(1, 1 + 2 * BLOCK_SIZE))
Metadata = list[tuple[str, str | bytes]]


def _keys(salt: bytes) -> list[int]:
    hashes = block_hashes(PROMPT, BLOCK_SIZE, fingerprint=FINGERPRINT, salt=salt)
    return [router_key(block_hash) for block_hash in hashes]


def _request(**fields: Any) -> pb.GenerateRequest:
    fields.setdefault("token_ids", pb.TokenIds(ids=PROMPT))
    return pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=1), **fields)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Stage]:
    auth = auth_config(tmp_path).model_dump()
    async with stage(FakeLeader(), auth=auth) as running:
        yield running


def _salt(running: Stage, name: str) -> bytes:
    return Authenticator(running.config.auth).authenticate(bearer(KEYS[name]), {}).salt


@pytest.mark.integration
async def test_every_method_asks_for_credentials_but_health(running: Stage) -> None:
    wrong: list[Metadata] = [[], bearer("wrong"), [("x-tenant", "alice"), ("tenant", "alice")]]
    async with grpc.aio.insecure_channel(running.address) as channel:
        inference, cache = InferenceStub(channel), cache_pb2_grpc.CacheStub(channel)
        calls: list[Callable[..., Any]] = [
            lambda **kw: inference.Generate(_request(request_id="hers"), **kw),
            lambda **kw: inference.GenerateStream(
                pb.GenerateStreamRequest(request=_request()), **kw
            ).read(),
            lambda **kw: inference.Tokenize(pb.TokenizeRequest(text="x"), **kw),
            lambda **kw: inference.ListModels(pb.ListModelsRequest(), **kw),
            lambda **kw: inference.ClusterStatus(pb.ClusterStatusRequest(), **kw),
            lambda **kw: inference.Explain(pb.ExplainRequest(request_id="hers"), **kw),
            lambda **kw: cache.ListPrefixes(cache_pb2.ListPrefixesRequest(), **kw),
        ]
        others: list[Callable[..., Any]] = [  # that find nothing
            lambda **kw: inference.Resume(pb.ResumeRequest(request_id="nobody's"), **kw).read(),
            lambda **kw: inference.DrainReplica(pb.DrainReplicaRequest(replica_id="none"), **kw),
        ]
        for call in (*calls, *others):
            for metadata in wrong:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call(metadata=metadata)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            if call in calls:
                assert await call(metadata=bearer(KEYS["carol"]))
        names = {m.name for m in pb.DESCRIPTOR.services_by_name["Inference"].methods}
        assert len(names) == 8, "a new method: does it authenticate?"
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert len(running.leaders[0].submitted) == 2
    assert running.server.num_inflight == 0


@pytest.mark.integration
async def test_salt_of_the_caller_reaches_the_leader_by_both_methods(running: Stage) -> None:
    leader = running.leaders[0]
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        salts = {}
        for name in KEYS:
            leader.submitted.clear()
            await stub.Generate(_request(), metadata=bearer(KEYS[name]))
            stream = stub.GenerateStream(
                pb.GenerateStreamRequest(request=_request()), metadata=bearer(KEYS[name])
            )
            assert [event async for event in stream]
            first, second = (request.salt for request in leader.submitted)
            assert first == second == _salt(running, name)
            salts[name] = first
    assert salts["alice"] == salts["bob"]
    assert len(set(salts.values())) == 3
    assert b"" not in salts.values()


@pytest.mark.integration
async def test_prompt_is_routed_to_the_blocks_of_its_own_tenant(running: Stage) -> None:
    other = FakeLeader("replica-2")
    other.blocks = _keys(_salt(running, "alice"))
    await running.add(other)
    cached = {}
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        for name in ("alice", "bob", "carol"):
            caller = bearer(KEYS[name])
            await stub.Generate(_request(request_id=name), metadata=caller)
            told = await stub.Explain(pb.ExplainRequest(request_id=name), metadata=caller)
            cached[name] = {c.replica_id: c.cached_tokens for c in told.candidates}
            if name != "carol":
                assert other.submitted.pop().prompt_token_ids == PROMPT
    # The last token of a prompt is always computed.
    assert cached["alice"] == cached["bob"] == {"replica-1": 0, "replica-2": len(PROMPT) - 1}
    assert cached["carol"] == {"replica-1": 0, "replica-2": 0}


@pytest.mark.integration
async def test_verified_certificate_is_a_credential(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "gateway")
    own_cert, own_key = make_certificate(tmp_path, "agent", subject="DNS:carol.example")
    auth = auth_config(tmp_path).model_dump()
    tls = {"tls_cert": cert, "tls_key": key, "tls_client_ca": own_cert}
    async with stage(FakeLeader(), auth=auth, **tls) as running:
        credentials = grpc.ssl_channel_credentials(
            *(Path(file).read_bytes() for file in (cert, own_key, own_cert))
        )
        async with grpc.aio.secure_channel(running.address, credentials) as channel:
            stub = InferenceStub(channel)
            await stub.Generate(_request())
            await stub.Generate(_request(), metadata=bearer(KEYS["carol"]))
            with pytest.raises(grpc.aio.AioRpcError, match="different tenants"):
                await stub.Generate(_request(), metadata=bearer(KEYS["alice"]))
        salts = {request.salt for request in running.leaders[0].submitted}
        assert salts == {_salt(running, "carol")}


@pytest.mark.integration
async def test_keys_and_tokens_are_in_no_log_and_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key, public = make_key("ES256")
    (tmp_path / "key").write_bytes(public)
    auth = auth_config(tmp_path, jwt_key_file=str(tmp_path / "key"), jwt_algorithm="ES256")
    tokens = [
        sign(key, "ES256", sub="carol"),
        sign(key, "ES256", sub="carol", expires_in_s=-9.0),
        sign(key, "ES256", sub="mallory"),
        sign(make_key("ES256")[0], "ES256", sub="carol"),
    ]
    answers = []
    async with stage(FakeLeader(), auth=auth.model_dump()) as running:
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = InferenceStub(channel)
            for credential in [KEYS["carol"], "sk-unknown-to-all", *tokens]:
                try:
                    response = await stub.Generate(_request(), metadata=bearer(credential))
                    answers.append(str(response))
                except grpc.aio.AioRpcError as error:
                    answers.append(repr(error))
        assert len(running.leaders[0].submitted) == 2
        assert {r.salt for r in running.leaders[0].submitted} == {_salt(running, "carol")}
    said = caplog.text + "".join(answers)
    assert "UNAUTHENTICATED" in said
    for secret in [KEYS["carol"], "sk-unknown-to-all", *tokens]:
        assert secret not in said
        assert secret.rpartition(".")[2] not in said, "a signature"


@pytest.mark.integration
async def test_tenant_that_left_the_file_is_refused_while_others_go_on(
    running: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.identity._LOOK_INTERVAL_S", 0.0)
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = InferenceStub(channel)
        await stub.Generate(_request(), metadata=bearer(KEYS["alice"]))
        write_tenants(tmp_path, [{"name": "bob", "certificate": ["bob.example"]}])
        with pytest.raises(grpc.aio.AioRpcError, match="none that is known"):
            await stub.Generate(_request(), metadata=bearer(KEYS["alice"]))
