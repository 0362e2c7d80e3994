from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.config import StoreConfig
from cluster.errors import ConfigError
from cluster.kvstore.open import open_store


def config_of(url: str) -> StoreConfig:
    return StoreConfig.model_validate({"url": url})


@pytest.mark.parametrize("url", ["redis://h", "rediss://u:p@h:6380/1", "unix:///run/redis.sock"])
async def test_open_store_takes_the_schemes_of_redis_without_connecting(url: str) -> None:
    store = open_store(config_of(url))
    assert type(store).__name__ == "RedisStore"
    await store.close()


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
        f"store.url has {got}: use embedded, redis://, rediss:// or unix://"
    )


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import cluster.kvstore.open", "ray redis torch"),
        ("import cluster.kvstore.embedded", "ray redis torch"),
        ("import cluster.kvstore.registry", "ray redis torch"),
        ("import cluster.kvstore.block_hash", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.codec", "ray redis torch grpc numpy pydantic"),
        ("import cluster.kvstore.redis_store", "ray torch"),
    ],
)
def test_kvstore_modules_import_only_what_they_need(statement: str, absent: str) -> None:
    code = f"import sys; {statement}; sys.exit(str(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "set()"
