"""Fills one worker's share of a model with its weights.

    the stage's module on the meta device, no memory (stage.py)
        -> each nn.Linear becomes ours, at this rank's shape, the largest first
        -> embedding table: mapped from the file, a row becomes resident when it is used
        -> the rest (norms, experts) is copied

At most one tensor beyond what stays is resident at any time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.model.collective import Collective
from cluster.model.layout import ShardSpec, check_layout, stage_layers
from cluster.model.linear import PackedLinear, RowParallelLinear, VocabParallelHead, why_not_packed
from cluster.model.model_info import ModelInfo
from cluster.model.stage import build_stage
from cluster.model.weights import WeightSource, open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where and how one worker's share lives."""

    shard: ShardSpec
    dtype: torch.dtype  # of the weights, converted where the checkpoint's differs
    device: torch.device
    collective: Collective  # of the stage's ranks


@dataclass(frozen=True)
class Stage:
    """One worker's share of a model, ready to run."""

    model: Any  # transformers' causal LM, cut to `layers`
    layers: range  # indices of this stage's layers


def load_stage(info: ModelInfo, placement: Placement) -> Stage:
    """Return a worker's share of the checkpoint, loaded.

    Raises:
        ConfigError: The layout or the family cannot be served, or a tensor is missing.
    """
    shard = placement.shard
    check_layout(info, shard.tp, shard.pp)
    layers = stage_layers(info, shard.pp)[shard.pp_rank]
    model = build_stage(Path(info.folder), placement.dtype, layers, shard)
    source = open_source(model, Path(info.folder), placement.dtype, shard.tp)
    _Filler(model, info.tp_plan, placement, source).fill()
    reason = why_not_packed(placement.dtype, placement.device)
    logger.info(
        "stage %d of %d, rank %d of %d: layers %d to %d in %s; linears %s",
        *(shard.pp_rank, shard.pp, shard.tp_rank, shard.tp),
        *(layers.start, layers.stop - 1, placement.dtype),
        f"as they are: {reason}" if reason else "packed by oneDNN",
    )
    return Stage(model, layers)


class _Filler:
    """Puts one rank's weights into a module on the meta device."""

    def __init__(
        self, model: Any, tp_plan: dict[str, str], placement: Placement, source: WeightSource
    ) -> None:
        self._model = model
        self._placement = placement
        self._source = source
        prefix = model.base_model_prefix
        self._plan = {f"{prefix}.{pattern}": style for pattern, style in tp_plan.items()}
        self._names = {module: name for name, module in model.named_modules()}

    def fill(self) -> None:
        """Replace the linears, then load what remains."""
        head = self._model.get_output_embeddings()
        linears = [module for module in self._model.modules() if type(module) is nn.Linear]
        # The largest first: what is resident only while packing falls into the time of least use.
        for linear in sorted(linears, key=lambda m: -m.in_features * m.out_features):
            self._replace(linear, self._head(head) if linear is head else self._linear(linear))
        for name, parameter in list(self._model.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(owner)
            tensor = self._table(name) if isinstance(module, nn.Embedding) else self._own(name)
            assert tensor.shape == parameter.shape, (name, tensor.shape, parameter.shape)
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in list(self._model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            self._model.get_submodule(owner)._buffers[attribute] = self._buffer(name, buffer)

    def _replace(self, linear: nn.Linear, ours: nn.Module) -> None:
        owner, _, attribute = self._names[linear].rpartition(".")
        setattr(self._model.get_submodule(owner), attribute, ours)

    def _linear(self, linear: nn.Linear) -> nn.Module:
        name = self._names[linear]
        style = next((s for p, s in self._plan.items() if fnmatchcase(name, p)), "replicated")
        has_bias = linear.bias is not None
        if self._placement.shard.tp > 1 and style == "rowwise":
            weight_OI = self._matrix(f"{name}.weight", self._part(name, linear.in_features), axis=1)
            bias_O = self._own(f"{name}.bias") if has_bias else None
            return RowParallelLinear(weight_OI, bias_O, self._placement.collective)
        part = slice(None)
        if style == "colwise":
            part = self._part(name, linear.out_features)
        bias_O = self._own(f"{name}.bias", part) if has_bias else None
        return PackedLinear(self._matrix(f"{name}.weight", part), bias_O)

    def _head(self, head: nn.Linear) -> nn.Module:
        name, vocab_size, shard = self._names[head], head.out_features, self._placement.shard
        weight = f"{name}.weight"
        if not self._source.has(weight):
            weight = self._model.all_tied_weights_keys.get(weight, weight)
        num_rows = -(-vocab_size // shard.tp)
        begin = num_rows * shard.tp_rank
        part = slice(begin, min(begin + num_rows, vocab_size))
        weight_VD = self._matrix(weight, part)
        bias_V = self._own(f"{name}.bias", part) if head.bias is not None else None
        if num_missing := num_rows - weight_VD.shape[0]:  # ranks gather equal shares
            weight_VD = F.pad(weight_VD, (0, 0, 0, num_missing))
            bias_V = None if bias_V is None else F.pad(bias_V, (0, num_missing))
        return VocabParallelHead(weight_VD, bias_V, vocab_size, self._placement.collective)

    def _part(self, name: str, size: int) -> slice:
        shard = self._placement.shard
        if size % shard.tp:
            raise ConfigError(
                f"parallel.tp={shard.tp} does not divide the {size} columns of {name}: "
                f"use a divisor of {size}",
                field="parallel.tp",
            )
        share = size // shard.tp
        return slice(share * shard.tp_rank, share * (shard.tp_rank + 1))

    def _own(self, name: str, part: slice = slice(None)) -> Tensor:
        """Return a copy that this process owns."""
        placement = self._placement
        view = self._source.read(name, part)
        return view.to(device=placement.device, dtype=placement.dtype, copy=True)

    def _matrix(self, name: str, part: slice, axis: int = 0) -> Tensor:
        """Return a contiguous matrix; still a view of the file where packing copies it anyway."""
        dtype, device = self._placement.dtype, self._placement.device
        view = self._source.read(name, part, axis)
        matrix = view.to(device=device, dtype=dtype).contiguous()
        is_kept = bool(why_not_packed(dtype, device))
        return matrix.clone() if is_kept and matrix.data_ptr() == view.data_ptr() else matrix

    def _table(self, name: str) -> Tensor:
        """Return an embedding table: a view of the file where neither dtype nor device differ."""
        placement = self._placement
        return self._source.read(name).to(device=placement.device, dtype=placement.dtype)

    def _buffer(self, name: str, computed: Tensor) -> Tensor:
        if self._source.has(name):
            return self._source.read(name).to(
                device=self._placement.device, dtype=computed.dtype, copy=True
            )
        if computed.is_floating_point() and bool(computed.isnan().any()):
            raise ConfigError(
                f"model.path: buffer {name} of {type(self._model).__name__} is neither in the "
                "checkpoint nor computed by transformers; take another model",
                field="model.path",
            )
        return computed.to(self._placement.device)
