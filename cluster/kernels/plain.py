"""The paged KV cache in plain torch: any device, any dtype, no compiler.

What is read is a list of slots that hold tokens of the very sequence; padding repeats the
sequence's first slot. Sequences with one query token (decode) run together, padded to the longest
of their group; chunks of prompts run one by one through SDPA. Shape suffixes: see reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.kv_cache import LayerCache

MAX_GROUP_TOKENS = 32_768
"""Padded context tokens that one group gathers: bounds the copy, at 2 x 32 Ki x K x H elements."""

MAX_PADDING_RATIO = 2
"""A group's longest context over its shortest: bounds what padding can waste."""


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
class PlainPlan:
    """A step's sequences, sorted into what runs together."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PromptChunk, ...]


def make_plan(
    query_starts_n1: Tensor, context_lens_n: Tensor, block_tables_nB: Tensor, block_size: int
) -> PlainPlan:
    """Return the plan of a step; the tensors are those of `ops.PagedBatch`."""
    device = block_tables_nB.device
    offset_S = torch.arange(block_size, device=device)
    slots_nC = (block_tables_nB.long()[:, :, None] * block_size + offset_S).flatten(1)
    starts, lens = query_starts_n1.tolist(), context_lens_n.tolist()
    decodes, chunks = [], []
    for index, length in enumerate(lens):
        num_new = starts[index + 1] - starts[index]
        if num_new == 1:
            decodes.append(index)
        else:
            slots_C = slots_nC[index, :length]
            chunks.append(PromptChunk(starts[index], num_new, length - num_new, slots_C))
    decodes.sort(key=lambda index: lens[index])
    groups = []
    for members in _group(decodes, lens):
        lens_n = torch.tensor([lens[index] for index in members], device=device)
        slots = slots_nC[torch.tensor(members, device=device), : lens[members[-1]]]
        is_token_nC = torch.arange(slots.shape[1], device=device) < lens_n[:, None]
        rows_n = torch.tensor([starts[index] for index in members], device=device)
        groups.append(DecodeGroup(rows_n, torch.where(is_token_nC, slots, slots[:, :1]), lens_n))
    return PlainPlan(tuple(groups), tuple(chunks))


def _group(indices: list[int], lens: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index in indices:
        length = lens[index]
        if (
            not groups
            or length > MAX_PADDING_RATIO * lens[groups[-1][0]]
            or length * (len(groups[-1]) + 1) > MAX_GROUP_TOKENS
        ):
            groups.append([])
        groups[-1].append(index)
    return groups


def quantize(x_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [T, K, H] and float32 scales [T, K], such that ``x = code * scale``.

    Symmetric: scale = max|x| / 127, ties to even; zeros have scale 0.
    """
    x = x_TKH.float()
    scales_TK = x.abs().amax(-1) / 127
    divisors = torch.where(scales_TK > 0, scales_TK, 1.0)
    return (x / divisors[..., None]).round_().to(torch.int8), scales_TK


def write_kv(layer: LayerCache, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    """As `ops.write_kv`."""
    for pool_BSKH, scales_BSK, new_TKH in (
        (layer.keys_BSKH, layer.key_scales_BSK, k_TKH),
        (layer.values_BSKH, layer.value_scales_BSK, v_TKH),
    ):
        if scales_BSK is not None:
            new_TKH, scales_TK = quantize(new_TKH)
            scales_BSK.flatten(0, 1).index_copy_(0, slots_T, scales_TK)
        pool_BSKH.flatten(0, 1).index_copy_(0, slots_T, new_TKH)


def paged_attention(
    q_TNH: Tensor,
    layer: LayerCache,
    plan: PlainPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `ops.paged_attention`, with the plan of `make_plan`."""
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    for group in plan.groups:
        out_nNH = _attend_group(q_TNH, layer, group, scale, window, softcap)
        out_TNH.index_copy_(0, group.rows_n, out_nNH)
    for chunk in plan.chunks:
        rows = slice(chunk.start, chunk.start + chunk.num_new)
        k_CKH, v_CKH = _gather(layer, chunk.slots_C, q_TNH.dtype)
        out_TNH[rows] = _attend_chunk(q_TNH[rows], k_CKH, v_CKH, chunk, scale, window, softcap)
    return out_TNH


def _gather(layer: LayerCache, slots_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k_CKH = layer.keys_BSKH.flatten(0, 1).index_select(0, slots_C)
    v_CKH = layer.values_BSKH.flatten(0, 1).index_select(0, slots_C)
    if layer.key_scales_BSK is None or layer.value_scales_BSK is None:
        return k_CKH, v_CKH
    key_scales_CK = layer.key_scales_BSK.flatten(0, 1).index_select(0, slots_C)
    value_scales_CK = layer.value_scales_BSK.flatten(0, 1).index_select(0, slots_C)
    return (
        (k_CKH * key_scales_CK[..., None]).to(dtype),
        (v_CKH * value_scales_CK[..., None]).to(dtype),
    )


def _attend_group(
    q_TNH: Tensor,
    layer: LayerCache,
    group: DecodeGroup,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_seqs, length = group.slots_nC.shape
    num_kv_heads, head_dim = layer.keys_BSKH.shape[2:]
    k_CKH, v_CKH = _gather(layer, group.slots_nC.flatten(), q_TNH.dtype)
    k_nCKH = k_CKH.view(num_seqs, length, num_kv_heads, head_dim)
    v_nCKH = v_CKH.view(num_seqs, length, num_kv_heads, head_dim)
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
    q_KGTH = q_TNH.reshape(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
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
