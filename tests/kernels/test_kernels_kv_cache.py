from __future__ import annotations

import pytest
import torch
from attention_cases import CPU

from cluster.errors import ConfigError
from cluster.kernels.kv_cache import KVCache


def random_cache(dtype: torch.dtype, is_int8: bool) -> KVCache:
    cache = KVCache.allocate(3, 5, 4, 2, 8, dtype, CPU, is_int8)
    if is_int8:
        cache.numbers_L2BSKH.random_(-127, 128)
    else:
        cache.numbers_L2BSKH.normal_()
    if cache.scales_L2BSK is not None:
        cache.scales_L2BSK.normal_()
    return cache


def bytes_of(cache: KVCache, block: int) -> bytes:
    """Return a block's numbers, then its scales, layer by layer."""
    parts = [cache.numbers_L2BSKH, cache.scales_L2BSK]
    return b"".join(
        part[:, :, block].contiguous().view(torch.uint8).numpy().tobytes()
        for part in parts
        if part is not None
    )


@pytest.mark.parametrize(
    ("dtype", "is_int8", "row_bytes"),
    [(torch.float32, False, 32), (torch.bfloat16, False, 16), (torch.bfloat16, True, 12)],
)
def test_blocks_travel_bit_by_bit(dtype: torch.dtype, is_int8: bool, row_bytes: int) -> None:
    torch.manual_seed(0)
    here, there = random_cache(dtype, is_int8), random_cache(dtype, is_int8)
    assert here.block_nbytes == 3 * 2 * 4 * 2 * row_bytes
    assert here.nbytes == 5 * here.block_nbytes
    before = [bytes_of(there, block) for block in range(5)]
    slots = torch.zeros(3, here.block_nbytes, dtype=torch.uint8)
    here.offload(1, slots[2])
    assert slots[2].numpy().tobytes() == bytes_of(here, 1)
    assert not slots[:2].any()
    there.restore(slots[2], 3)
    after = [bytes_of(there, block) for block in range(5)]
    assert after == [*before[:3], bytes_of(here, 1), before[4]]


@pytest.mark.parametrize("is_int8", [False, True])
def test_layers_are_views_of_the_cache(is_int8: bool) -> None:
    cache = random_cache(torch.float32, is_int8)
    layer = cache.layer(2)
    layer.values_BSKH[4, 3] = 7
    assert bool((cache.numbers_L2BSKH[2, 1, 4, 3] == 7).all())
    assert layer.keys_BSKH.is_contiguous() and layer.values_BSKH.is_contiguous()
    assert (layer.key_scales_BSK is None) != is_int8
    if layer.value_scales_BSK is not None and cache.scales_L2BSK is not None:
        layer.value_scales_BSK[4, 3] = 9
        assert bool((cache.scales_L2BSK[2, 1, 4, 3] == 9).all())


def test_a_cache_beyond_all_memory_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match="does not fit on cpu: lower") as caught:
        KVCache.allocate(1, 2**50, 16, 2, 64, torch.float32, CPU, False)
    assert caught.value.field == "cache.num_blocks"
