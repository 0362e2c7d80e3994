"""Attention over the paged cache on a GPU: FlashAttention where it reads pages, else our kernel.

    FlashAttention 3 or 4    torch's `varlen_attn` with a block table; fp16 and bf16
    Triton                   triton_ops.py; any dtype, soft-capping, INT8 cache
    plain torch              where Triton is missing; it reads lengths back, so no CUDA graphs

The FlashAttention 2 inside torch wants pages of 256 tokens and, in torch 2.13, loses the rows of
all sequences but the first where it splits the keys (pytorch/pytorch#194167). So `varlen_attn`
serves only with the package of FlashAttention 3 (`flash_attn_interface`, compute capability 9.0)
or 4 (`flash_attn.cute`, 10.x). Shape suffixes: see reference.py.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import varlen

from cluster.kernels import plain
from cluster.kernels.kv_cache import LayerCache

if TYPE_CHECKING:
    from cluster.kernels.ops import PagedBatch

_FLASH_BY_MAJOR = {9: "FA3", 10: "FA4"}  # of the compute capability: who reads pages there
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_MAX_FLASH_HEAD_DIM = 256

logger = logging.getLogger(__name__)


def paged_attention_cuda(
    q_TNH: Tensor,
    layer: LayerCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `ops.paged_attention`, on a GPU."""
    is_int8 = layer.key_scales_BSK is not None
    reason = why_not_flash(q_TNH.device, q_TNH.dtype, q_TNH.shape[-1], is_int8, softcap)
    if not reason:
        return attend_varlen(q_TNH, layer, batch, scale=scale, window=window)
    if not (missing := why_not_triton()):
        _log_choice("our Triton kernel", reason)
        from cluster.kernels import triton_ops  # imports Triton, which a CPU build lacks

        return triton_ops.paged_attention(
            q_TNH, layer, batch, scale=scale, window=window, softcap=softcap
        )
    _log_choice("plain torch, slower, without CUDA graphs", f"{reason}; {missing}")
    return plain.paged_attention(
        q_TNH, layer, batch.plain, scale=scale, window=window, softcap=softcap
    )


def attend_varlen(
    q_TNH: Tensor,
    layer: LayerCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return attention by torch's `varlen_attn`; arguments as in `ops.paged_attention`."""
    out_TNH = varlen.varlen_attn(
        q_TNH if q_TNH.stride(-1) == 1 else q_TNH.contiguous(),
        layer.keys_BSKH,
        layer.values_BSKH,
        batch.query_starts_n1,
        None,  # FlashAttention takes either cumulated key lengths or pages
        batch.max_query_len,
        batch.max_context_len,
        scale=scale,
        # Keys to the left of a token and to the right; it always sees itself.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_TNH.shape[1] != layer.keys_BSKH.shape[2],
        seqused_k=batch.context_lens_n,
        block_table=batch.block_tables_nB,
    )
    assert isinstance(out_TNH, Tensor)
    return out_TNH


def why_not_captured(device: torch.device, dtype: torch.dtype, *, is_int8: bool) -> str:
    """Return why attention cannot be part of a CUDA graph; empty where it can.

    Every choice but plain torch can, and soft-capping leaves the choice to Triton at the most.
    """
    missing = why_not_triton()
    if not missing:
        return ""
    reason = why_not_flash(device, dtype, 0, is_int8, None)
    return f"{reason}; {missing}" if reason else ""


def why_not_flash(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    is_int8: bool,
    softcap: float | None,
) -> str:
    """Return why `varlen_attn` cannot serve; empty where it can."""
    if softcap is not None:
        return "varlen_attn bends no scores (soft-capping)"
    if is_int8:
        return "varlen_attn reads no INT8 cache"
    if dtype not in _FLASH_DTYPES:
        return f"varlen_attn takes no {dtype}"
    if head_dim % 8 or head_dim > _MAX_FLASH_HEAD_DIM:
        return f"varlen_attn takes no heads of {head_dim}"
    return _activate_flash(torch.cuda.get_device_capability(device))


@cache
def _activate_flash(capability: tuple[int, int]) -> str:
    """Make `varlen_attn` use the FlashAttention that reads pages; return why not."""
    name = _FLASH_BY_MAJOR.get(capability[0])
    if name is None:
        return f"no FlashAttention reads pages on compute capability {capability}"
    try:
        attention.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        return f"FlashAttention {name[2:]} is not installed ({error})"
    logger.info("attention: varlen_attn with FlashAttention %s", name[2:])
    return ""


@cache
def why_not_triton() -> str:
    """Return why our Triton kernel cannot serve; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return ""


@cache
def _log_choice(choice: str, reason: str) -> None:
    """Log a choice once."""
    logger.info("attention: %s, because %s", choice, reason)
