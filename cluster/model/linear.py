"""The linear layers of a shard: packed weights, and their tensor-parallel forms.

On a CPU, oneDNN packs a weight once into the layout that its products read, and the product then
runs at the memory's speed for one token and near the peak for many; `F.linear` packs in each call.
Shape suffixes: I inputs of a layer, O outputs; the rest as in kernels/reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.model.collective import Collective

PACK_HINT = 16
"""Tokens per step that packing is tuned for; measured from 1 to 256, the choice hardly matters."""


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


class PackedLinear(nn.Module):
    """``y = x W^T + b``, with W packed where the device gains by it.

    Args:
        weight_OI: Not kept where it is packed; otherwise this module owns it.
        bias_O: Added to the product; None is none.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.is_packed = not why_not_packed(weight_OI.dtype, weight_OI.device)
        # Plain attributes: the packed layout is opaque to whatever walks over parameters.
        self._bias_O = bias_O
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_HINT)
            if self.is_packed
            else weight_OI
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the product over the last dim of `x` [..., I]: [..., O]."""
        if not self.is_packed:
            return F.linear(x, self._weight, self._bias_O)
        flat_TI = x.reshape(-1, self.in_features)
        out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(
            flat_TI, self._weight, self._bias_O, "none", [], ""
        )
        return out_TO.view(*x.shape[:-1], self.out_features)


class RowParallelLinear(nn.Module):
    """A linear whose inputs are spread over the ranks: partial products are summed.

    Args:
        weight_OI: This rank's columns.
        bias_O: The whole bias; added once, after the sum.
        collective: Of the stage's ranks.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, collective: Collective) -> None:
        super().__init__()
        self._product = PackedLinear(weight_OI, None)
        self._bias_O = bias_O
        self._collective = collective

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole product on every rank, [..., O]."""
        out: Tensor = self._product(x)
        self._collective.all_reduce_(out)
        return out if self._bias_O is None else out.add_(self._bias_O)


class VocabParallelHead(nn.Module):
    """The language model's head: each rank computes the logits of its rows, all get all.

    Args:
        weight_VD: This rank's rows, equally many on every rank (the last one's may be padding).
        bias_V: Of these rows.
        vocab_size: Rows of the whole head.
        collective: Of the stage's ranks.
    """

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, vocab_size: int, collective: Collective
    ) -> None:
        super().__init__()
        self._product = PackedLinear(weight_VD, bias_V)
        self._vocab_size = vocab_size
        self._collective = collective

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., vocab_size]."""
        logits: Tensor = self._collective.all_gather(self._product(x))
        return logits[..., : self._vocab_size]
