"""Paged batches whose unused slots are poisoned, and the comparison of a kernel with the oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.kernels.kv_cache import KVCache, LayerCache
from cluster.kernels.ops import SequenceSpan, paged_attention, plan_batch
from cluster.kernels.reference import paged_attention_reference, write_kv_reference

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Shape:
    """Of heads, cache and numbers."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    is_int8: bool = False
    device: torch.device = CPU


def make_spans(lengths: Sequence[tuple[int, int]], block_size: int = 4) -> list[SequenceSpan]:
    """Return sequences of (new, computed) tokens on shuffled blocks."""
    counts = [-(-(new + old) // block_size) for new, old in lengths]
    blocks = list(range(sum(counts) + 2))
    random.Random(1).shuffle(blocks)
    return [
        SequenceSpan(new, old, tuple(blocks.pop() for _ in range(count)))
        for (new, old), count in zip(lengths, counts, strict=True)
    ]


def poisoned(shape: Shape, num_blocks: int) -> LayerCache:
    """Return a cache that holds NaN everywhere; int8: the largest code, and NaN as its scale."""
    cache = KVCache.allocate(
        1,
        num_blocks,
        shape.block_size,
        shape.num_kv_heads,
        shape.head_dim,
        shape.dtype,
        shape.device,
        shape.is_int8,
    )
    cache.numbers_L2BSKH.fill_(127 if shape.is_int8 else torch.nan)
    if cache.scales_L2BSK is not None:
        cache.scales_L2BSK.fill_(torch.nan)
    return cache.layer(0)


def filled(shape: Shape, spans: Sequence[SequenceSpan]) -> LayerCache:
    """Return a poisoned cache with random rows where a sequence has tokens."""
    layer = poisoned(shape, sum(len(span.block_table) for span in spans) + 2)
    whole = [SequenceSpan(span.context_len, 0, span.block_table) for span in spans]
    slots_T = plan_batch(whole, shape.block_size, shape.device).slots_T
    rows = (len(slots_T), shape.num_kv_heads, shape.head_dim)
    k_TKH, v_TKH = torch.randn(2, *rows).to(shape.device, shape.dtype)
    write_kv_reference(layer, k_TKH, v_TKH, slots_T)
    return layer


def strided_queries(shape: Shape, num_tokens: int) -> Tensor:
    """Return queries [T, N, H] that are a slice of a wider row, as of a merged q, k, v."""
    width = shape.num_heads * shape.head_dim
    merged = torch.randn(num_tokens, width + 2 * shape.num_kv_heads * shape.head_dim)
    merged = merged.to(shape.device, shape.dtype)
    return merged[:, :width].view(num_tokens, shape.num_heads, shape.head_dim)


def check_attention(shape: Shape, lengths: Sequence[tuple[int, int]], **options: Any) -> None:
    """Raise AssertionError unless the dispatched kernel gives what the oracle gives."""
    torch.manual_seed(0)
    spans = make_spans(lengths, shape.block_size)
    layer = filled(shape, spans)
    q_TNH = strided_queries(shape, sum(new for new, _ in lengths))
    rows = [(span.num_new, span.num_computed, span.block_table) for span in spans]
    expected = paged_attention_reference(q_TNH, layer, rows, **options)
    batch = plan_batch(spans, shape.block_size, shape.device)
    got = paged_attention(q_TNH, layer, batch, **options)
    assert got.is_contiguous()
    tolerance = TOLERANCE[shape.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
