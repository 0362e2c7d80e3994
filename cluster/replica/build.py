"""Puts a replica's engine together, the same way for serving and for measuring without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.clock import Clock
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.step_time import StepTimeModel
from cluster.model.checkpoint import fingerprint
from cluster.model.model_info import ModelInfo

if TYPE_CHECKING:  # a leader of worker processes needs no torch
    from cluster.model.runner import ModelRunner


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


def load_whole(
    config: ClusterConfig, *, num_blocks: int, max_model_len: int, num_threads: int
) -> ModelRunner:
    """Return a runner of the whole model in this process, which computes with `num_threads`.

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
    )


def make_engine(
    config: ClusterConfig,
    model: ModelInfo,
    executor: Executor,
    clock: Clock,
    step_time: StepTimeModel | None = None,
) -> Engine:
    """Return the engine of a replica; `executor` is the caller's to shut down.

    Args:
        config: Of the cluster.
        model: What the checkpoint says.
        executor: Computes the steps.
        clock: Of the engine.
        step_time: What is known of the steps already; None is nothing.
    """
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
    )
