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
from cluster.model.tensor_index import read_tensor_index

logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """The tensors of a checkpoint under the names that transformers' module gives them."""

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

    def has(self, name: str) -> bool:
        """Return whether there is such a tensor."""
        return name in self._index

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor.

        Raises:
            ConfigError: The checkpoint has no such tensor.
        """
        if name not in self._index:
            raise _no_tensor(self._folder, name)
        return self._index[name].shape

    def read(self, name: str, part: slice = slice(None), axis: int = 0) -> Tensor:
        """Return a part of a tensor: a view of the mapped file."""
        num_axes = len(self.shape(name))
        with safe_open(self._index[name].file, framework="pt") as file:
            if num_axes == 0:
                whole: Tensor = file.get_tensor(name)
                return whole
            view: Tensor = file.get_slice(name)[(slice(None),) * axis + (part,)]
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
        return source
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
