"""`quantize_checkpoint`: what it writes, and that a failure leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_fakes import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import ConfigError
from cluster.model.checkpoint import fingerprint, inspect_checkpoint
from cluster.model.quantization.reader import read_quantized
from cluster.model.quantization.weight import QuantizedWeight, quantize
from cluster.model.quantization.writer import quantize_checkpoint
from cluster.model.tensor_index import read_tensor_index, tensor_files
from cluster.model.weights import SafetensorsSource, open_source

LAYER = "model.layers.1"
LINEAR = f"{LAYER}.mlp.down_proj.weight"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model("llama_tied", tmp_path / "source", intermediate_size=64, dtype="bfloat16")


def equal(ours: QuantizedWeight | None, theirs: QuantizedWeight) -> bool:
    assert ours is not None
    pairs = zip((ours.codes, ours.scales), (theirs.codes, theirs.scales), strict=True)
    return ours.scheme == theirs.scheme and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("scheme", "group_size"), [("int8", 0), ("int4", 32)])
def test_what_is_read_is_what_would_be_made_while_loading(
    scheme: str, group_size: int, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    written = quantize_checkpoint(source, out, scheme, group_size or 128)
    before, after = SafetensorsSource(source), SafetensorsSource(out)
    made = quantize(before.read(LINEAR), scheme, group_size)  # type: ignore[arg-type]
    assert equal(read_quantized(after, LINEAR), made)
    assert equal(read_quantized(after, HEAD), quantize(before.read(TABLE), "int8", 0))
    for name in (TABLE, f"{LAYER}.input_layernorm.weight", "model.norm.weight"):
        assert read_quantized(after, name) is None
        assert torch.equal(after.read(name), before.read(name))
    info, old = inspect_checkpoint(out), inspect_checkpoint(source)
    assert (info.quantization, info.quantization_group_size) == (scheme, group_size)
    assert (info.dtype, info.is_tied, info.vocab_size) == (old.dtype, False, old.vocab_size)
    assert info.layer_bytes[0] < (0.6 if scheme == "int8" else 0.4) * old.layer_bytes[0]
    assert info.head_bytes == old.head_bytes // 2 + 2 * info.vocab_size
    assert (written.num_quantized, written.weight_bytes) == (3 * 7 + 1, info.weight_bytes)
    assert written.source_bytes == old.weight_bytes
    assert list(tmp_path.glob("new/*")) == [out]


def test_every_file_keeps_its_name(source: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="20KB")
    (sharded / "tokenizer.json").write_text('{"any": "thing"}')
    (sharded / "pytorch_model.bin").write_bytes(b"weights in another format")
    names = [file.name for file in tensor_files(sharded)]
    assert len(names) > 2
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    quantize_checkpoint(sharded, out, "int4", 32, on_progress=lambda *at: seen.append(at))
    assert [file.name for file in tensor_files(out)] == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_tensor_index(out))
    assert index["metadata"]["total_size"] == inspect_checkpoint(out).weight_bytes
    assert (out / "tokenizer.json").read_text() == '{"any": "thing"}'
    assert not (out / "pytorch_model.bin").exists()
    total = inspect_checkpoint(sharded).weight_bytes
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_the_files_are_what_safetensors_reads(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", "int4", 32)
    (file,) = tensor_files(tmp_path / "out")
    tensors = load_file(file)
    module = LINEAR.removesuffix(".weight")
    assert tensors[f"{module}.weight_packed"].dtype is torch.int32
    assert tensors[f"{module}.weight_packed"].shape == (32, 64 // 8)
    assert tensors[f"{module}.weight_scale"].shape == (32, 2)
    assert tensors[f"{module}.weight_shape"].tolist() == [32, 64]
    assert (int.from_bytes(file.read_bytes()[:8], "little") + 8) % 8 == 0


def test_an_own_head_is_quantized_in_place(tmp_path: Path) -> None:
    source = save_model("qwen3", tmp_path / "source", intermediate_size=64)
    quantize_checkpoint(source, tmp_path / "out", "int4", 32)
    before, after = SafetensorsSource(source), SafetensorsSource(tmp_path / "out")
    assert equal(read_quantized(after, HEAD), quantize(before.read(HEAD), "int8", 0))


def test_fingerprints_differ_by_quantization(source: Path, tmp_path: Path) -> None:
    folders = [source]
    for scheme in ("int8", "int4"):
        folders.append(tmp_path / scheme)
        quantize_checkpoint(source, folders[-1], scheme, 32)
    prints = [fingerprint(folder, "auto", 1) for folder in folders]
    prints.append(fingerprint(source, "auto", 1, precision="int8"))
    assert len(set(prints)) == 4


def test_a_failure_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, "int8", 128, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == [source]
    (file,) = tensor_files(source)
    tensors = load_file(file)
    tensors[LINEAR][3, 3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"down_proj\.weight holds NaN or infinity"):
        quantize_checkpoint(source, out, "int8", 128)
    assert list(tmp_path.iterdir()) == [source]


def _occupy(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").touch()


def _quantize_twice(source: Path, out: Path) -> None:
    quantize_checkpoint(source, out, "int8", 128)
    shutil.rmtree(source)
    out.rename(source)


@pytest.mark.parametrize(
    ("scheme", "group_size", "prepare", "message"),
    [
        ("int4", 128, None, r"=128 cannot be used for the 32 inputs of .*; use 32$"),
        ("int4", 16, None, r"group_size=16 cannot be used .*; use 32$"),
        ("int2", 32, None, r"scheme=int2: known here: int8, int4"),
        ("int8", 128, _occupy, r"out=.*out is not empty"),
        ("int8", 128, _quantize_twice, r"is quantized already; give the model"),
    ],
)
def test_what_cannot_be_written_is_refused(
    scheme: str,
    group_size: int,
    prepare: Callable[[Path, Path], None] | None,
    message: str,
    source: Path,
    tmp_path: Path,
) -> None:
    if prepare:
        prepare(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(source, tmp_path / "out", scheme, group_size)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "source")
    with pytest.raises(ConfigError, match=r"named or fused differently .*; quantize another model"):
        quantize_checkpoint(source, tmp_path / "out", "int8", 128)


def test_fused_tensors_of_a_quantized_checkpoint_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(source, out, "int8", 128)
    (file,) = tensor_files(out)
    tensors = load_file(file)
    tensors["other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, {"format": "pt"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    with pytest.raises(ConfigError, match=r"is quantized and has no tensor model\.norm\.weight"):
        open_source(model, out, torch.float32, 1)
