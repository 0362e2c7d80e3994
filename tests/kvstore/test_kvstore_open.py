from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.config import StoreConfig
from cluster.errors import ConfigError
from cluster.kvstore.breaker import BreakerState
from cluster.kvstore.guarded import GuardedBlocks
from cluster.kvstore.open import open_block_store, open_store
from cluster.kvstore.redis_blocks import RedisBlocks
from cluster.kvstore.redis_store import RedisStore


def config_of(url: str) -> StoreConfig:
    return StoreConfig.model_validate({"url": url})


URLS = [
    "redis://h",
    "rediss://u:p@h:6380/1",
    "unix:///run/redis.sock",
    "redis+sentinel://:p@h,g:1/main",
    "rediss+sentinel://h/main",
    "redis+cluster://h:1,g:2",
    "rediss+cluster://u:p@h",
]


@pytest.mark.parametrize("url", URLS)
async def test_open_takes_the_schemes_of_redis_without_connecting(url: str) -> None:
    store = open_store(config_of(url))
    assert isinstance(store._store, RedisStore)
    assert store.state is BreakerState.CLOSED
    await store.close()
    blocks = open_block_store(config_of(url))
    assert isinstance(blocks, GuardedBlocks)
    assert isinstance(blocks._blocks, RedisBlocks)
    await blocks.close()


async def test_open_block_store_is_bare_for_who_has_a_breaker() -> None:
    blocks = open_block_store(config_of("redis://h"), guarded=False)
    assert isinstance(blocks, RedisBlocks)
    await blocks.close()


async def test_open_block_store_may_be_another_one_or_none() -> None:
    config = StoreConfig(url="redis://h", kv_url="redis+cluster://g")
    blocks = open_block_store(config, guarded=False)
    assert isinstance(blocks, RedisBlocks)
    assert blocks._link.is_cluster
    await blocks.close()
    assert open_block_store(StoreConfig(url="redis://h", kv_url="off")) is None
    with pytest.raises(ConfigError, match=r"store\.kv_url has scheme 'memcached'"):
        open_block_store(StoreConfig(url="redis://h", kv_url="memcached://h"))
    with pytest.raises(ConfigError, match=r"store\.url has no scheme"):
        open_block_store(StoreConfig(url="hunter2"))


async def test_open_store_reads_the_url_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SLUICE_TEST_URL", "redis://h")
    await open_store(config_of("env:SLUICE_TEST_URL")).close()
    monkeypatch.delenv("SLUICE_TEST_URL")
    with pytest.raises(ConfigError, match="SLUICE_TEST_URL"):
        open_store(config_of("env:SLUICE_TEST_URL"))


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("memcached://:hunter2@h", "scheme 'memcached'"),
        ("embedded://x", "scheme 'embedded'"),
        ("redis", "no scheme"),
        ("hunter2", "no scheme"),
        ("", "no scheme"),
    ],
)
def test_open_store_refuses_other_schemes_by_name(url: str, got: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(config_of(url))
    assert caught.value.field == "store.url"
    assert str(caught.value) == (
        f"store.url has {got}: use embedded, redis://, rediss://, unix://, redis+sentinel://, "
        "rediss+sentinel://, redis+cluster://, rediss+cluster://"
    )


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import cluster.kvstore.open", "ray redis torch"),
        ("import cluster.kvstore.embedded", "ray redis torch"),
        ("import cluster.kvstore.registry", "ray redis torch"),
        ("import cluster.kvstore.block_hash", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.codec", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.eviction", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.breaker", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.block_store", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.redis_blocks", "ray torch grpc numpy"),
        ("import cluster.kvstore.redis_store", "ray torch"),
    ],
)
def test_kvstore_modules_import_only_what_they_need(statement: str, absent: str) -> None:
    code = f"import sys; {statement}; sys.exit(str(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "set()"
