from __future__ import annotations

import pytest
import torch

from cluster.errors import InvalidArgumentError
from cluster.kernels.kv_cache import KVCache
from cluster.model.kv_transfer import (
    NUM_BUFFERS,
    PinnedTransfer,
    block_parts,
    open_transfer,
    pack,
    unpack,
)


def make_cache(*, int8: bool, device: str = "cpu") -> KVCache:
    cache = KVCache.allocate(3, 8, 4, 2, 8, torch.bfloat16, torch.device(device), int8)
    generator = torch.Generator().manual_seed(4)
    shape = cache.numbers_L2BSKH.shape
    cache.numbers_L2BSKH.copy_(torch.randint(-100, 100, shape, generator=generator))
    if cache.scales_L2BSK is not None:
        cache.scales_L2BSK.copy_(torch.rand(shape[:-1], generator=generator))
    return cache


def test_a_cache_on_a_cpu_is_its_own_transfer() -> None:
    cache = make_cache(int8=False)
    assert open_transfer(cache) is cache


@pytest.mark.parametrize("int8", [False, True])
def test_packed_bytes_are_those_of_the_cache(int8: bool) -> None:
    cache = make_cache(int8=int8)
    packed = pack(block_parts(cache, 5))
    assert packed.numpy().tobytes() == cache.read_block(5)
    unpack(packed, block_parts(cache, 2))
    assert cache.read_block(2) == cache.read_block(5)
    assert cache.read_block(3) == make_cache(int8=int8).read_block(3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("int8", [False, True])
def test_blocks_travel_bit_exact_between_a_gpu_and_a_cpu(int8: bool) -> None:
    here, there = make_cache(int8=int8), make_cache(int8=int8, device="cuda")
    transfer = open_transfer(there)
    assert isinstance(transfer, PinnedTransfer)
    blocks = [here.read_block(block) for block in range(8)]
    assert [transfer.read_block(block) for block in range(8)] == blocks
    for turn in range(2 * NUM_BUFFERS):  # every buffer is used again while copies are on their way
        transfer.write_block(turn % 8, blocks[(turn + 3) % 8])
    assert [transfer.read_block(b) for b in range(8)] == [blocks[(b + 3) % 8] for b in range(8)]
    with pytest.raises(InvalidArgumentError, match=f"expected {there.block_nbytes}"):
        transfer.write_block(0, b"short")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_read_sees_the_work_that_was_issued_before() -> None:
    cache = make_cache(int8=False, device="cuda")
    transfer = open_transfer(cache)
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        big = big @ big / 64
    cache.numbers_L2BSKH[:, :, 1] = cache.numbers_L2BSKH[:, :, 6]
    assert transfer.read_block(1) == transfer.read_block(6)
