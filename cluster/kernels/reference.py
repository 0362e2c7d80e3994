"""Plain-torch oracle of the kernels: slow, in float32, one sequence and one head at a time.

Shape suffixes of kernels/ and model/: T tokens of a step, C tokens of a context, N query heads,
K key-value heads, G = N / K, H head dim, D model dim, V vocabulary, B blocks, S slots of a block,
n sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def write_kv_reference(cache_BSKH: Tensor, new_TKH: Tensor, slots_T: Tensor) -> None:
    """Put each token's row into slot ``slots_T[t]``, block ``slot // S``, in place."""
    block_size = cache_BSKH.shape[1]
    for row, slot in zip(new_TKH, slots_T.tolist(), strict=True):
        cache_BSKH[slot // block_size, slot % block_size] = row


def paged_attention_reference(
    q_TNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    sequences: Sequence[tuple[int, int, Sequence[int]]],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return causal attention of each sequence's new tokens over its blocks.

    Args:
        q_TNH: Queries, the sequences one after the other.
        k_cache_BSKH: Keys; those of the new tokens are already written.
        v_cache_BSKH: Values, likewise.
        sequences: Per sequence (new tokens, tokens computed before, block table).
        scale: Factor on the scores.
        window: Newest keys that a token sees, itself included; None is all.
        softcap: Scores are bent to ``softcap * tanh(score / softcap)``; None is not.

    Returns:
        Tensor [T, N, H] in the dtype of `q_TNH`.
    """
    out_TNH = torch.empty_like(q_TNH)
    group = q_TNH.shape[1] // k_cache_BSKH.shape[2]
    row = 0
    for num_new, num_computed, table in sequences:
        blocks = torch.tensor(table, device=q_TNH.device)
        for position in range(num_computed, num_computed + num_new):
            first = 0 if window is None else max(0, position - window + 1)
            k_CKH = k_cache_BSKH[blocks].flatten(0, 1)[first : position + 1].float()
            v_CKH = v_cache_BSKH[blocks].flatten(0, 1)[first : position + 1].float()
            for head in range(q_TNH.shape[1]):
                scores_C = k_CKH[:, head // group] @ q_TNH[row, head].float() * scale
                if softcap is not None:
                    scores_C = softcap * torch.tanh(scores_C / softcap)
                out_TNH[row, head] = (scores_C.softmax(0) @ v_CKH[:, head // group]).to(q_TNH.dtype)
            row += 1
    return out_TNH
