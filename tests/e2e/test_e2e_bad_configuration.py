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


def test_gateways_on_a_free_port_each() -> None:
    assert "gateway.num_replicas=2" in error_of("gateway.num_replicas=2")
