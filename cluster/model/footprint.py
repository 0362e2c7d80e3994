"""How much memory a worker will take, known from headers before one is started."""

from __future__ import annotations

from pathlib import Path

import psutil

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.layout import (
    DTYPE_BYTES,
    largest_part_bytes,
    num_blocks_for,
    num_host_slots_for,
    stage_layers,
)
from cluster.model.model_info import ModelInfo

CGROUP = Path("/sys/fs/cgroup")

_INT4_OVERHEAD_BYTES = 3  # of a group: its scale in bfloat16, its zero in a byte


def weight_bytes_of_worker(info: ModelInfo, config: ClusterConfig) -> int:
    """Return the bytes of the heaviest worker's linears, as they will lie in memory.

    An embedding table that is used as it is stored stays in its file and counts nothing.
    """
    dtype_bytes = DTYPE_BYTES[info.dtype_for(config.model.dtype)]
    stored_bytes = DTYPE_BYTES[info.dtype]
    scheme = config.model.quantization
    per_element: float = dtype_bytes
    per_head_element: float = dtype_bytes
    if scheme != "none":
        per_element = per_head_element = 1
    if scheme == "int4":
        per_element = 0.5 + _INT4_OVERHEAD_BYTES / config.model.quantization_group_size
    if info.is_quantized:  # as it is in the file
        per_element = per_head_element = stored_bytes
    stages = stage_layers(info, config.parallel.pp)
    table_bytes = info.vocab_size * info.hidden_size * dtype_bytes
    if config.model.device == "cpu" and dtype_bytes == stored_bytes:
        table_bytes = 0
    heaviest = 0.0
    for index, layers in enumerate(stages):
        num_bytes = sum(info.layer_bytes[layer] for layer in layers) * per_element
        if index == len(stages) - 1:
            num_bytes += info.head_bytes * per_head_element
        share = num_bytes / stored_bytes / config.parallel.tp
        heaviest = max(heaviest, share + (table_bytes if index == 0 else 0))
    return int(heaviest)


def check_fits(info: ModelInfo, config: ClusterConfig) -> None:
    """Return if the groups' weights, KV caches and host tiers fit into this machine's free memory.

    Args:
        info: Of the model; its layout is checked already.
        config: To be deployed; all replica groups are counted, as if they came to this machine.

    Raises:
        ConfigError: They do not, with the sizes; or not one block fits into the cache.
    """
    parallel, cache = config.parallel, config.cache
    num_blocks = num_blocks_for(
        info, cache, config.model.dtype, parallel.tp, parallel.pp, device=config.model.device
    )
    if config.model.device != "cpu":
        return
    block_bytes = _block_bytes(info, config)
    host_bytes = block_bytes * num_host_slots_for(
        info, cache, config.model.dtype, parallel.tp, parallel.pp
    )
    cache_bytes = num_blocks * block_bytes
    weight_bytes = weight_bytes_of_worker(info, config)
    scaling = config.replica.autoscaling
    num_groups = scaling.max_replicas if scaling else config.replica.num_replicas
    num_workers = parallel.world_size * num_groups
    wanted = num_workers * (weight_bytes + cache_bytes + host_bytes)
    available = available_bytes()
    if wanted > available:
        raise ConfigError(
            f"model.path={info.folder}: {num_workers} workers x ({weight_bytes} bytes of weights + "
            f"{cache_bytes} bytes of KV cache + {host_bytes} bytes of host tier) = {wanted} bytes, "
            f"{available} are free on this machine: take a smaller model, model.quantization, "
            "fewer groups, a smaller cache or cache.host_memory_bytes",
            field="model.path",
        )


def check_gpu_fits(config: ClusterConfig, *, num_blocks: int) -> None:
    """Return if one worker's weights and KV cache fit on its GPU; on a CPU at once.

    Args:
        config: Of the cluster.
        num_blocks: Of the cache.

    Raises:
        ConfigError: They do not, with the sizes, or there is no GPU.
    """
    if config.model.device == "cpu":
        return
    from cluster.model.cuda_device import check_gpu_memory, open_device  # imports torch

    info = inspect_checkpoint(config.model.folder)
    check_gpu_memory(
        open_device(config.model.device),
        weight_bytes=weight_bytes_of_worker(info, config),
        cache_bytes=num_blocks * _block_bytes(info, config),
    )


def available_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or its container's."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        inactive = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    # Cached file pages count as used there, and give way.
    return min(available, int(limit) - used + int(inactive.get("inactive_file", 0)))


def _block_bytes(info: ModelInfo, config: ClusterConfig) -> int:
    """Return the bytes of one KV block on the worker with most layers."""
    parallel = config.parallel
    return largest_part_bytes(info, config.cache, config.model.dtype, parallel.tp, parallel.pp)
