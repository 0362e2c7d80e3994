"""The GPU of a worker: which one, whether the model fits, and errors that say so before loading."""

from __future__ import annotations

import torch

from cluster.errors import ConfigError

RESERVE_BYTES = 2**30
"""For activations, workspaces and captured graphs, beside weights and KV cache."""


def open_device(name: str) -> torch.device:
    """Return the device to compute on and make it this process's current one.

    Ray shows every worker the GPU that it reserved and no other: it is always the first.

    Args:
        name: As in `ModelConfig.device`.

    Raises:
        ConfigError: torch sees no GPU.
    """
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise ConfigError(
            f"model.device=cuda: torch sees no CUDA device{build}; check nvidia-smi and "
            "parallel.num_gpus_per_worker, or use model.device=cpu",
            field="model.device",
        )
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def check_gpu_memory(device: torch.device, *, weight_bytes: int, cache_bytes: int) -> None:
    """Return if a worker's share fits on its GPU; anything fits on no GPU.

    Args:
        device: From `open_device`.
        weight_bytes: Of the worker's weights, as they will lie there.
        cache_bytes: Of its KV cache.

    Raises:
        ConfigError: It does not, with the sizes.
    """
    if device.type != "cuda":
        return
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if weight_bytes + RESERVE_BYTES > free_bytes:
        raise ConfigError(
            f"model.path: the weights of one worker take {weight_bytes} bytes, and "
            f"{RESERVE_BYTES} are kept for activations; {free_bytes} are free on {device}: "
            "raise parallel.tp or parallel.pp, or set model.quantization=fp8",
            field="model.path",
        )
    if weight_bytes + cache_bytes + RESERVE_BYTES > free_bytes:
        raise ConfigError(
            f"the KV cache of one worker takes {cache_bytes} bytes, limit="
            f"{free_bytes - weight_bytes - RESERVE_BYTES} on {device} ({free_bytes} free, "
            f"{weight_bytes} of weights, {RESERVE_BYTES} for activations): lower "
            "cache.num_blocks or cache.memory_bytes",
            field="cache.num_blocks",
        )
