"""Fills one worker's share of a model with its weights.

    the stage's module on the meta device, no memory (stage.py)
        -> decoder layers of a known kind become fused ones, with linears to be set (fused_layer.py)
        -> each nn.Linear becomes ours, at this rank's shape, quantized or packed, the largest first
        -> embedding table: mapped from the file, a row becomes resident when it is used
        -> the rest (norms, experts) is copied

At most one tensor beyond what stays is resident at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.model.collective import Collective
from cluster.model.fused_layer import FusedLayer, why_not_fused
from cluster.model.layout import ShardSpec, check_layout, stage_layers
from cluster.model.linear import (
    RowParallelLinear,
    VocabParallelHead,
    Weight,
    concatenate,
    interleave,
    make_linear,
    pad_rows,
    why_linears_stay,
)
from cluster.model.mapped_table import keep_in_file
from cluster.model.model_info import ModelInfo
from cluster.model.native_linear import why_not_native
from cluster.model.quantization.reader import read_quantized
from cluster.model.quantization.weight import Scheme, head_scheme, quantize
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
    quantization: Literal["none", "int8", "int4", "fp8"] = "none"  # of linears, while loading
    group_size: int = 128  # of int4


@dataclass(frozen=True)
class Stage:
    """One worker's share of a model, ready to run."""

    model: Any  # transformers' causal LM, cut to `layers`
    layers: range  # indices of this stage's layers
    is_fused: bool  # every layer is a `FusedLayer`


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
    filler = _Filler(model, info.tp_plan, placement, source)
    filler.fill()
    unfused = f": {filler.why_not_fused}" if filler.why_not_fused else ""
    fused = [module for module in model.modules() if isinstance(module, FusedLayer)]
    reason = why_linears_stay(placement.dtype, placement.device)
    logger.info(
        "stage %d of %d, rank %d of %d: layers %d to %d in %s, weights %s; linears %s; %s",
        *(shard.pp_rank, shard.pp, shard.tp_rank, shard.tp),
        *(layers.start, layers.stop - 1, placement.dtype),
        info.quantization_for(placement.quantization).replace("none", "not quantized"),
        f"as they are: {reason}" if reason else f"packed by {_packer(placement)}",
        f"{len(fused)} of {len(layers)} layers fused{unfused}",
    )
    return Stage(model, layers, is_fused=len(fused) == len(layers))


@dataclass(frozen=True)
class _Slot:
    """A place for one of our linears, made of one or more of transformers'."""

    owner: nn.Module
    attribute: str
    sources: tuple[nn.Linear, ...]  # several become one, row below row
    joins_gate_up: bool = False

    @property
    def num_elements(self) -> int:
        return sum(linear.in_features * linear.out_features for linear in self.sources)


def _packer(placement: Placement) -> str:
    is_quantized = placement.quantization != "none"
    is_ours = is_quantized or (placement.dtype is torch.bfloat16 and not why_not_native())
    return "our kernels" if is_ours else "oneDNN"


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
        self._head = model.get_output_embeddings()
        self.why_not_fused = ""  # of the last layer that stays as transformers made it

    def fill(self) -> None:
        """Replace the linears, then load what remains."""
        slots = [*self._fuse_layers(), *self._single_slots()]
        # The largest first: what is resident only while packing falls into the time of least use.
        for slot in sorted(slots, key=lambda s: -s.num_elements):
            setattr(slot.owner, slot.attribute, self._linear(slot))
        for name, parameter in list(self._model.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(owner)
            tensor = self._table(name) if isinstance(module, nn.Embedding) else self._own(name)
            assert tensor.shape == parameter.shape, (name, tensor.shape, parameter.shape)
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            if isinstance(module, nn.Embedding):
                keep_in_file(module)
        for name, buffer in list(self._model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            self._model.get_submodule(owner)._buffers[attribute] = self._buffer(name, buffer)

    def _fuse_layers(self) -> Iterator[_Slot]:
        """Replace the decoder layers that can be fused; yield the places of their linears."""
        placement, tp = self._placement, self._placement.shard.tp
        for name, layer in list(self._model.named_modules()):
            if not hasattr(layer, "self_attn") or not hasattr(layer, "mlp"):
                continue
            reason = why_not_fused(layer, tp, placement.dtype, placement.device)
            if reason:
                self.why_not_fused = reason
                continue
            fused, attention, mlp = FusedLayer(layer, tp), layer.self_attn, layer.mlp
            owner, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, fused)
            yield _Slot(fused, "qkv", (attention.q_proj, attention.k_proj, attention.v_proj))
            yield _Slot(fused, "out", (attention.o_proj,))
            yield _Slot(fused, "gate_up", (mlp.gate_proj, mlp.up_proj), joins_gate_up=True)
            yield _Slot(fused, "down", (mlp.down_proj,))

    def _single_slots(self) -> Iterator[_Slot]:
        for name, module in list(self._model.named_modules()):
            if type(module) is nn.Linear:
                owner, _, attribute = name.rpartition(".")
                yield _Slot(self._model.get_submodule(owner), attribute, (module,))

    def _linear(self, slot: _Slot) -> nn.Module:
        """Return our linear for a slot, loaded."""
        first = slot.sources[0]
        if first is self._head:
            return self._make_head(first)
        name = self._names[first]
        if self._placement.shard.tp > 1 and self._style(name) == "rowwise":
            columns = self._part(name, first.in_features)
            weight = self._weight(f"{name}.weight", columns=columns)
            bias_O = self._own(f"{name}.bias") if first.bias is not None else None
            return RowParallelLinear(weight, bias_O, self._placement.collective)
        loaded = [self._rows_of(linear) for linear in slot.sources]
        weights = [weight for weight, _ in loaded]
        if slot.joins_gate_up:
            return make_linear(interleave(*weights), _joined_bias(loaded), joins_gate_up=True)
        biases = [bias_O for _, bias_O in loaded if bias_O is not None]
        return make_linear(concatenate(weights), torch.cat(biases) if biases else None)

    def _rows_of(self, linear: nn.Linear) -> tuple[Weight, Tensor | None]:
        """Return this rank's rows of a linear's weight and bias."""
        name = self._names[linear]
        part = slice(None)
        if self._style(name) == "colwise":
            part = self._part(name, linear.out_features)
        bias_O = self._own(f"{name}.bias", part) if linear.bias is not None else None
        return self._weight(f"{name}.weight", rows=part), bias_O

    def _style(self, name: str) -> str:
        return next((s for p, s in self._plan.items() if fnmatchcase(name, p)), "replicated")

    def _make_head(self, head: nn.Linear) -> nn.Module:
        name, vocab_size, shard = self._names[head], head.out_features, self._placement.shard
        weight = f"{name}.weight"
        if not self._source.has(weight):
            weight = self._model.all_tied_weights_keys.get(weight, weight)
        num_rows = -(-vocab_size // shard.tp)
        begin = num_rows * shard.tp_rank
        part = slice(begin, min(begin + num_rows, vocab_size))
        # Ranks gather equal shares: the last one's may be padded.
        loaded = self._weight(weight, rows=part, is_head=True, num_rows=num_rows)
        bias_V = self._own(f"{name}.bias", part) if head.bias is not None else None
        if bias_V is not None:
            bias_V = F.pad(bias_V, (0, num_rows - len(bias_V)))
        return VocabParallelHead(loaded, bias_V, vocab_size, self._placement.collective)

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

    def _weight(
        self,
        name: str,
        *,
        rows: slice = slice(None),
        columns: slice = slice(None),
        is_head: bool = False,
        num_rows: int = 0,
    ) -> Weight:
        """Return a part of a linear's weight, quantized where it is or is to be.

        Args:
            name: Of the tensor.
            rows: This rank's outputs.
            columns: This rank's inputs; only one of the two is cut.
            is_head: It is quantized as heads are.
            num_rows: Outputs to pad to, with zeros.
        """
        placement = self._placement
        stored = read_quantized(self._source, name, rows, columns)
        if stored is not None:
            return pad_rows(stored.to(placement.device), num_rows)
        axis = 0 if columns == slice(None) else 1
        view = self._source.read(name, rows if axis == 0 else columns, axis)
        if placement.quantization == "none":
            matrix = view.to(device=placement.device, dtype=placement.dtype).contiguous()
            # Still a view of the file where packing copies it anyway.
            is_kept = bool(why_linears_stay(placement.dtype, placement.device))
            if is_kept and matrix.data_ptr() == view.data_ptr():
                matrix = matrix.clone()
            return pad_rows(matrix, num_rows)
        scheme: Scheme = placement.quantization
        if is_head:
            scheme = head_scheme(scheme)
        quantized = quantize(view.to(device=placement.device), scheme, placement.group_size)
        if not bool(quantized.scales.isfinite().all()):
            raise ConfigError(
                f"model.path: {name} holds numbers that are not finite; get the checkpoint again",
                field="model.path",
            )
        return pad_rows(quantized, num_rows)

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


def _joined_bias(loaded: list[tuple[Weight, Tensor | None]]) -> Tensor | None:
    """Return the biases of gate and up in the order of `interleave`."""
    (_, gate_O), (_, up_O) = loaded
    if gate_O is None or up_O is None:
        return None
    both = interleave(gate_O[:, None], up_O[:, None])
    assert isinstance(both, Tensor)
    return both[:, 0]
