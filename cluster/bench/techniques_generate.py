"""The naive server: transformers' generate, one request after the other."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cluster.bench.engine_drive import Emit
from cluster.model.linear import PackedLinear
from cluster.types import EngineOutput, EngineRequest, FinishReason, SampledToken


class GenerateServer:
    """Answers with `generate`, which keeps a KV cache for the length of one request.

    Args:
        folder: Of the checkpoint.
        dtype: Of weights and activations.
        is_packed: Replace the linears by the engine's.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, *, is_packed: bool) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None  # answers have the length asked for
        self._waiting: deque[EngineRequest] = deque()
        if is_packed:
            pack_linears(self._model)

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def step(self, emit: Emit) -> None:
        """Answer one request, emitting each token as soon as it is known."""
        request = self._waiting.popleft()
        prompt_1T = torch.tensor([request.prompt_token_ids])
        num_tokens = request.sampling.max_tokens
        with torch.inference_mode():
            self._model.generate(
                prompt_1T,
                attention_mask=torch.ones_like(prompt_1T),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                streamer=_Streamer(request, emit),
            )


class _Streamer:
    """Receives tokens from `generate`, the prompt first."""

    def __init__(self, request: EngineRequest, emit: Emit) -> None:
        self._request_id = request.request_id
        self._num_left = request.sampling.max_tokens
        self._is_prompt = True
        self._emit = emit

    def put(self, token_ids: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._num_left -= 1
        token = SampledToken(int(token_ids.flatten()[-1]))
        reason = None if self._num_left else FinishReason.LENGTH
        self._emit(EngineOutput(self._request_id, (token,), finish_reason=reason))

    def end(self) -> None:
        assert self._num_left == 0, f"generate stopped {self._num_left} tokens early"


def pack_linears(model: nn.Module) -> None:
    """Put the engine's packed linears in the place of torch's, the largest first."""
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, linear in sorted(found, key=lambda one: -one[1].weight.numel()):
        owner, _, attribute = name.rpartition(".")
        packed = PackedLinear(linear.weight.detach(), linear.bias)
        setattr(model.get_submodule(owner), attribute, packed)
