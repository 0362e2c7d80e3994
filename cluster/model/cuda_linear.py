"""Linear layers in FP8 (e4m3) on GPUs of compute capability 8.9 and above.

    x [T, I] --largest of each row--> codes, scale per token  \\
                                                               product, scaled per element
    W [O, I] --quantized at load-->   codes, scale per output /

Weights take half the bytes of bf16; the product runs on the tensor cores' FP8 units. Shape
suffixes: I inputs, O outputs; the rest as in kernels/reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from cluster.errors import ConfigError
from cluster.model.quantization.weight import QuantizedWeight

LARGEST_FP8 = 448.0
"""Of e4m3; what is larger would become NaN."""

MIN_CAPABILITY = (8, 9)
_ALIGNMENT = 16  # of both dims of the weight, in elements
_DTYPES = (torch.bfloat16, torch.float16)


def check_fp8(device: torch.device) -> None:
    """Return if `device` multiplies FP8; a CPU does, for tests, slowly.

    Raises:
        ConfigError: Its compute capability is too low.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"model.quantization=fp8 needs compute capability {MIN_CAPABILITY}, {name} has "
            f"{capability}: leave model.quantization at none",
            field="model.quantization",
        )


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes [T, I] and float32 scales [T, 1], such that ``x = code * scale``.

    A row of zeros has scale 1.
    """
    x = x_TI.float()
    largest_T1 = x.abs().amax(1, keepdim=True)
    scales_T1 = torch.where(largest_T1 > 0, largest_T1 / LARGEST_FP8, 1.0)
    # Rounding may lift the largest above 448.
    codes_TI = (x / scales_T1).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return codes_TI, scales_T1


class Fp8Linear(nn.Module):
    """``y = x W^T + b + residual``; activations are quantized per token, as they come.

    Args:
        weight: Of scheme fp8, on the device that computes; owned from now on.
        bias_O: In the dtype of the activations; None is none.

    Raises:
        ConfigError: The device has no FP8 units, or 16 does not divide the inputs.
    """

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        assert weight.scheme == "fp8", weight.scheme
        check_fp8(weight.codes.device)
        self.out_features, self.in_features = weight.shape
        if self.in_features % _ALIGNMENT:
            raise ConfigError(
                f"model.quantization=fp8: a linear has {self.in_features} inputs, which "
                f"{_ALIGNMENT} does not divide; leave model.quantization at none",
                field="model.quantization",
            )
        padding = -self.out_features % _ALIGNMENT
        codes = weight.codes.contiguous().view(torch.uint8)
        self._codes_OI = F.pad(codes, (0, 0, 0, padding)).view(torch.float8_e4m3fn)
        self._scales_1O = F.pad(weight.scales, (0, padding), value=1.0)[None].contiguous()
        self._bias_O = bias_O

    @property
    def weight_nbytes(self) -> int:
        """Bytes that a product reads."""
        return self._codes_OI.nbytes + self._scales_1O.nbytes

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the product over the last dim of `x` [..., I], in its dtype: [..., O].

        Args:
            x: bfloat16 or float16.
            residual: Added, like the result.
        """
        assert x.dtype in _DTYPES, x.dtype
        codes_TI, scales_T1 = quantize_rows(x.reshape(-1, self.in_features))
        out_TO = F.scaled_mm(
            codes_TI,
            self._codes_OI.t(),
            scales_T1,
            ScalingType.RowWise,
            self._scales_1O,
            ScalingType.RowWise,
            output_dtype=x.dtype,
            use_fast_accum=True,
        )
        out = out_TO[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
        if self._bias_O is not None:
            out = out.add_(self._bias_O)
        return out if residual is None else out.add_(residual)
