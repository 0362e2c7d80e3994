"""What is the actor's own: its death, its restart, its silence."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest
from kvstore_kinds import fresh_keys, fresh_namespace, plain, wait_for_store

from cluster.config import StoreConfig
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.kvstore.embedded_actor import (
    EmbeddedStoreClient,
    delete_actor,
    get_or_create_actor,
)
from cluster.kvstore.open import open_block_store, open_store
from cluster.kvstore.store import MAX_RECORD_BYTES, Journal, JournalOutcome, JournalWrite

BEGIN = JournalWrite("r", "team", "A", (b"entry",), begins=True)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def config() -> Iterator[StoreConfig]:
    config = StoreConfig.model_validate({"namespace": fresh_namespace(), "timeout_s": 1.0})
    yield config
    delete_actor(config.namespace)


async def _open(config: StoreConfig) -> EmbeddedStoreClient:
    store = EmbeddedStoreClient(get_or_create_actor(config), config.timeout_s)
    await wait_for_store(store, 30.0)
    return store


async def test_actor_is_shared_by_all_who_open_its_namespace(config: StoreConfig) -> None:
    one, other = open_store(config), open_store(config)
    await wait_for_store(one, 30.0)
    await one.put_record("prefix", "a", b"payload")
    assert (await other.list_records("prefix")).values == {"a": b"payload"}
    (key,) = fresh_keys(1)
    left, right = open_block_store(config), open_block_store(config, guarded=False)
    assert left is not None and right is not None
    assert await left.put_blocks({key: b"payload"}, pinned=True) == [True]
    assert plain(await right.get_blocks([key])) == [b"payload"]
    assert (await right.stats()).num_pinned == 1


async def _pid(store: EmbeddedStoreClient) -> int:
    return int(await store._actor.__ray_call__.remote(lambda _: os.getpid()))


async def test_actor_that_is_silent_costs_one_deadline(config: StoreConfig) -> None:
    store = await _open(config)
    await store.write_journals([BEGIN])
    pid = await _pid(store)
    os.kill(pid, signal.SIGSTOP)
    try:
        start_s = time.monotonic()
        with pytest.raises(UnavailableError, match=r"read_journal.*store\.timeout_s=1"):
            await store.read_journal("r")
        assert 0.9 < time.monotonic() - start_s < 3.0
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await store.read_journal("r") == Journal("team", "A", [b"entry"], is_ended=False)


async def test_actor_killed_is_unavailable_and_comes_back_empty(config: StoreConfig) -> None:
    store = await _open(config)
    await store.write_journals([BEGIN])
    os.kill(await _pid(store), signal.SIGKILL)
    with pytest.raises(UnavailableError):
        await store.read_journal("r")
    await wait_for_store(store, 30.0)
    assert await store.read_journal("r") is None
    assert (await store.write_journals([BEGIN])).outcomes == [JournalOutcome.WRITTEN]


async def test_actor_deleted_is_gone_and_may_be_deleted_again(config: StoreConfig) -> None:
    store = await _open(config)
    delete_actor(config.namespace)
    with pytest.raises(UnavailableError):
        await store.ping()
    for _ in range(10):  # it does not restart
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError):
            await store.ping()
    delete_actor(config.namespace)
    assert await (await _open(config)).read_journal("r") is None


async def test_actor_refusal_keeps_its_type(config: StoreConfig) -> None:
    store = await _open(config)
    with pytest.raises(InvalidArgumentError, match="record prefix/a has 1048577 bytes"):
        await store.put_record("prefix", "a", bytes(MAX_RECORD_BYTES + 1))
