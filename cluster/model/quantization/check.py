"""Whether a model can be quantized as asked, known from headers, before a process is started."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from cluster.config import ModelConfig, ParallelConfig
from cluster.errors import ConfigError
from cluster.model.model_info import ModelInfo
from cluster.model.quantization.stored import dividing_group_sizes, read_stored_weights
from cluster.model.tensor_index import read_tensor_index

_DEVICES = {"int8": "cpu", "int4": "cpu", "fp8": "cuda"}
_REFUSED_DTYPES = {"int8": "float16", "int4": "float16", "fp8": "float32"}
_FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply e4m3
INPUT_MULTIPLE = 16
"""Inputs that the quantized products take at a time, on CPUs and GPUs."""

_LAYER_WEIGHT = re.compile(r"(?:layers|h|blocks)\.\d+\..*\.weight$")


def check_quantization(info: ModelInfo, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Return if the model can run quantized as configured, or as its checkpoint brings it.

    Raises:
        ConfigError: The device or the dtype does not go with the scheme, a group would be cut, or
            the checkpoint is quantized already.
    """
    field = "model.path" if info.is_quantized else "model.quantization"
    if info.is_quantized and model.quantization != "none":
        raise ConfigError(
            f"model.quantization={model.quantization}: the checkpoint in {info.folder} is "
            f"{info.quantization} already; leave model.quantization at none, or give the model "
            "that it was made from",
            field="model.quantization",
        )
    scheme = info.quantization_for(model.quantization)
    if scheme == "none":
        return
    if model.device != _DEVICES[scheme]:
        raise ConfigError(
            f"{field}: {scheme} runs on model.device={_DEVICES[scheme]}, not on {model.device}; "
            f"{_alternative(model.device)}",
            field=field,
        )
    if scheme == "fp8":
        _check_gpu(field)
    dtype = info.dtype_for(model.dtype)
    if dtype == _REFUSED_DTYPES[scheme]:
        raise ConfigError(
            f"model.dtype={model.dtype}: activations of {scheme} weights are not computed in "
            f"{dtype} on {model.device}; set model.dtype=bfloat16",
            field="model.dtype",
        )
    if scheme == "int4":
        _check_groups(info, model.quantization_group_size, parallel.tp)
    _check_inputs(info, parallel.tp, field)
    if any(".experts." in name for name in read_tensor_index(Path(info.folder))):
        raise ConfigError(
            f"{field}: {scheme} is for linears, and model_type={info.model_type!r} keeps most of "
            "its weights in stacks of experts, which would stay as they are; set "
            "model.quantization=none",
            field=field,
        )


def _alternative(device: str) -> str:
    names = [name for name, where in _DEVICES.items() if where == device]
    return f"on {device} there is {' and '.join(names)}"


def _check_gpu(field: str) -> None:
    import torch  # seconds to import: only where a GPU is asked about

    if not torch.cuda.is_available():  # the gateway's machine may have none: workers check again
        return
    capability = torch.cuda.get_device_capability()
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"{field}: {torch.cuda.get_device_name()} has compute capability {capability}, fp8 "
            f"needs {_FP8_CAPABILITY}; leave model.quantization at none",
            field=field,
        )


def _check_inputs(info: ModelInfo, tp: int, field: str) -> None:
    """Raise if the products cannot take the inputs of a linear on one rank."""
    for name, size in {**_input_sizes(info, tp), "the head": info.hidden_size}.items():
        if size % INPUT_MULTIPLE:
            raise ConfigError(
                f"{field}: {name} has {size} inputs per rank of parallel.tp={tp}, quantized "
                f"products take multiples of {INPUT_MULTIPLE}; use fewer ranks, or "
                "model.quantization=none",
                field=field,
            )


def _check_groups(info: ModelInfo, asked: int, tp: int) -> None:
    """Raise if a scale would be shared across the end of a row or across two ranks."""
    sizes = _input_sizes(info, tp)
    group_size = info.quantization_group_size or asked
    for name, size in sizes.items():
        if size % group_size == 0:
            continue
        share = f"{size} inputs per rank" if tp > 1 else f"{size} inputs"
        if info.is_quantized:
            raise ConfigError(
                f"parallel.tp={tp}: {name} has {share}, the checkpoint's groups of {group_size} "
                "do not divide them; use fewer ranks",
                field="parallel.tp",
            )
        raise ConfigError(
            f"model.quantization_group_size={group_size} does not divide the {share} of {name}; "
            f"use {dividing_group_sizes(*sizes.values())}",
            field="model.quantization_group_size",
        )


def _input_sizes(info: ModelInfo, tp: int) -> dict[str, int]:
    """Return the inputs of each linear of the layers on one rank, by the name of its weight."""
    sizes = {}
    rowwise = [pattern for pattern, style in info.tp_plan.items() if style == "rowwise"]
    for name, shape in linear_shapes(info).items():
        is_split = tp > 1 and any(fnmatchcase(name, f"*{p}.weight") for p in rowwise)
        sizes[name] = shape[1] // tp if is_split else shape[1]
    return sizes


def linear_shapes(info: ModelInfo) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the weights that quantization is for, in the layers."""
    folder = Path(info.folder)
    index = read_tensor_index(folder)
    if info.is_quantized:
        return {n: w.shape for n, w in read_stored_weights(folder, index).items()}
    return {
        name: (entry.shape[0], entry.shape[1])
        for name, entry in index.items()
        if is_linear_of_layer(name) and len(entry.shape) == 2
    }


def is_linear_of_layer(name: str) -> bool:
    """Return whether a tensor of two dims is a linear's weight that quantization is for.

    Mixtures of experts hold theirs in stacks, which no quantized product takes.
    """
    return bool(_LAYER_WEIGHT.search(name)) and ".experts." not in name


def check_kernels(info: ModelInfo, model: ModelConfig) -> None:
    """Return if this machine multiplies weights quantized as configured.

    It builds the kernels where that was not done yet, and imports torch.

    Raises:
        ConfigError: The CPU or the compiler is not there for it.
    """
    scheme = info.quantization_for(model.quantization)
    if model.device != "cpu" or scheme == "none":
        return
    from cluster.model.native_linear import why_not_native

    if reason := why_not_native():
        field = "model.path" if info.is_quantized else "model.quantization"
        raise ConfigError(
            f"{field}: {scheme} needs the kernels for AVX-512 with BF16 and VNNI, and {reason}; "
            "set model.quantization=none and give a model that is not quantized",
            field=field,
        )
