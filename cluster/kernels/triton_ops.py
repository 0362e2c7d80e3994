# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
"""Paged attention for GPUs in Triton: what FlashAttention does not offer, from one source.

A program takes the queries of one sequence that share a key-value head (tokens x G rows) and walks
over the keys through the block table. In decode the keys of a sequence are split between programs,
so that few sequences fill the GPU; a second kernel joins the parts:

    keys of a sequence   |---- split 0 ----|---- split 1 ----|-- split 2 --|
    each split           unscaled sum of values, largest score m, sum of weights l
    joined               sum(acc * exp(m - max m)) / sum(l * exp(m - max m))

Where a split begins follows from the lengths on the device and their number from the shapes alone:
a captured CUDA graph stays right while contexts grow. Shape suffixes: see reference.py.
Source of the online softmax: Dao et al., "FlashAttention" (2022), section 3.1; of the splits:
"Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.kv_cache import LayerCache

if TYPE_CHECKING:
    from cluster.kernels.ops import PagedBatch

MAX_NUM_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2  # as many hide each other's waits
_MIN_DOT = 16  # the least extent of a matrix product in Triton
_TILE_ROWS = 64
_TILE_KEY_BYTES = 16_384


def paged_attention(
    q_TNH: Tensor,
    layer: LayerCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `ops.paged_attention`."""
    if q_TNH.stride(-1) != 1:
        q_TNH = q_TNH.contiguous()
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads = layer.keys_BSKH.shape[2]
    group = num_heads // num_kv_heads
    num_seqs = batch.context_lens_n.shape[0]
    is_decode = batch.max_query_len == 1
    num_splits = choose_num_splits(num_seqs * num_kv_heads, q_TNH.device) if is_decode else 1
    tile_rows = max(_MIN_DOT, triton.next_power_of_2(group)) if is_decode else _TILE_ROWS
    padded_dim = max(_MIN_DOT, triton.next_power_of_2(head_dim))
    tile_keys = _TILE_KEY_BYTES // (padded_dim * q_TNH.element_size())
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    if num_splits == 1:
        sums, marks = out_TNH, out_TNH  # marks are not touched
    else:
        parts = (num_tokens, num_heads, num_splits)
        sums = q_TNH.new_empty((*parts, head_dim), dtype=torch.float32)
        marks = q_TNH.new_empty((*parts, 2), dtype=torch.float32)
    _attend[(num_seqs * num_splits, num_kv_heads, -(-batch.max_query_len * group // tile_rows))](
        q_TNH,
        layer.keys_BSKH,
        layer.values_BSKH,
        layer.key_scales_BSK if layer.key_scales_BSK is not None else layer.keys_BSKH,
        layer.value_scales_BSK if layer.value_scales_BSK is not None else layer.values_BSKH,
        sums,
        marks,
        batch.query_starts_n1,
        batch.context_lens_n,
        batch.block_tables_nB,
        q_TNH.stride(0),
        q_TNH.stride(1),
        batch.block_tables_nB.stride(0),
        scale,
        softcap or 0.0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=layer.keys_BSKH.shape[1],
        TILE_ROWS=tile_rows,
        TILE_KEYS=min(64, max(_MIN_DOT, tile_keys)),
        WINDOW=window or 0,
        HAS_SOFTCAP=softcap is not None,
        IS_INT8=layer.key_scales_BSK is not None,
        NUM_SPLITS=num_splits,
    )
    if num_splits > 1:
        _join[(num_tokens, num_heads)](
            sums, marks, out_TNH, num_heads, num_splits, HEAD_DIM=head_dim, PADDED_DIM=padded_dim
        )
    return out_TNH


def choose_num_splits(num_programs: int, device: torch.device) -> int:
    """Return in how many parts each sequence's keys are read: a power of two."""
    if device.type != "cuda":
        return 4  # Triton's interpreter: as many as a test can tell apart
    wanted = _num_processors(device) * PROGRAMS_PER_PROCESSOR // num_programs
    return min(MAX_NUM_SPLITS, 1 << max(0, wanted.bit_length() - 1))


def _num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _attend(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    sums,
    marks,
    query_starts,
    context_lens,
    block_tables,
    q_token_stride,
    q_head_stride,
    table_stride,
    scale,
    softcap,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_INT8: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> None:
    """Attend with one tile of rows over one split of the keys."""
    seq = tl.program_id(0) // NUM_SPLITS
    split = tl.program_id(0) % NUM_SPLITS
    kv_head = tl.program_id(1)
    start = tl.load(query_starts + seq)
    num_new = tl.load(query_starts + seq + 1) - start
    context_len = tl.load(context_lens + seq)
    first_row = tl.program_id(2) * TILE_ROWS
    if first_row >= num_new * GROUP:
        return
    row = first_row + tl.arange(0, TILE_ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = token < num_new
    position = context_len - num_new + token
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    q_rows = (start + token).to(tl.int64) * q_token_stride + head * q_head_stride
    q_tile = tl.load(
        q + q_rows[:, None] + dim[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0
    )
    last_token = tl.minimum(num_new - 1, (first_row + TILE_ROWS - 1) // GROUP)
    past = context_len - num_new + last_token + 1
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, context_len - num_new + first_row // GROUP - WINDOW + 1)
    share = tl.cdiv(tl.cdiv(past - begin, NUM_SPLITS), TILE_KEYS) * TILE_KEYS
    begin += split * share
    end = tl.minimum(past, begin + share)
    best = tl.full([TILE_ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    for tile in range(begin, end, TILE_KEYS):
        key = tile + tl.arange(0, TILE_KEYS)
        is_key = key < end  # what lies beyond is never read: it may hold anything
        block = tl.load(
            block_tables + seq.to(tl.int64) * table_stride + key // BLOCK_SIZE, mask=is_key, other=0
        )
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        scalar = slot * NUM_KV_HEADS + kv_head
        vector = scalar * HEAD_DIM
        k_tile = tl.load(
            keys + vector[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
        )
        scores = tl.dot(q_tile, k_tile.to(q_tile.dtype), input_precision="ieee") * scale
        if IS_INT8:
            scores *= tl.load(key_scales + scalar, mask=is_key, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)  # a row that sees nothing yet
        odds = tl.exp(scores - shift[:, None])
        decay = tl.exp(best - shift)
        weight = weight * decay + tl.sum(odds, 1)
        if IS_INT8:
            odds *= tl.load(value_scales + scalar, mask=is_key, other=0.0)[None, :]
        v_tile = tl.load(
            values + vector[:, None] + dim[None, :],
            mask=is_key[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc = acc * decay[:, None] + tl.dot(
            odds.to(q_tile.dtype), v_tile.to(q_tile.dtype), input_precision="ieee"
        )
        best = new_best
    out_row = ((start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head) * NUM_SPLITS + split
    if NUM_SPLITS == 1:
        acc = acc / weight[:, None]
    else:
        tl.store(marks + out_row * 2, best, mask=is_row)
        tl.store(marks + out_row * 2 + 1, weight, mask=is_row)
    tl.store(
        sums + out_row[:, None] * HEAD_DIM + dim[None, :],
        acc.to(sums.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )


@triton.jit
def _join(
    sums,
    marks,
    out,
    num_heads,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> None:
    """Join the splits of one token's head."""
    row = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    split = row * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    best = tl.load(marks + split * 2)
    factor = tl.exp(best - tl.max(best, 0))  # 0 for a split without keys
    weight = tl.sum(tl.load(marks + split * 2 + 1) * factor, 0)
    acc = tl.load(sums + split[:, None] * HEAD_DIM + dim[None, :], mask=is_dim[None, :], other=0.0)
    joined = tl.sum(acc * factor[:, None], 0) / weight
    tl.store(out + row * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=is_dim)
