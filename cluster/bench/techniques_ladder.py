"""The ladder of techniques: each row is the one before it with one switch more.

    transformers' generate, one at a time     the engine, one at a time    the engine, batching
    naive -> bf16 -> packed weights       ->  KV cache paging          ->  dynamic -> continuous
      -> chunked prefill -> prefix cache -> fused kernels -> INT8 -> INT4 (in place of INT8)

INT8 and INT4 products are fused kernels themselves, so those come before them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.bench.techniques_workload import Workload


@dataclass(frozen=True, slots=True)
class Literature:
    """What the field claims for a technique: attributed, to be compared with, not measured here."""

    claim: str  # the technique that it is about
    low: float  # factor
    high: float  # factor

    def __str__(self) -> str:
        return f"{self.claim} {self.low:g}-{self.high:g}x (literature)"


ALL_TOGETHER = Literature("all techniques together", 10, 100)


@dataclass(frozen=True, slots=True)
class Technique:
    """One row: how the production code is switched. What is not named is as in the row before."""

    name: str
    title: str
    switch: str  # what is switched on, for the reader
    is_engine: bool = True  # else transformers' generate
    is_packed: bool = True  # generate runs on the engine's packed linears
    dtype: str = "bfloat16"
    num_at_once: int = 0  # requests that the server gets at once; 0: all users'
    waits_for_all: bool = False  # a batch is answered before the next begins
    is_chunked: bool = False  # else a step computes whole prompts
    settings: dict[str, Any] = field(default_factory=dict)  # of the configuration
    kernels: str = "torch"  # SLUICE_KERNELS; empty: the best there are
    literature: Literature | None = None


_PLAIN: dict[str, Any] = {"cache.prefix_caching": False}
_PREFIX: dict[str, Any] = {"cache.prefix_caching": True}


def ladder() -> tuple[Technique, ...]:
    """Return all rows, from the naive server upwards."""
    return (
        Technique(
            "naive",
            "naive server",
            "transformers' generate in float32, one request at a time; nothing is kept between "
            "requests",
            is_engine=False,
            is_packed=False,
            dtype="float32",
            num_at_once=1,
        ),
        Technique(
            "bf16",
            "bf16",
            "weights and activations in bfloat16",
            is_engine=False,
            is_packed=False,
            num_at_once=1,
        ),
        Technique(
            "packed_weights",
            "packed weights",
            "every linear of that model becomes the engine's, packed once for oneDNN",
            is_engine=False,
            num_at_once=1,
        ),
        Technique(
            "paging",
            "KV cache paging",
            "the engine with its paged cache (plain torch attention), still one request at a time",
            num_at_once=1,
            settings=_PLAIN,
        ),
        Technique(
            "dynamic_batching",
            "dynamic batching",
            "all users' requests are submitted together; the next batch waits for all of them",
            waits_for_all=True,
            settings=_PLAIN,
        ),
        Technique(
            "continuous_batching",
            "continuous batching",
            "a request is submitted at once and joins the running batch; prompts are computed "
            "whole",
            settings=_PLAIN,
        ),
        Technique(
            "chunked_prefill",
            "chunked prefill",
            "engine.max_num_batched_tokens at its default: long prompts in chunks beside decodes",
            is_chunked=True,
            settings=_PLAIN,
        ),
        Technique(
            "prefix_cache",
            "prefix cache",
            "cache.prefix_caching=true: the static prefix is computed once for all requests",
            is_chunked=True,
            settings=_PREFIX,
        ),
        Technique(
            "fused_kernels",
            "fused kernels",
            "C++ kernels for attention, norms, rotation and products instead of torch's "
            "(SLUICE_KERNELS)",
            is_chunked=True,
            settings=_PREFIX,
            kernels="",
            literature=Literature("FlashAttention", 1.5, 3),
        ),
        Technique(
            "int8",
            "INT8",
            "model.quantization=int8: weights per channel, activations per token",
            is_chunked=True,
            settings=_PREFIX | {"model.quantization": "int8"},
            kernels="",
            literature=Literature("FP16 to INT8", 1.3, 2),
        ),
        Technique(
            "int4",
            "INT4",
            "model.quantization=int4 instead of int8: weights in groups (of 128 where they "
            "divide), activations quantized to 8 bits inside of the product; pays where the "
            "weights' bytes bound a step, at small batches, and in memory",
            is_chunked=True,
            settings=_PREFIX | {"model.quantization": "int4"},
            kernels="",
        ),
    )


def settings_of(technique: Technique, workload: Workload, model: str) -> dict[str, Any]:
    """Return the configuration of a row, by key."""
    num_seqs = technique.num_at_once or workload.num_users
    found: dict[str, Any] = {
        "model.path": model,
        "model.dtype": technique.dtype,
        "engine.max_num_seqs": num_seqs,
        "engine.max_num_waiting": max(1, workload.num_users),
    }
    if not technique.is_chunked:
        found["engine.max_num_batched_tokens"] = num_seqs * workload.max_prompt_tokens
    return found | technique.settings
