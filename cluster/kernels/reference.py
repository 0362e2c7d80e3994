"""Plain-torch oracle of the kernels: slow, in float32, one sequence and one head at a time.

Shape suffixes of kernels/ and model/: T tokens of a step, C tokens of a context, N query heads,
K key-value heads, G = N / K, H head dim, D model dim, V vocabulary, B blocks, S slots of a block,
n sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.kernels.kv_cache import LayerCache


def write_kv_reference(layer: LayerCache, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    """Put each token's rows into slot ``slots_T[t]``, block ``slot // S``, in place.

    An int8 cache takes ``round(x / scale)`` with ``scale = max|x| / 127`` over the row.
    """
    for cache_BSKH, scales_BSK, new_TKH in (
        (layer.keys_BSKH, layer.key_scales_BSK, k_TKH),
        (layer.values_BSKH, layer.value_scales_BSK, v_TKH),
    ):
        block_size, num_kv_heads = cache_BSKH.shape[1:3]
        for row_KH, slot in zip(new_TKH, slots_T.tolist(), strict=True):
            block, offset = slot // block_size, slot % block_size
            if scales_BSK is None:
                cache_BSKH[block, offset] = row_KH
                continue
            for head in range(num_kv_heads):
                row_H = row_KH[head].float()
                scale = row_H.abs().max() / 127
                codes_H = torch.round(row_H / scale) if scale > 0 else torch.zeros_like(row_H)
                cache_BSKH[block, offset, head] = codes_H.to(torch.int8)
                scales_BSK[block, offset, head] = scale


def _rows(cache_BSKH: Tensor, scales_BSK: Tensor | None, blocks: Tensor, span: slice) -> Tensor:
    rows_CKH = cache_BSKH[blocks].flatten(0, 1)[span].float()
    if scales_BSK is not None:
        rows_CKH = rows_CKH * scales_BSK[blocks].flatten(0, 1)[span][..., None]
    return rows_CKH


def paged_attention_reference(
    q_TNH: Tensor,
    layer: LayerCache,
    sequences: Sequence[tuple[int, int, Sequence[int]]],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return causal attention of each sequence's new tokens over its blocks.

    Args:
        q_TNH: Queries, the sequences one after the other.
        layer: Keys and values; those of the new tokens are already written.
        sequences: Per sequence (new tokens, tokens computed before, block table).
        scale: Factor on the scores.
        window: Newest keys that a token sees, itself included; None is all.
        softcap: Scores are bent to ``softcap * tanh(score / softcap)``; None is not.

    Returns:
        Tensor [T, N, H] in the dtype of `q_TNH`.
    """
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    group = q_TNH.shape[1] // layer.keys_BSKH.shape[2]
    row = 0
    for num_new, num_computed, table in sequences:
        blocks = torch.tensor(table, device=q_TNH.device)
        for position in range(num_computed, num_computed + num_new):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            k_CKH = _rows(layer.keys_BSKH, layer.key_scales_BSK, blocks, seen)
            v_CKH = _rows(layer.values_BSKH, layer.value_scales_BSK, blocks, seen)
            for head in range(q_TNH.shape[1]):
                scores_C = k_CKH[:, head // group] @ q_TNH[row, head].float() * scale
                if softcap is not None:
                    scores_C = softcap * torch.tanh(scores_C / softcap)
                out_TNH[row, head] = (scores_C.softmax(0) @ v_CKH[:, head // group]).to(q_TNH.dtype)
            row += 1
    return out_TNH


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return ``x / rms(x) * weight`` by rows, in the dtype of `x_TD`.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019), equation 4.
    """
    x = x_TD.double()
    rms_T1 = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (x / rms_T1 * weight_D.double()).to(x_TD.dtype)


def rope_reference(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Return every head with its pairs (i, i + H / 2) rotated, in the dtype of `x_TNH`.

    Source: Su et al., "RoFormer" (2021), equation 34, in the halves that Llama pairs.
    """
    low, high = x_TNH.double().chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    cos_T1H, sin_T1H = cos_TH.double()[:, None], sin_TH.double()[:, None]
    return (x_TNH.double() * cos_T1H + turned * sin_T1H).to(x_TNH.dtype)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``SiLU(gate) * up`` in float64."""
    return torch.nn.functional.silu(gate.double()) * up.double()
