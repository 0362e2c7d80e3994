"""Mistakes that are known before a process is started: one precise error each."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.gateway.app import check


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(load_config(None, ["gateway.port=0", *overrides]))
    return str(caught.value)


def test_default_configuration_is_fine() -> None:
    check(load_config(None, ["gateway.port=0"]))


def test_model_path_without_a_checkpoint(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert str(tmp_path) in error_of(f"model.path={tmp_path}")


def test_tensor_parallelism_that_does_not_divide_the_heads() -> None:
    assert "parallel.tp=3" in error_of("parallel.tp=3")


def test_more_stages_than_layers() -> None:
    assert "parallel.pp=7" in error_of("parallel.pp=7")


def test_context_beyond_the_models() -> None:
    assert "2048" in error_of("model.max_model_len=4096")


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"gateway.port={port}" in error_of(f"gateway.port={port}")


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "g++" in error_of("parallel.tp=2")


def test_unknown_store() -> None:
    assert "store.url" in error_of("store.url=mysql://localhost")
    assert "NOWHERE" in error_of("store.url=env:NOWHERE")


def test_store_that_does_not_answer_and_its_password_stays_out_of_the_error() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody listens
        message = error_of(f"store.url=redis://user:s3cret@127.0.0.1:{deaf.getsockname()[1]}/0")
    assert "store.url" in message and "s3cret" not in message


def test_store_url_without_a_scheme_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "s3cret@redis:6379")
    message = error_of("store.url=env:STORE")
    assert "store.url" in message and "s3cret" not in message


def test_cache_that_holds_no_sequence() -> None:
    assert "cache" in error_of(
        "cache.memory_bytes=1048576", "cache.block_size=512", "model.dtype=float32"
    )


def test_tls_files_that_are_missing_or_no_pem(tmp_path: Path) -> None:
    missing, wrong = tmp_path / "cert.pem", tmp_path / "key.pem"
    wrong.write_text("no key")
    files = (f"gateway.tls_cert={missing}", f"gateway.tls_key={wrong}")
    assert "gateway.tls_cert" in error_of(*files)
    missing.write_text("-----BEGIN CERTIFICATE-----")
    assert "gateway.tls_key" in error_of(*files)


def test_gateways_on_a_free_port_each() -> None:
    assert "gateway.num_replicas=2" in error_of("gateway.num_replicas=2")
