"""Our Triton kernel, run by Triton's interpreter where there is no GPU.

The interpreter computes what the kernel says, on the CPU: masks, pages, splits and windows are
tested; whether it compiles for a GPU, and how fast it is there, is not (test_kernels_cuda.py).
"""

from __future__ import annotations

import os

import pytest
import torch
from attention_cases import Shape
from paged_cases import DECODES, LONG, LONG_DECODES, MIXED, make_case

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from cluster.kernels import triton_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}  # the interpreter multiplies no bfloat16


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "window", "softcap"),
    [
        (torch.float32, (4, 4), 16, None, None),
        (torch.float32, (6, 2), 24, 6, None),
        (torch.float32, (5, 1), 32, 6, 5.0),
        (torch.float16, (6, 2), 16, None, 5.0),
    ],
)
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_triton_attention_equals_reference_with_unused_slots_poisoned(
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    lengths: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
) -> None:
    case = make_case(lengths, Shape(*heads, head_dim, dtype=dtype, device=DEVICE))
    got = triton_ops.paged_attention(
        case.q_TNH, case.layer, case.batch, scale=0.3, window=window, softcap=softcap
    )
    expected = case.expected(scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [LONG, LONG_DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("window", [None, 200])
def test_triton_attention_joins_tiles_of_keys(
    lengths: list[tuple[int, int]], window: int | None
) -> None:
    case = make_case(lengths, Shape(4, 2, device=DEVICE))
    got = triton_ops.paged_attention(case.q_TNH, case.layer, case.batch, scale=0.3, window=window)
    torch.testing.assert_close(got, case.expected(scale=0.3, window=window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_triton_attention_reads_an_int8_cache(lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, Shape(is_int8=True, device=DEVICE))
    got = triton_ops.paged_attention(case.q_TNH, case.layer, case.batch, scale=0.3, window=9)
    torch.testing.assert_close(got, case.expected(scale=0.3, window=9), atol=1e-5, rtol=1e-5)


def test_triton_attention_takes_queries_of_any_stride() -> None:
    case = make_case(MIXED, Shape(device=DEVICE))
    expected = triton_ops.paged_attention(case.q_TNH, case.layer, case.batch, scale=0.3)
    by_head = case.q_TNH.transpose(0, 1).contiguous().transpose(0, 1)
    scattered = case.q_TNH.transpose(1, 2).contiguous().transpose(1, 2)
    for q_TNH in (by_head, scattered):
        assert not q_TNH.is_contiguous()
        got = triton_ops.paged_attention(q_TNH, case.layer, case.batch, scale=0.3)
        assert torch.equal(got, expected)


def test_splits_fill_the_gpu_and_no_more() -> None:
    class Gpu:
        multi_processor_count = 132

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda _device: Gpu())
        device = torch.device("cuda")
        splits = [triton_ops.choose_num_splits(n, device) for n in (1, 8, 64, 128, 264, 4096)]
    assert splits == [32, 32, 4, 2, 1, 1]
