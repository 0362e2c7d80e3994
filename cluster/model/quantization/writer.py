"""Writes a checkpoint anew with its linears quantized, one tensor at a time.

    source file -> plan: what each tensor becomes, from the header -> header of the new file
                -> each tensor: read, quantized, appended

Files keep their names, what is not quantized its bytes. The folder appears when it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.model.quantization.compressed_tensors import written_config
from cluster.model.quantization.linears import Linears, find_linears
from cluster.model.quantization.packing import pack_words
from cluster.model.quantization.stored import read_quantization_config, unusable
from cluster.model.quantization.tensor_file import write_tensors
from cluster.model.quantization.weight import QuantizedWeight, Scheme, head_scheme, quantize
from cluster.model.tensor_index import INDEX_NAME, TensorEntry, read_tensor_index, tensor_files
from cluster.model.weights import SafetensorsSource

_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
WRITTEN_SCHEMES: dict[str, Scheme] = {"int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class WrittenCheckpoint:
    """What `quantize_checkpoint` made."""

    num_quantized: int  # weights
    source_bytes: int  # of all tensors before
    weight_bytes: int  # of all tensors after


def quantize_checkpoint(
    source: Path,
    out: Path,
    scheme: str,
    group_size: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> WrittenCheckpoint:
    """Write `source` to `out` in compressed-tensors format; tokenizer and other files are copied.

    Linears of the layers are quantized in `scheme`, the head in `head_scheme` of it; a tied head
    becomes a weight of its own. Norms, biases and the embedding stay.

    Args:
        source: Folder of an unquantized checkpoint.
        out: Folder to write; must not exist, or be empty. A failure leaves nothing of it.
        scheme: "int8" or "int4".
        group_size: Inputs that share a scale, for "int4".
        on_progress: Called with the source bytes done and in total, after each tensor.

    Raises:
        ConfigError: The source cannot be quantized so, or `out` is not empty.
    """
    if read_quantization_config(source):
        raise unusable(source, "is quantized already; give the model that it was made from")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} is not empty: name another folder", field="out")
    if scheme not in WRITTEN_SCHEMES:
        raise ConfigError(
            f"scheme={scheme}: known here: {', '.join(WRITTEN_SCHEMES)}", field="scheme"
        )
    linears = find_linears(source)
    linears.check_groups(scheme, group_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        job = _Job(source, partial, linears, WRITTEN_SCHEMES[scheme], group_size, on_progress)
        written = job.run()
        partial.chmod(0o755)
        partial.replace(out)
    except BaseException:  # an interrupt, too
        shutil.rmtree(partial)
        raise
    return written


class _Job:
    """One conversion, into a folder that only it knows."""

    def __init__(
        self,
        source: Path,
        out: Path,
        linears: Linears,
        scheme: Scheme,
        group_size: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._source, self._out, self._linears = source, out, linears
        self._scheme, self._group_size = scheme, group_size
        self._on_progress = on_progress
        self._index = read_tensor_index(source)
        self._tensors = SafetensorsSource(source)
        self._total_bytes = sum(entry.num_bytes for entry in self._index.values())
        self._done_bytes = 0
        self._num_quantized = 0

    def run(self) -> WrittenCheckpoint:
        weight_map: dict[str, str] = {}
        weight_bytes = 0
        files = tensor_files(self._source)
        for file in files:
            names = [name for name, entry in self._index.items() if entry.file == file]
            plan = {k: v for name in names for k, v in self._plan(name).items()}
            tensors = (tensor for name in names for tensor in self._convert(name))
            weight_bytes += write_tensors(self._out / file.name, plan, tensors)
            weight_map |= dict.fromkeys(plan, file.name)
        if (self._source / INDEX_NAME).is_file():
            index = {"metadata": {"total_size": weight_bytes}, "weight_map": weight_map}
            (self._out / INDEX_NAME).write_text(json.dumps(index, indent=2))
        self._copy_others()
        return WrittenCheckpoint(self._num_quantized, self._total_bytes, weight_bytes)

    def _copy_others(self) -> None:
        for file in sorted(self._source.iterdir()):
            is_ours = file.name in (INDEX_NAME, "config.json")
            if file.is_file() and file.suffix not in _OTHER_WEIGHTS and not is_ours:
                shutil.copyfile(file, self._out / file.name)
        config = json.loads((self._source / "config.json").read_text())
        config["quantization_config"] = written_config(
            self._scheme, self._group_size, self._linears.head
        )
        config["tie_word_embeddings"] = False
        (self._out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _schemes(self, name: str) -> dict[str, Scheme]:
        """Return the weights that are made from a tensor, by name, with their schemes."""
        linears = self._linears
        if name == linears.tied_to:
            return {f"{linears.head}.weight": head_scheme(self._scheme)}
        module = name.removesuffix(".weight")
        if module == linears.head:
            return {name: head_scheme(self._scheme)}
        return {name: self._scheme} if module in linears.of_layers else {}

    def _plan(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of all that a tensor becomes, in order."""
        entry, schemes = self._index[name], self._schemes(name)
        plan = {}
        if name not in schemes:
            plan[name] = entry.dtype, entry.shape
        for weight, scheme in schemes.items():
            plan |= _stored_as(weight, entry, scheme, self._group_size)
        return plan

    def _convert(self, name: str) -> Iterator[Tensor]:
        """Make what `_plan` says."""
        schemes = self._schemes(name)
        tensor = self._tensors.read(name)
        if name not in schemes:
            yield tensor
        for scheme in schemes.values():
            weight = quantize(tensor, scheme, self._group_size)
            if not bool(weight.scales.isfinite().all()):
                raise unusable(self._source, f"{name} holds NaN or infinity; get it again")
            self._num_quantized += 1
            yield from _parts(weight)
        self._done_bytes += self._index[name].num_bytes
        if self._on_progress:
            self._on_progress(self._done_bytes, self._total_bytes)


def _stored_as(
    name: str, entry: TensorEntry, scheme: Scheme, group_size: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    module = name.removesuffix(".weight")
    num_outputs, num_inputs = entry.shape
    if scheme != "int4":
        return {
            name: ("I8", (num_outputs, num_inputs)),
            f"{module}.weight_scale": ("BF16", (num_outputs, 1)),
        }
    num_groups = num_inputs // group_size
    return {
        f"{module}.weight_packed": ("I32", (num_outputs, num_inputs // 8)),
        f"{module}.weight_scale": ("BF16", (num_outputs, num_groups)),
        f"{module}.weight_shape": ("I64", (2,)),
    }


def _parts(weight: QuantizedWeight) -> Iterator[Tensor]:
    """Return what `_stored_as` names, in its order."""
    if weight.scheme != "int4":
        yield weight.codes
        yield weight.scales.bfloat16()[:, None]
        return
    yield pack_words(weight.codes)
    yield weight.scales.bfloat16()
    yield torch.tensor(weight.shape)
