"""Attention on a GPU. Without one, what is passed to torch's `varlen_attn` is tested instead.

`varlen_oracle` has the signature of `varlen_attn` and says, in plain torch, what its documentation
says: it shows that pages, lengths and windows are passed rightly. That FlashAttention computes the
same, and that our kernel compiles and is right on a GPU, is shown by the tests marked gpu alone.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from attention_cases import CPU, TOLERANCE, Shape
from paged_cases import DECODES, LONG, LONG_DECODES, MIXED, make_case
from torch import Tensor
from torch.nn.attention import varlen

from cluster.kernels import cuda
from cluster.kernels.ops import paged_attention

FLASH = [torch.bfloat16, torch.float16]
GPU = torch.device("cuda")


def varlen_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of each sequence's queries, aligned with the end of its keys, over its pages."""
    assert cu_seq_k is None and seqused_k is not None and block_table is not None
    for index in (cu_seq_q, seqused_k, block_table):
        assert index.dtype is torch.int32
    assert enable_gqa or query.shape[1] == key.shape[2]
    out = torch.empty_like(query)
    for i, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[i : i + 2].tolist()
        assert end - begin <= max_q and length <= max_k
        pages = block_table[i, : -(-length // key.shape[1])].long()
        k, v = (x[pages].flatten(0, 1)[:length].float() for x in (key, value))
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
        q_position = torch.arange(length - (end - begin), length)[:, None]
        k_position = torch.arange(length)
        left, right = window_size
        is_seen = torch.ones(end - begin, length, dtype=torch.bool)
        if left >= 0:
            is_seen &= k_position >= q_position - left
        if right >= 0:
            is_seen &= k_position <= q_position + right
        scores = torch.einsum("qnh,knh->nqk", query[begin:end].float(), k)
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        odds = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("nqk,knh->qnh", odds, v).to(query.dtype)
    return out


def test_oracle_has_the_signature_of_the_real_one() -> None:
    def shape(function: Any) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(varlen_oracle) == shape(varlen.varlen_attn)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_varlen_gets_pages_lengths_and_windows_rightly(
    heads: tuple[int, int],
    lengths: list[tuple[int, int]],
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_oracle)
    case = make_case(lengths, Shape(*heads, device=CPU))
    got = cuda.attend_varlen(case.q_TNH, case.layer, case.batch, scale=0.3, window=window)
    torch.testing.assert_close(got, case.expected(scale=0.3, window=window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 5.0}, "bends no scores"),
        ({"is_int8": True}, "no INT8 cache"),
        ({"dtype": torch.float32}, "takes no torch.float32"),
        ({"head_dim": 20}, "no heads of 20"),
        ({"head_dim": 512}, "no heads of 512"),
        ({}, "not installed"),
    ],
)
def test_what_flash_attention_lacks_is_named(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # as where it is missing
    cuda._activate_flash.cache_clear()
    facts: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "is_int8": False,
        "softcap": None,
        **changes,
    }
    assert reason in cuda.why_not_flash(torch.device("cuda"), **facts)
    cuda._activate_flash.cache_clear()


def test_old_gpus_have_no_flash_attention_that_reads_pages() -> None:
    assert "(8, 0)" in cuda._activate_flash((8, 0))


def test_graphs_need_a_kernel_that_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(cuda, "why_not_triton", lambda: "")
    assert cuda.why_not_captured(device, torch.float32, is_int8=False) == ""
    monkeypatch.setattr(cuda, "why_not_triton", lambda: "no Triton")
    assert "no Triton" in cuda.why_not_captured(device, torch.bfloat16, is_int8=False)
    monkeypatch.setattr(cuda, "why_not_flash", lambda *_: "")
    assert cuda.why_not_captured(device, torch.bfloat16, is_int8=False) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "head_dim"), [((8, 8), 64), ((12, 2), 128), ((5, 1), 96)])
@pytest.mark.parametrize("lengths", [MIXED, DECODES, LONG, LONG_DECODES])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (6, 5.0)])
@pytest.mark.parametrize("is_int8", [False, True])
def test_attention_on_a_gpu_equals_reference_with_unused_slots_poisoned(
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    lengths: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    is_int8: bool,
) -> None:
    shape = Shape(*heads, head_dim, 16, dtype, is_int8, GPU)
    case = make_case(lengths, shape)
    options: dict[str, Any] = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    got = paged_attention(case.q_TNH, case.layer, case.batch, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, case.expected(**options), atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLASH)
@pytest.mark.parametrize("window", [None, 6])
def test_flash_attention_on_a_gpu_equals_reference(dtype: torch.dtype, window: int | None) -> None:
    reason = cuda.why_not_flash(torch.device("cuda", 0), dtype, 128, False, None)
    if reason:
        pytest.skip(reason)
    case = make_case(MIXED, Shape(12, 2, 128, 16, dtype, device=GPU))
    got = cuda.attend_varlen(case.q_TNH, case.layer, case.batch, scale=0.1, window=window)
    expected = case.expected(scale=0.1, window=window)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
