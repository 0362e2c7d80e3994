"""Writes a safetensors file whose tensors are made one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
_ALIGNMENT = 8  # of the first tensor, as the format's own writer has it


def write_tensors(
    file: Path, plan: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> int:
    """Write a file; no more than one tensor is in memory at a time.

    Args:
        file: To write.
        plan: Of each tensor, in order: dtype as safetensors spells it, and shape.
        tensors: As planned.

    Returns:
        The size of the tensors, bytes.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in plan.items():
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for (name, (_, shape)), tensor in zip(plan.items(), tensors, strict=True):
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        assert stream.tell() == 8 + len(header) + end, file
    return end
