"""Write a Llama checkpoint as a GGUF file for llama.cpp.

The gguf package has the format and the codecs; llama.cpp's own converter is not in any package.
No tokenizer goes in: the prompts are token ids.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

FILE_NAME = "model.gguf"
TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    """Export what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scheme", choices=TYPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"model_type={config['model_type']!r}: only a Llama is converted here")
    writer = gguf.GGUFWriter(arguments.out / FILE_NAME, "llama")
    describe(writer, config)
    for file in sorted(arguments.model.glob("*.safetensors")):
        for name, weight in read_tensors(file):
            kind = tensor_type(name, weight, arguments.scheme)
            data = gguf.quants.quantize(rotated(name, weight, config), kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copyfile(arguments.model / "config.json", arguments.out / "config.json")


def describe(writer: Any, config: dict[str, Any]) -> None:
    """Write the sizes of the model."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")


def read_tensors(file: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield name and values of each tensor; numpy alone has no bf16."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            stream.seek(8 + header_bytes + begin)
            yield name, to_float32(stream.read(end - begin), entry["dtype"]).reshape(entry["shape"])


def to_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Return the values of a tensor's bytes."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def rotated(name: str, weight: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """Return query and key rows in llama.cpp's order: it rotates neighbours, not halves."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = next((heads[part] for part in heads if part in name), None)
    if key is None:
        return weight
    halves = weight.reshape(config[key], 2, config["head_dim"] // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def tensor_type(name: str, weight: NDArray[np.float32], scheme: str) -> Any:
    """Return how a tensor is stored; as in OpenVINO's INT4, the embedding has 8 bits."""
    if weight.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if scheme == "int4" and ("embed_tokens" in name or "lm_head" in name):
        return TYPES["int8"]
    return TYPES[scheme]


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a Llama's tensor."""
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


if __name__ == "__main__":
    main()
