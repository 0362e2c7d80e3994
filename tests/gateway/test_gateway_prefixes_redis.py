"""Registered prefixes and a Redis that is emptied, or restarted empty."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from gateway_fakes import eventually
from prefix_fakes import MODEL, TOKENS, record
from redis import Redis
from redis_server import RedisServer

from cluster.config import GatewayConfig, StoreConfig
from cluster.errors import NotFoundError, SluiceError
from cluster.gateway.identity import Caller
from cluster.gateway.prefixes import Prefixes
from cluster.kvstore.open import open_store

pytestmark = pytest.mark.integration

ALICE = Caller("alice", b"a", False)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with RedisServer() as server:
        yield server


def _prefixes(store: Any) -> Prefixes:
    return Prefixes(store, GatewayConfig(), model=MODEL, vocab_size=4096)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_prefixes_outlive_their_redis(own_redis: RedisServer, is_killed: bool) -> None:
    store = open_store(StoreConfig(url=own_redis.url))
    mine, fresh = _prefixes(store), _prefixes(store)
    try:
        await mine.put(record("one"))
        await mine.put(record("two", token_ids=(7, 8, 9)))
        await mine.put(record("gone"))
        await mine.remove("alice", "gone")
        if is_killed:
            own_redis.kill()
            with pytest.raises(SluiceError):
                await mine.refresh()
            assert await mine.tokens_of(ALICE, "one", "") == TOKENS
            own_redis.start()
        else:
            with Redis.from_url(own_redis.url) as redis:
                redis.flushall()

        async def is_back() -> bool:
            try:
                await mine.refresh()
                await fresh.refresh()
            except SluiceError:
                return False
            return [known.name for known in fresh.records] == ["one", "two"]

        await eventually(is_back)
        assert await fresh.tokens_of(ALICE, "one", "") == TOKENS
        assert await fresh.tokens_of(ALICE, "two", "") == (7, 8, 9)
        await fresh.remove("alice", "one")
        await mine.refresh()
        with pytest.raises(NotFoundError):
            await mine.tokens_of(ALICE, "one", "")
    finally:
        await store.close()
