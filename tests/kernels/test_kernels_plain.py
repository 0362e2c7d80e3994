from __future__ import annotations

import pytest
import torch
from attention_cases import CPU, make_spans

from cluster.kernels import plain
from cluster.kernels.ops import plan_batch


def test_decode_groups_bound_padding_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "MAX_GROUP_TOKENS", 64)
    spans = make_spans([(1, old) for old in (39, 1, 20, 38, 0, 21, 3)])
    groups = plan_batch(spans, 4, CPU).plain.groups
    assert sorted(torch.cat([group.rows_n for group in groups]).tolist()) == list(range(7))
    for group in groups:
        assert group.slots_nC.numel() <= 64
        assert int(group.lens_n.max()) <= plain.MAX_PADDING_RATIO * int(group.lens_n.min())


def test_quantization_errs_by_half_a_step_and_keeps_zeros() -> None:
    torch.manual_seed(0)
    x_TKH = torch.randn(50, 3, 16)
    x_TKH[4, 1] = 0
    codes, scales_TK = plain.quantize(x_TKH)
    error = (codes * scales_TK[..., None] - x_TKH).abs()
    assert bool((error <= scales_TK[..., None] * 0.5001).all())
    assert int(codes.abs().amax()) == 127
    assert float(scales_TK[4, 1]) == 0 and not codes[4, 1].any()
