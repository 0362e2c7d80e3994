from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from cluster.model.cuda_linear import LARGEST_FP8, Fp8Linear, check_fp8, quantize_rows
from cluster.model.quantization.weight import QuantizedWeight, dequantize, quantize_fp8

EPSILON = 2**-4  # e4m3 has 3 bits of mantissa: rounding moves a number by half a step of 1/8


def make_weight(num_outputs: int, num_inputs: int) -> QuantizedWeight:
    return quantize_fp8(torch.randn(num_outputs, num_inputs, generator=torch.manual_seed(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_quantized_each_by_its_own_largest(dtype: torch.dtype) -> None:
    x = torch.randn(6, 64, generator=torch.manual_seed(0)).to(dtype)
    x *= torch.tensor([1e-3, 1, 1e3, 0, 7, 1e-20])[:, None]
    codes, scales = quantize_rows(x)
    assert codes.dtype is torch.float8_e4m3fn
    again = codes.float() * scales
    smallest_step = x.float().abs().amax(1, keepdim=True) / LARGEST_FP8 * 2**-9
    assert ((again - x.float()).abs() <= x.float().abs() * EPSILON + smallest_step).all()
    assert scales[3] == 1
    assert codes.float().abs().amax(1).tolist() == [448, 448, 448, 0, 448, 448]


@pytest.mark.parametrize("num_outputs", [48, 35])
@pytest.mark.parametrize("has_bias", [True, False])
def test_fp8_linear_is_the_product_of_what_was_quantized(num_outputs: int, has_bias: bool) -> None:
    weight = make_weight(num_outputs, 64)
    bias = torch.randn(num_outputs).bfloat16() if has_bias else None
    x = torch.randn(2, 3, 64, generator=torch.manual_seed(1)).bfloat16()
    residual = torch.randn(2, 3, num_outputs, generator=torch.manual_seed(2)).bfloat16()
    codes, scales = quantize_rows(x.view(6, 64))
    expected = (codes.float() * scales) @ dequantize(weight).t() + residual.view(6, -1).float()
    if bias is not None:
        expected += bias.float()
    linear = Fp8Linear(weight, bias)
    got = linear(x, residual)
    assert got.shape == (2, 3, num_outputs)
    torch.testing.assert_close(got.view(6, -1).float(), expected, atol=0.1, rtol=2e-2)
    assert linear.weight_nbytes == 48 * 64 + 48 * 4


def test_fp8_linear_stays_close_to_the_plain_product() -> None:
    w = torch.randn(96, 256, generator=torch.manual_seed(3))
    x = torch.randn(32, 256, generator=torch.manual_seed(1)).bfloat16()
    expected = x.float() @ w.t()
    got = Fp8Linear(quantize_fp8(w), None)(x).float()
    error = (got - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.05  # it was quantized, and well


def test_fp8_linear_names_what_it_cannot_multiply() -> None:
    with pytest.raises(ConfigError, match="40 inputs, which 16 does not divide"):
        Fp8Linear(make_weight(32, 40), None)


@pytest.mark.parametrize(
    ("capability", "is_served"), [((8, 6), False), ((8, 9), True), ((9, 0), True)]
)
def test_gpus_without_fp8_units_are_refused(
    capability: tuple[int, int], is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    if is_served:
        check_fp8(torch.device("cuda"))
        return
    with pytest.raises(ConfigError, match=r"A GPU has \(8, 6\)") as caught:
        check_fp8(torch.device("cuda"))
    assert caught.value.field == "model.quantization"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_linear_on_a_gpu_equals_the_same_on_a_cpu(dtype: torch.dtype) -> None:
    gpu = torch.device("cuda", 0)
    try:
        check_fp8(gpu)
    except ConfigError as error:
        pytest.skip(str(error))
    weight = make_weight(304, 512)
    x = torch.randn(33, 512, generator=torch.manual_seed(1)).to(dtype)
    codes, scales = quantize_rows(x)
    expected = (codes.float() * scales) @ dequantize(weight).t()
    there = replace(weight, codes=weight.codes.to(gpu), scales=weight.scales.to(gpu))
    got = Fp8Linear(there, None)(x.to(gpu)).cpu().float()
    torch.testing.assert_close(got, expected, atol=0.2, rtol=2e-2)
