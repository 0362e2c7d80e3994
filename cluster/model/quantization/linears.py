"""Which weights of a checkpoint are linears, as transformers' module of the family says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import ConfigError
from cluster.model.quantization.stored import GROUP_SIZES, dividing_group_sizes, unusable
from cluster.model.tensor_index import read_tensor_index


@dataclass(frozen=True, slots=True)
class Linears:
    """The modules of a checkpoint that quantization is for."""

    of_layers: dict[str, int]  # name -> inputs
    head: str  # of the language model
    tied_to: str | None  # tensor that is the head's weight too

    def check_groups(self, scheme: str, group_size: int) -> None:
        """Return if every row of the layers' weights is a whole number of groups.

        Raises:
            ConfigError: One is not.
        """
        if scheme != "int4":
            return
        for name, size in self.of_layers.items():
            if group_size not in GROUP_SIZES or size % group_size:
                raise ConfigError(
                    f"group_size={group_size} cannot be used for the {size} inputs of {name}; "
                    f"use {dividing_group_sizes(*self.of_layers.values())}",
                    field="group_size",
                )


def find_linears(folder: Path) -> Linears:
    """Return the linears of an unquantized checkpoint; no weight is read.

    Raises:
        ConfigError: Its tensors are named or fused differently from the module's.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    index = read_tensor_index(folder)
    tied = model.all_tied_weights_keys
    for name, _ in model.named_parameters():
        if tied.get(name, name) not in index:
            raise unusable(
                folder,
                f"no tensor {name}: its tensors are named or fused differently from transformers' "
                "module (mixtures of experts are); quantize another model",
            )
    head = model.get_output_embeddings()
    of_layers, head_name = {}, ""
    for name, module in model.named_modules():
        if module is head:
            head_name = name
        elif type(module) is nn.Linear:
            of_layers[name] = module.in_features
    weight = f"{head_name}.weight"
    return Linears(of_layers, head_name, tied.get(weight) if weight not in index else None)
