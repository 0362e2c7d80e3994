"""Commands and a gateway that demands certificates; what `serve` says if it cannot ask its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cli_run import run

from cluster.cli.serve import _announce
from cluster.config import ClusterConfig, GatewayConfig
from cluster.gateway.app import ServingCluster
from tests.bench.bench_fakes import FakeInference, serving
from tests.gateway.tls_files import make_certificate

pytestmark = pytest.mark.integration


def _credentials(cert: str, key: str, client_ca: str | None) -> grpc.ServerCredentials:
    pair = (Path(key).read_bytes(), Path(cert).read_bytes())
    ca = Path(client_ca).read_bytes() if client_ca else None
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


@pytest.fixture
def mutual_tls(tmp_path: Path) -> Iterator[list[str]]:
    """Serve who shows a certificate; the options that reach the server."""
    cert, key = make_certificate(tmp_path, "gateway")
    own_cert, own_key = make_certificate(tmp_path, "client")
    with serving(FakeInference(["ok"] * 9), _credentials(cert, key, own_cert)) as address:
        files = ["--ca-file", cert, "--cert-file", own_cert, "--key-file", own_key]
        yield ["--address", address, *files]


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["generate", "x", "--max-tokens", "2"],
        ["bench", "serve", "--concurrency", "1", "--num-requests", "2", "--output-tokens", "2"],
    ],
    ids=["status", "generate", "bench"],
)
def test_commands_show_their_certificate(command: list[str], mutual_tls: list[str]) -> None:
    result = run(*command, *mutual_tls, "--json")
    assert result.exit_code == 0, result.output
    without = run(*command, *mutual_tls[:4], "--json")
    assert without.exit_code == 1
    assert len(without.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("subject", "demands_certificate", "is_reached"),
    [
        ("IP:127.0.0.1", False, True),
        ("DNS:sluice.example", False, False),
        ("IP:127.0.0.1", True, False),
    ],
    ids=["verified", "other name", "client certificate"],
)
def test_serve_announces_its_address_whoever_can_be_asked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    subject: str,
    demands_certificate: bool,
    is_reached: bool,
) -> None:
    cert, key = make_certificate(tmp_path, "gateway", subject=subject)
    config = ClusterConfig(gateway=GatewayConfig(tls_cert=cert, tls_key=key))
    credentials = _credentials(cert, key, cert if demands_certificate else None)
    with serving(FakeInference([]), credentials) as address:
        cluster = ServingCluster(config, address, owns_ray=False)
        _announce(cluster, json=True)
        (line,) = capsys.readouterr().out.splitlines()
        _announce(cluster, json=False)
        text = capsys.readouterr().out
    announced = json.loads(line)
    assert announced["address"] == address
    assert bool(announced["replicas"]) == is_reached
    assert f"serving on {address}" in text
    assert ("gateway g1" in text) == is_reached
