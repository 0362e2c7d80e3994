"""The paged KV cache: planning a step, writing, attending; each operation for every device.

    sequence of 6 tokens, S = 4, block table [7, 2]    slots 28 29 30 31 | 8 9
    its next token                                     slot 10

A slot is one token's place in the cache: slot = block * S + offset. Only slots that hold tokens of
the very sequence are read: whatever an unused slot holds, it changes no result. Where the work
runs: native.py on a CPU, cuda.py on a GPU, plain.py where there is neither.
Shape suffixes: see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from cluster.kernels import native, plain
from cluster.kernels.kv_cache import LayerCache

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of a step."""

    num_new: int  # query tokens, >= 1
    num_computed: int  # tokens in the cache before
    block_table: Sequence[int]  # covers num_computed + num_new

    @property
    def context_len(self) -> int:
        """Tokens in the cache after this step's are written."""
        return self.num_computed + self.num_new


@dataclass(frozen=True)
class PagedBatch:
    """Where a step's tokens go and what they attend to: made once, read by each layer."""

    slots_T: Tensor  # int64, where each token's key and value are written
    positions_T: Tensor  # int64, of each token in its sequence
    query_starts_n1: Tensor  # int32 [n + 1], each sequence's first row among the tokens; T
    context_lens_n: Tensor  # int32, tokens in the cache after the step
    block_tables_nB: Tensor  # int32, padded with 0
    max_query_len: int  # tokens of the longest part
    max_context_len: int  # tokens of the longest sequence
    block_size: int  # slots per block

    @cached_property
    def plain(self) -> plain.PlainPlan:
        """What plain torch needs besides; made at its first use."""
        return plain.make_plan(
            self.query_starts_n1, self.context_lens_n, self.block_tables_nB, self.block_size
        )


def plan_batch(spans: Sequence[SequenceSpan], block_size: int, device: torch.device) -> PagedBatch:
    """Return the indices of a step whose tokens are those of `spans`, one after the other.

    Args:
        spans: At least one.
        block_size: Slots per block.
        device: Where the indices are needed.
    """
    lengths = [(span.num_new, span.num_computed, len(span.block_table)) for span in spans]
    new_n, computed_n, blocks_n = np.array(lengths, dtype=np.int64).T
    blocks = np.fromiter(
        chain.from_iterable(span.block_table for span in spans), np.int32, int(blocks_n.sum())
    )
    tables_nB = np.zeros((len(spans), int(blocks_n.max())), dtype=np.int32)
    tables_nB[np.arange(tables_nB.shape[1]) < blocks_n[:, None]] = blocks
    starts_n1 = np.zeros(len(spans) + 1, dtype=np.int32)
    np.cumsum(new_n, out=starts_n1[1:])
    rows_T = np.repeat(np.arange(len(spans)), new_n)
    positions_T = np.arange(starts_n1[-1]) + np.repeat(computed_n - starts_n1[:-1], new_n)
    block_T, offset_T = np.divmod(positions_T, block_size)
    slots_T = tables_nB[rows_T, block_T].astype(np.int64) * block_size + offset_T
    context_n = new_n + computed_n
    return PagedBatch(
        slots_T=_to(slots_T, device),
        positions_T=_to(positions_T, device),
        query_starts_n1=_to(starts_n1, device),
        context_lens_n=_to(context_n.astype(np.int32), device),
        block_tables_nB=_to(tables_nB, device),
        max_query_len=int(new_n.max()),
        max_context_len=int(context_n.max()),
        block_size=block_size,
    )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)


def write_kv(layer: LayerCache, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    """Put each token's key and value into its slot, in place; an int8 cache takes them quantized.

    Args:
        layer: Keeps the dtype of the rows, or int8.
        k_TKH: Any strides.
        v_TKH: Likewise.
        slots_T: int64, distinct.
    """
    if not _is_native(k_TKH):
        plain.write_kv(layer, k_TKH, v_TKH, slots_T)
        return
    torch.ops.sluice.write_kv(
        layer.keys_BSKH,
        layer.values_BSKH,
        layer.key_scales_BSK,
        layer.value_scales_BSK,
        _with_dense_rows(k_TKH),
        _with_dense_rows(v_TKH),
        slots_T,
    )


def paged_attention(
    q_TNH: Tensor,
    layer: LayerCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return causal attention of a step's tokens, each over its own sequence.

    Args:
        q_TNH: Queries in the order of the batch, any strides.
        layer: Keys and values; the step's own are already written.
        batch: From `plan_batch`.
        scale: Factor on the scores.
        window: Newest keys that a token sees, itself included; None is all.
        softcap: Scores are bent to ``softcap * tanh(score / softcap)``; None is not.

    Returns:
        Tensor [T, N, H], contiguous.
    """
    if q_TNH.device.type == "cuda":
        from cluster.kernels.cuda import paged_attention_cuda  # where there is CUDA

        return paged_attention_cuda(
            q_TNH, layer, batch, scale=scale, window=window, softcap=softcap
        )
    if not _is_native(q_TNH):
        return plain.paged_attention(
            q_TNH, layer, batch.plain, scale=scale, window=window, softcap=softcap
        )
    out_TNH: Tensor = torch.ops.sluice.paged_attention(
        _with_dense_rows(q_TNH),
        layer.keys_BSKH,
        layer.values_BSKH,
        layer.key_scales_BSK,
        layer.value_scales_BSK,
        batch.query_starts_n1,
        batch.context_lens_n,
        batch.block_tables_nB,
        scale,
        window or 0,
        softcap or 0.0,
    )
    return out_TNH


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES and not native.load()


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
