from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import CPU, Shape, check_attention, make_spans, poisoned, strided_queries
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels import native
from cluster.kernels.ops import paged_attention, plan_batch, write_kv
from cluster.kernels.reference import write_kv_reference

MIXED = [(1, 0), (5, 0), (1, 30), (9, 7), (1, 3), (16, 0), (1, 12), (2, 33)]
DECODES = [(1, 0), (1, 40), (1, 3), (1, 17), (1, 18)]
DTYPES = [torch.float32, torch.bfloat16]
"""Those of the native kernels; what else there is goes through plain torch."""


@pytest.fixture(autouse=True, params=[1, 2], ids=["1thread", "2threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (14, 2), (5, 1)])
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 5.0), (6, 5.0)])
def test_attention_equals_reference_with_unused_slots_poisoned(
    dtype: torch.dtype,
    is_int8: bool,
    num_heads: int,
    num_kv_heads: int,
    lengths: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
) -> None:
    shape = Shape(num_heads, num_kv_heads, dtype=dtype, is_int8=is_int8)
    check_attention(shape, lengths, scale=0.3, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[(1, 1400)], [(3, 700), (1, 80)], [(130, 65)]])
def test_attention_over_long_contexts_is_split_and_merged(
    dtype: torch.dtype, lengths: list[tuple[int, int]]
) -> None:
    shape = Shape(4, 1, 64, 16, dtype)
    check_attention(shape, lengths, scale=0.125)
    check_attention(shape, lengths, scale=0.125, window=600)


def test_attention_takes_the_largest_and_the_smallest_scores() -> None:
    """Scores of a thousand: exp of one would overflow, the softmax must not."""
    check_attention(Shape(dtype=torch.float32), MIXED, scale=300.0)
    check_attention(Shape(dtype=torch.float32), MIXED, scale=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention_of_odd_shapes_equals_reference(data: st.DataObject) -> None:
    draw = data.draw
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    shape = Shape(
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 7, 9])),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 40, 48, 80, 128])),
        block_size=draw(st.sampled_from([1, 5, 16, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
        is_int8=draw(st.booleans()),
    )
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 130)), min_size=1, max_size=3)
    )
    options: dict[str, Any] = {
        "scale": draw(st.sampled_from([0.05, 0.2])),  # a sharper softmax magnifies rounding
        "window": draw(st.sampled_from([None, 1, 63, 64])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    check_attention(shape, lengths, **options)


def test_float16_goes_through_plain_torch() -> None:
    check_attention(Shape(dtype=torch.float16), MIXED, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_write_equals_reference_bit_by_bit(
    dtype: torch.dtype, is_int8: bool, head_dim: int
) -> None:
    torch.manual_seed(0)
    shape = Shape(2, 2, head_dim, dtype=dtype, is_int8=is_int8)
    slots_T = plan_batch(make_spans(MIXED), 4, CPU).slots_T
    k_TKH = strided_queries(shape, len(slots_T))
    v_TKH = torch.randn(2, len(slots_T), head_dim).to(dtype).transpose(0, 1)  # heads first
    v_TKH[3] = 0
    got, expected = poisoned(shape, 40), poisoned(shape, 40)
    write_kv(got, k_TKH, v_TKH, slots_T)
    write_kv_reference(expected, k_TKH, v_TKH, slots_T)
    for name in ("keys_BSKH", "values_BSKH", "key_scales_BSK", "value_scales_BSK"):
        there, wanted = getattr(got, name), getattr(expected, name)
        assert (there is None) == (wanted is None)
        if there is not None:
            torch.testing.assert_close(there, wanted, rtol=0, atol=0, equal_nan=True)


def test_plan_puts_each_token_where_its_block_table_says() -> None:
    spans = make_spans(MIXED)
    batch = plan_batch(spans, 4, CPU)
    slots, positions = batch.slots_T.tolist(), batch.positions_T.tolist()
    starts = batch.query_starts_n1.tolist()
    assert (batch.max_query_len, batch.max_context_len) == (16, 35)
    assert batch.context_lens_n.tolist() == [new + old for new, old in MIXED]
    for index, span in enumerate(spans):
        rows = range(starts[index], starts[index + 1])
        assert [positions[row] for row in rows] == list(range(span.num_computed, span.context_len))
        table = batch.block_tables_nB[index].tolist()
        assert table == [*span.block_table, *[0] * (len(table) - len(span.block_table))]
        for row in rows:
            block, offset = divmod(positions[row], 4)
            assert slots[row] == span.block_table[block] * 4 + offset
    assert starts[-1] == len(slots) == sum(new for new, _ in MIXED)


def test_kernels_refuse_tensors_that_do_not_fit() -> None:
    if native.load():
        pytest.skip("plain torch has checks of its own")
    spans = make_spans(DECODES)
    batch = plan_batch(spans, 4, CPU)
    layer = poisoned(Shape(), 40)
    with pytest.raises(RuntimeError, match="do not fit keys"):
        paged_attention(torch.zeros(5, 6, 32), layer, batch, scale=1.0)
    with pytest.raises(RuntimeError, match="dtype of the queries"):
        paged_attention(torch.zeros(5, 6, 16, dtype=torch.bfloat16), layer, batch, scale=1.0)
    with pytest.raises(RuntimeError, match="do not fit a cache"):
        write_kv(layer, torch.zeros(4, 2, 16), torch.zeros(4, 2, 16), batch.slots_T)
