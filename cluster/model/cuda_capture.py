"""Records steps as CUDA graphs, and makes the graphs of a model's decode steps."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cluster.kernels.cuda import why_not_captured
from cluster.kernels.kv_cache import KVCache
from cluster.model.attention import PagedStep
from cluster.model.cuda_graph import DecodeGraphs, DecodeInputs, GraphLimits

NUM_WARMUPS = 2  # eager runs before a capture: kernels are compiled, workspaces allocated

logger = logging.getLogger(__name__)


class CudaCapture:
    """Captures work on fixed tensors; the graphs share one memory pool.

    They share it because they run one after the other and keep nothing in it between replays.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], Any]:
        """Return what repeats `work` on the current stream."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their workspaces outside of the capture
            for _ in range(NUM_WARMUPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (block transfers, NCCL's watchdog) go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def make_forward(
    model: Any, cache: KVCache, first_layer: int, *, is_last: bool
) -> Callable[[DecodeInputs], Tensor]:
    """Return a stage's decode step: logits [n, V] on the last stage, else activations [n, D].

    Args:
        model: transformers' causal LM, cut to the stage's layers.
        cache: Of these layers.
        first_layer: Index in the model of the first of them.
        is_last: Whether the stage computes logits.
    """

    def forward(step: DecodeInputs) -> Tensor:
        inputs: dict[str, Any] = {
            "position_ids": step.batch.positions_T[None],
            "use_cache": False,
            "paged": PagedStep(step.batch, cache, first_layer),
        }
        if step.hidden_1nD is None:
            inputs["input_ids"] = step.token_ids_1n
        else:
            inputs["inputs_embeds"] = step.hidden_1nD
        if is_last:
            logits: Tensor = model(**inputs).logits[0]
            return logits
        hidden: Tensor = model.base_model(**inputs).last_hidden_state[0]
        return hidden

    return forward


def capture_decode(
    forward: Callable[[DecodeInputs], Tensor],
    cache: KVCache,
    limits: GraphLimits,
    *,
    dtype: torch.dtype,
    hidden_size: int | None,
) -> DecodeGraphs | None:
    """Return the captured decode steps of a stage on a GPU.

    Args:
        forward: From `make_forward`.
        cache: Has the scratch block of `limits`.
        limits: What is captured.
        dtype: Of activations.
        hidden_size: Of the activations that come in; None on the first stage.

    Returns:
        None where decode steps cannot be captured, which is logged with its reason: they then run
        eagerly.
    """
    device = cache.numbers_L2BSKH.device
    is_int8 = cache.scales_L2BSK is not None
    if reason := why_not_captured(device, dtype, is_int8=is_int8):
        logger.warning("decode runs without CUDA graphs, slower: %s", reason)
        return None
    hidden = None if hidden_size is None else (hidden_size, dtype)
    try:
        graphs = DecodeGraphs(forward, limits, device, hidden=hidden, capture=CudaCapture())
    except torch.OutOfMemoryError as error:
        reason = f"no memory is left for them ({error}): lower cache.memory_bytes"
    except RuntimeError as error:
        # A family that looks at numbers on the host (experts, some rotary scalings) cannot be
        # recorded; what it computes eagerly is right.
        reason = f"{type(error).__name__}: {error}"
    else:
        logger.info("decode steps are captured for up to %d sequences", limits.max_num_seqs)
        return graphs
    gc.collect()
    torch.cuda.synchronize(device)
    logger.warning("decode runs without CUDA graphs, slower: %s", reason)
    return None
