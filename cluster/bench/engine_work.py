"""What a step has to do at the least, and what share of the machine's limits that is. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.engine_drive import StepTime
from cluster.bench.hardware import HardwarePeaks
from cluster.bench.statistics import percentile
from cluster.model.model_info import ModelInfo
from cluster.model.quantization.check import linear_shapes
from cluster.model.tensor_index import read_tensor_index


@dataclass(frozen=True)
class ModelWork:
    """Bytes and operations of one model as it is loaded."""

    weight_bytes: int  # of all linears: what every step reads
    kv_bytes_per_token: float  # of all layers, keys and values
    linear_params: int  # of the layers: each is multiplied once per token
    head_params: int  # multiplied once per token that is sampled
    attention_width: int  # query heads x head dim x layers

    def step_bytes(self, num_context_tokens: float) -> float:
        """Return what a decode step reads, its sequences holding so many tokens together."""
        return self.weight_bytes + num_context_tokens * self.kv_bytes_per_token

    def prefill_flop(self, num_tokens: int) -> float:
        """Return the operations of computing one whole prompt and its first token.

        Two per weight and token; attention twice two per query, key and channel, over the half of
        the square that is causal.
        """
        linears = 2 * (self.linear_params * num_tokens + self.head_params)
        return linears + 4 * self.attention_width * num_tokens * (num_tokens + 1) / 2


def model_work(info: ModelInfo, weight_bytes: int, kv_bytes_per_token: float) -> ModelWork | None:
    """Return a model's work; None where a step reads only some of the weights (experts).

    Args:
        info: Of the checkpoint.
        weight_bytes: Of the linears, as loaded.
        kv_bytes_per_token: Of the cache.
    """
    if any(".experts." in name for name in read_tensor_index(Path(info.folder))):
        return None
    attention_width = info.num_layers * info.num_heads * info.head_dim
    linear_params = sum(map(math.prod, linear_shapes(info).values()))
    head_params = info.vocab_size * info.hidden_size
    return ModelWork(weight_bytes, kv_bytes_per_token, linear_params, head_params, attention_width)


@dataclass(frozen=True)
class Alone:
    """One request alone in the engine."""

    num_prompt_tokens: int
    ttft_s: float
    tokens_per_s: float  # decoding: without the first token
    num_context_tokens: float  # mean over the decoding
    num_cached_tokens: int = 0  # of the prompt: found, not computed


def full_decodes(steps: list[StepTime]) -> list[StepTime]:
    """Return the decode steps with the largest batch that any has."""
    decodes = [step for step in steps if step.is_decode]
    most = max((step.num_sequences for step in decodes), default=0)
    return [step for step in decodes if step.num_sequences == most]


def shares(
    work: ModelWork | None, peaks: HardwarePeaks, alone: Alone, steps: list[StepTime]
) -> dict[str, float | None]:
    """Return how near the engine comes to the machine's limits, and what it adds to the model.

    Args:
        work: None leaves the shares of the machine's limits out.
        peaks: Measured.
        alone: A single request: decoding it is bound by memory, its prompt by arithmetic. A prompt
            that was in part found says nothing of arithmetic: `matrix_peak_share` is None.
        steps: Of a whole batch; without the model's time `engine_overhead_share` is None.
    """
    full = full_decodes(steps)
    step_s = _median([step.wall_s for step in full])
    found = {
        "memory_bandwidth_share": None,
        "batch_memory_bandwidth_share": None,
        "matrix_peak_share": None,
        "engine_overhead_share": _share_outside([s.forward_s for s in full], full),
        "scheduling_share": _share_outside([s.executor_s for s in full], full),
        "decode_step_s": step_s,
        "decode_batch": float(full[0].num_sequences) if full else None,
    }
    if work is None:
        return found
    alone_bytes_per_s = work.step_bytes(alone.num_context_tokens) * alone.tokens_per_s
    found["memory_bandwidth_share"] = alone_bytes_per_s / peaks.read_bytes_per_s
    if not alone.num_cached_tokens:
        flop_per_s = work.prefill_flop(alone.num_prompt_tokens) / alone.ttft_s
        found["matrix_peak_share"] = flop_per_s / peaks.matrix_flop_per_s
    if step_s:
        rates = [work.step_bytes(step.num_context_tokens) / step.wall_s for step in full]
        found["batch_memory_bandwidth_share"] = (_median(rates) or 0.0) / peaks.read_bytes_per_s
    return found


def _share_outside(inner_s: list[float | None], steps: list[StepTime]) -> float | None:
    """Return the median share of a step's time that is not `inner_s`, over those that know it."""
    pairs = zip(inner_s, steps, strict=True)
    return _median([1.0 - own_s / step.wall_s for own_s, step in pairs if own_s is not None])


def _median(values: list[float]) -> float | None:
    return percentile(values, 50)
