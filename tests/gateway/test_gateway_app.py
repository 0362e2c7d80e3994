"""What the composition root checks before a process is started, and what it puts together."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tenant_files import KEYS, bearer, make_key, write_tenants

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.gateway.app import check, start
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.integration


def _error(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(load_config(None, ["gateway.port=0", *overrides]))
    return caught.value


def test_check_reads_tenants_and_key(tmp_path: Path) -> None:
    tenants, key = write_tenants(tmp_path), tmp_path / "key.pem"
    assert _error("auth.tenants_file=/nowhere").field == "auth.tenants_file"
    files = [f"auth.tenants_file={tenants}", f"auth.jwt_key_file={key}"]
    assert _error(*files).field == "auth.jwt_key_file"
    key.write_bytes(make_key("ES256")[1])
    assert _error(*files).field == "auth.jwt_key_file", "it is no key for RS256"
    tenants.write_text("tenants: [{name: x, key: sk-secret}]")
    assert "secret" not in str(_error(f"auth.tenants_file={tenants}"))


def test_check_asks_a_block_store_of_its_own() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody listens
        url = f"redis://user:s3cret@127.0.0.1:{deaf.getsockname()[1]}/0"
        error = _error(f"store.kv_url={url}")
    assert error.field == "store.kv_url"
    assert "s3cret" not in str(error)
    assert _error("store.kv_url=mysql://x").field == "store.kv_url"


def _scrape(port: int) -> dict[str, float]:
    """Return sums by metric's name and the value of its tier."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        text = answer.read().decode()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name + sample.labels.get("tier", "")
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


@pytest.mark.timeout(300)
def test_tenants_share_within_and_not_across_in_a_whole_cluster(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        metrics_port = reserved.getsockname()[1]
    config = load_config(
        None,
        [
            f"auth.tenants_file={write_tenants(tmp_path)}",
            f"gateway.metrics_port={metrics_port}",
            "gateway.port=0",
            "cache.num_blocks=200",
            "cache.host_memory_bytes=0",
            "parallel.num_cpus_per_worker=0.1",
            f"store.namespace=tenants{metrics_port}",
        ],
    )
    check(config)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(100, 164)), sampling=pb.SamplingParams(max_tokens=2)
    )
    cached = {}
    with start(config) as running:
        with grpc.insecure_channel(running.address) as channel:
            stub = InferenceStub(channel)
            for name in ("alice", "carol", "bob", "root"):
                answer = stub.Generate(request, metadata=bearer(KEYS[name]), timeout=60.0)
                cached[name] = answer.usage.cached_tokens
            with pytest.raises(grpc.RpcError) as refused:
                stub.Generate(request, timeout=60.0)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        shown = _scrape(metrics_port)
    assert cached == {"alice": 0, "carol": 0, "bob": 48, "root": 0}
    assert shown["sluice_requests_total"] == 5
    assert shown["sluice_kv_blocks"] == 200
    assert shown["sluice_prefix_query_tokens_total"] > 0
    assert shown["sluice_control_store_state"] == 1
