"""Fixtures of all rooms."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings
from redis_server import RedisServer

# As the command line does: tests start Ray from a process that has spoken gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# How long one example takes says nothing on a machine that others use too; pytest has a timeout.
settings.register_profile("sluice", deadline=None)
settings.load_profile("sluice")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests; each takes a namespace of its own, and none may end it."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with RedisServer() as server:
        yield server
