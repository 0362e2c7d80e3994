"""Linear layers on our own CPU kernels: bf16, INT8 and INT4 weights in one kind of panels.

The kernels (kernels/cpu/linear.cpp) want AVX-512 with BF16 and VNNI. Activations of INT8 are
quantized per token, those of INT4 per token and group, inside the product.
Shape suffixes: I inputs, O outputs, P panels of 16 outputs, G groups of inputs; the rest as in
kernels/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cluster.kernels import native
from cluster.model.quantization.check import INPUT_MULTIPLE
from cluster.model.quantization.weight import INT4_ZERO, QuantizedWeight

LANES = 16
"""Outputs of a panel; gate and up rows alternate by as many where a product joins them."""

NO_JOIN, SILU_MUL = 0, 1
_PANELS_OF_A_BLOCK = 4  # packed weights are padded to whole blocks


def why_not_native(num_inputs: int = 0) -> str:
    """Return why the kernels do not multiply weights here; empty where they do.

    Args:
        num_inputs: Of the linear; 0 asks about the machine alone.
    """
    if reason := native.load():
        return reason
    if native.isa() != "avx512_bf16":
        return f"the kernels for {native.isa()} have no matrix products"
    if num_inputs % INPUT_MULTIPLE:
        return f"{num_inputs} inputs are not a multiple of {INPUT_MULTIPLE}"
    return ""


class NativeLinear(nn.Module):
    """``y = x W^T + b + residual``, or SiLU(gate) x up of such a product.

    Args:
        weight: bf16 [O, I], or quantized.
        bias_O: Any float dtype; None is none.
        joins_gate_up: Rows of `weight` alternate, `LANES` of the gate and `LANES` of the up
            projection; the result is SiLU(gate) * up, half as wide.
    """

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias_O: Tensor | None,
        *,
        joins_gate_up: bool = False,
    ) -> None:
        super().__init__()
        self._num_outputs, self.in_features = weight.shape
        self.out_features = self._num_outputs // 2 if joins_gate_up else self._num_outputs
        self._join = SILU_MUL if joins_gate_up else NO_JOIN
        self._bias_O = None if bias_O is None else _padded(bias_O.float())
        self._operator, self._operands = _pack(weight)

    @property
    def weight_nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in self._operands)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the product over the last dim of `x` [..., I], in its dtype: [..., O].

        Args:
            x: bfloat16; quantized weights take float32 too.
            residual: Added, like the result.
        """
        is_flat = x.dim() == 2
        out_TO: Tensor = self._operator(
            x if is_flat else x.reshape(-1, self.in_features),
            *self._operands,
            self._num_outputs,
            self._bias_O,
            residual if is_flat or residual is None else residual.reshape(-1, self.out_features),
            self._join,
        )
        return out_TO if is_flat else out_TO.view(*x.shape[:-1], self.out_features)


def _pack(weight: Tensor | QuantizedWeight) -> tuple[torch._ops.OpOverload, tuple[Tensor, ...]]:
    ops = torch.ops.sluice
    if isinstance(weight, Tensor):
        return ops.linear_bf16.default, (ops.pack_bf16(weight),)
    if weight.scheme == "int8":
        # The kernel moves activations up by 128 to have them unsigned; this takes it off again.
        sums_O = weight.codes.sum(1, dtype=torch.int32) * 128
        packed = ops.pack_int8(weight.codes)
        return ops.linear_int8.default, (packed, _padded(weight.scales), _padded(sums_O))
    assert weight.scheme == "int4", weight.scheme
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, INT4_ZERO)
    scales_PG16 = _panels(weight.scales.bfloat16())
    return (
        ops.linear_int4.default,
        (ops.pack_int4(weight.codes), scales_PG16, _panels(zeros.to(torch.uint8))),
    )


def _padded(values_O: Tensor) -> Tensor:
    """Return the values of each output, with zeros for those that pad the last block."""
    block = _PANELS_OF_A_BLOCK * LANES
    return torch.nn.functional.pad(values_O, (0, -len(values_O) % block)).contiguous()


def _panels(values_OG: Tensor) -> Tensor:
    """Return [O, G] as [P, G, 16]."""
    num_groups = values_OG.shape[1]
    padded_GO = torch.stack([_padded(column_O) for column_O in values_OG.unbind(1)])
    return padded_GO.view(num_groups, -1, LANES).transpose(0, 1).contiguous()
