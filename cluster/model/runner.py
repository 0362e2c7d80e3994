"""Executes steps on one worker's share of a model.

plan -> token ids, positions, slots -> the stage's layers -> activations for the next stage
                                                      or -> logits of sampled rows -> tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cluster.config import CacheConfig, ModelConfig
from cluster.errors import ConfigError
from cluster.kernels.kv_cache import KVCache
from cluster.kernels.ops import SequenceSpan, plan_batch
from cluster.model.attention import PagedStep
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.collective import Collective
from cluster.model.cuda_capture import capture_decode, make_forward
from cluster.model.cuda_device import open_device
from cluster.model.cuda_graph import DecodeGraphs, GraphLimits
from cluster.model.kv_transfer import open_transfer
from cluster.model.layout import ShardSpec, num_blocks_for
from cluster.model.linear import weight_nbytes
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
        max_num_seqs: On a GPU, decode steps of up to so many sequences are captured as graphs.
        slots: Host tier, uint8 [slots, bytes of this worker's part of a block]; the caller's, who
            keeps it for as long as the runner is used. None where plans move no blocks.

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
        max_num_seqs: int = 0,
        slots: Tensor | None = None,
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
        self._device = open_device(model.device)
        self._reports = shard.tp_rank == 0
        self._block_size = cache.block_size
        captures = self._device.type == "cuda" and max_num_seqs > 0
        stage = load_stage(
            info,
            Placement(
                shard,
                self.dtype,
                self._device,
                collective,
                quantization="none" if info.is_quantized else model.quantization,
                group_size=model.quantization_group_size,
            ),
        )
        self._model, self._layers = stage.model, stage.layers
        # transformers hands a mask of four dims through; ours reads none, so none is computed.
        self._mask = torch.empty(1, 1, 1, 1) if stage.is_fused else None
        self._cache = KVCache.allocate(
            len(stage.layers),
            num_blocks + captures,  # the last one takes what padded rows of a graph write
            cache.block_size,
            info.num_kv_heads // shard.tp,
            info.head_dim,
            self.dtype,
            self._device,
            int8=cache.dtype == "int8",
        )
        self.block_nbytes = self._cache.block_nbytes
        self._transfer = None if slots is None else open_transfer(self._cache, slots)
        self._graphs: DecodeGraphs | None = None
        if captures:
            width = -(-max_model_len // cache.block_size)
            limits = GraphLimits(max_num_seqs, width, cache.block_size, num_blocks)
            self._graphs = self._capture(limits)

    def _capture(self, limits: GraphLimits) -> DecodeGraphs | None:
        return capture_decode(
            make_forward(self._model, self._cache, self._layers.start, is_last=self.is_last),
            self._cache,
            limits,
            dtype=self.dtype,
            hidden_size=None if self.is_first else self.hidden_size,
        )

    def execute(self, plan: StepPlan, hidden_TD: Tensor | None) -> Tensor | dict[int, SampledToken]:
        """Move a plan's blocks, then compute its step; every rank of the stage gets the same plan.

        The moves are complete when this returns.

        Args:
            plan: What to move and to compute; no sequences are fine.
            hidden_TD: Activations of the stage before; None on the first.

        Returns:
            On the last stage tokens by `seq_id`, for the sequences that sample; on ranks other than
            `tp_rank` 0 the dict is empty. On other stages activations [T, D] for the next.
        """
        assert (hidden_TD is None) == self.is_first, "activations go to every stage but the first"
        with torch.inference_mode():
            if plan.moves:
                assert self._transfer is not None, "a plan moves blocks, and there is no host tier"
                self._transfer.begin(plan.moves)
            output = self._forward(plan, hidden_TD) if plan.sequences else self._nothing()
            if plan.moves and self._transfer is not None:
                self._transfer.finish()
        return output

    def logits(self, plan: StepPlan) -> Tensor:
        """Return the logits [T, V] after each token of a plan, for a runner of the whole model."""
        assert self.is_first and self.is_last, "a stage has no logits of its own"
        with torch.inference_mode():
            logits_TV: Tensor = self._model(**self._inputs(plan, None)).logits[0]
        return logits_TV

    def _nothing(self) -> Tensor | dict[int, SampledToken]:
        return {} if self.is_last else torch.empty(0, self.hidden_size, dtype=self.dtype)

    def _forward(
        self, plan: StepPlan, hidden_TD: Tensor | None
    ) -> Tensor | dict[int, SampledToken]:
        sampled = [seq for seq in plan.sequences if seq.sample is not None]
        replayed = None if self._graphs is None else self._graphs.run(plan, hidden_TD)
        if replayed is not None and not self.is_last:
            return replayed.clone()  # the next replay overwrites it
        if not self.is_last or not sampled:
            if replayed is None:
                inputs = self._inputs(plan, hidden_TD)
                hidden: Tensor = self._model.base_model(**inputs).last_hidden_state[0]
            if self.is_last and self._device.type == "cuda":
                # Nothing waits for the device here; the next step's time would hold this one's.
                torch.cuda.synchronize(self._device)
            return {} if self.is_last else hidden
        rows = torch.tensor(_sampled_rows(plan), device=self._device)
        if replayed is None:
            inputs = self._inputs(plan, hidden_TD)
            # Through the causal LM itself: what a family does to its logits is its own.
            logits_nV = self._model(**inputs, logits_to_keep=rows).logits[0]
        else:
            logits_nV = replayed[rows]
        if not self._reports:
            return {}
        tokens = sample(logits_nV, [seq.sample for seq in sampled if seq.sample is not None])
        return {seq.seq_id: token for seq, token in zip(sampled, tokens, strict=True)}

    def _inputs(self, plan: StepPlan, hidden_TD: Tensor | None) -> dict[str, Any]:
        """Return the keyword arguments of transformers' forward, one batch row of T tokens."""
        spans = [
            SequenceSpan(len(seq.token_ids), seq.num_computed_tokens, seq.block_table)
            for seq in plan.sequences
        ]
        batch = plan_batch(spans, self._block_size, self._device)
        inputs: dict[str, Any] = {
            "position_ids": batch.positions_T[None],
            "use_cache": False,
            "attention_mask": self._mask,
            "paged": PagedStep(batch, self._cache, self._layers.start),
        }
        if hidden_TD is None:
            token_ids = [token_id for seq in plan.sequences for token_id in seq.token_ids]
            inputs["input_ids"] = torch.tensor([token_ids], device=self._device)
        else:
            inputs["inputs_embeds"] = hidden_TD.to(self._device)[None]
        return inputs

    @property
    def model(self) -> Any:
        """transformers' causal LM, cut to this stage: to look at, as benchmarks do."""
        return self._model

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps are captured as CUDA graphs."""
        return self._graphs is not None

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the linears' weights, as packed: what a step reads at the least."""
        return weight_nbytes(self._model)


def _sampled_rows(plan: StepPlan) -> list[int]:
    """Return which of a plan's tokens are the last of a sequence that samples."""
    rows, row = [], -1
    for seq in plan.sequences:
        row += len(seq.token_ids)
        if seq.sample is not None:
            rows.append(row)
    return rows
