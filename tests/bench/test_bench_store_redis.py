"""Parts of `sluice bench store` with a real Redis, a real mover and a real bad network."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from cluster.bench import store_budget, store_faults, store_raw
from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.store_budget import run_budget
from cluster.bench.store_fault_kinds import FaultySetup
from cluster.bench.store_faults import FaultBench, FaultLoad
from cluster.bench.store_proxy import ProxyProcess
from cluster.bench.store_raw import run_raw
from cluster.bench.store_redis import OwnRedis, redis_url
from cluster.bench.store_replica import SharedModel
from cluster.config import StoreConfig, load_config
from cluster.model.checkpoint import inspect_checkpoint
from tests.redis_server import RedisServer

pytestmark = pytest.mark.integration


def nothing(label: str, num_done: int, total: int) -> None:
    """Tell nobody."""


@pytest.fixture
def config(redis_server: RedisServer, request: pytest.FixtureRequest) -> StoreConfig:
    return StoreConfig(url=redis_server.url, namespace=f"bench-{request.node.name[:40]}")


def test_raw_moves_the_same_blocks_every_way(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_raw, "SIZES", (2**14, 2**18))
    monkeypatch.setattr(store_raw, "SERIES_BYTES", 2**20)
    figures = run_raw(config, 1, nothing)
    for size in figures["sizes"]:
        for kind in ("put", "get"):
            ways = size[kind]
            assert ways.keys() == {"redis_py", "blocks", "mover"}
            assert all(way["bytes_per_s"] > 0 and way["p99_s"] > 0 for way in ways.values())
            assert ways["redis_py"]["ratio"] == 1.0


def test_budget_holds_and_the_hot_set_stays(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_budget, "BUDGET_BYTES", 2 * 2**20)
    monkeypatch.setattr(store_budget, "SIZES", (2**13,))
    (row,) = run_budget(config, nothing)["sizes"]
    assert row["written_bytes"] >= 10 * 2 * 2**20
    assert 0.9 < row["used_share"] <= 1.02
    assert row["num_rejected"] == 0
    assert row["hot_reads"] > 0 and row["hot_hit_rate"] >= 0.95
    assert row["num_evicted"] > row["num_blocks"]


def test_own_redis_comes_back_empty_on_its_port_and_ends_with_its_context() -> None:
    with redis_url(None) as url:
        assert url.startswith("redis://127.0.0.1:")
        port = int(url.rsplit(":", 1)[1].partition("/")[0])
        assert ask(port, b"PING\r\n") == b"+PONG\r\n"
    with pytest.raises(OSError, match="refused"):
        ask(port, b"PING\r\n")
    server = OwnRedis()
    try:
        ask(server.port, b"SET a b\r\n")
        server.kill()
        server.start()
        assert ask(server.port, b"EXISTS a\r\n") == b":0\r\n"
    finally:
        server.close()


def ask(port: int, command: bytes, timeout_s: float = 5.0) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(command)
        return connection.recv(64)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[ProxyProcess]:
    process = ProxyProcess(redis_server.port)
    yield process
    process.close()


def test_proxy_passes_delays_and_swallows(proxy: ProxyProcess) -> None:
    assert ask(proxy.port, b"PING\r\n") == b"+PONG\r\n"
    proxy.order("delay 0.2")
    time.sleep(0.05)  # the order has arrived
    start_s = time.monotonic()
    assert ask(proxy.port, b"PING\r\n") == b"+PONG\r\n"
    assert 0.4 <= time.monotonic() - start_s < 2.0, "there and back"
    proxy.order("black_hole")
    time.sleep(0.05)
    with pytest.raises(TimeoutError):
        ask(proxy.port, b"PING\r\n", 0.3)
    proxy.order("pass")
    time.sleep(0.05)
    assert ask(proxy.port, b"PING\r\n") == b"+PONG\r\n"


def test_proxy_loses_a_share_of_the_pieces(proxy: ProxyProcess) -> None:
    proxy.order("drop 0.5")
    time.sleep(0.05)
    num_lost = 0
    for _ in range(12):
        try:
            ask(proxy.port, b"PING\r\n", 0.1)
        except TimeoutError:
            num_lost += 1
    assert 3 <= num_lost <= 12, "about nine: a question and an answer, each lost half of the time"


def test_shared_model_gives_replicas_that_share_nothing_but_the_store(
    config: StoreConfig,
) -> None:
    settings = load_config(None, [f"store.url={config.url}", f"store.namespace={config.namespace}"])
    info = inspect_checkpoint(settings.model.folder)
    model = SharedModel(settings, info, num_blocks=64, num_slots=64)
    prompt = random_tokens("shared", 320, info.vocab_size)
    try:
        first = model.replica()
        first.run([greedy_request("a", prompt, 4)])
        (again,) = first.run([greedy_request("b", prompt, 4)])
        assert again.num_cached_tokens == 304
        first.settle(lambda: first.cache.num_stored_blocks >= 19)
        without = model.replica(has_tiers=False)
        (record,) = without.run([greedy_request("c", prompt, 4)])
        assert record.num_cached_tokens == 0, "what another one knows is not there"
        other = model.replica()
        (record,) = other.run([greedy_request("d", prompt, 4)])
        assert record.num_cached_tokens == other.cache.num_fetched_blocks * 16
        assert other.outputs["d"] == first.outputs["a"] == without.outputs["c"]
        assert model.replica(num_blocks=32).engine.load().num_blocks == 32
    finally:
        model.close()


def test_faults_are_felt_by_the_store_and_by_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_faults, "MAX_RECOVERY_S", 2.0)
    setup = FaultySetup()
    try:
        own = (f"store.url={setup.url}", "store.kv_write_after_uses=1", "model.dtype=float32")
        settings = load_config(None, list(own))
        load = FaultLoad(
            num_streams=2, num_requests=24, prompt_tokens=256, answer_tokens=16, phase_s=1.0
        )
        info = inspect_checkpoint(settings.model.folder)
        size = settings.cache.block_size
        model = SharedModel(
            settings, info, num_blocks=load.num_blocks(size), num_slots=load.num_slots(size)
        )
        try:
            faults = [f for f in setup.faults() if f.name.startswith(("black", "killed"))]
            assert len(faults) == 2
            result = FaultBench(model, load, faults, seed=0, on_progress=nothing).run()
        finally:
            model.close()
    finally:
        setup.close()
    assert result["num_failed"] == 0 and result["num_different"] == 0
    assert result["cache"]["num_failed"] > 0, "nothing went wrong"
    assert result["cache"]["num_stored_blocks"] > 0
    assert [fault["name"] for fault in result["faults"]] == [fault.name for fault in faults]
    assert result["undisturbed"]["num_requests"] > 0
