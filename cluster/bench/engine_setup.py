"""An engine with its model in this process, as the leader of a 1x1 group has it, and its clocks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from cluster.bench.engine_drive import EngineServer, StepClock
from cluster.clock import WallClock
from cluster.config import ClusterConfig, ReplicaConfig
from cluster.engine.engine import Engine
from cluster.errors import ConfigError
from cluster.kernels import cuda, native
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.footprint import check_fits
from cluster.model.linear import weight_nbytes
from cluster.model.model_info import ModelInfo
from cluster.model.quantization.check import check_kernels, check_quantization
from cluster.model.runner import ModelRunner, num_blocks_for
from cluster.replica.build import load_whole, make_engine, max_model_len_of
from cluster.replica.executor import InProcessExecutor
from cluster.replica.local_tiers import LocalTiers
from cluster.replica.mover_start import OpenStore
from cluster.replica.placement import threads_per_worker


@dataclass(frozen=True)
class LoadedEngine:
    """What a measurement needs of an engine."""

    info: ModelInfo
    engine: Engine
    server: EngineServer
    load_s: float  # from the checkpoint to the first possible step
    weight_bytes: int  # of all linears
    kv_cache_bytes: int
    kv_bytes_per_token: float
    attention: str  # "flash", "triton" or "plain" on a GPU; "native" or "plain" on a CPU
    has_graphs: bool  # decode steps are captured as CUDA graphs
    tiers: LocalTiers  # to be closed when the engine is used no more


def num_threads_of(config: ClusterConfig) -> int:
    """Return the threads that a group alone on this machine computes with."""
    return threads_per_worker(config.parallel, os.cpu_count() or 1, 1)


def check_engine(config: ClusterConfig, num_sequence_tokens: int) -> ModelInfo:
    """Return what the checkpoint is, if this process can serve sequences of that length from it.

    Raises:
        ConfigError: The layout is split, the model or its quantization does not run here, its
            context is shorter, or the memory for its weights and cache is not there.
    """
    if config.parallel.world_size != 1:
        raise ConfigError(
            f"parallel.tp={config.parallel.tp}, parallel.pp={config.parallel.pp}: an engine is "
            "measured in one process; set both to 1, or use `sluice bench serve`",
            field="parallel",
        )
    info = inspect_checkpoint(config.model.folder)
    check_quantization(info, config.model, config.parallel)
    limit = max_model_len_of(config, info)
    if num_sequence_tokens > limit:
        raise ConfigError(
            f"prompt and answer have {num_sequence_tokens} tokens, limit={limit}: ask for less, or "
            "take a model with a longer context",
            field="input-len",
        )
    _num_blocks(config, info, num_sequence_tokens)
    check_fits(info, config.model_copy(update={"replica": ReplicaConfig()}))  # one group, here
    check_kernels(info, config.model)
    return info


def _num_blocks(config: ClusterConfig, info: ModelInfo, num_sequence_tokens: int = 0) -> int:
    return num_blocks_for(
        info,
        config.cache,
        config.model.dtype,
        1,
        1,
        max_model_len=num_sequence_tokens,
        device=config.model.device,
    )


def load_engine(
    config: ClusterConfig, info: ModelInfo, open_store: OpenStore | None = None
) -> LoadedEngine:
    """Return an engine that is ready.

    Args:
        config: With `cache.num_blocks` or `cache.memory_bytes` as wanted.
        info: From `check_engine`.
        open_store: Makes the store of KV blocks; None is the one that `config.store` names, unless
            that is the embedded one, which a process without Ray has not.

    Raises:
        ConfigError: The model or its cache do not fit.
    """
    num_blocks = _num_blocks(config, info)
    if open_store is None and config.store.resolved_kv_url == "embedded":
        config = config.model_copy(
            update={"store": config.store.model_copy(update={"kv_url": "off"})}
        )
    tiers = LocalTiers(config, info, open_store)
    start_s = time.perf_counter()
    runner = load_whole(
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len_of(config, info),
        num_threads=num_threads_of(config),
        slots=tiers.slots,
    )
    load_s = time.perf_counter() - start_s
    # A GPU's forward returns before it is done: there, only the whole step's time means something.
    forward = ForwardClock(runner.model) if config.model.device == "cpu" else None
    clock = StepClock(InProcessExecutor(runner), forward.take_s if forward else None)
    engine = make_engine(config, info, clock, WallClock(), tiers=tiers.tiers)
    return LoadedEngine(
        info=info,
        engine=engine,
        server=EngineServer(engine, clock),
        load_s=load_s,
        weight_bytes=weight_nbytes(runner.model),
        kv_cache_bytes=runner.block_nbytes * runner.num_blocks,
        kv_bytes_per_token=runner.block_nbytes / config.cache.block_size,
        attention=attention_of(runner, info, config),
        has_graphs=runner.has_graphs,
        tiers=tiers,
    )


def attention_of(runner: ModelRunner, info: ModelInfo, config: ClusterConfig) -> str:
    """Return what attends, as the kernels choose it from the device, the dtype and the model."""
    if config.model.device == "cpu":
        return "native" if native.isa() else "plain"
    softcap = getattr(runner.model.config, "attn_logit_softcapping", None)
    is_int8 = config.cache.dtype == "int8"
    device = torch.device(config.model.device)
    if not cuda.why_not_flash(device, runner.dtype, info.head_dim, is_int8, softcap):
        return "flash"
    return "plain" if cuda.why_not_triton() else "triton"


class ForwardClock:
    """Adds up the time inside of a model's forward.

    Args:
        model: transformers' causal LM; steps that sample nothing call its base model alone.
    """

    def __init__(self, model: Any) -> None:
        self._depth = 0
        self._start_s = 0.0
        self._total_s = 0.0
        for module in (model, model.base_model):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def take_s(self) -> float:
        """Return the seconds since the last call."""
        total_s, self._total_s = self._total_s, 0.0
        return total_s

    def _enter(self, *_: Any) -> None:
        if self._depth == 0:
            self._start_s = time.perf_counter()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._total_s += time.perf_counter() - self._start_s
