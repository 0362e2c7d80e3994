from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.kernels.kv_cache import KVCache
from cluster.model.kv_transfer import PinnedTransfer, open_transfer, pack, unpack
from cluster.step import BlockMoves

NUM_SLOTS = 6


def make_cache(*, int8: bool, device: str = "cpu") -> KVCache:
    cache = KVCache.allocate(3, 8, 4, 2, 8, torch.bfloat16, torch.device(device), int8)
    generator = torch.Generator().manual_seed(4)
    shape = cache.numbers_L2BSKH.shape
    cache.numbers_L2BSKH.copy_(torch.randint(-100, 100, shape, generator=generator))
    if cache.scales_L2BSK is not None:
        cache.scales_L2BSK.copy_(torch.rand(shape[:-1], generator=generator))
    return cache


def make_slots(cache: KVCache, *, pin_memory: bool = False) -> Tensor:
    shape = (NUM_SLOTS, cache.block_nbytes)
    return torch.zeros(shape, dtype=torch.uint8, pin_memory=pin_memory)


def block_of(cache: KVCache, block: int) -> bytes:
    return pack(cache.chunks(block)).cpu().numpy().tobytes()


@pytest.mark.parametrize("int8", [False, True])
def test_packed_bytes_are_those_of_a_slot(int8: bool) -> None:
    cache = make_cache(int8=int8)
    slots = make_slots(cache)
    cache.offload(5, slots[1])
    assert slots[1].numpy().tobytes() == block_of(cache, 5)
    unpack(slots[1], cache.chunks(2))
    assert block_of(cache, 2) == block_of(cache, 5)
    assert block_of(cache, 3) == block_of(make_cache(int8=int8), 3)


@pytest.mark.parametrize("int8", [False, True])
def test_moves_are_offloads_and_then_restores(int8: bool) -> None:
    cache = make_cache(int8=int8)
    slots = make_slots(cache)
    before = [block_of(cache, block) for block in range(8)]
    transfer = open_transfer(cache, slots)
    transfer.begin(BlockMoves(offloads=((0, 3), (6, 5)), restores=((3, 6), (5, 0))))
    transfer.finish()
    after = [block_of(cache, block) for block in range(8)]
    assert after == [before[6], *before[1:6], before[0], before[7]]  # 0 and 6 changed places


def test_slots_of_another_layout_are_refused() -> None:
    slots = make_slots(make_cache(int8=True))
    with pytest.raises(ConfigError, match="made for another model") as caught:
        open_transfer(make_cache(int8=False), slots)
    assert caught.value.field == "cache.host_memory_bytes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("int8", [False, True])
def test_blocks_travel_bit_exact_between_a_gpu_and_the_host(int8: bool) -> None:
    here, there = make_cache(int8=int8), make_cache(int8=int8, device="cuda")
    blocks = [block_of(here, block) for block in range(8)]
    slots = make_slots(there, pin_memory=True)
    transfer = open_transfer(there, slots)
    assert isinstance(transfer, PinnedTransfer)
    for turn in range(20):
        block, other = turn % 8, (turn + 3) % 8
        transfer.begin(BlockMoves(((block, 0), (other, 1)), ((0, other), (1, block))))
        transfer.finish()
        blocks[block], blocks[other] = blocks[other], blocks[block]
        assert [block_of(there, block) for block in range(8)] == blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_offload_sees_the_work_that_was_issued_before_and_none_after() -> None:
    cache = make_cache(int8=False, device="cuda")
    expected = block_of(cache, 6)
    slots = make_slots(cache, pin_memory=True)
    transfer = open_transfer(cache, slots)
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        big = big @ big / 64
    cache.numbers_L2BSKH[:, :, 1] = cache.numbers_L2BSKH[:, :, 6]
    transfer.begin(BlockMoves(((1, 2),)))
    cache.numbers_L2BSKH[:, :, 1] = 0
    transfer.finish()
    assert slots[2].numpy().tobytes() == expected
