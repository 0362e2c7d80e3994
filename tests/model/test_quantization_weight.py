"""Weights in fewer bits: their error, their slices, their layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.model.quantization import weight as module
from cluster.model.quantization.packing import pack_words, unpack_words
from cluster.model.quantization.weight import (
    QuantizedWeight,
    dequantize,
    head_scheme,
    quantize,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)


def weight_of(num_outputs: int = 24, num_inputs: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed))


def test_int8_of_a_small_matrix_is_what_a_hand_computes() -> None:
    made = quantize_int8(torch.tensor([[127.0, -64.0, 0.4], [-2.54, 1.27, 0.0], [0.0, 0.0, 0.0]]))
    assert made.codes.dtype is torch.int8
    assert made.codes.tolist() == [[127, -64, 0], [-127, 63, 0], [0, 0, 0]]
    assert made.scales.tolist() == pytest.approx([1.0, 0.02, 1.0], rel=2**-8)


def test_int4_of_a_small_group_is_what_a_hand_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INT4_CLIPS", (1.0,))
    row = torch.arange(32.0) / 2 - 7.5  # -7.5 to 8
    made = quantize_int4(torch.cat([row * 7.5 / 8, torch.zeros(32)])[None], 32)
    assert made.codes.dtype is torch.uint8
    assert made.zeros is None
    # the scale is 8 * (7.5 / 8) / 7.5 = 7.5 / 7.5 * (8 / 8) of the largest: 1 step is 1.0
    assert made.scales.tolist() == [[1.0, 1.0]]
    expected = (row * 7.5 / 8).round().clamp(-8, 7) + 8
    assert made.codes[0, :32].tolist() == expected.tolist()
    assert made.codes[0, 32:].unique().tolist() == [8]


@pytest.mark.parametrize("zeros", [None, torch.tensor([[3.0, 15.0]])])
def test_codes_scales_and_zeros_stand_for_a_weight(zeros: torch.Tensor | None) -> None:
    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    weight = QuantizedWeight("int4", codes, torch.tensor([[0.5, 2.0]]), zeros, 32)
    a, b = (8, 8) if zeros is None else (3, 15)
    expected = [(c % 16 - a) * 0.5 for c in range(32)] + [(c % 16 - b) * 2.0 for c in range(32)]
    assert dequantize(weight).tolist() == [expected]


@pytest.mark.parametrize(
    ("scheme", "group_size", "limit"), [("int8", 0, 0.007), ("fp8", 0, 0.03), ("int4", 32, 0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_as_small_as_the_bits_allow(
    scheme: str, group_size: int, limit: float, dtype: torch.dtype
) -> None:
    w_OI = weight_of().to(dtype)
    made = quantize(w_OI, scheme, group_size)  # type: ignore[arg-type]
    error = (dequantize(made) - w_OI.float()).norm() / w_OI.float().norm()
    assert float(error) < limit
    assert torch.equal(made.scales, made.scales.bfloat16().float()), "a checkpoint keeps bfloat16"


def test_the_search_never_makes_a_group_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI = weight_of(64, 256)

    def errors() -> torch.Tensor:
        return (dequantize(quantize_int4(w_OI, 64)) - w_OI).square().view(64, 4, 64).sum(2)

    searched = errors()
    for clip in module.INT4_CLIPS:
        monkeypatch.setattr(module, "INT4_CLIPS", (clip,))
        assert bool((searched <= errors() + 1e-6).all())
        assert float(searched.sum()) < 0.995 * float(errors().sum())


def test_rows_are_quantized_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI = weight_of()
    for make in (quantize_int8, quantize_fp8, lambda w: quantize_int4(w, 64)):
        whole = make(w_OI)
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 128)
        assert torch.equal(dequantize(make(w_OI)), dequantize(whole))
        monkeypatch.undo()
        assert torch.equal(dequantize(make(w_OI[7:19])), dequantize(whole.rows(slice(7, 19))))


@given(st.data())
def test_slices_are_those_of_the_weight(data: st.DataObject) -> None:
    scheme = data.draw(st.sampled_from(["int8", "int4", "fp8"]))
    made = quantize(weight_of(), scheme, 32)
    if scheme == "int4" and data.draw(st.booleans()):
        zeros = torch.arange(24 * 4.0).view(24, 4) % 16
        made = QuantizedWeight("int4", made.codes, made.scales, zeros, 32)
    begin, end = sorted(data.draw(st.tuples(st.integers(0, 24), st.integers(0, 24))))
    first, last = sorted(data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4))))
    rows, columns = slice(begin, end), slice(32 * first, 32 * last)
    part = made.rows(rows).columns(columns)
    assert part.shape == (end - begin, 32 * (last - first))
    assert torch.equal(dequantize(part), dequantize(made)[rows, columns])


def test_a_group_is_not_cut() -> None:
    made = quantize_int4(weight_of(8, 896), 128)
    assert made.columns(slice(128, 384)).shape == (8, 256)
    with pytest.raises(ConfigError) as caught:
        made.columns(slice(0, 448), "model.layers.0.self_attn.o_proj.weight")
    assert str(caught.value) == (
        "model.quantization_group_size=128 cuts model.layers.0.self_attn.o_proj.weight: inputs 0 "
        "to 448 of 896 belong to one rank; use 64 or 32"
    )
    with pytest.raises(ConfigError, match=r"cuts a weight: .*; use model\.quantization=int8"):
        made.columns(slice(8, 896))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"=128 does not divide 320 inputs; use 64 or 32"):
        quantize_int4(weight_of(8, 320), 128)


def test_the_head_keeps_eight_bits() -> None:
    assert [head_scheme(s) for s in ("int8", "int4", "fp8")] == ["int8", "int8", "fp8"]


def test_words_hold_eight_codes_the_first_lowest() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15]], dtype=torch.uint8)
    words = pack_words(codes)
    assert words.dtype is torch.int32
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x87654321, 0x0000000F]
    assert unpack_words(words)[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 15, *[0] * 7]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
def test_packing_loses_nothing(num_rows: int, num_codes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (num_codes, num_rows), generator=generator).to(torch.uint8).T
    assert torch.equal(unpack_words(pack_words(codes))[:, :num_codes], codes)
