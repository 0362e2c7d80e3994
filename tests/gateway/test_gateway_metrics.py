"""What a scrape of a gateway shows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

import pytest
from gateway_fakes import FakeLeader, eventually, stage
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.gateway.fleet_metrics import FleetCollector
from cluster.gateway.metrics_server import MetricsServer
from cluster.kvstore.breaker import BreakerState
from cluster.metrics import REPLICA_METRICS, Metrics
from cluster.types import CacheLoad, ReplicaInfo, ReplicaLoad, ReplicaSnapshot, StoreState

LOAD = ReplicaLoad(
    num_running=1,
    num_waiting=2,
    num_queued_prefill_tokens=3,
    num_free_blocks=4,
    num_blocks=5,
    num_prefix_query_tokens=1000,
    num_prefix_hit_tokens=700,
    num_generated_tokens=6,
    cache=CacheLoad(
        store_state=StoreState.DEGRADED,
        num_host_slots=11,
        num_host_blocks=12,
        num_host_hit_tokens=200,
        num_store_hit_tokens=100,
        num_device_evictions=13,
        num_host_evictions=14,
        num_stored_blocks=15,
        num_fetched_blocks=16,
        stored_bytes=17,
        fetched_bytes=18,
        num_rejected=19,
        num_late=20,
        num_failed=21,
        num_corrupt=22,
        saved_s=23.5,
    ),
)
SHOWN = {
    "sluice_running_sequences": 1,
    "sluice_waiting_sequences": 2,
    "sluice_queued_prefill_tokens": 3,
    "sluice_generated_tokens_total": 6,
    "sluice_prefix_query_tokens_total": 1000,
    "sluice_prefix_hit_tokens_total": {"device": 400, "host": 200, "store": 100},
    "sluice_kv_blocks": 5,
    "sluice_kv_free_blocks": 4,
    "sluice_host_slots": 11,
    "sluice_host_blocks": 12,
    "sluice_evicted_blocks_total": {"device": 13, "host": 14},
    "sluice_stored_blocks_total": 15,
    "sluice_fetched_blocks_total": 16,
    "sluice_stored_bytes_total": 17,
    "sluice_fetched_bytes_total": 18,
    "sluice_store_rejected_total": 19,
    "sluice_store_late_total": 20,
    "sluice_store_failed_total": 21,
    "sluice_store_corrupt_total": 22,
    "sluice_saved_prefill_seconds_total": 23.5,
    "sluice_store_state": {"exact": 0, "degraded": 1, "off": 0},
}


def _snapshot(replica_id: str, load: ReplicaLoad) -> ReplicaSnapshot:
    info = ReplicaInfo(replica_id, "127.0.0.1:1", "m", "07" * 16, 1, 1, 16, 512)
    return ReplicaSnapshot(info, load)


def _samples(text: str) -> dict[tuple[str, frozenset[str]], float]:
    """Return values by name and the values of their labels."""
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Fleet:
    """Replicas that tests add and take away."""

    def __init__(self) -> None:
        self.snapshots = [_snapshot("r-1", LOAD), _snapshot("r-2", ReplicaLoad())]
        self.state = BreakerState.CLOSED
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.registry.register(FleetCollector(lambda: self.snapshots, lambda: self.state))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def test_every_number_of_a_replica_is_shown_with_its_tier() -> None:
    fleet = Fleet()
    assert {metric.name for metric in REPLICA_METRICS} == {*SHOWN}
    for metric in REPLICA_METRICS:
        shown = SHOWN[metric.name]
        parts = shown if isinstance(shown, dict) else {"": shown}
        for label, value in parts.items():
            labels = {"replica_id": "r-1"} | ({metric.label: label} if label else {})
            assert fleet.value(metric.name, **labels) == value, (metric.name, label)
    assert fleet.value("sluice_store_state", replica_id="r-2", state="off") == 1


def test_counter_that_is_kept_elsewhere_is_read_at_each_scrape() -> None:
    fleet = Fleet()
    assert fleet.value("sluice_watch_resyncs_total") == 0
    counts = [3]
    fleet.metrics.watch_resyncs.set_function(lambda: counts[0])
    assert fleet.value("sluice_watch_resyncs_total") == 3
    counts[0] = 5
    assert fleet.value("sluice_watch_resyncs_total") == 5
    assert "# TYPE sluice_watch_resyncs_total counter" in generate_latest(fleet.registry).decode()


@pytest.mark.integration
async def test_gateway_counts_what_goes_wrong_with_its_replicas() -> None:
    leader = FakeLeader()
    leader.blocks = list(range(2**20))  # more than the smallest index can hold
    async with stage(leader, router={"max_index_bytes": 2**16}) as running:
        assert running.value("sluice_prefix_index_dropped_total") > 2**19
        assert 0 < running.value("sluice_prefix_index_bytes") <= 2**16
        leader.push(seq=7)  # in place of 1
        await eventually(lambda: running.value("sluice_watch_resyncs_total") == 1)
        assert running.value("sluice_replicas_quarantined_total") == 0
        await eventually(lambda: leader.num_watches == 2 and len(leader.watches) == 1)
        leader.push_load(ReplicaLoad(late_s=-1.0))
        await eventually(lambda: running.value("sluice_replicas_quarantined_total") == 1)


def test_replica_that_went_leaves_no_series() -> None:
    fleet = Fleet()
    fleet.snapshots = [_snapshot("r-2", LOAD)]
    assert fleet.value("sluice_kv_blocks", replica_id="r-1") is None
    assert fleet.value("sluice_kv_blocks", replica_id="r-2") == 5
    fleet.snapshots = []
    assert fleet.value("sluice_kv_blocks", replica_id="r-2") is None


def test_breaker_of_the_control_store_is_one_of_its_states() -> None:
    fleet = Fleet()
    for state in BreakerState:
        fleet.state = state
        values = {
            other: fleet.value("sluice_control_store_state", state=other.value)
            for other in BreakerState
        }
        assert values == {other: float(other is state) for other in BreakerState}


async def _get(port: int, request: str) -> tuple[str, str]:
    """Return the status line and the body of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return head.partition("\r\n")[0], body


@pytest.mark.integration
async def test_scrape_reads_what_is_true_now() -> None:
    fleet = Fleet()
    server = MetricsServer(fleet.registry)
    port = await server.start("127.0.0.1", 0)
    assert port
    fleet.metrics.requests.labels("OK").inc()
    request = "GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n"
    status, body = await _get(port, request)
    assert status == "HTTP/1.1 200 OK"
    samples = _samples(body)
    assert samples["sluice_requests_total", frozenset({"OK"})] == 1
    assert samples["sluice_prefix_hit_tokens_total", frozenset({"r-1", "store"})] == 100
    fleet.snapshots = []
    _, body = await _get(port, request)
    assert "r-1" not in body
    assert (await _get(port, "HEAD /metrics HTTP/1.1\r\n\r\n")) == (status, "")
    assert "404" in (await _get(port, "GET /else HTTP/1.1\r\n\r\n"))[0]
    assert "405" in (await _get(port, "POST /metrics HTTP/1.1\r\n\r\n"))[0]
    assert await _get(port, "GET /" + "x" * 20_000) == ("", "")
    assert (await _get(port, request))[0] == status, "it goes on after bad requests"
    await server.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.integration
async def test_port_in_use_gives_the_next_free_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = MetricsServer(CollectorRegistry()), MetricsServer(CollectorRegistry())
    port = await first.start("127.0.0.1", 0)
    assert port
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    other = await second.start("127.0.0.1", port)
    assert other
    assert port < other <= port + 16
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"on port {other}" in warning.getMessage()
    assert f"port {other - 1}: " in warning.getMessage()
    await first.stop()
    await second.stop()


@pytest.mark.integration
async def test_no_free_port_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # bound, and nobody listens
        server = MetricsServer(CollectorRegistry())
        assert await server.start("192.0.2.77", other.getsockname()[1]) is None
    assert "no metrics" in caplog.text
    await server.stop()


@pytest.mark.integration
async def test_clients_that_say_nothing_do_not_take_the_place_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.gateway.metrics_server._TIMEOUT_S", 0.5)
    server = MetricsServer(CollectorRegistry())
    port = await server.start("127.0.0.1", 0)
    assert port
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
    async with asyncio.timeout(5.0):
        with contextlib.suppress(ConnectionResetError):  # or it is closed before it asked
            assert await _get(port, "GET /metrics HTTP/1.1\r\n\r\n") == ("", "")
        for reader, _ in silent:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        assert (await _get(port, "GET /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"
    await server.stop()


def _num_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.integration
async def test_clients_that_do_not_read_hold_a_bounded_number_of_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.gateway.metrics_server._TIMEOUT_S", 1.0)
    registry = CollectorRegistry()
    Gauge("sluice_wide", "Less than a stream holds.", ["label"], registry=registry).labels(
        "x" * 60_000
    )
    server = MetricsServer(registry)
    port = await server.start("127.0.0.1", 0)
    assert port
    assert server._server
    server._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    clients = [socket.socket() for _ in range(40)]
    num_before = _num_files()
    most = 0
    try:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.01)
            most = max(most, _num_files() - num_before)
        assert 0 < most <= 17, "one more may just be refused"
        await eventually(lambda: _num_files() == num_before)
        assert (await _get(port, "GET /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"
    finally:
        for client in clients:
            client.close()
        await server.stop()
