"""transformers' module of a model, without weights, cut to what one stage computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import ConfigError
from cluster.model.attention import ATTENTION_NAME, register_attention
from cluster.model.layout import ShardSpec


class SkippedLayer(nn.Module):
    """Stands where another stage's layer would, so that the others keep their index."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return `hidden_states`."""
        return hidden_states


def build_stage(folder: Path, dtype: torch.dtype, layers: range, shard: ShardSpec) -> Any:
    """Return the causal LM with the layers of one stage, its parameters on the meta device.

    Buffers are computed, on the CPU.

    Args:
        folder: Of the checkpoint.
        dtype: Of the parameters.
        layers: Indices of the stage's layers.
        shard: The first stage keeps the embedding, the last one norm and head.

    Raises:
        ConfigError: The family cannot run on the paged cache.
    """
    register_attention()
    model = _build_on_meta(folder, dtype)
    _cut(model, layers, shard)
    for module in model.modules():
        _fill_buffers(model, module)
    return model.eval()


def _build_on_meta(folder: Path, dtype: torch.dtype) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"model.path={folder}: {type(model).__name__} does not let its attention be replaced, "
            "so it cannot run on the paged cache; take another model",
            field="model.path",
        )
    return model


def _cut(model: Any, layers: range, shard: ShardSpec) -> None:
    """Remove what other stages hold."""
    if shard.pp == 1:
        return
    base = model.base_model
    for index in range(len(base.layers)):
        if index not in layers:
            base.layers[index] = SkippedLayer()
    before, after = _around_layers(list(model.config.base_model_pp_plan))
    for name in (*(() if shard.is_first else before), *(() if shard.is_last else after)):
        setattr(base, name, nn.Identity())
    if not shard.is_last:
        model.set_output_embeddings(nn.Identity())


def _around_layers(parts: list[str]) -> tuple[list[str], list[str]]:
    index = parts.index("layers")
    return parts[:index], parts[index + 1 :]


def _fill_buffers(model: Any, module: nn.Module) -> None:
    """Compute what no checkpoint holds, as rotary frequencies, the way the family does.

    Where the family computes nothing, NaN stays: the loader finds it.
    """
    names = [name for name, buffer in module._buffers.items() if buffer is not None]
    for name in names:
        fresh = torch.empty_like(module.get_buffer(name), device="cpu")
        module._buffers[name] = fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh
    if names:
        with torch.no_grad():
            model._init_weights(module)
