from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from cluster.config import CacheConfig
from cluster.errors import ConfigError
from cluster.model.layout import (
    block_bytes,
    largest_part_bytes,
    num_blocks_for,
    num_host_slots_for,
    stage_layers,
)
from cluster.model.model_info import ModelInfo


def make_info(layer_bytes: tuple[int, ...] = (100,) * 12, **changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "folder": "nowhere",
        "model_type": "llama",
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": len(layer_bytes),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": "bfloat16",
        "eos_token_ids": (2,),
        "weight_bytes": sum(layer_bytes),
        "layer_bytes": layer_bytes,
        "head_bytes": 400,
        "is_tied": True,
        "tp_plan": {},
        "can_be_staged": True,
    }
    return ModelInfo(**{**fields, **changes})


def heaviest(info: ModelInfo, stages: tuple[range, ...]) -> int:
    loads = [sum(info.layer_bytes[layer] for layer in layers) for layers in stages]
    loads[-1] += info.head_bytes
    return max(loads)


def test_one_stage_has_all_layers() -> None:
    assert stage_layers(make_info(), 1) == (range(12),)


def test_the_head_takes_the_place_of_layers() -> None:
    assert stage_layers(make_info(), 2) == (range(8), range(8, 12))


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("layer_bytes", [(5, 9, 1, 7, 3, 3), (1, 1, 1, 1, 1, 30)])
def test_stages_are_as_even_as_can_be(pp: int, layer_bytes: tuple[int, ...]) -> None:
    info = make_info(layer_bytes, head_bytes=6)
    stages = stage_layers(info, pp)
    assert [layer for layers in stages for layer in layers] == list(range(6))
    assert all(stages)
    cuts = combinations(range(1, 6), pp - 1)
    best = min(heaviest(info, tuple(map(range, (0, *cut), (*cut, 6)))) for cut in cuts)
    assert heaviest(info, stages) == best


def test_blocks_follow_from_memory_and_the_stage_with_most_layers() -> None:
    info = make_info()
    cache = CacheConfig(memory_bytes=2**20, block_size=16)
    assert block_bytes(info, cache, "auto", 1, 12) == 2 * 12 * 16 * 2 * 8 * 2
    assert num_blocks_for(info, cache, "auto", 1, 1) == 2**20 // block_bytes(
        info, cache, "auto", 1, 12
    )
    assert num_blocks_for(info, cache, "auto", 2, 1) == 2**20 // block_bytes(
        info, cache, "auto", 2, 12
    )
    assert num_blocks_for(info, cache, "float32", 1, 2) == 2**20 // block_bytes(
        info, cache, "float32", 1, 8
    )
    assert num_blocks_for(info, CacheConfig(num_blocks=77), "auto", 1, 1) == 77


def test_an_int8_block_holds_codes_and_scales() -> None:
    cache = CacheConfig(block_size=16, dtype="int8")
    assert block_bytes(make_info(), cache, "auto", 2, 3) == 2 * 3 * 16 * 1 * (8 + 4)


@pytest.mark.parametrize(
    ("cache", "options", "field", "message"),
    [
        ({"num_blocks": 3}, {"max_model_len": 64}, "cache.num_blocks", "at least 4 are needed"),
        ({"memory_bytes": 2**20}, {"max_model_len": 2000}, "cache.memory_bytes", "2000 tokens"),
        ({"num_blocks": 2**50}, {}, "cache.num_blocks", "are free on this machine"),
    ],
)
def test_a_cache_that_cannot_work_is_refused(
    cache: dict[str, Any], options: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        num_blocks_for(make_info(), CacheConfig(**cache), "auto", 1, 1, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(("tp", "pp", "num_layers"), [(1, 1, 12), (2, 1, 12), (1, 2, 8)])
def test_slots_hold_the_largest_part_on_every_worker(tp: int, pp: int, num_layers: int) -> None:
    info, layout = make_info(), (tp, pp)
    part_bytes = 2 * num_layers * 16 * (2 // tp) * 8 * 2
    cache = CacheConfig(host_memory_bytes=100 * part_bytes - 1)
    assert largest_part_bytes(info, cache, "auto", *layout) == part_bytes
    assert num_host_slots_for(info, cache, "auto", *layout) == 99
    assert num_host_slots_for(info, CacheConfig(host_memory_bytes=0), "auto", *layout) == 0
