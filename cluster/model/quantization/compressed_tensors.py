"""The checkpoint format of compressed-tensors: which of it is read, and what is written.

config.json, `quantization_config`, has groups of modules, each with the bits of its weights and a
format. Of a module `m`:

    pack-quantized    m.weight_packed int32 [O, I / 8]     eight codes a word, the first lowest,
                                                           each plus 8
                      m.weight_scale        [O, I / group] or [O, 1]
                      m.weight_zero_point   int32 [O / 8, G]   packed along the outputs; asymmetric
                      m.weight_shape        int [2]
    int-quantized     m.weight int8 [O, I], m.weight_scale [O, 1] or [1]
    float-quantized   m.weight e4m3 [O, I], m.weight_scale [O, 1] or [1]

Source: the documentation and the code of compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.model.quantization.stored import (
    ADVICE,
    CODES_PER_WORD,
    SCALE_DTYPES,
    StoredWeight,
    tensor_of,
    unusable,
)
from cluster.model.tensor_index import TensorEntry

_SUFFIXES = (".weight_packed", ".weight_scale")
_PLAIN_FORMATS = {
    "int-quantized": ("int8", "I8"),
    "float-quantized": ("fp8", "F8_E4M3"),
}


def stored_weights(
    folder: Path, config: Mapping[str, Any], index: Mapping[str, TensorEntry]
) -> dict[str, StoredWeight]:
    """Return the quantized weights of a checkpoint; see `stored.read_stored_weights`."""
    if config.get("transform_config"):
        raise unusable(folder, f"its weights are rotated (transform_config); {ADVICE}")
    modules: dict[str, None] = {}  # ordered
    for name, entry in index.items():
        module, dot, _ = name.rpartition(".")
        is_integer = name.endswith(".weight") and entry.dtype not in SCALE_DTYPES
        if is_integer or (dot and name.endswith(_SUFFIXES)):
            modules[module] = None
    groups = list(config.get("config_groups", {}).values())
    return {f"{m}.weight": _stored(folder, m, _group_of(m, groups), config, index) for m in modules}


def _group_of(module: str, groups: list[Any]) -> Mapping[str, Any]:
    """Return the group of a module: names go before patterns, patterns before classes."""
    ranks: list[Callable[[str], bool]] = [
        lambda target: target == module,
        lambda target: target.startswith("re:") and bool(re.match(target[3:], module)),
        lambda target: target == "Linear",
    ]
    for is_match in ranks:
        for group in groups:
            if any(is_match(target) for target in group.get("targets", ())):
                return dict(group)
    return {}


def _stored(
    folder: Path,
    module: str,
    group: Mapping[str, Any],
    config: Mapping[str, Any],
    index: Mapping[str, TensorEntry],
) -> StoredWeight:
    weights = group.get("weights") or {}
    if not weights:
        raise unusable(folder, f"no config group is for {module}, which is quantized; {ADVICE}")
    kind = str(group.get("format") or config.get("format"))
    if kind == "naive-quantized":
        kind = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if f"{module}.weight_g_idx" in index or weights.get("actorder") in ("group", "dynamic", True):
        raise unusable(folder, f"the inputs of {module} are reordered (actorder); {ADVICE}")
    if kind == "pack-quantized":
        return _packed(folder, module, weights, index)
    if kind in _PLAIN_FORMATS:
        return _plain(folder, module, kind, group, index)
    raise unusable(folder, f"format={kind!r} of {module} is not read here; {ADVICE}")


def _packed(
    folder: Path, module: str, weights: Mapping[str, Any], index: Mapping[str, TensorEntry]
) -> StoredWeight:
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits != 4 or weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise unusable(
            folder,
            f"{module} has {bits} bits per {strategy} in format 'pack-quantized', read here are "
            f"4 bits per group or channel; {ADVICE}",
        )
    entry = tensor_of(folder, index, f"{module}.weight_packed", {"I32"})
    num_outputs, num_inputs = entry.shape[0], entry.shape[1] * CODES_PER_WORD
    group_size = int(weights.get("group_size") or 0) if strategy == "group" else 0
    if strategy == "group" and (group_size <= 0 or num_inputs % group_size):
        raise unusable(
            folder,
            f"group_size={weights.get('group_size')} does not divide the {num_inputs} inputs of "
            f"{module}; {ADVICE}",
        )
    num_groups = num_inputs // group_size if group_size else 1
    tensor_of(folder, index, f"{module}.weight_scale", SCALE_DTYPES, (num_outputs, num_groups))
    has_zeros = weights.get("symmetric", True) is False
    if has_zeros:
        num_words = -(-num_outputs // CODES_PER_WORD)
        name = f"{module}.weight_zero_point"
        tensor_of(folder, index, name, {"I32"}, (num_words, num_groups))
    shape = (num_outputs, num_inputs)
    return StoredWeight("packed", "int4", shape, group_size, has_zeros)


def _plain(
    folder: Path,
    module: str,
    kind: str,
    group: Mapping[str, Any],
    index: Mapping[str, TensorEntry],
) -> StoredWeight:
    weights, activations = group["weights"], group.get("input_activations")
    scheme, dtype = _PLAIN_FORMATS[kind]
    strategy, is_symmetric = weights.get("strategy"), weights.get("symmetric", True)
    if weights.get("num_bits") != 8 or strategy not in ("channel", "tensor") or not is_symmetric:
        raise unusable(
            folder,
            f"{module} has {weights.get('num_bits')} bits per {strategy}, symmetric="
            f"{is_symmetric}, in format {kind!r}, read here are 8 symmetric bits per channel or "
            f"tensor; {ADVICE}",
        )
    if activations and not activations.get("dynamic"):
        raise unusable(folder, f"the activations of {module} have static scales; {ADVICE}")
    entry = tensor_of(folder, index, f"{module}.weight", {dtype})
    num_outputs, num_inputs = entry.shape
    shapes = ((num_outputs, 1), (num_outputs,)) if strategy == "channel" else ((1,), (), (1, 1))
    tensor_of(folder, index, f"{module}.weight_scale", SCALE_DTYPES, *shapes)
    return StoredWeight("plain", "fp8" if scheme == "fp8" else "int8", (num_outputs, num_inputs))


def written_config(scheme: str, group_size: int, head: str) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint that `writer.py` writes.

    Args:
        scheme: Of the layers: "int8" or "int4"; the head is int8 in either.
        group_size: Of int4.
        head: Name of the head's module.
    """
    int8 = {
        "targets": ["Linear"],
        "weights": _arguments(8, "channel"),
        "input_activations": {**_arguments(8, "token"), "dynamic": True},
        "format": "int-quantized",
    }
    groups: dict[str, Any] = {"group_0": int8}
    if scheme == "int4":
        int4 = {
            "targets": ["Linear"],
            "weights": {**_arguments(4, "group"), "group_size": group_size},
            "format": "pack-quantized",
        }
        groups = {"group_0": int4, "group_1": {**int8, "targets": [head]}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme == "int8" else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def _arguments(num_bits: int, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
    }
