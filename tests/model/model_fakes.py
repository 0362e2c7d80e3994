"""Tiny random models on disk, and the simplest engine that can drive a `ModelRunner`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from cluster.config import CacheConfig, ModelConfig
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.collective import NoCollective
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import SampleSpec, SequenceStep, StepPlan
from cluster.types import SampledToken

VOCAB_SIZE = 131  # odd: two ranks get unequal shares
BLOCK_SIZE = 4
NUM_BLOCKS = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from uniform logits: a greedy choice is no toss-up
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
}


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """Write a random model of `family` into `folder` and return it; one seed, one model."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**_SIZES, **extra, **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """Return prompts of mixed length, longer than any sliding window here and shorter."""
    rng = random.Random(3)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (1, 5, 13, 22, 9)]


def generate_reference(folder: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return what transformers itself generates, greedily, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def make_runner(
    folder: Path,
    *,
    dtype: str = "float32",
    shard: ShardSpec | None = None,
    collective: Any = None,
    cache_dtype: str = "auto",
    slots: torch.Tensor | None = None,
) -> ModelRunner:
    """Return a runner whose whole cache is NaN: whatever reads an unused slot shows."""
    runner = ModelRunner(
        ModelConfig(path=str(folder), dtype=dtype),  # type: ignore[arg-type]
        CacheConfig(block_size=BLOCK_SIZE, dtype=cache_dtype),  # type: ignore[arg-type]
        shard or ShardSpec(0, 1, 0, 1),
        collective or NoCollective(),
        max_model_len=inspect_checkpoint(folder).max_model_len,
        num_blocks=NUM_BLOCKS,
        slots=slots,
    )
    if cache_dtype == "auto":
        runner._cache.numbers_L2BSKH.fill_(torch.nan)
    return runner


def greedy_spec(position: int) -> SampleSpec:
    return spec(position=position, temperature=0.0)


def spec(**fields: Any) -> SampleSpec:
    """Return a spec that leaves the distribution as it is, but for `fields`."""
    plain: dict[str, Any] = {
        "seed": 0,
        "position": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_logprobs": -1,
    }
    return SampleSpec(**{**plain, **fields})


def run_pipeline(runners: Sequence[ModelRunner]) -> Callable[[StepPlan], dict[int, SampledToken]]:
    """Return a function that takes a plan through the stages."""

    def step(plan: StepPlan) -> dict[int, SampledToken]:
        hidden = None
        for runner in runners[:-1]:
            hidden = runner.execute(plan, hidden)
            assert isinstance(hidden, torch.Tensor)
        tokens = runners[-1].execute(plan, hidden)
        assert isinstance(tokens, dict)
        return tokens

    return step


def drive(
    step: Callable[[StepPlan], dict[int, SampledToken]],
    sequences: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    chunk_sizes: Sequence[int] = (3, 7, 1, 5),
    make_spec: Callable[[int], SampleSpec] = greedy_spec,
) -> list[list[int]]:
    """Return `num_tokens` new tokens per prompt.

    All sequences run at once, prompts in chunks of odd sizes beside others that decode already, on
    shuffled blocks.
    """
    free = list(range(NUM_BLOCKS))
    random.Random(5).shuffle(free)
    texts = [list(sequence) for sequence in sequences]
    tables = [[free.pop() for _ in range(-(-(len(t) + num_tokens) // BLOCK_SIZE))] for t in texts]
    computed = [0] * len(texts)
    step_id = 0
    while any(len(t) < len(s) + num_tokens for t, s in zip(texts, sequences, strict=True)):
        steps = []
        for i, text in enumerate(texts):
            if len(text) >= len(sequences[i]) + num_tokens:
                continue
            size = chunk_sizes[(step_id + i) % len(chunk_sizes)]
            new = text[computed[i] : computed[i] + size]
            is_caught_up = computed[i] + len(new) == len(text)
            sample = make_spec(len(text)) if is_caught_up else None
            num_blocks = -(-(computed[i] + len(new)) // BLOCK_SIZE)
            steps.append(
                SequenceStep(i, tuple(new), computed[i], tuple(tables[i][:num_blocks]), sample)
            )
            computed[i] += len(new)
        plan = StepPlan.decode(StepPlan(step_id, tuple(steps)).encode())
        for seq_id, token in step(plan).items():
            texts[seq_id].append(token.token_id)
        step_id += 1
    return [t[len(s) :] for t, s in zip(texts, sequences, strict=True)]
