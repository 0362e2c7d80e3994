"""A linear's weight in fewer bits, how it is made, and how a rank takes its part.

    int8, fp8    w[o, i] = code[o, i] * scale[o]
    int4         w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],   g = i // group size

Scales are values that bfloat16 holds exactly: a checkpoint stores them without another error, and
what was quantized ahead equals what is quantized while loading.
Shape suffixes: O outputs, I inputs, G groups of a row, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.model.quantization.stored import dividing_group_sizes

Scheme = Literal["int8", "int4", "fp8"]

INT4_ZERO = 8  # the code of 0.0 where a weight has no zeros of its own
INT4_CLIPS = (1.07, 1.0, 0.92, 0.84)  # half of the codes' extent, of a group's largest weight
CHUNK_ELEMENTS = 2**20  # rounded at a time: what float32 needs of it stays in a core's cache
_LARGEST_INT8, _LARGEST_INT4 = 127, 15
_LARGEST_FP8 = 448.0  # of e4m3


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The weight of one linear, or a rank's part of it."""

    scheme: Scheme
    codes: Tensor  # [O, I]: int8 in [-127, 127]; int4 uint8 in [0, 15], one a byte; fp8 e4m3
    scales: Tensor  # float32, > 0: [O], int4 [O, I / group_size]
    zeros: Tensor | None = None  # int4: float32, whole, in [0, 15], as scales; None: all are 8
    group_size: int = 0  # int4: inputs of a row that share a scale

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device) -> QuantizedWeight:
        """Return it on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros
        )

    def rows(self, part: slice) -> QuantizedWeight:
        """Return the outputs in `part`; a view."""
        zeros = None if self.zeros is None else self.zeros[part]
        return replace(self, codes=self.codes[part], scales=self.scales[part], zeros=zeros)

    def columns(self, part: slice, name: str = "a weight") -> QuantizedWeight:
        """Return the inputs in `part`; a view.

        Args:
            part: With a step of 1.
            name: Of the tensor, for the error.

        Raises:
            ConfigError: `part` would cut a group of int4.
        """
        codes = self.codes[:, part]
        if self.scheme != "int4":
            return replace(self, codes=codes)
        groups = group_slice(part, self.shape[1], self.group_size, name)
        zeros = None if self.zeros is None else self.zeros[:, groups]
        return replace(self, codes=codes, scales=self.scales[:, groups], zeros=zeros)


def group_slice(part: slice, num_inputs: int, group_size: int, name: str) -> slice:
    """Return which groups of a row the inputs in `part` are.

    Raises:
        ConfigError: `part` begins or ends inside a group.
    """
    begin, end, _ = part.indices(num_inputs)
    if begin % group_size or end % group_size:
        fitting = dividing_group_sizes(begin, end)
        raise ConfigError(
            f"model.quantization_group_size={group_size} cuts {name}: inputs {begin} to {end} of "
            f"{num_inputs} belong to one rank; use {fitting}",
            field="model.quantization_group_size",
        )
    return slice(begin // group_size, end // group_size)


def quantize_int8(w_OI: Tensor) -> QuantizedWeight:
    """Return `w_OI` in 8 bits, symmetric, one scale per output.

    Args:
        w_OI: Any floating dtype, finite.
    """
    return _by_rows(w_OI, _int8_rows)


def quantize_int4(w_OI: Tensor, group_size: int) -> QuantizedWeight:
    """Return `w_OI` in 4 bits, symmetric, one scale per `group_size` inputs.

    Of a few scales for the group it takes the one with the least squared error: a wider one rounds
    more coarsely, a narrower one cuts the largest weights. Zeros of their own would not pay: the
    demo model loses 0.3 % of perplexity without and with them.

    Args:
        w_OI: Any floating dtype, finite.
        group_size: Divides the inputs.

    Raises:
        ConfigError: It does not.
    """
    num_inputs = w_OI.shape[1]
    if num_inputs % group_size:
        raise ConfigError(
            f"model.quantization_group_size={group_size} does not divide {num_inputs} inputs; "
            f"use {dividing_group_sizes(num_inputs)}",
            field="model.quantization_group_size",
        )
    return _by_rows(w_OI, lambda rows_OI: _int4_rows(rows_OI, group_size))


def quantize_fp8(w_OI: Tensor) -> QuantizedWeight:
    """Return `w_OI` as e4m3, one scale per output.

    Args:
        w_OI: Any floating dtype, finite.
    """
    return _by_rows(w_OI, _fp8_rows)


def quantize(w_OI: Tensor, scheme: Scheme, group_size: int) -> QuantizedWeight:
    """Return `w_OI` in `scheme`; `group_size` counts for int4 alone."""
    if scheme == "int4":
        return quantize_int4(w_OI, group_size)
    return quantize_int8(w_OI) if scheme == "int8" else quantize_fp8(w_OI)


def head_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme of a language model's head: int8 for "int4".

    The head decides between tokens that are close, and 4 bits there cost more than in all layers.
    """
    return "int8" if scheme == "int4" else scheme


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return the weight that the codes stand for, float32 [O, I]."""
    codes_OI = weight.codes.float()
    if weight.scheme != "int4":
        return codes_OI * weight.scales[:, None]
    codes_OGS = _grouped(codes_OI, weight.group_size)
    zeros = INT4_ZERO if weight.zeros is None else weight.zeros[..., None]
    return ((codes_OGS - zeros) * weight.scales[..., None]).flatten(1)


def _grouped(matrix_OI: Tensor, group_size: int) -> Tensor:
    return matrix_OI.reshape(matrix_OI.shape[0], matrix_OI.shape[1] // group_size, group_size)


def _by_rows(w_OI: Tensor, make: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Quantize some rows at a time: beyond the result, little is ever resident.

    Args:
        w_OI: Of any size.
        make: Returns rows without zeros.
    """
    num_rows = max(1, CHUNK_ELEMENTS // max(1, w_OI.shape[1]))
    first = make(w_OI[:num_rows].float())
    codes = first.codes.new_empty(w_OI.shape)
    scales = first.scales.new_empty((w_OI.shape[0], *first.scales.shape[1:]))
    for begin in range(0, w_OI.shape[0], num_rows):
        rows = slice(begin, begin + num_rows)
        part = make(w_OI[rows].float()) if begin else first
        codes[rows], scales[rows] = part.codes, part.scales
    return replace(first, codes=codes, scales=scales)


def _int8_rows(w_OI: Tensor) -> QuantizedWeight:
    scales_O1 = _scale(w_OI.abs().amax(1, keepdim=True), _LARGEST_INT8)
    codes_OI = (w_OI / scales_O1).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
    return QuantizedWeight("int8", codes_OI.to(torch.int8), scales_O1[:, 0])


def _fp8_rows(w_OI: Tensor) -> QuantizedWeight:
    scales_O1 = _scale(w_OI.abs().amax(1, keepdim=True), _LARGEST_FP8)
    codes_OI = (w_OI / scales_O1).clamp_(-_LARGEST_FP8, _LARGEST_FP8)
    return QuantizedWeight("fp8", codes_OI.to(torch.float8_e4m3fn), scales_O1[:, 0])


def _int4_rows(w_OI: Tensor, group_size: int) -> QuantizedWeight:
    w_OGS = _grouped(w_OI, group_size)
    largest_OG1 = w_OGS.abs().amax(2, keepdim=True)
    least_OG1 = torch.full_like(largest_OG1, torch.inf)
    scales_OG1 = largest_OG1.clone()  # NaN stays where no error is the least
    for clip in INT4_CLIPS:
        scale = _scale(largest_OG1 * clip, _LARGEST_INT4 / 2)
        error = _int4_steps(w_OGS, scale).mul_(scale).sub_(w_OGS).square_().sum(2, keepdim=True)
        scales_OG1 = torch.where(error < least_OG1, scale, scales_OG1)
        least_OG1 = torch.minimum(error, least_OG1)
    codes_OI = (_int4_steps(w_OGS, scales_OG1) + INT4_ZERO).flatten(1).to(torch.uint8)
    return QuantizedWeight("int4", codes_OI, scales_OG1[..., 0], None, group_size)


def _int4_steps(w_OGS: Tensor, scales_OG1: Tensor) -> Tensor:
    """Return the codes less their zero: whole numbers in [-8, 7]."""
    return (w_OGS / scales_OG1).round_().clamp_(-INT4_ZERO, _LARGEST_INT4 - INT4_ZERO)


def _scale(extent: Tensor, num_steps: float) -> Tensor:
    """Return the size of a step, exact in bfloat16; 1 where there is nothing but zeros."""
    scale = (extent / num_steps).bfloat16().float()
    return torch.where(scale == 0, 1.0, scale)
