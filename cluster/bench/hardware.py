"""What this machine can do, measured: reading memory, and multiplying matrices.

Both run with torch's present number of threads, so that they bound what a model can reach with as
many. The best of some runs counts: a limit is not what a busy moment shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

READ_BYTES = 512 * 2**20
"""Of the buffer that is read: far more than the caches of a CPU hold."""

CUDA_READ_BYTES = 2**31
NUM_RUNS = 8
MATRIX_KINDS = ("float32", "bfloat16", "float16", "int8")

_CPU_SIZES = (1024, 4096, 1024)  # M, N, K: long prompts through a wide layer
_CUDA_SIZES = (8192, 8192, 8192)


@dataclass(frozen=True)
class HardwarePeaks:
    """Limits of one machine at one number of threads."""

    read_bytes_per_s: float  # from memory, in order
    matrix_flop_per_s: float  # of a large product; an int8 operation counts like a float one
    matrix_kind: str  # one of MATRIX_KINDS: what was multiplied


def matrix_kind(dtype: str, quantization: str) -> str:
    """Return the kind of product whose peak bounds a model's.

    Args:
        dtype: Of activations.
        quantization: Of the weights; INT4 is multiplied as INT8, FP8's peak is held against bf16's.
    """
    return "int8" if quantization in ("int8", "int4") else dtype


def measure_peaks(device: str, kind: str) -> HardwarePeaks:
    """Return the limits of this machine; what is allocated for that is freed again.

    Args:
        device: "cpu" or "cuda".
        kind: One of MATRIX_KINDS.
    """
    peaks = HardwarePeaks(read_bandwidth(device), matrix_peak(device, kind), kind)
    if device == "cuda":  # the pool keeps what was freed, and the peak counts it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peaks


def read_bandwidth(device: str, num_bytes: int = 0) -> float:
    """Return how fast a sum reads a large buffer, bytes/s.

    Args:
        device: "cpu" or "cuda".
        num_bytes: Of the buffer; 0 takes one that no cache holds.
    """
    num_bytes = num_bytes or (CUDA_READ_BYTES if device == "cuda" else READ_BYTES)
    buffer = torch.ones(num_bytes // 4, device=device)
    half = buffer.numel() // 2
    # Two kinds of reading: which of them is faster depends on the machine's prefetchers.
    sum_s = _best_s(lambda: buffer.sum(), device)
    dot_s = _best_s(lambda: torch.dot(buffer[:half], buffer[half : 2 * half]), device)
    return num_bytes / min(sum_s, dot_s)


def matrix_peak(device: str, kind: str, sizes: tuple[int, int, int] | None = None) -> float:
    """Return the rate of a large matrix product through oneDNN or cuBLAS, operations/s.

    Args:
        device: "cpu" or "cuda".
        kind: One of MATRIX_KINDS.
        sizes: M, N, K of ``[M, K] x [K, N]``; None takes large ones.
    """
    assert kind in MATRIX_KINDS, kind
    rows, columns, inner = sizes or (_CUDA_SIZES if device == "cuda" else _CPU_SIZES)
    if device == "cpu" and kind == "int8":
        product = _int8_product(rows, columns, inner)
    elif device == "cpu" and kind != "float16":
        product = _packed_product(rows, columns, inner, getattr(torch, kind))
    else:
        product = _plain_product(rows, columns, inner, kind, device)
    with torch.inference_mode():
        return 2 * rows * columns * inner / _best_s(product, device)


def _packed_product(
    rows: int, columns: int, inner: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    x = torch.randn(rows, inner).to(dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(columns, inner).to(dtype), rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _int8_product(rows: int, columns: int, inner: int) -> Callable[[], Tensor]:
    x = torch.randint(0, 255, (rows, inner), dtype=torch.uint8)
    codes = torch.randint(-127, 127, (columns, inner), dtype=torch.int8)
    weight = torch.ops.onednn.qlinear_prepack(codes, [rows, inner])
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    tail: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, weight, scales, zeros, *tail)


def _plain_product(
    rows: int, columns: int, inner: int, kind: str, device: str
) -> Callable[[], Tensor]:
    if kind == "int8":
        x = torch.randint(-127, 127, (rows, inner), dtype=torch.int8, device=device)
        y = torch.randint(-127, 127, (columns, inner), dtype=torch.int8, device=device)
        return lambda: torch._int_mm(x, y.t())
    dtype = getattr(torch, kind)
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    return lambda: a @ b.t()


def _best_s(run: Callable[[], object], device: str) -> float:
    """Return the shortest time of `run` after one that does not count, seconds."""
    run()
    best_s = float("inf")
    for _ in range(NUM_RUNS):
        _wait(device)
        start_s = time.perf_counter()
        run()
        _wait(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
