"""Attention of transformers' modules on the paged cache.

transformers calls the function registered here from every attention module and hands down the
keyword arguments of the model's forward: `paged` is how a step's `PagedStep` arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cluster.errors import ConfigError
from cluster.kernels.kv_cache import KVCache
from cluster.kernels.ops import PagedBatch, paged_attention, write_kv

ATTENTION_NAME = "sluice_paged"


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What one step's attention needs besides queries, keys and values."""

    batch: PagedBatch
    cache: KVCache  # of this stage's layers
    first_layer: int  # index in the model of the stage's first layer


def register_attention() -> None:
    """Make ``attn_implementation="sluice_paged"`` known to transformers; again is harmless."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Each sequence's own slots are the mask."""


def _paged_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write a step's keys and values, attend; [1, N, T, H] in, [1, T, N, H] out."""
    if kwargs.get("s_aux") is not None or not getattr(module, "is_causal", True):
        raise ConfigError(
            f"model.path: {type(module).__name__} wants attention sinks or sees the future, "
            "which the paged cache does not serve; take another model",
            field="model.path",
        )
    layer = paged.cache.layer(module.layer_idx - paged.first_layer)
    write_kv(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), paged.batch.slots_T)
    out_TNH = paged_attention(
        query[0].transpose(0, 1),
        layer,
        paged.batch,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out_TNH[None], None
