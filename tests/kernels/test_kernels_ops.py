from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from cluster.kernels import ops
from cluster.kernels.ops import SequenceSpan, paged_attention, plan_batch, write_kv
from cluster.kernels.reference import paged_attention_reference, write_kv_reference

BLOCK_SIZE = 4
NUM_BLOCKS = 64
HEAD_DIM = 16
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

MIXED = [(1, 0), (5, 0), (1, 30), (9, 7), (1, 3), (16, 0), (1, 12), (2, 33)]
DECODES = [(1, 0), (1, 40), (1, 3), (1, 17), (1, 18)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_spans(lengths: list[tuple[int, int]]) -> list[SequenceSpan]:
    blocks = list(range(NUM_BLOCKS))
    random.Random(1).shuffle(blocks)
    return [
        SequenceSpan(new, old, tuple(blocks.pop() for _ in range(-(-(new + old) // BLOCK_SIZE))))
        for new, old in lengths
    ]


def fill(spans: list[SequenceSpan], num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return keys and values [2, B, S, K, H], random where a sequence has tokens, else NaN."""
    cache = torch.full((2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM), torch.nan, dtype=dtype)
    for span in spans:
        for position in range(span.context_len):
            block = span.block_table[position // BLOCK_SIZE]
            cache[:, block, position % BLOCK_SIZE] = torch.randn(2, num_kv_heads, HEAD_DIM)
    return cache


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 5.0), (6, 5.0)])
def test_attention_equals_reference_with_unused_slots_poisoned(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    lengths: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    spans = make_spans(lengths)
    keys, values = fill(spans, num_kv_heads, dtype)
    q_TNH = torch.randn(sum(new for new, _ in lengths), num_heads, HEAD_DIM).to(dtype)
    rows = [(span.num_new, span.num_computed, span.block_table) for span in spans]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = paged_attention_reference(q_TNH, keys, values, rows, **options)  # type: ignore[arg-type]
    batch = plan_batch(spans, BLOCK_SIZE, CPU)
    got = paged_attention(q_TNH, keys, values, batch, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_write_puts_each_token_where_its_block_table_says() -> None:
    spans = make_spans(MIXED)
    slots = plan_batch(spans, BLOCK_SIZE, CPU).slots_T
    new_TKH = torch.randn(len(slots), 2, HEAD_DIM)
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 2, HEAD_DIM)
    expected = cache.clone()
    write_kv_reference(expected, new_TKH, slots)
    write_kv(cache, new_TKH, slots)
    assert torch.equal(cache, expected)
    row = 0
    for span in spans:
        for position in range(span.num_computed, span.context_len):
            block = span.block_table[position // BLOCK_SIZE]
            assert torch.equal(cache[block, position % BLOCK_SIZE], new_TKH[row])
            row += 1


def test_decode_groups_bound_padding_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MAX_GROUP_TOKENS", 64)
    spans = make_spans([(1, old) for old in (39, 1, 20, 38, 0, 21, 3)])
    groups = plan_batch(spans, BLOCK_SIZE, CPU).groups
    assert sorted(torch.cat([group.rows_n for group in groups]).tolist()) == list(range(7))
    for group in groups:
        assert group.slots_nC.numel() <= 64
        assert int(group.lens_n.max()) <= ops.MAX_PADDING_RATIO * int(group.lens_n.min())
