"""How a checkpoint stores its quantized weights, from its configuration and headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ConfigError
from cluster.model.tensor_index import TensorEntry

GROUP_SIZES = (128, 64, 32)
"""Inputs that share a scale in the products, the largest first."""

CODES_PER_WORD = 8
"""Codes of 4 bits in an int32."""

Layout = Literal["plain", "packed", "gptq", "awq"]
SCALE_NAME = re.compile(r"\.(?:weight_scale|scales)$")
SCALE_DTYPES = {"F32", "BF16", "F16"}
ADVICE = (
    "give a checkpoint in compressed-tensors format (int8 per channel, int4 in groups), or the "
    "model that it was made from with model.quantization"
)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """How one quantized weight lies in a checkpoint; `reader.py` draws the layouts."""

    layout: Layout
    scheme: Literal["int8", "int4", "fp8"]
    shape: tuple[int, int]  # outputs, inputs
    stored_group_size: int = 0  # inputs that share a stored scale; 0: a whole row
    has_zeros: bool = False  # int4: zeros of the groups are their own, not all 8
    zero_offset: int = 0  # to be added to a stored zero

    @property
    def group_size(self) -> int:
        """Inputs that share a scale once it is read, the largest that there is; int4 only."""
        if self.scheme != "int4":
            return 0
        size = self.stored_group_size or self.shape[1]
        return next((g for g in GROUP_SIZES if size % g == 0), 0)


def read_quantization_config(folder: Path) -> Mapping[str, Any]:
    """Return what config.json says of quantization; empty where it says nothing.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        found = config.get("quantization_config") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise unusable(folder, f"config.json cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        raise unusable(folder, f"quantization_config={found!r} in config.json is no object")
    return found


def read_stored_weights(folder: Path, index: Mapping[str, TensorEntry]) -> dict[str, StoredWeight]:
    """Return the quantized weights of a checkpoint by the names of the unquantized ones.

    Raises:
        ConfigError: The checkpoint is quantized in a way that is not read here, or tensors are
            missing or do not fit each other.
    """
    from cluster.model.quantization import compressed_tensors, gptq

    config = read_quantization_config(folder)
    if not config:
        return {}
    method = str(config.get("quant_method", "compressed-tensors"))
    try:
        if method == "compressed-tensors":
            weights = compressed_tensors.stored_weights(folder, config, index)
        elif method in gptq.METHODS:
            weights = gptq.stored_weights(folder, config, index)
        else:
            raise unusable(folder, f"quant_method={method!r} is not read here; {ADVICE}")
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        reason = f"quantization_config in config.json is malformed ({error!r}); {ADVICE}"
        raise unusable(folder, reason) from error
    for name, weight in weights.items():
        if weight.scheme == "int4" and not weight.group_size:
            raise unusable(
                folder,
                f"{name} has a scale for each {weight.stored_group_size or weight.shape[1]} "
                f"inputs, the products take groups of 32, 64, 128; {ADVICE}",
            )
    return weights


def dividing_group_sizes(*sizes: int) -> str:
    """Return advice: the group sizes that divide every one of `sizes`, the largest first."""
    fitting = [str(g) for g in GROUP_SIZES if not any(size % g for size in sizes)]
    return " or ".join(fitting) if fitting else "model.quantization=int8, which has no groups"


def unusable(folder: Path, reason: str) -> ConfigError:
    """Return the error of a checkpoint that cannot be served."""
    return ConfigError(f"model.path={folder}: {reason}", field="model.path")


def tensor_of(
    folder: Path, index: Mapping[str, TensorEntry], name: str, dtypes: set[str], *shapes: Any
) -> TensorEntry:
    """Return an entry of the index that must be there, of one of `dtypes` and `shapes`.

    Args:
        folder: Of the checkpoint.
        index: Of its tensors.
        name: Of the tensor.
        dtypes: As safetensors spells them.
        shapes: That are right; none: any of two dims.

    Raises:
        ConfigError: It is missing or different.
    """
    entry = index.get(name)
    if entry is None:
        raise unusable(
            folder, f"no tensor {name}, which its quantization needs; get the checkpoint again"
        )
    is_right = entry.shape in shapes if shapes else len(entry.shape) == 2
    if entry.dtype not in dtypes or not is_right:
        wanted = " or ".join(str(list(shape)) for shape in shapes) or "two dims"
        raise unusable(
            folder,
            f"{name} is {entry.dtype} {list(entry.shape)}, expected {' or '.join(sorted(dtypes))} "
            f"{wanted}; get the checkpoint again",
        )
    return entry
