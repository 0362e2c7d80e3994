"""`sluice serve` and mistakes that are known before a process is started: one line, status 2."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cli_run import error_of

from cluster.gateway import app

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object, **options: object) -> None:
        pytest.fail("the cluster was started")

    monkeypatch.setattr(app, "start", start)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path={empty}", "{empty}"),
        ("parallel.tp=3", "parallel.tp=3"),
        ("parallel.speed=3", "parallel.speed: unknown key"),
        ("cache.block_size=many", "cache.block_size='many'"),
        ("cache.block_size", "expected a.b=value"),
        ("gateway={{tls_cert: {empty}/no.pem, tls_key: {empty}/no.key}}", "{empty}/no.pem"),
    ],
)
def test_serve_refuses_a_wrong_value(tmp_path: Path, override: str, expected: str) -> None:
    items = [item.format(empty=tmp_path) for item in ("gateway.port=0", override)]
    message = error_of("serve", "--set", items[1], "--set", items[0])
    assert expected.format(empty=tmp_path) in message


def test_serve_refuses_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        knob = f"gateway.port={other.getsockname()[1]}"
        assert knob in error_of("serve", "--set", knob)


def test_serve_refuses_to_split_a_model_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = error_of("serve", "--set", "parallel.tp=2", "--set", "gateway.port=0")
    assert "g++ not found" in error


def test_serve_refuses_a_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    assert str(file) in error_of("serve", "--config", str(file))
