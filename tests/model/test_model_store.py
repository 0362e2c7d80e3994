"""KV blocks of a real model through the store: written by one runner, read back by another."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import torch

from cluster.clock import WallClock
from cluster.config import DEMO_MODEL_PATH, CacheConfig, ModelConfig, StoreConfig
from cluster.kvstore.block_hash import block_hashes
from cluster.kvstore.block_key import block_keys, part_prefix
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.kvstore.redis_blocks import RedisBlocks
from cluster.model.checkpoint import fingerprint, inspect_checkpoint
from cluster.model.collective import NoCollective
from cluster.model.layout import largest_part_bytes
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import BlockMoves, SampleSpec, SequenceStep, StepPlan

PROMPT = tuple(range(100, 140))  # two full blocks of 16 and a rest
GREEDY = SampleSpec(0, len(PROMPT), 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0)


def make_runner() -> tuple[ModelRunner, torch.Tensor]:
    """Return a runner and the four slots of its host tier."""
    cache = CacheConfig()
    nbytes = largest_part_bytes(inspect_checkpoint(DEMO_MODEL_PATH), cache, "auto", 1, 1)
    slots = torch.zeros(4, nbytes, dtype=torch.uint8)
    shard = ShardSpec(tp_rank=0, tp=1, pp_rank=0, pp=1)
    runner = ModelRunner(
        ModelConfig(), cache, shard, NoCollective(), max_model_len=64, num_blocks=8, slots=slots
    )
    return runner, slots


@pytest.fixture(
    params=["embedded", pytest.param("redis", marks=pytest.mark.integration)],
)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[BlockStore]:
    if request.param == "embedded":
        yield EmbeddedBlocks(StoreConfig(), WallClock())
        return
    url = request.getfixturevalue("redis_server").url
    redis = RedisBlocks(StoreConfig(url=url, namespace="model-store"))
    yield redis
    await redis.close()


async def test_blocks_of_one_runner_serve_another(store: BlockStore) -> None:
    (writer, written), (reader, read) = make_runner(), make_runner()
    whole = SequenceStep(1, PROMPT, 0, (5, 2, 7), GREEDY)
    expected = writer.execute(StepPlan(1, (whole,)), None)
    writer.execute(StepPlan(2, (), BlockMoves(offloads=((5, 3), (2, 0)))), None)
    seed = fingerprint(DEMO_MODEL_PATH, "auto", 1)
    hashes = block_hashes(PROMPT, 16, fingerprint=seed)
    keys = block_keys(part_prefix(seed, pp=1, part=0), hashes)
    slots = (written[slot].numpy().tobytes() for slot in (3, 0))
    assert await store.put_blocks(dict(zip(keys, slots, strict=True))) == [True, True]
    fetched = await store.get_blocks(keys)
    for slot, value in zip((1, 2), fetched.values, strict=True):
        assert value is not None
        read[slot].copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
    rest = SequenceStep(9, PROMPT[32:], 32, (1, 6, 0), GREEDY)
    moves = BlockMoves(restores=((1, 1), (2, 6)))
    got = reader.execute(StepPlan(3, (rest,), moves), None)
    assert isinstance(got, dict) and isinstance(expected, dict)
    assert got[9].token_id == expected[1].token_id
    assert got[9].logprob == pytest.approx(expected[1].logprob, abs=0.02)  # bf16, other chunks
