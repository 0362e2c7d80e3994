"""Where a stage's weights come from, a slice at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from cluster.errors import ConfigError
from cluster.model.quantization.reader import StoredTensors, read_quantized
from cluster.model.quantization.stored import StoredWeight, read_stored_weights
from cluster.model.quantization.weight import dequantize
from cluster.model.tensor_index import read_tensor_index

logger = logging.getLogger(__name__)


class WeightSource(StoredTensors, Protocol):
    """The tensors of a checkpoint under the names that transformers' module gives them.

    A quantized weight has the name and the shape of the unquantized one;
    `quantization.reader.read_quantized` reads it.
    """

    def has(self, name: str) -> bool:
        """Return whether there is such a tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        ...

    def read(self, name: str, part: slice = slice(None), axis: int = 0) -> Tensor:
        """Return a part of a tensor along one axis.

        It may be a view of a mapped file: whoever keeps it copies it, so that the mapping closes
        and its pages leave the process.
        """
        ...


class SafetensorsSource:
    """Reads slices of safetensors files; a file is mapped only while what it gave is alive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = read_tensor_index(folder)
        self._stored = read_stored_weights(folder, self._index)
        self.is_quantized = bool(self._stored)

    def has(self, name: str) -> bool:
        """Return whether there is such a tensor."""
        return name in self._index or name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor.

        Raises:
            ConfigError: The checkpoint has no such tensor.
        """
        if name in self._stored:
            return self._stored[name].shape
        if name not in self._index:
            raise _no_tensor(self._folder, name)
        return self._index[name].shape

    def read(self, name: str, part: slice = slice(None), axis: int = 0) -> Tensor:
        """Return a part of a tensor: a view of the mapped file, but of a quantized weight."""
        parts = (slice(None),) * axis + (part,)
        if name not in self._stored:
            return self.read_stored(name, *parts)
        weight = read_quantized(self, name, *parts)
        assert weight is not None
        return dequantize(weight)

    def stored(self, name: str) -> StoredWeight | None:
        """Return how a quantized weight is stored; None of any other tensor."""
        return self._stored.get(name)

    def read_stored(self, name: str, *parts: slice) -> Tensor:
        """Return a part of a tensor as it is in the file: a view of it."""
        if name not in self._index:
            raise _no_tensor(self._folder, name)
        with safe_open(self._index[name].file, framework="pt") as file:
            if not self._index[name].shape:
                whole: Tensor = file.get_tensor(name)
                return whole
            view: Tensor = file.get_slice(name)[parts or (slice(None),)]
        return view


class ModuleSource:
    """Hands out the tensors of a module that transformers loaded, and lets go of each.

    For checkpoints whose tensors are named or fused differently from the module's: transformers
    converts them, for the price of the whole model in memory for the time of loading.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def has(self, name: str) -> bool:
        """Return whether there is such a tensor."""
        return name in self._state

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        return tuple(self._state[name].shape)

    def read(self, name: str, part: slice = slice(None), axis: int = 0) -> Tensor:
        """Return a part of a tensor, once."""
        tensor: Tensor = self._state.pop(name)
        return tensor[(slice(None),) * axis + (part,)] if tensor.ndim else tensor

    def stored(self, name: str) -> StoredWeight | None:
        """Return None: transformers does not load quantized checkpoints for us."""
        return None

    def read_stored(self, name: str, *parts: slice) -> Tensor:
        """Raise: `stored` names nothing that could be read."""
        raise AssertionError(f"{name} is not quantized")


def open_source(model: Any, folder: Path, dtype: torch.dtype, tp: int) -> WeightSource:
    """Return a source for the parameters of `model`.

    Args:
        model: Causal LM of transformers, cut to its stage; its parameters' names are looked up.
        folder: Of the checkpoint.
        dtype: That transformers loads in, where it has to.
        tp: Ranks that share the tensors.

    Raises:
        ConfigError: A file or tensor is missing, or only transformers knows how to read the
            checkpoint and there are several ranks: each would hold all of it.
    """
    source = SafetensorsSource(folder)
    tied = model.all_tied_weights_keys
    names = [name for name, _ in model.named_parameters()]
    strange = [name for name in names if not source.has(tied.get(name, name))]
    if not strange:
        _check_shapes(source, model, folder)
        return source
    if source.is_quantized:
        raise ConfigError(
            f"model.path={folder}: the checkpoint is quantized and has no tensor {strange[0]}; "
            "its tensors are named or fused differently, take the model that it was made from",
            field="model.path",
        )
    if tp > 1:
        raise ConfigError(
            f"parallel.tp={tp}: the checkpoint in {folder} has no tensor {strange[0]} to read "
            "slices of; use parallel.tp=1 or write it anew with transformers' save_pretrained",
            field="parallel.tp",
        )
    logger.info("%s: its tensors are named or fused differently: transformers loads it", folder)
    with _quiet_transformers():
        whole, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise _no_tensor(folder, missing[0])
    return ModuleSource(whole.state_dict())


def _check_shapes(source: SafetensorsSource, model: Any, folder: Path) -> None:
    """Raise ConfigError if a tensor has not the shape that config.json promises."""
    for name, parameter in model.named_parameters():
        shape = source.shape(model.all_tied_weights_keys.get(name, name))
        if shape != tuple(parameter.shape):
            raise ConfigError(
                f"model.path={folder}: {name} has shape {list(shape)}, config.json promises "
                f"{list(parameter.shape)}; get the checkpoint again",
                field="model.path",
            )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars and load reports off the terminal; what matters in them is an error."""
    shows_progress = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def _no_tensor(folder: Path, name: str) -> ConfigError:
    return ConfigError(
        f"model.path={folder}: no tensor {name}; get the checkpoint again", field="model.path"
    )
