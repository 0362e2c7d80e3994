"""Choosing tokens of a batch of logits on a CPU, by the native kernels where they serve.

Shape suffixes: see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.kernels import native

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is chosen; the fields mean what they mean in `types.SamplingParams`."""

    row: int  # of the logits
    temperature: float  # 0: the likeliest token, the one of lowest id on ties
    top_k: int  # 0: no limit
    top_p: float
    min_p: float
    uniform: float  # the random number, in [0, 1)


def is_native(logits_nV: Tensor) -> bool:
    """Return whether the kernels take these logits; else plain torch has to choose."""
    return (
        logits_nV.device.type == "cpu"
        and logits_nV.dtype in _DTYPES
        and logits_nV.shape[1] > 0
        and not native.load()
    )


def argmax(logits_nV: Tensor) -> Tensor:
    """Return each row's likeliest token, int64 [n], the one of lowest id on ties.

    Args:
        logits_nV: Any device and float dtype. A row that holds NaN gives the first NaN.
    """
    if not is_native(logits_nV):
        return logits_nV.argmax(dim=-1)
    chosen_n: Tensor = torch.ops.sluice.argmax(_with_dense_rows(logits_nV))
    return chosen_n


def sample_native(logits_nV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return one token per draw, int64, by inverse CDF in the order of the vocabulary.

    Mass is exact to 1e-6 of a row's whole: a draw nearer than that to a border of its CDF, or a
    token whose top-p or min-p is, may fall on either side, always on the same one. Rows without
    odds, of NaN or with infinite logits, give what `argmax` gives.

    Args:
        logits_nV: For which `is_native` holds; not changed, not copied.
        draws: In any order; several may draw from one row.
    """
    chosen_n: Tensor = torch.ops.sluice.sample(
        _with_dense_rows(logits_nV),
        [draw.row for draw in draws],
        [draw.temperature for draw in draws],
        [draw.top_k for draw in draws],
        [draw.top_p for draw in draws],
        [draw.min_p for draw in draws],
        [draw.uniform for draw in draws],
    )
    return chosen_n


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
