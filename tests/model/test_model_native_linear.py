from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.kernels.reference import silu_mul_reference
from cluster.model.linear import PackedLinear, concatenate, interleave, make_linear, pad_rows
from cluster.model.native_linear import NativeLinear, why_not_native
from cluster.model.quantization.weight import (
    QuantizedWeight,
    dequantize,
    quantize_int4,
    quantize_int8,
)

pytestmark = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native())

SCHEMES = ["bf16", "int8", "int4"]
# Activations of int8 have a scale per token, those of int4 one per group: the error of rounding.
TOLERANCE = {"bf16": 0.01, "int8": 0.03, "int4": 0.03}


def _weight(
    scheme: str, outputs: int, inputs: int, group_size: int = 32
) -> Tensor | QuantizedWeight:
    weight_OI = torch.randn(outputs, inputs).bfloat16()
    if scheme == "int8":
        return quantize_int8(weight_OI)
    return quantize_int4(weight_OI, group_size) if scheme == "int4" else weight_OI


def _plain(weight: Tensor | QuantizedWeight) -> Tensor:
    return (weight if isinstance(weight, Tensor) else dequantize(weight)).double()


def _assert_close(got: Tensor, expected: Tensor, scheme: str) -> None:
    # At least 10, a typical product of these sizes: a few outputs may cancel out by chance.
    scale = max(float(expected.abs().max()), 10.0)
    error = float((got.double() - expected).abs().max()) / scale
    assert error < TOLERANCE[scheme], error


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    num_tokens=st.integers(1, 60),
    num_outputs=st.integers(1, 200),
    num_inputs=st.sampled_from([32, 96, 320, 864]),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
)
def test_product_is_that_of_the_plain_weight(
    scheme: str,
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool,
    has_residual: bool,
) -> None:
    torch.manual_seed(num_tokens * num_outputs)
    weight = _weight(scheme, num_outputs, num_inputs)
    x_TI = torch.randn(num_tokens, num_inputs).bfloat16()
    bias_O = torch.randn(num_outputs) if has_bias else None
    residual_TO = torch.randn(num_tokens, num_outputs).bfloat16() if has_residual else None
    got = NativeLinear(weight, bias_O)(x_TI, residual_TO)
    expected = x_TI.double() @ _plain(weight).T
    if bias_O is not None:
        expected += bias_O
    if residual_TO is not None:
        expected += residual_TO
    assert got.dtype is torch.bfloat16
    _assert_close(got, expected, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_tokens", [1, 5, 12, 13, 24, 25, 49])
def test_joined_product_is_silu_of_the_gate_times_up(scheme: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    gate, up = (_weight(scheme, 80, 96) for _ in range(2))
    bias_O = torch.randn(160)
    x_TI = torch.randn(num_tokens, 96).bfloat16() / 8
    joined = interleave(gate, up)
    both = interleave(bias_O[:80, None], bias_O[80:, None])
    assert isinstance(both, Tensor)
    got = make_linear(joined, both[:, 0], joins_gate_up=True)(x_TI)
    x = x_TI.double()
    expected = silu_mul_reference(x @ _plain(gate).T + bias_O[:80], x @ _plain(up).T + bias_O[80:])
    assert got.shape == (num_tokens, 80)
    _assert_close(got, expected, scheme)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_product_takes_float32(scheme: str) -> None:
    torch.manual_seed(0)
    weight, x_TI = _weight(scheme, 70, 64), torch.randn(9, 64)
    got = NativeLinear(weight, None)(x_TI)
    assert got.dtype is torch.float32
    _assert_close(got, x_TI.double() @ _plain(weight).T, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_row_of_a_product_does_not_depend_on_the_other_rows(scheme: str) -> None:
    torch.manual_seed(0)
    linear = NativeLinear(_weight(scheme, 130, 96), None)
    x_TI = torch.randn(50, 96).bfloat16()
    whole = linear(x_TI)
    for num_tokens in (1, 7, 16, 30):
        assert torch.equal(linear(x_TI[:num_tokens]), whole[:num_tokens]), num_tokens


def test_zero_token_of_int8_gives_zeros_and_not_nan() -> None:
    linear = NativeLinear(_weight("int8", 20, 64), None)
    assert torch.equal(linear(torch.zeros(2, 64).bfloat16()), torch.zeros(2, 20).bfloat16())


def test_views_with_a_row_stride_are_read_rightly() -> None:
    torch.manual_seed(0)
    wide = torch.randn(9, 200).bfloat16()
    for scheme in SCHEMES:
        linear = NativeLinear(_weight(scheme, 40, 64), None)
        assert torch.equal(linear(wide[:, 64:128]), linear(wide[:, 64:128].contiguous())), scheme


def test_symmetric_int4_means_eight_is_zero() -> None:
    weight = quantize_int4(torch.randn(32, 64), 32)
    symmetric = QuantizedWeight("int4", weight.codes, weight.scales, None, 32)
    explicit = QuantizedWeight(
        "int4", weight.codes, weight.scales, torch.full_like(weight.scales, 8), 32
    )
    x_TI = torch.randn(3, 64).bfloat16()
    assert torch.equal(NativeLinear(symmetric, None)(x_TI), NativeLinear(explicit, None)(x_TI))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_concatenated_weights_give_the_products_side_by_side(scheme: str) -> None:
    torch.manual_seed(0)
    parts = [_weight(scheme, outputs, 64) for outputs in (33, 7, 64)]
    x_TI = torch.randn(4, 64).bfloat16()
    together = make_linear(concatenate(parts), None)(x_TI)
    apart = torch.cat([make_linear(part, None)(x_TI) for part in parts], dim=-1)
    assert torch.equal(together, apart)


def test_padded_rows_give_zeros() -> None:
    x_TI = torch.randn(3, 64).bfloat16()
    for weight in (_weight("bf16", 10, 64), _weight("int8", 10, 64)):
        out = make_linear(pad_rows(weight, 16), None)(x_TI)
        assert torch.equal(out[:, 10:], torch.zeros(3, 6).bfloat16())
        assert torch.equal(out[:, :10], make_linear(weight, None)(x_TI))


def _asymmetric(outputs: int, inputs: int) -> QuantizedWeight:
    """Return an int4 weight with zeros of its own, as some checkpoints have them."""
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // 32).bfloat16().float() + 0.5
    zeros = torch.randint(0, 16, (outputs, inputs // 32)).float()
    return QuantizedWeight("int4", codes, scales, zeros, 32)


@pytest.mark.parametrize("has_zeros", [False, True])
def test_padded_rows_of_int4_give_zeros(has_zeros: bool) -> None:
    torch.manual_seed(0)
    weight = _asymmetric(10, 64)
    if not has_zeros:
        weight = replace(weight, zeros=None)
    padded = pad_rows(weight, 16)
    assert isinstance(padded, QuantizedWeight)
    assert padded.shape == (16, 64)
    assert torch.equal(dequantize(padded)[10:], torch.zeros(6, 64))
    x_TI = torch.randn(3, 64).bfloat16()
    out = make_linear(padded, None)(x_TI)
    assert torch.equal(out[:, 10:], torch.zeros(3, 6).bfloat16())
    assert torch.equal(out[:, :10], make_linear(weight, None)(x_TI))
    _assert_close(out[:, :10], x_TI.double() @ _plain(weight).T, "int4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_give_no_rows(scheme: str) -> None:
    for joins_gate_up, width in ((False, 64), (True, 32)):
        linear = make_linear(_weight(scheme, 64, 96), None, joins_gate_up=joins_gate_up)
        out = linear(torch.empty(0, 96).bfloat16())
        assert out.shape == (0, width) and out.dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("num_tokens", [3, 30])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_nan_of_a_token_stays_in_its_row(scheme: str, num_tokens: int, bad: float) -> None:
    torch.manual_seed(0)
    linear = NativeLinear(_weight(scheme, 70, 96), None)
    x_TI = torch.randn(num_tokens, 96).bfloat16()
    clean = linear(x_TI)
    x_TI[1, 40] = bad
    out = linear(x_TI)
    assert not out[1].isfinite().any()
    others = torch.arange(num_tokens) != 1
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
@pytest.mark.parametrize("num_inputs", [16, 48, 432])
@pytest.mark.parametrize("num_tokens", [1, 7, 30])
def test_inputs_are_any_multiple_of_16(scheme: str, num_inputs: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    weight, x_TI = _weight(scheme, 70, num_inputs), torch.randn(num_tokens, num_inputs).bfloat16()
    linear = make_linear(weight, None)
    assert isinstance(linear, NativeLinear)
    _assert_close(linear(x_TI), x_TI.double() @ _plain(weight).T, scheme)


def test_bytes_of_a_weight_are_those_that_a_step_reads() -> None:
    def nbytes(scheme: str) -> int:
        linear = make_linear(_weight(scheme, 128, 256, 128), None)
        assert isinstance(linear, NativeLinear)
        return linear.weight_nbytes

    assert nbytes("bf16") == 128 * 256 * 2
    assert nbytes("int8") == 128 * 256 + 128 * (4 + 4)
    assert nbytes("int4") == 128 * 256 // 2 + 128 * 2 * (2 + 1)


def test_inputs_that_the_kernels_do_not_take_go_to_onednn() -> None:
    weight_OI = torch.randn(8, 40).bfloat16()
    assert isinstance(make_linear(weight_OI, None), PackedLinear)
    x_TI = torch.randn(3, 40).bfloat16()
    residual_TO = torch.randn(3, 8).bfloat16()
    got = make_linear(weight_OI, None)(x_TI, residual_TO)
    _assert_close(got, x_TI.double() @ weight_OI.double().T + residual_TO, "bf16")


def test_plain_joined_product_is_the_native_one() -> None:
    torch.manual_seed(0)
    weight = interleave(torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16())
    assert isinstance(weight, Tensor)
    x_TI = torch.randn(5, 64).bfloat16() / 4
    plain = PackedLinear(weight, None, joins_gate_up=True)(x_TI)
    ours = NativeLinear(weight, None, joins_gate_up=True)(x_TI)
    torch.testing.assert_close(plain, ours, rtol=0.03, atol=0.03)
