"""The linear layers of a shard: packed weights, and their tensor-parallel forms.

    bf16, INT8, INT4 on a CPU     our kernels, with BF16 and VNNI (native_linear.py)
    FP8 on a GPU                  cuda_linear.py
    the rest on a CPU             oneDNN on weights packed once; `F.linear` packs in each call.
                                  It compiles for each number of tokens: few numbers are asked for
    the rest on a GPU             `F.linear`

Shape suffixes: I inputs of a layer, O outputs; the rest as in kernels/reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.model.collective import Collective
from cluster.model.native_linear import LANES, NativeLinear, why_not_native
from cluster.model.quantization.weight import QuantizedWeight

Weight = Tensor | QuantizedWeight

PACK_HINT = 16
"""Tokens per step that oneDNN packs for; measured from 1 to 256, the choice hardly matters."""

_RUNGS_PER_OCTAVE = 8  # at most an eighth of the rows is padding


def padded_rows(num_rows: int) -> int:
    """Return the least number of rows, from `num_rows` on, that a packed product is run with.

    oneDNN compiles a product for each number of rows, for about its own time, and keeps the last
    1,024, each of about 0.5 MiB. Of the first 512 numbers 56 are left: 1 to 16, 18, 20, ... 32,
    36, ... 64, 72 and so on.
    """
    if num_rows <= 2 * _RUNGS_PER_OCTAVE:
        return num_rows
    step: int = 2 ** ((num_rows - 1).bit_length() - 1) // _RUNGS_PER_OCTAVE
    return -(-num_rows // step) * step


def why_not_packed(dtype: torch.dtype, device: torch.device) -> str:
    """Return why weights of this kind stay as they are; empty where oneDNN packs them."""
    if device.type != "cpu":
        return f"oneDNN packs for the CPU, not for {device.type}"
    if not torch._C._has_mkldnn:
        return "this torch has no oneDNN"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no AVX-512 for bfloat16"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"oneDNN's packed product takes no {dtype}"
    return ""


def why_linears_stay(dtype: torch.dtype, device: torch.device) -> str:
    """Return why weights of this kind stay as they are; empty where `make_linear` packs them."""
    if device.type == "cpu" and dtype is torch.bfloat16 and not why_not_native():
        return ""
    return why_not_packed(dtype, device)


def make_linear(weight: Weight, bias_O: Tensor | None, *, joins_gate_up: bool = False) -> nn.Module:
    """Return the fastest module for ``y = x W^T + b (+ residual)`` on the weight's device.

    Args:
        weight: [O, I]. A tensor is kept only where it is not packed.
        bias_O: Added to the product; None is none.
        joins_gate_up: The result is SiLU(gate) * up; see `interleave`.

    Raises:
        ConfigError: Quantized weights cannot be multiplied here.
    """
    if isinstance(weight, QuantizedWeight):
        if weight.scheme == "fp8":
            from cluster.model.cuda_linear import Fp8Linear

            return Fp8Linear(weight, bias_O)
        if reason := why_not_native(weight.shape[1]):
            raise ConfigError(
                f"model.quantization={weight.scheme} needs kernels for AVX-512 with BF16 and VNNI: "
                f"{reason}; set model.quantization=none, or take the model that a quantized one "
                "was made from",
                field="model.quantization",
            )
        return NativeLinear(weight, bias_O, joins_gate_up=joins_gate_up)
    is_bf16 = weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    if is_bf16 and not why_not_native(weight.shape[1]):
        return NativeLinear(weight, bias_O, joins_gate_up=joins_gate_up)
    return PackedLinear(weight, bias_O, joins_gate_up=joins_gate_up)


def concatenate(weights: Sequence[Weight]) -> Weight:
    """Return weights of the same kind one below the other: one product instead of several.

    Raises:
        ConfigError: They are not of the same kind.
    """
    plain = [w for w in weights if isinstance(w, Tensor)]
    if len(plain) == len(weights):
        return torch.cat(plain)
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    zeros = [w.zeros for w in quantized if w.zeros is not None]
    kinds = {(w.scheme, w.group_size) for w in quantized}
    if len(quantized) != len(weights) or len(kinds) > 1 or len(zeros) not in (0, len(weights)):
        raise ConfigError(
            "model.path: the checkpoint quantizes queries, keys and values, or gate and up, "
            "differently within a layer; quantize them alike",
            field="model.path",
        )
    return replace(
        quantized[0],
        codes=torch.cat([w.codes for w in quantized]),
        scales=torch.cat([w.scales for w in quantized]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def interleave(gate: Weight, up: Weight) -> Weight:
    """Return both with their rows in turns, `LANES` of each, as `joins_gate_up` wants them."""
    both = concatenate([gate, up])
    num_rows = gate.shape[0]
    order = torch.arange(2 * num_rows).view(2, num_rows // LANES, LANES).transpose(0, 1).flatten()
    if isinstance(both, Tensor):
        return both[order.to(both.device)]
    zeros = None if both.zeros is None else both.zeros[order]
    return replace(both, codes=both.codes[order], scales=both.scales[order], zeros=zeros)


def pad_rows(weight: Weight, num_rows: int) -> Weight:
    """Return `weight` with rows of zeros below, `num_rows` in all; as it is where it has them."""
    num_missing = num_rows - weight.shape[0]
    if num_missing <= 0:
        return weight
    if isinstance(weight, Tensor):
        return F.pad(weight, (0, 0, 0, num_missing))
    # Codes of zero times scales of zero: a padded row gives 0 whatever its zeros are.
    below = (0, num_missing) if weight.scales.dim() == 1 else (0, 0, 0, num_missing)
    return replace(
        weight,
        codes=F.pad(weight.codes, (0, 0, 0, num_missing)),
        scales=F.pad(weight.scales, below),
        zeros=None if weight.zeros is None else F.pad(weight.zeros, below),
    )


class PackedLinear(nn.Module):
    """``y = x W^T + b``, with W packed by oneDNN where the device gains by it.

    Args:
        weight_OI: Not kept where it is packed; otherwise this module owns it.
        bias_O: Added to the product; None is none.
        joins_gate_up: The result is SiLU(gate) * up; see `interleave`.
    """

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None, *, joins_gate_up: bool = False
    ) -> None:
        super().__init__()
        self._num_outputs, self.in_features = weight_OI.shape
        self.out_features = self._num_outputs // 2 if joins_gate_up else self._num_outputs
        self.weight_nbytes = weight_OI.nbytes
        self.is_packed = not why_not_packed(weight_OI.dtype, weight_OI.device)
        self._joins_gate_up = joins_gate_up
        # Plain attributes: the packed layout is opaque to whatever walks over parameters.
        self._bias_O = bias_O
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_HINT)
            if self.is_packed
            else weight_OI
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the product over the last dim of `x` [..., I]: [..., O]; `residual` is added."""
        if self.is_packed:
            flat_TI = x.reshape(-1, self.in_features)
            num_rows = len(flat_TI)
            if num_missing := padded_rows(num_rows) - num_rows:
                flat_TI = F.pad(flat_TI, (0, 0, 0, num_missing))
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                flat_TI, self._weight, self._bias_O, "none", [], ""
            )[:num_rows].view(*x.shape[:-1], self._num_outputs)
        else:
            out = F.linear(x, self._weight, self._bias_O)
        if self._joins_gate_up:
            gate, up = out.view(*out.shape[:-1], -1, 2, LANES).unbind(-2)
            out = (F.silu(gate) * up).flatten(-2)
        return out if residual is None else out.add_(residual)


class RowParallelLinear(nn.Module):
    """A linear whose inputs are spread over the ranks: partial products are summed.

    Args:
        weight: This rank's columns.
        bias_O: The whole bias; added once, after the sum.
        collective: Of the stage's ranks.
    """

    def __init__(self, weight: Weight, bias_O: Tensor | None, collective: Collective) -> None:
        super().__init__()
        self._product = make_linear(weight, None)
        self._bias_O = bias_O
        self._collective = collective

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the whole product on every rank, [..., O]; `residual` is added."""
        out: Tensor = self._product(x)
        self._collective.all_reduce_(out)
        if self._bias_O is not None:
            out.add_(self._bias_O)
        return out if residual is None else out.add_(residual)


class VocabParallelHead(nn.Module):
    """The language model's head: each rank computes the logits of its rows, all get all.

    Args:
        weight: This rank's rows, equally many on every rank (the last one's may be padding).
        bias_V: Of these rows.
        vocab_size: Rows of the whole head.
        collective: Of the stage's ranks.
    """

    def __init__(
        self, weight: Weight, bias_V: Tensor | None, vocab_size: int, collective: Collective
    ) -> None:
        super().__init__()
        self._product = make_linear(weight, bias_V)
        self._vocab_size = vocab_size
        self._collective = collective

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., vocab_size]."""
        logits: Tensor = self._collective.all_gather(self._product(x))
        return logits[..., : self._vocab_size]


def weight_nbytes(model: nn.Module) -> int:
    """Return the bytes of all linears of a model: what one step reads from memory, at least."""
    return sum(int(getattr(module, "weight_nbytes", 0)) for module in model.modules())
