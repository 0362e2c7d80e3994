"""The gateway as a process sees it: port, TLS, health, reflection, end."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from gateway_fakes import FakeLeader, eventually, stage
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tls_files import make_certificate

from cluster.client import AsyncClient, Client, Tls
from cluster.errors import ConfigError, UnavailableError
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import CacheLoad, ReplicaLoad, StoreState

pytestmark = pytest.mark.integration

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def _health(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_health_is_serving_from_the_first_replica_on() -> None:
    async with stage() as running:
        assert await _health(running.address) == NOT_SERVING
        leader = await running.add(FakeLeader())

        async def is_serving() -> bool:
            return await _health(running.address) == SERVING

        await eventually(is_serving)
        assert await _health(running.address, "sluice.v1.Inference") == SERVING
        await leader.die()
        await running.wait_state("replica-1", "connecting")
        assert await _health(running.address) == SERVING, "requests wait for the next one"


async def test_reflection_lists_and_describes_the_service() -> None:
    async with stage() as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {s.name for s in (await call.read()).list_services_response.service}
        assert {"sluice.v1.Inference", "grpc.health.v1.Health"} <= names
        symbol = reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="sluice.v1.Inference"
        )
        await call.write(symbol)
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        call.cancel()


async def test_status_shows_the_tiers_of_each_replica() -> None:
    leader = FakeLeader()
    tiers = CacheLoad(store_state=StoreState.DEGRADED, num_host_slots=7, num_store_hit_tokens=48)
    leader.load = ReplicaLoad(num_blocks=100, cache=tiers)
    async with stage(leader) as running, grpc.aio.insecure_channel(running.address) as channel:
        request = inference_pb2.ClusterStatusRequest()
        (replica,) = (await InferenceStub(channel).ClusterStatus(request)).replicas
    assert replica.cache.store_state == inference_pb2.STORE_STATE_DEGRADED
    assert (replica.cache.num_host_slots, replica.cache.num_store_hit_tokens) == (7, 48)


async def http2_connection(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    empty_settings = b"\0\0\0\4\0\0\0\0\0"
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty_settings)
    return reader, writer


async def test_idle_connection_is_pinged() -> None:
    async with stage(keepalive_s=1.0) as running, asyncio.timeout(10.0):
        reader, writer = await http2_connection(running.port)
        kind, flags = 0, 0
        while (kind, flags) != (6, 0):  # a PING that is no answer to one
            header = await reader.readexactly(9)
            kind, flags = header[3], header[4]
            await reader.readexactly(int.from_bytes(header[:3], "big"))
        writer.close()


async def test_client_that_waits_in_silence_may_ask_again_and_again() -> None:
    """By default the fourth question is answered with GOAWAY, too_many_pings."""
    async with stage() as running, asyncio.timeout(20.0):
        reader, writer = await http2_connection(running.port)
        for number in range(5):
            writer.write(b"\0\0\x08\6\0\0\0\0\0" + bytes([number] * 8))  # a PING
            answer: tuple[int, int, bytes] | None = None
            while answer is None or answer[:2] != (6, 1):  # its answer
                header = await reader.readexactly(9)
                body = await reader.readexactly(int.from_bytes(header[:3], "big"))
                answer = (header[3], header[4], body)
                assert header[3] != 7, f"GOAWAY: {body!r}"
            assert answer[2] == bytes([number] * 8)
            await asyncio.sleep(1.1)
        writer.close()


async def test_port_in_use_is_a_config_error() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another cluster has
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"gateway.port={port}: in use") as caught:
            async with stage(port=port):
                pass
        assert caught.value.field == "gateway.port"


async def test_gateways_of_one_host_share_the_port() -> None:
    with socket.socket() as reserved:  # a free port, kept free until it is used
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        async with (
            stage(port=port, num_replicas=2) as first,
            stage(port=port, num_replicas=2) as second,
        ):
            assert first.port == second.port == port


async def test_tls_serves_who_knows_the_authority(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "gateway")
    async with stage(tls_cert=cert, tls_key=key) as running:
        async with AsyncClient(running.address, ca_file=cert) as client:
            assert (await client.list_models())[0].name == "sluice-demo"
        async with AsyncClient(running.address) as plain:
            with pytest.raises(UnavailableError):
                await plain.list_models()
        with Client(running.address, ca_file=cert) as sync:
            assert await asyncio.to_thread(sync.list_models)


async def test_tls_with_client_ca_demands_amake_certificate(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "gateway")
    own_cert, own_key = make_certificate(tmp_path, "client")
    async with stage(tls_cert=cert, tls_key=key, tls_client_ca=own_cert) as running:
        tls = Tls(cert, cert_file=own_cert, key_file=own_key)
        async with AsyncClient(running.address, tls=tls) as client:
            assert await client.list_models()
        async with AsyncClient(running.address, ca_file=cert) as client:
            with pytest.raises(UnavailableError):
                await client.list_models()


async def test_missing_tls_file_is_a_config_error(tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path, "gateway")
    missing = str(tmp_path / "no.key")
    with pytest.raises(ConfigError, match="No such file") as caught:
        async with stage(tls_cert=cert, tls_key=missing):
            pass
    assert caught.value.field == "gateway.tls_key"
