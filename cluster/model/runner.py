"""Executes steps on one worker's share of a model.

    plan -> token ids, positions, slots -> the stage's layers -> activations for the next stage
                                                          or -> logits of sampled rows -> tokens

KV cache, one allocation per worker:  [layers, 2 (keys, values), blocks, slots, KV heads, head dim]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cluster.config import CacheConfig, ModelConfig
from cluster.errors import ConfigError, InvalidArgumentError
from cluster.kernels.ops import SequenceSpan, plan_batch
from cluster.model.attention import PagedStep
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.collective import Collective
from cluster.model.layout import ShardSpec, block_bytes, num_blocks_for
from cluster.model.loader import Placement, load_stage
from cluster.model.sampler import sample
from cluster.step import StepPlan
from cluster.types import SampledToken

__all__ = ["ModelRunner", "ShardSpec", "num_blocks_for"]


class ModelRunner:
    """One worker's share of a model with its part of the KV cache.

    Args:
        model: Which model, dtype and device.
        cache: Block size.
        shard: Which share.
        collective: Of the stage's tensor-parallel ranks.
        max_model_len: Tokens of the longest sequence that plans will hold.
        num_blocks: Of the cache, the same on every worker.

    Raises:
        ConfigError: The model cannot be served in this layout, or its memory is not there.
    """

    def __init__(
        self,
        model: ModelConfig,
        cache: CacheConfig,
        shard: ShardSpec,
        collective: Collective,
        *,
        max_model_len: int,
        num_blocks: int,
    ) -> None:
        info = inspect_checkpoint(model.folder)
        if not 0 < max_model_len <= info.max_model_len:
            raise ConfigError(
                f"model.max_model_len={max_model_len}, limit={info.max_model_len}: ask for less",
                field="model.max_model_len",
            )
        self.num_blocks = num_blocks
        self.is_first, self.is_last = shard.is_first, shard.is_last
        self.hidden_size = info.hidden_size
        self.dtype: torch.dtype = getattr(torch, info.dtype_for(model.dtype))
        self._device = _device(model.device)
        self._reports = shard.tp_rank == 0
        self._block_size = cache.block_size
        stage = load_stage(info, Placement(shard, self.dtype, self._device, collective))
        self._model, self._layers = stage.model, stage.layers
        self.block_nbytes = block_bytes(
            info, cache.block_size, model.dtype, shard.tp, len(stage.layers)
        )
        shape = (cache.block_size, info.num_kv_heads // shard.tp, info.head_dim)
        self._cache_L2BSKH = self._allocate((len(stage.layers), 2, num_blocks, *shape))

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        try:
            return torch.zeros(shape, dtype=self.dtype, device=self._device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise ConfigError(
                f"the KV cache of {self.num_blocks} blocks x {self.block_nbytes} bytes does not "
                f"fit on {self._device}: lower cache.num_blocks or cache.memory_bytes",
                field="cache.num_blocks",
            ) from error

    def execute(self, plan: StepPlan, hidden_TD: Tensor | None) -> Tensor | dict[int, SampledToken]:
        """Compute one step; every rank of the stage gets the same plan.

        Args:
            plan: What to compute; no sequences are fine.
            hidden_TD: Activations of the stage before; None on the first.

        Returns:
            On the last stage tokens by `seq_id`, for the sequences that sample; on ranks other than
            `tp_rank` 0 the dict is empty. On other stages activations [T, D] for the next.
        """
        assert (hidden_TD is None) == self.is_first, "activations go to every stage but the first"
        if not plan.sequences:
            return {} if self.is_last else torch.empty(0, self.hidden_size, dtype=self.dtype)
        with torch.inference_mode():
            return self._forward(plan, hidden_TD)

    def _forward(
        self, plan: StepPlan, hidden_TD: Tensor | None
    ) -> Tensor | dict[int, SampledToken]:
        inputs = self._inputs(plan, hidden_TD)
        sampled = [(seq.seq_id, seq.sample) for seq in plan.sequences if seq.sample is not None]
        if not self.is_last or not sampled:
            hidden: Tensor = self._model.base_model(**inputs).last_hidden_state[0]
            return {} if self.is_last else hidden
        rows, row = [], -1
        for seq in plan.sequences:
            row += len(seq.token_ids)
            if seq.sample is not None:
                rows.append(row)
        keep = torch.tensor(rows, device=self._device)
        # Through the causal LM itself: what a family does to its logits is its own.
        logits_nV = self._model(**inputs, logits_to_keep=keep).logits[0]
        if not self._reports:
            return {}
        tokens = sample(logits_nV, [spec for _, spec in sampled])
        return {seq_id: token for (seq_id, _), token in zip(sampled, tokens, strict=True)}

    def _inputs(self, plan: StepPlan, hidden_TD: Tensor | None) -> dict[str, Any]:
        """Return the keyword arguments of transformers' forward, one batch row of T tokens."""
        spans = [
            SequenceSpan(len(seq.token_ids), seq.num_computed_tokens, seq.block_table)
            for seq in plan.sequences
        ]
        positions = [
            position for span in spans for position in range(span.num_computed, span.context_len)
        ]
        batch = plan_batch(spans, self._block_size, self._device)
        inputs: dict[str, Any] = {
            "position_ids": torch.tensor([positions], device=self._device),
            "use_cache": False,
            "paged": PagedStep(batch, self._cache_L2BSKH, self._layers.start),
        }
        if hidden_TD is None:
            token_ids = [token_id for seq in plan.sequences for token_id in seq.token_ids]
            inputs["input_ids"] = torch.tensor([token_ids], device=self._device)
        else:
            inputs["inputs_embeds"] = hidden_TD.to(self._device)[None]
        return inputs

    def read_block(self, block_id: int) -> bytes:
        """Return this worker's part of a block, all its layers, `block_nbytes` bytes, bit-exact."""
        block = self._cache_L2BSKH[:, :, block_id].contiguous().view(torch.uint8)
        return bytes(block.cpu().numpy().tobytes())

    def write_block(self, block_id: int, data: bytes) -> None:
        """Replace this worker's part of a block by what `read_block` returned.

        Raises:
            InvalidArgumentError: `data` is not `block_nbytes` long.
        """
        if len(data) != self.block_nbytes:
            raise InvalidArgumentError(
                f"block of {len(data)} bytes, expected {self.block_nbytes}: it belongs to another "
                "model, dtype or layout; drop it",
                field="data",
            )
        block = self._cache_L2BSKH[:, :, block_id]
        fresh = torch.frombuffer(bytearray(data), dtype=self.dtype).view(block.shape)
        block.copy_(fresh)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device=cuda: torch sees no CUDA device; use model.device=cpu",
            field="model.device",
        )
    return torch.device(name)
