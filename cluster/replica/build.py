"""Puts a replica's engine together, the same way for serving and for measuring without Ray."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.clock import Clock
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.mover import BlockMover
from cluster.engine.step_time import StepTimeModel
from cluster.kvstore.block_key import part_prefix
from cluster.model.checkpoint import fingerprint
from cluster.model.layout import block_bytes, num_host_slots_for, stage_layers
from cluster.model.model_info import ModelInfo
from cluster.replica.mover_start import MoverSpec

if TYPE_CHECKING:  # a leader of worker processes needs no torch
    from torch import Tensor

    from cluster.model.runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiers:
    """What is below the KV cache of a replica; the caller shuts the mover down."""

    num_slots: int  # of every worker's host tier
    block_nbytes: int  # of one worker's part of a block, the largest
    mover: BlockMover | None  # to the store; None where no blocks are stored


def max_model_len_of(config: ClusterConfig, model: ModelInfo) -> int:
    """Return the tokens that a prompt and its answer may have together."""
    return config.model.max_model_len or model.max_model_len


def fingerprint_of(config: ClusterConfig) -> bytes:
    """Return what the block hashes are seeded with: of whatever decides the cache's bytes."""
    model, precision = config.model, ""
    if (model.quantization, config.cache.dtype) != ("none", "auto"):
        group_size = model.quantization_group_size if model.quantization == "int4" else 0
        precision = f"{model.quantization}/{group_size}/{config.cache.dtype}"
    return fingerprint(model.folder, model.dtype, config.parallel.tp, precision=precision)


@dataclass(frozen=True)
class WorkerTier:
    """The host tier of one worker."""

    num_slots: int = 0
    block_nbytes: int = 0  # of a slot: the worker's part of a block
    mover: MoverSpec | None = None  # None where no blocks are stored


NO_TIER = WorkerTier()


def num_slots_of(config: ClusterConfig, model: ModelInfo) -> int:
    """Return the slots of every worker's host tier; without a prefix cache there are none."""
    if not config.cache.prefix_caching:
        return 0
    parallel, cache = config.parallel, config.cache
    num_slots = num_host_slots_for(model, cache, config.model.dtype, parallel.tp, parallel.pp)
    if cache.host_memory_bytes and not num_slots:
        logger.warning(
            "cache.host_memory_bytes=%d is less than one block: no host tier, no blocks are stored",
            cache.host_memory_bytes,
        )
    return num_slots


def part_nbytes(config: ClusterConfig, model: ModelInfo, pp_rank: int) -> int:
    """Return the bytes of a stage's part of a block, on each of its ranks."""
    layers = stage_layers(model, config.parallel.pp)[pp_rank]
    return block_bytes(model, config.cache, config.model.dtype, config.parallel.tp, len(layers))


def mover_spec(
    config: ClusterConfig, model: ModelInfo, index: int, fingerprint: bytes
) -> MoverSpec:
    """Return what the mover of a worker does, whose leader is in the worker's process.

    Args:
        config: Of the cluster.
        model: What the checkpoint says.
        index: Of the worker.
        fingerprint: From `fingerprint_of`.
    """
    return MoverSpec(
        store=config.store.model_dump(),
        prefix=part_prefix(fingerprint, pp=config.parallel.pp, part=index),
        block_nbytes=part_nbytes(config, model, index // config.parallel.tp),
        index=index,
    )


def load_whole(
    config: ClusterConfig,
    *,
    num_blocks: int,
    max_model_len: int,
    num_threads: int,
    slots: Tensor | None = None,
) -> ModelRunner:
    """Return a runner of the whole model in this process, which computes with `num_threads`.

    Args:
        config: Of the cluster.
        num_blocks: Of the KV cache.
        max_model_len: Tokens.
        num_threads: Of torch.
        slots: Host tier; the caller's.

    Raises:
        ConfigError: The model cannot be served, or its memory is not there.
    """
    import torch

    from cluster.model.collective import NoCollective
    from cluster.model.footprint import check_gpu_fits
    from cluster.model.runner import ModelRunner, ShardSpec

    torch.set_num_threads(num_threads)
    check_gpu_fits(config, num_blocks=num_blocks)
    return ModelRunner(
        config.model,
        config.cache,
        ShardSpec(tp_rank=0, tp=1, pp_rank=0, pp=1),
        NoCollective(),
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        max_num_seqs=config.engine.max_num_seqs,
        slots=slots,
    )


def make_engine(
    config: ClusterConfig,
    model: ModelInfo,
    executor: Executor,
    clock: Clock,
    step_time: StepTimeModel | None = None,
    tiers: Tiers | None = None,
) -> Engine:
    """Return the engine of a replica; `executor` is the caller's to shut down.

    Args:
        config: Of the cluster.
        model: What the checkpoint says.
        executor: Computes the steps.
        clock: Of the engine.
        step_time: What is known of the steps already; None is nothing.
        tiers: Below the KV cache; None where there are none.
    """
    tiers = tiers or Tiers(0, 0, None)
    return Engine(
        config.engine,
        executor=executor,
        block_size=config.cache.block_size,
        max_model_len=max_model_len_of(config, model),
        fingerprint=fingerprint_of(config),
        eos_token_ids=frozenset(model.eos_token_ids),
        vocab_size=model.vocab_size,
        prefix_caching=config.cache.prefix_caching,
        clock=clock,
        step_time=step_time,
        num_host_slots=tiers.num_slots,
        block_nbytes=tiers.block_nbytes,
        mover=tiers.mover,
        store_config=config.store,
    )
