"""Reads a rank's part of a quantized weight from a checkpoint, whatever tool wrote it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cluster.errors import ConfigError
from cluster.model.quantization.packing import unpack_words
from cluster.model.quantization.stored import CODES_PER_WORD, StoredWeight
from cluster.model.quantization.weight import INT4_ZERO, QuantizedWeight, Scheme, group_slice

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ puts each of eight neighbours."""
_WHOLE = slice(None)


class StoredTensors(Protocol):
    """A checkpoint that may hold quantized weights; a `WeightSource` is one."""

    def stored(self, name: str) -> StoredWeight | None:
        """Return how a quantized weight is stored; None of any other tensor."""
        ...

    def read_stored(self, name: str, *parts: slice) -> Tensor:
        """Return a part of a tensor that holds codes, scales or zeros: a slice for each axis."""
        ...


def read_quantized(
    source: StoredTensors, name: str, rows: slice = _WHOLE, columns: slice = _WHOLE
) -> QuantizedWeight | None:
    """Return a part of a weight as the checkpoint has it quantized; None where it is not.

    Args:
        source: Of the checkpoint.
        name: Of the weight, as transformers' module calls it: ``...q_proj.weight``.
        rows: Outputs of this rank.
        columns: Inputs of this rank.

    Returns:
        A copy: nothing of it is a view of the file, but for int8 and fp8 codes.

    Raises:
        ConfigError: `columns` cut a group, or the scales are not finite.
    """
    stored = source.stored(name)
    if stored is None:
        return None
    module = name.removesuffix(".weight")
    part = _ints(rows, stored.shape[0]), _ints(columns, stored.shape[1])
    read = {"plain": _plain, "packed": _packed, "gptq": _gptq, "awq": _awq}[stored.layout]
    weight = read(source, module, stored, *part)
    if not bool(weight.scales.isfinite().all()):
        raise ConfigError(
            f"model.path: scales of {name} are not finite; get the checkpoint again",
            field="model.path",
        )
    return weight


def _ints(part: slice, size: int) -> slice:
    begin, end, _ = part.indices(size)
    return slice(begin, end)


def _plain(
    source: StoredTensors, module: str, stored: StoredWeight, rows: slice, columns: slice
) -> QuantizedWeight:
    codes_OI = source.read_stored(f"{module}.weight", rows, columns)
    scales = source.read_stored(f"{module}.weight_scale").float().flatten()
    scales_O = scales[rows] if len(scales) > 1 else scales.expand(codes_OI.shape[0])
    scheme: Scheme = stored.scheme
    return QuantizedWeight(scheme, codes_OI, scales_O.contiguous())


def _packed(
    source: StoredTensors, module: str, stored: StoredWeight, rows: slice, columns: slice
) -> QuantizedWeight:
    groups = group_slice(columns, stored.shape[1], stored.group_size, f"{module}.weight")
    words = source.read_stored(f"{module}.weight_packed", rows, _words(columns))
    scales_OG = source.read_stored(f"{module}.weight_scale", rows)
    zeros_OG = None
    if stored.has_zeros:
        words_WG = source.read_stored(f"{module}.weight_zero_point")
        zeros_OG = unpack_words(words_WG.T).T[rows]
    return _int4(stored, unpack_words(words), scales_OG, zeros_OG, groups)


def _gptq(
    source: StoredTensors, module: str, stored: StoredWeight, rows: slice, columns: slice
) -> QuantizedWeight:
    groups = group_slice(columns, stored.shape[1], stored.group_size, f"{module}.weight")
    words_WO = source.read_stored(f"{module}.qweight", _words(columns), rows)
    scales_GO = source.read_stored(f"{module}.scales", _WHOLE, rows)
    zeros_GO = unpack_words(source.read_stored(f"{module}.qzeros"))[:, rows]
    return _int4(stored, unpack_words(words_WO.T), scales_GO.T, zeros_GO.T, groups)


def _awq(
    source: StoredTensors, module: str, stored: StoredWeight, rows: slice, columns: slice
) -> QuantizedWeight:
    groups = group_slice(columns, stored.shape[1], stored.group_size, f"{module}.weight")
    codes_IO = _awq_order(unpack_words(source.read_stored(f"{module}.qweight", columns)))[:, rows]
    scales_GO = source.read_stored(f"{module}.scales", _WHOLE, rows)
    zeros_GO = _awq_order(unpack_words(source.read_stored(f"{module}.qzeros")))[:, rows]
    return _int4(stored, codes_IO.T, scales_GO.T, zeros_GO.T, groups)


def _awq_order(codes: Tensor) -> Tensor:
    words = codes.view(codes.shape[0], -1, CODES_PER_WORD)
    return words[..., list(AWQ_PLACES)].flatten(1)


def _words(columns: slice) -> slice:
    return slice(columns.start // CODES_PER_WORD, columns.stop // CODES_PER_WORD)


def _int4(
    stored: StoredWeight, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, part: slice
) -> QuantizedWeight:
    """Return the weight with one scale per group of the size that the products take."""
    copies = (stored.stored_group_size or stored.shape[1]) // stored.group_size

    def per_group(values_OG: Tensor) -> Tensor:
        return values_OG.float().repeat_interleave(copies, 1)[:, part].contiguous()

    zeros = None
    if zeros_OG is not None:
        zeros = per_group(zeros_OG) + stored.zero_offset
        if not stored.has_zeros:
            if bool((zeros != INT4_ZERO).any()):
                raise ConfigError(
                    "model.path: the checkpoint is said to be symmetric (sym), but its zeros are "
                    "not all 8; get it again",
                    field="model.path",
                )
            zeros = None
    return QuantizedWeight(
        "int4", codes_OI.contiguous(), per_group(scales_OG), zeros, stored.group_size
    )
