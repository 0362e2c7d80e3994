"""The shape of a model, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a checkpoint is; `checkpoint.inspect_checkpoint` makes it."""

    folder: str
    model_type: str  # transformers' name of the family
    vocab_size: int  # rows of the language model's head
    max_position_embeddings: int  # tokens, prompt and answer together
    hidden_size: int
    intermediate_size: int  # of the MLP; 0 where the configuration names none
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int
    head_dim: int
    dtype: str  # of what is not quantized: float32, bfloat16 or float16
    eos_token_ids: tuple[int, ...]  # each of these ends a text; empty where the model has none
    weight_bytes: int  # of all tensors, as stored
    layer_bytes: tuple[int, ...]  # of each layer, as stored
    head_bytes: int  # of the language model's head, as stored
    is_tied: bool  # the head is the embedding table
    tp_plan: dict[str, str]  # module pattern -> style, as transformers gives it
    can_be_staged: bool  # its layers can be spread over pipeline stages
    quantization: str = "none"  # of the checkpoint: of most of its layers' weights
    quantization_group_size: int = 0  # inputs that share a scale; int4 checkpoints

    @property
    def max_model_len(self) -> int:
        """Tokens that the model was made for, prompt and answer together."""
        return self.max_position_embeddings

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint holds quantized weights."""
        return self.quantization != "none"

    def quantization_for(self, wanted: str) -> str:
        """Return how the linears are quantized: as the checkpoint brings it, or `wanted`."""
        return self.quantization if self.is_quantized else wanted

    def dtype_for(self, wanted: str) -> str:
        """Return the dtype to compute in: `wanted`, or the checkpoint's for "auto"."""
        return self.dtype if wanted == "auto" else wanted
