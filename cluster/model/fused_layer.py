"""A decoder layer of the Llama kind in nine calls: what its family computes, with less in between.

    x -> norm -> q, k, v in one product -> rotate -> write k, v -> attention -> out (+ x) = y
    y -> norm -> SiLU(gate) x up in one product -> down (+ y)

transformers' layer makes three times as many passes over the activations and some forty calls. It
stays where this one does not fit: other families, GPUs, machines without our kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cluster.kernels import native
from cluster.kernels.ops import paged_attention, write_kv
from cluster.model.attention import PagedStep
from cluster.model.native_linear import LANES

FUSED_LAYERS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
"""Classes of transformers whose arithmetic `FusedLayer` does, and their attention's window."""

_DTYPES = (torch.float32, torch.bfloat16)


def why_not_fused(layer: nn.Module, tp: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return why a decoder layer stays as transformers made it; empty where it is replaced."""
    kind = type(layer).__name__
    if kind not in FUSED_LAYERS:
        return f"{kind} is not of a known kind"
    if device.type != "cpu" or dtype not in _DTYPES:
        return f"no kernels for {dtype} on {device.type}"
    mlp: Any = layer.mlp
    if mlp.config.hidden_act != "silu" or mlp.intermediate_size // tp % LANES:
        return f"{kind} has another activation or an MLP that is no multiple of {LANES} wide"
    return native.load()


class FusedLayer(nn.Module):
    """Replaces one decoder layer.

    The loader sets its linears: `qkv`, `out`, `gate_up` and `down`.

    Args:
        layer: transformers' module; its norms are taken over, under their names.
        tp: Ranks that share the heads.
    """

    def __init__(self, layer: Any, tp: int) -> None:
        super().__init__()
        attention, config = layer.self_attn, layer.self_attn.config
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.self_attn = nn.Module()  # the norms of queries and keys keep their names in it
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(self.self_attn, name, getattr(attention, name))
        self.head_dim: int = attention.head_dim
        self.num_heads: int = config.num_attention_heads // tp
        self.num_kv_heads: int = config.num_key_value_heads // tp
        self._index: int = attention.layer_idx
        self._scale: float = attention.scaling
        self._eps: float = config.rms_norm_eps
        self._window = FUSED_LAYERS[type(layer).__name__](attention)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        paged: PagedStep,
        **_kwargs: Any,
    ) -> Tensor:
        """Return the layer's output, [1, T, D] as it came.

        Args:
            hidden_states: [1, T, D].
            position_embeddings: Cosines and sines, [1, T, H] each.
            paged: The step's batch and cache.
        """
        x_TD = hidden_states[0]
        attend_norm_D, mlp_norm_D, qkv, out, gate_up, down, q_norm_H, k_norm_H = self._parts
        rms_norm, eps = torch.ops.sluice.rms_norm.default, self._eps
        heads = qkv(rms_norm(x_TD, attend_norm_D, eps))
        self._rotate(heads, position_embeddings, q_norm_H, k_norm_H)
        y_TD = out(self._attend(heads, paged), x_TD)
        out_TD: Tensor = down(gate_up(rms_norm(y_TD, mlp_norm_D, eps)), y_TD)
        return out_TD[None]

    @cached_property
    def _parts(self) -> tuple[Any, ...]:
        """Weights of the norms and forwards of the linears: nn.Module takes its time to find them.

        A decode step of a small model is so short that looking them up counts.
        """
        linears: tuple[Any, ...] = (self.qkv, self.out, self.gate_up, self.down)
        norms = (getattr(self.self_attn, name, None) for name in ("q_norm", "k_norm"))
        return (
            self.input_layernorm.weight,
            self.post_attention_layernorm.weight,
            *(linear.forward for linear in linears),
            *(None if norm is None else norm.weight for norm in norms),
        )

    def _rotate(
        self, heads: Tensor, rotation: tuple[Tensor, Tensor], q_norm_H: Any, k_norm_H: Any
    ) -> None:
        torch.ops.sluice.rope_.default(
            heads,
            rotation[0][0],
            rotation[1][0],
            self.num_heads,
            self.num_kv_heads,
            q_norm_H,
            k_norm_H,
            self._eps,
        )

    def _attend(self, heads: Tensor, paged: PagedStep) -> Tensor:
        """Return attention [T, N x H] of queries, keys and values [T, (N + 2K) x H]."""
        heads_TXH = heads.view(len(heads), -1, self.head_dim)
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q_TNH, k_TKH, v_TKH = torch.split(heads_TXH, sizes, 1)
        cache = paged.cache.layer(self._index - paged.first_layer)
        write_kv(cache, k_TKH, v_TKH, paged.batch.slots_T)
        out_TNH = paged_attention(q_TNH, cache, paged.batch, scale=self._scale, window=self._window)
        return out_TNH.flatten(1)
