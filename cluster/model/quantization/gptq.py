"""The checkpoint formats of GPTQ and AWQ, 4 bits, as their tools wrote them. Of a module `m`:

    gptq   m.qweight int32 [I / 8, O]   packed along the inputs, the first lowest
           m.qzeros  int32 [G, O / 8]   packed along the outputs, each less 1 (not in "gptq_v2")
    awq    m.qweight int32 [I, O / 8]   packed along the outputs, in the order 0 2 4 6 1 3 5 7
           m.qzeros  int32 [G, O / 8]   the same
    both   m.scales        [G, O]       w = (code - zero) * scale

With "sym" all zeros of gptq are 8.

Source: the checkpoints of AutoGPTQ / GPTQModel and of AutoAWQ, version "gemm".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.model.quantization.stored import (
    ADVICE,
    CODES_PER_WORD,
    SCALE_DTYPES,
    StoredWeight,
    tensor_of,
    unusable,
)
from cluster.model.tensor_index import TensorEntry

METHODS: tuple[Literal["gptq", "awq"], ...] = ("gptq", "awq")


def stored_weights(
    folder: Path, config: Mapping[str, Any], index: Mapping[str, TensorEntry]
) -> dict[str, StoredWeight]:
    """Return the quantized weights of a checkpoint; see `stored.read_stored_weights`."""
    method = METHODS[METHODS.index(config["quant_method"])]
    if reason := _why_unread(config):
        raise unusable(folder, f"quant_method={method!r} with {reason} is not read here; {ADVICE}")
    modules = [name.removesuffix(".qweight") for name in index if name.endswith(".qweight")]
    if not modules:
        raise unusable(folder, f"quant_method={method!r}, but no tensor is named *.qweight")
    group_size = max(0, int(config.get("group_size", 0)))  # -1: a whole row
    is_v2 = config.get("checkpoint_format") == "gptq_v2"
    zero_offset = 0 if method == "awq" or is_v2 else 1
    has_zeros = method == "awq" or not config.get("sym", False)
    found = {}
    for module in modules:
        shape = _shape(folder, module, index, method)
        weight = StoredWeight(method, "int4", shape, group_size, has_zeros, zero_offset)
        _check_scales(folder, module, index, weight)
        found[f"{module}.weight"] = weight
    return found


def _why_unread(config: Mapping[str, Any]) -> str:
    is_gptq = config["quant_method"] == "gptq"
    known = {"bits": (4,)} | (
        {"desc_act": (False, None), "checkpoint_format": ("gptq", "gptq_v2", "", None)}
        if is_gptq
        else {"version": ("gemm", "GEMM", None)}
    )
    wrong = [name for name, values in known.items() if config.get(name) not in values]
    return f"{wrong[0]}={config.get(wrong[0])!r}" if wrong else ""


def _shape(
    folder: Path, module: str, index: Mapping[str, TensorEntry], method: str
) -> tuple[int, int]:
    """Return outputs and inputs."""
    first, second = tensor_of(folder, index, f"{module}.qweight", {"I32"}).shape
    if method == "gptq":
        return second, first * CODES_PER_WORD
    return second * CODES_PER_WORD, first


def _check_scales(
    folder: Path, module: str, index: Mapping[str, TensorEntry], weight: StoredWeight
) -> None:
    num_outputs, num_inputs = weight.shape
    group_size = weight.stored_group_size or num_inputs
    if num_inputs % group_size:
        raise unusable(
            folder,
            f"group_size={group_size} does not divide {module}'s {num_inputs} inputs; {ADVICE}",
        )
    num_groups = num_inputs // group_size
    tensor_of(folder, index, f"{module}.scales", SCALE_DTYPES, (num_groups, num_outputs))
    zeros = (num_groups, num_outputs // CODES_PER_WORD)
    tensor_of(folder, index, f"{module}.qzeros", {"I32"}, zeros)
