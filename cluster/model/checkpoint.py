"""What a checkpoint is, without loading its weights: for the command, gateway and leader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cluster.model.layout import DTYPE_BYTES, check_layout
from cluster.model.model_info import ModelInfo
from cluster.model.quantization.check import check_quantization
from cluster.model.quantization.stored import (
    SCALE_NAME,
    StoredWeight,
    read_quantization_config,
    read_stored_weights,
    unusable,
)
from cluster.model.tensor_index import TensorEntry, read_header, read_tensor_index, tensor_files

__all__ = [
    "ModelInfo",
    "check_layout",
    "check_quantization",
    "fingerprint",
    "inspect_checkpoint",
]

NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
NO_CONFIG = "no config.json; give a folder in transformers' format, or 'demo'"
_LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_HEAD_NAME = re.compile(r"(?:^|\.)lm_head\.")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_UNSTABLE_ROPES = {"dynamic", "longrope"}


def inspect_checkpoint(folder: Path) -> ModelInfo:
    """Return what the checkpoint in `folder` holds; reads the configuration and headers only.

    Raises:
        ConfigError: The folder holds no causal language model that can be served.
    """
    config = _read_config(folder)
    index = read_tensor_index(folder)
    dtype = _dtype(folder, index)
    quantization, group_size = _quantization(read_stored_weights(folder, index))
    num_heads = config.num_attention_heads
    plan = dict(getattr(config, "base_model_tp_plan", None) or {})
    return ModelInfo(
        folder=str(folder),
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 0,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=dtype,
        eos_token_ids=_eos_token_ids(folder, config),
        weight_bytes=sum(entry.num_bytes for entry in index.values()),
        layer_bytes=_layer_bytes(index, config.num_hidden_layers),
        head_bytes=_head_bytes(index, config.vocab_size * config.hidden_size, dtype),
        is_tied=bool(config.tie_word_embeddings),
        tp_plan=plan,
        can_be_staged="layers" in (getattr(config, "base_model_pp_plan", None) or {}),
        quantization=quantization,
        quantization_group_size=group_size,
    )


def fingerprint(folder: Path, dtype: str, tp: int, *, precision: str = "") -> bytes:
    """Return 16 bytes that differ wherever the bytes of the KV cache would.

    Hashes the configuration, the headers and sizes of the tensor files and samples of their bytes,
    the dtype and the tensor-parallel layout. Cheap: it reads at most 256 KiB of each file.

    Args:
        folder: Of the checkpoint.
        dtype: As in `ModelConfig.dtype`; "auto" counts as the checkpoint's.
        tp: Ranks that share the heads.
        precision: Whatever else decides the bytes: quantization while loading, the cache's dtype.

    Raises:
        ConfigError: The folder is no checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise unusable(folder, NO_CONFIG)
    if dtype == "auto":
        dtype = _dtype(folder, read_tensor_index(folder))
    digest = blake2b(digest_size=16)
    config = (folder / "config.json").read_bytes()
    for part in (config, dtype.encode(), b"%d" % tp, precision.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    for file in tensor_files(folder):
        num_bytes = file.stat().st_size
        digest.update(num_bytes.to_bytes(8, "little") + read_header(file))
        with file.open("rb") as stream:
            for i in range(NUM_SAMPLES):
                stream.seek(num_bytes * i // NUM_SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig  # seconds to import: only where a model is looked at
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise unusable(folder, NO_CONFIG)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable(folder, f"config.json cannot be read: {error}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unusable(
            folder, f"model_type={config.model_type!r} is no causal language model of transformers"
        )
    reason = _why_unsupported(config)
    if reason:
        raise unusable(folder, f"model_type={config.model_type!r} {reason}; take another model")
    return config


def _why_unsupported(config: Any) -> str:
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    for name in (*names, "max_position_embeddings"):
        if not isinstance(getattr(config, name, None), int):
            return f"has no {name} in its configuration"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if others:
        return f"has layers of type {others[0]!r}, which the paged cache does not serve"
    if getattr(config, "kv_lora_rank", None):
        return "has latent attention, which the paged cache does not serve"
    if _rope_types(getattr(config, "rope_parameters", None) or {}) & _UNSTABLE_ROPES:
        return "has rotary frequencies that change with the longest sequence of a batch"
    return ""


def _rope_types(parameters: Mapping[str, Any]) -> set[str]:
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(p.get("rope_type", "default")) for p in (parameters, *nested)}


def _quantization(stored: Mapping[str, StoredWeight]) -> tuple[str, int]:
    """Return scheme and group size of most weights; a head may have another scheme."""
    counts: dict[tuple[str, int], int] = {}
    for name, weight in stored.items():
        if _LAYER_NAME.search(name):
            kind = weight.scheme, weight.group_size
            counts[kind] = counts.get(kind, 0) + weight.shape[0] * weight.shape[1]
    return max(counts, key=lambda kind: counts[kind], default=("none", 0))


def _head_bytes(index: Mapping[str, TensorEntry], num_elements: int, dtype: str) -> int:
    own = [entry.num_bytes for name, entry in index.items() if _HEAD_NAME.search(name)]
    return sum(own) or num_elements * DTYPE_BYTES[dtype]


def _dtype(folder: Path, index: Mapping[str, TensorEntry]) -> str:
    """Return the dtype that holds most of the bytes that are not quantized."""
    is_quantized = bool(read_quantization_config(folder))
    sizes: dict[str, int] = {}
    for name, entry in index.items():
        if not SCALE_NAME.search(name) and (entry.dtype in _DTYPES or not is_quantized):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    largest = max(sizes, key=lambda name: sizes[name], default="")
    if largest not in _DTYPES:
        raise unusable(
            folder, f"weights are {largest or 'missing'}; known here: {', '.join(_DTYPES)}"
        )
    return _DTYPES[largest]


def _layer_bytes(index: Mapping[str, TensorEntry], num_layers: int) -> tuple[int, ...]:
    layers = [0] * num_layers
    for name, entry in index.items():
        match = _LAYER_NAME.search(name)
        if match and int(match[1]) < num_layers:
            layers[int(match[1])] += entry.num_bytes
    return tuple(layers)


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    ids = None
    if generation.is_file():
        try:
            ids = json.loads(generation.read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise unusable(folder, f"generation_config.json cannot be read: {error}") from error
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
