"""Models of well-known shapes with random weights: real sizes, without a download."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.errors import InvalidArgumentError

MAX_SHARD_BYTES = 2**30
"""Limit of one file; memory while writing stays near one file."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int  # model dim
    num_layers: int  # decoder layers
    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads
    head_dim: int  # per head
    intermediate: int  # MLP dim
    vocab: int  # tokens, may exceed the tokenizer's
    is_tied: bool  # the output matrix is the embedding
    max_position: int  # longest context, tokens
    rope_theta: float = 500_000.0  # base of the rotary embedding

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of the checkpoint, in the order of the layers."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            found[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            found[f"{prefix}.self_attn.q_proj.weight"] = (q_dim, self.hidden)
            found[f"{prefix}.self_attn.k_proj.weight"] = (kv_dim, self.hidden)
            found[f"{prefix}.self_attn.v_proj.weight"] = (kv_dim, self.hidden)
            found[f"{prefix}.self_attn.o_proj.weight"] = (self.hidden, q_dim)
            found[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
            found[f"{prefix}.mlp.gate_proj.weight"] = (self.intermediate, self.hidden)
            found[f"{prefix}.mlp.up_proj.weight"] = (self.intermediate, self.hidden)
            found[f"{prefix}.mlp.down_proj.weight"] = (self.hidden, self.intermediate)
        found["model.norm.weight"] = (self.hidden,)
        if not self.is_tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the size of all tensors in `dtype`, bytes."""
        return sum(map(math.prod, self.tensors().values())) * dtype.itemsize


SHAPES: dict[str, Shape] = {
    "tiny": Shape(64, 2, 4, 2, 16, 128, 4096, True, 2048),
    # Qwen2.5-0.5B's sizes
    "llama-0.5b": Shape(896, 24, 14, 2, 64, 4864, 151_936, True, 32_768, 1_000_000.0),
    # Llama 3.2's and Llama 3.1's; the long-context scaling of their rotary embedding is left out
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, 128_256, True, 131_072),
    "llama-3b": Shape(3072, 28, 24, 8, 128, 8192, 128_256, True, 131_072),
    "llama-8b": Shape(4096, 32, 32, 8, 128, 14_336, 128_256, False, 131_072),
}


def write_random_model(
    shape: str,
    out: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    tokenizer_from: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a model of random weights to `out` in transformers' format.

    Matrices are normal with a deviation of 0.02, norms are one. Memory stays near one shard.

    Args:
        shape: A name in `SHAPES`.
        out: Folder to write; must not exist, or be empty.
        dtype: A name in `DTYPES`.
        seed: Decides every weight: the same seed gives the same bytes.
        tokenizer_from: Model folder whose tokenizer is copied.
        on_progress: Called with the bytes done and the bytes in total, after each tensor and shard.

    Returns:
        The size of the weights, bytes.

    Raises:
        InvalidArgumentError: Unknown shape or dtype, a folder that is not empty, no tokenizer.
    """
    sizes = _check(shape, out, dtype, tokenizer_from)
    kind = DTYPES[dtype]
    total_bytes = sizes.num_bytes(kind)
    shards = list(_shards(sizes, kind))
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    done_bytes = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, dims in names.items():
            tensors[name] = _draw(dims, kind, generator)
            weight_map[name] = file
            done_bytes += tensors[name].nbytes
            if on_progress:
                on_progress(done_bytes, total_bytes)
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors makes it readable for its owner alone
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)
    for file in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_from / file, out / file)
    # Last, because a folder without a configuration is not taken for a model.
    _write_json(out / "config.json", _config(sizes, dtype))
    return total_bytes


def _check(shape: str, out: Path, dtype: str, tokenizer_from: Path) -> Shape:
    if shape not in SHAPES:
        raise InvalidArgumentError(
            f"shape={shape!r} is unknown: choose one of {', '.join(SHAPES)}", field="shape"
        )
    if dtype not in DTYPES:
        raise InvalidArgumentError(
            f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}", field="dtype"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgumentError(
            f"out={str(out)!r} is not an empty folder: choose a new one", field="out"
        )
    for file in TOKENIZER_FILES:
        if not (tokenizer_from / file).is_file():
            raise InvalidArgumentError(
                f"tokenizer_from={str(tokenizer_from)!r} has no {file}: name a model's folder",
                field="tokenizer_from",
            )
    return SHAPES[shape]


def _shards(sizes: Shape, dtype: torch.dtype) -> Iterator[dict[str, tuple[int, ...]]]:
    """Split the tensors, in order, into files of at most `MAX_SHARD_BYTES`.

    A tensor that is larger on its own gets a file on its own.
    """
    shard: dict[str, tuple[int, ...]] = {}
    shard_bytes = 0
    for name, dims in sizes.tensors().items():
        tensor_bytes = math.prod(dims) * dtype.itemsize
        if shard and shard_bytes + tensor_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = dims
        shard_bytes += tensor_bytes
    yield shard


def _draw(dims: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return one tensor: a norm's ones, or a matrix of normal values."""
    if len(dims) == 1:
        return torch.ones(dims, dtype=dtype)
    # Drawn in the target dtype: an fp32 copy would treble the memory of the largest one.
    return torch.empty(dims, dtype=dtype).normal_(0.0, WEIGHT_STD, generator=generator)


def _config(sizes: Shape, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": dtype,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": sizes.max_position,
        "mlp_bias": False,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "tie_word_embeddings": sizes.is_tied,
        "use_cache": True,
        "vocab_size": sizes.vocab,
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
