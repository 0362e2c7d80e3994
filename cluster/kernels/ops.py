"""The paged KV cache: writing it, and attending over it. Any device, plain torch.

A slot is one token's place in the cache: slot = block * S + offset. What is read is a list of
slots that hold tokens of the very sequence; padding repeats the sequence's first slot. So an unused
slot, whatever garbage it holds, is never read.

    sequence of 6 tokens, S = 4, block table [7, 2]    slots 28 29 30 31 | 8 9
    its next token                                     slot 10

Sequences with one query token (decode) run together, padded to the longest of their group;
chunks of prompts run one by one through SDPA. Shape suffixes: see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GROUP_TOKENS = 32_768
"""Padded context tokens that one group gathers: bounds the copy, at 2 x 32 Ki x K x H elements."""

MAX_PADDING_RATIO = 2
"""A group's longest context over its shortest: bounds what padding can waste."""


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


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query token each, of similar length."""

    rows_n: Tensor  # int64, their rows among the step's tokens
    slots_nC: Tensor  # int64, padded with the sequence's own first slot
    lens_n: Tensor  # int64, context lengths


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """One sequence with several query tokens."""

    start: int  # its first row among the step's tokens
    num_new: int
    num_computed: int
    slots_C: Tensor  # int64
    masks: dict[int, Tensor] = field(default_factory=dict)  # by window, shared by the layers


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where a step's tokens go and what they attend to: made once, read by each layer."""

    slots_T: Tensor  # int64, where each token's key and value are written
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PromptChunk, ...]


def plan_batch(spans: Sequence[SequenceSpan], block_size: int, device: torch.device) -> PagedBatch:
    """Return the indices of a step whose tokens are those of `spans`, one after the other.

    Args:
        spans: At least one.
        block_size: Slots per block.
        device: Where the indices are needed.
    """
    new_slots, decodes, chunks = [], [], []
    row = 0
    for span in spans:
        slots_C = _slots([span.block_table], block_size)[0, : span.context_len]
        new_slots.append(slots_C[span.num_computed :])
        if span.num_new == 1:
            decodes.append((span, row))
        else:
            on_device = slots_C.to(device)
            chunks.append(PromptChunk(row, span.num_new, span.num_computed, on_device))
        row += span.num_new
    return PagedBatch(
        slots_T=torch.cat(new_slots).to(device),
        groups=tuple(_decode_group(members, block_size, device) for members in _group(decodes)),
        chunks=tuple(chunks),
    )


def _slots(tables: Sequence[Sequence[int]], block_size: int) -> Tensor:
    blocks_nB = torch.tensor([list(table) for table in tables], dtype=torch.int64)
    return (blocks_nB[:, :, None] * block_size + torch.arange(block_size)).flatten(1)


def _group(decodes: list[tuple[SequenceSpan, int]]) -> list[list[tuple[SequenceSpan, int]]]:
    groups: list[list[tuple[SequenceSpan, int]]] = []
    for span, row in sorted(decodes, key=lambda item: item[0].context_len):
        length = span.context_len
        if (
            not groups
            or length > MAX_PADDING_RATIO * groups[-1][0][0].context_len
            or length * (len(groups[-1]) + 1) > MAX_GROUP_TOKENS
        ):
            groups.append([])
        groups[-1].append((span, row))
    return groups


def _decode_group(
    members: list[tuple[SequenceSpan, int]], block_size: int, device: torch.device
) -> DecodeGroup:
    longest = members[-1][0].context_len
    num_blocks = -(-longest // block_size)
    tables = [(list(span.block_table) + [0] * num_blocks)[:num_blocks] for span, _ in members]
    slots_nC = _slots(tables, block_size)[:, :longest]
    lens_n = torch.tensor([span.context_len for span, _ in members])
    is_token_nC = torch.arange(longest) < lens_n[:, None]
    return DecodeGroup(
        rows_n=torch.tensor([row for _, row in members], device=device),
        slots_nC=torch.where(is_token_nC, slots_nC, slots_nC[:, :1]).to(device),
        lens_n=lens_n.to(device),
    )


def write_kv(cache_BSKH: Tensor, new_TKH: Tensor, slots_T: Tensor) -> None:
    """Put each token's row into its slot, in place.

    Args:
        cache_BSKH: Contiguous keys or values of one layer.
        new_TKH: Same dtype.
        slots_T: int64, distinct.
    """
    cache_BSKH.flatten(0, 1).index_copy_(0, slots_T, new_TKH)


def paged_attention(
    q_TNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return causal attention of a step's tokens, each over its own sequence.

    Args:
        q_TNH: Queries in the order of the batch.
        k_cache_BSKH: Keys; the step's own are already written.
        v_cache_BSKH: Values, likewise.
        batch: From `plan_batch`.
        scale: Factor on the scores.
        window: Newest keys that a token sees, itself included; None is all.
        softcap: Scores are bent to ``softcap * tanh(score / softcap)``; None is not.

    Returns:
        Tensor [T, N, H], contiguous.
    """
    k_pool, v_pool = k_cache_BSKH.flatten(0, 1), v_cache_BSKH.flatten(0, 1)
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    for group in batch.groups:
        out_nNH = _attend_group(q_TNH, k_pool, v_pool, group, scale, window, softcap)
        out_TNH.index_copy_(0, group.rows_n, out_nNH)
    for chunk in batch.chunks:
        rows = slice(chunk.start, chunk.start + chunk.num_new)
        k_CKH = k_pool.index_select(0, chunk.slots_C)
        v_CKH = v_pool.index_select(0, chunk.slots_C)
        out_TNH[rows] = _attend_chunk(q_TNH[rows], k_CKH, v_CKH, chunk, scale, window, softcap)
    return out_TNH


def _attend_group(
    q_TNH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    group: DecodeGroup,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_seqs, length = group.slots_nC.shape
    num_kv_heads, head_dim = k_pool.shape[1:]
    flat_slots = group.slots_nC.flatten()
    k_nCKH = k_pool.index_select(0, flat_slots).view(num_seqs, length, num_kv_heads, head_dim)
    v_nCKH = v_pool.index_select(0, flat_slots).view(num_seqs, length, num_kv_heads, head_dim)
    q_nKGH = q_TNH.index_select(0, group.rows_n).view(num_seqs, num_kv_heads, -1, head_dim)
    position_C = torch.arange(length, device=q_TNH.device)
    is_seen_nC = position_C < group.lens_n[:, None]
    if window is not None:
        is_seen_nC &= position_C >= group.lens_n[:, None] - window
    out = _attend(
        q_nKGH,
        k_nCKH.transpose(1, 2).contiguous(),  # bf16 products on strided keys take 3 times as long
        v_nCKH.transpose(1, 2),
        is_seen_nC[:, None, None],
        scale,
        softcap,
    )
    return out.flatten(1, 2)


def _attend_chunk(
    q_TNH: Tensor,
    k_CKH: Tensor,
    v_CKH: Tensor,
    chunk: PromptChunk,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_new, num_heads, head_dim = q_TNH.shape
    length, num_kv_heads = k_CKH.shape[:2]
    group = num_heads // num_kv_heads
    # Key-value heads are SDPA's batch, the queries of a group its heads: expanded views, no copies.
    q_KGTH = q_TNH.view(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k_KGCH = k_CKH.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    v_KGCH = v_CKH.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    is_windowed = window is not None and window < length
    if softcap is not None:
        is_seen_TC = _chunk_mask(chunk, window if is_windowed else None)
        out_KGTH = _attend(q_KGTH, k_KGCH, v_KGCH, is_seen_TC, scale, softcap)
    elif chunk.num_computed == 0 and not is_windowed:
        out_KGTH = F.scaled_dot_product_attention(
            q_KGTH, k_KGCH, v_KGCH, is_causal=True, scale=scale
        )
    else:
        is_seen_TC = _chunk_mask(chunk, window if is_windowed else None)
        out_KGTH = F.scaled_dot_product_attention(
            q_KGTH, k_KGCH, v_KGCH, attn_mask=is_seen_TC, scale=scale
        )
    return out_KGTH.permute(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)


def _chunk_mask(chunk: PromptChunk, window: int | None) -> Tensor:
    key = window or 0
    if key not in chunk.masks:
        device = chunk.slots_C.device
        key_C = torch.arange(chunk.num_computed + chunk.num_new, device=device)
        query_T1 = key_C[chunk.num_computed :, None]
        is_seen_TC = key_C <= query_T1
        if window is not None:
            is_seen_TC &= key_C > query_T1 - window
        chunk.masks[key] = is_seen_TC
    return chunk.masks[key]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, is_seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill_(~is_seen, -torch.inf).softmax(-1).to(v.dtype) @ v
