"""How one copy of a model is split: layers over stages, heads over ranks, memory into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import psutil

from cluster.config import CacheConfig
from cluster.errors import ConfigError
from cluster.model.model_info import ModelInfo

SCALE_BYTES = 4  # of an int8 cache's scale, as kernels/kv_cache.py has it, which imports torch
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_REPLICATED = "replicated"
_SHARDED = {"colwise", "rowwise"}


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Which part of a model one worker holds."""

    tp_rank: int  # [0, tp)
    tp: int  # ranks that share each layer
    pp_rank: int  # [0, pp)
    pp: int  # stages that the layers are spread over

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the logits."""
        return self.pp_rank == self.pp - 1


def check_layout(info: ModelInfo, tp: int, pp: int) -> None:
    """Return if the model can be split over `tp` ranks and `pp` stages.

    Raises:
        ConfigError: It cannot; `field` is ``parallel.tp`` or ``parallel.pp``.
    """
    if pp > info.num_layers:
        raise ConfigError(
            f"parallel.pp={pp}, limit={info.num_layers}: the model has {info.num_layers} layers, "
            "every stage needs one; use fewer stages",
            field="parallel.pp",
        )
    if pp > 1 and not info.can_be_staged:
        raise ConfigError(
            f"parallel.pp={pp}: transformers gives no pipeline plan for "
            f"model_type={info.model_type!r}; use parallel.pp=1",
            field="parallel.pp",
        )
    if tp > 1:
        _check_tensor_parallel(info, tp)


def _check_tensor_parallel(info: ModelInfo, tp: int) -> None:
    if not info.tp_plan:
        raise ConfigError(
            f"parallel.tp={tp}: transformers gives no tensor-parallel plan for "
            f"model_type={info.model_type!r}; use parallel.tp=1",
            field="parallel.tp",
        )
    for pattern, style in info.tp_plan.items():
        if style not in _SHARDED and not style.startswith(_REPLICATED):
            raise ConfigError(
                f"parallel.tp={tp}: {pattern} of model_type={info.model_type!r} would be split "
                f"{style!r}, which is not supported (mixtures of experts run with parallel.tp=1, "
                "and parallel.pp)",
                field="parallel.tp",
            )
    for what, count in (
        ("attention heads", info.num_heads),
        ("KV heads", info.num_kv_heads),
        ("columns of the MLP", info.intermediate_size),
    ):
        if count % tp:
            raise ConfigError(
                f"parallel.tp={tp} does not divide the model's {count} {what}: "
                f"use a divisor of {count}",
                field="parallel.tp",
            )


def stage_layers(info: ModelInfo, pp: int) -> tuple[range, ...]:
    """Return the layers of each stage: contiguous, at least one, the heaviest stage lightest.

    The weight of a stage is the bytes that a step reads: its layers and, on the last one, the head.
    The embedding counts nothing: a step reads a row per token of it, and it stays on disk.
    """
    assert 1 <= pp <= info.num_layers, (pp, info.num_layers)
    ends = [0]
    for num_bytes in info.layer_bytes:
        ends.append(ends[-1] + num_bytes)
    # heaviest[i]: of the stages so far that hold the first i layers; cuts: where the last begins.
    heaviest = [float(end) for end in ends]
    cuts: list[list[int]] = []
    for stage in range(1, pp):
        extra = info.head_bytes if stage == pp - 1 else 0
        best = [float("inf")] * len(ends)
        cut = [0] * len(ends)
        for end in range(stage + 1, len(ends)):
            for begin in range(stage, end):
                cost = max(heaviest[begin], ends[end] - ends[begin] + extra)
                if cost < best[end]:
                    best[end], cut[end] = cost, begin
        heaviest = best
        cuts.append(cut)
    bounds = [info.num_layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    bounds = [0, *reversed(bounds)]
    return tuple(range(begin, end) for begin, end in pairwise(bounds))


def block_bytes(info: ModelInfo, cache: CacheConfig, dtype: str, tp: int, num_layers: int) -> int:
    """Return the bytes of one KV block on one worker, keys and values of `num_layers` layers."""
    num_rows = 2 * num_layers * cache.block_size * (info.num_kv_heads // tp)
    if cache.dtype == "int8":
        return num_rows * (info.head_dim + SCALE_BYTES)
    return num_rows * info.head_dim * DTYPE_BYTES[info.dtype_for(dtype)]


def num_blocks_for(
    info: ModelInfo,
    cache: CacheConfig,
    dtype: str,
    tp: int,
    pp: int,
    *,
    max_model_len: int = 0,
    device: str = "cpu",
) -> int:
    """Return how many KV blocks every worker holds: the stage with most layers decides.

    Args:
        info: Of the model.
        cache: `num_blocks`, or `memory_bytes` per worker where that is 0.
        dtype: As in `ModelConfig.dtype`.
        tp: Ranks per stage.
        pp: Stages.
        max_model_len: Tokens of the longest sequence that has to fit; 0 asks for one block.
        device: As in `ModelConfig.device`; the free memory of this machine binds "cpu" only.

    Raises:
        ConfigError: Not even one such sequence fits, or the machine has less memory free.
    """
    num_bytes = largest_part_bytes(info, cache, dtype, tp, pp)
    if cache.num_blocks:
        field, got, unit_bytes = "cache.num_blocks", cache.num_blocks, 1
    else:
        field, got, unit_bytes = "cache.memory_bytes", cache.memory_bytes, num_bytes
    num_blocks = got // unit_bytes
    num_needed = max(1, -(-max_model_len // cache.block_size))
    if num_blocks < num_needed:
        raise ConfigError(
            f"{field}={got}, at least {num_needed * unit_bytes} are needed for one sequence of "
            f"{max_model_len or cache.block_size} tokens: raise it or lower model.max_model_len",
            field=field,
        )
    available = psutil.virtual_memory().available
    if device == "cpu" and num_blocks * num_bytes > available:
        raise ConfigError(
            f"{field}={got}: the KV cache of one worker would take {num_blocks * num_bytes} bytes, "
            f"{available} are free on this machine: lower it",
            field=field,
        )
    return num_blocks


def num_host_slots_for(info: ModelInfo, cache: CacheConfig, dtype: str, tp: int, pp: int) -> int:
    """Return the slots of every worker's host tier: the stage with most layers decides.

    Args:
        info: Of the model.
        cache: `host_memory_bytes` per worker; less than one block is no host tier.
        dtype: As in `ModelConfig.dtype`.
        tp: Ranks per stage.
        pp: Stages.
    """
    return cache.host_memory_bytes // largest_part_bytes(info, cache, dtype, tp, pp)


def largest_part_bytes(info: ModelInfo, cache: CacheConfig, dtype: str, tp: int, pp: int) -> int:
    """Return the bytes of one KV block on the worker with most layers."""
    most_layers = max(len(layers) for layers in stage_layers(info, pp))
    return block_bytes(info, cache, dtype, tp, most_layers)
