"""KV blocks of a real model through the store: written by one runner, read back by another."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cluster.clock import WallClock
from cluster.config import DEMO_MODEL_PATH, CacheConfig, ModelConfig, StoreConfig
from cluster.kvstore.block_hash import block_hashes
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.redis_store import RedisStore
from cluster.kvstore.store import Store
from cluster.model.checkpoint import fingerprint
from cluster.model.collective import NoCollective
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import SampleSpec, SequenceStep, StepPlan

PROMPT = tuple(range(100, 140))  # two full blocks of 16 and a rest
GREEDY = SampleSpec(0, len(PROMPT), 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0)


def make_runner() -> ModelRunner:
    shard = ShardSpec(tp_rank=0, tp=1, pp_rank=0, pp=1)
    return ModelRunner(
        ModelConfig(), CacheConfig(), shard, NoCollective(), max_model_len=64, num_blocks=8
    )


@pytest.fixture(
    params=["embedded", pytest.param("redis", marks=pytest.mark.integration)],
)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "embedded":
        yield EmbeddedStore(StoreConfig(), WallClock())
        return
    redis = RedisStore(StoreConfig(url=request.getfixturevalue("redis_server").url))
    yield redis
    await redis.close()


async def test_blocks_of_one_runner_serve_another(store: Store) -> None:
    writer, reader = make_runner(), make_runner()
    whole = StepPlan(1, (SequenceStep(1, PROMPT, 0, (5, 2, 7), GREEDY),))
    expected = writer.execute(whole, None)
    hashes = block_hashes(PROMPT, 16, fingerprint=fingerprint(DEMO_MODEL_PATH, "auto", 1))
    written = {h: writer.read_block(block) for h, block in zip(hashes, (5, 2), strict=True)}
    assert await store.put_blocks(written) == 2
    for block, data in zip((1, 6), await store.get_blocks(hashes), strict=True):
        assert data is not None
        reader.write_block(block, data)
        assert reader.read_block(block) == data
    rest = StepPlan(2, (SequenceStep(9, PROMPT[32:], 32, (1, 6, 0), GREEDY),))
    got = reader.execute(rest, None)
    assert isinstance(got, dict) and isinstance(expected, dict)
    assert got[9].token_id == expected[1].token_id
    assert got[9].logprob == pytest.approx(expected[1].logprob, abs=0.02)  # bf16, other chunks
