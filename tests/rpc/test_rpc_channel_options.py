"""Options of channels and servers: gRPC passes over a name that it does not know, in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from grpc._cython import cygrpc

import cluster

SOURCES = [*Path(cluster.__file__).parent.rglob("*.py")]
OPTION = re.compile(r'\(\s*"(grpc\.[a-z0-9_.]+)",')
NAMES = sorted({name for source in SOURCES for name in OPTION.findall(source.read_text())})


def test_options_are_found() -> None:
    assert {"grpc.keepalive_time_ms", "grpc.so_reuseport"} < set(NAMES)


@pytest.fixture(scope="module")
def core() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_grpc_knows_the_option(core: bytes, name: str) -> None:
    """The core keeps each name as a string that ends with a zero byte."""
    assert f"{name}\0".encode() in core


def test_a_wrong_name_would_be_seen(core: bytes) -> None:
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms\0" not in core
