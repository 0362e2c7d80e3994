from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_fakes import VOCAB_SIZE, save_model

from cluster.errors import ConfigError
from cluster.model.checkpoint import check_layout, fingerprint, inspect_checkpoint
from cluster.model.tensor_index import read_tensor_index, tensor_files


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_inspection_finds_the_shape_of_a_model(tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path)
    info = inspect_checkpoint(folder)
    assert (info.vocab_size, info.max_model_len, info.num_layers) == (VOCAB_SIZE, 128, 3)
    assert (info.num_heads, info.num_kv_heads, info.head_dim) == (4, 2, 16)
    assert (info.dtype, info.dtype_for("auto"), info.dtype_for("bfloat16")) == (
        *("float32", "float32", "bfloat16"),
    )
    assert info.eos_token_ids == (2,)
    file_bytes = sum(file.stat().st_size for file in tensor_files(folder))
    assert 0.9 * file_bytes < info.weight_bytes < file_bytes
    rest = info.weight_bytes - sum(info.layer_bytes) - 2 * info.head_bytes
    assert 0 < rest < 1000  # the last norm


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [([5, 6], 2, (5, 6)), (7, 2, (7,)), (None, [3, 4], (3, 4)), (None, None, ())],
)
def test_inspection_finds_the_ends_of_text(
    generation: Any, model: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path)
    edit_json(folder / "config.json", eos_token_id=model)
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    assert inspect_checkpoint(folder).eos_token_ids == expected


def test_inspection_works_without_a_generation_config(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    (folder / "generation_config.json").unlink()
    assert inspect_checkpoint(folder).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "no_such_family"}, "cannot be read"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 8}, "latent attention"),
    ],
    ids=["vision", "unknown", "dynamic rope", "latent"],
)
def test_inspection_refuses_what_cannot_be_served(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        inspect_checkpoint(folder)
    assert caught.value.field == "model.path"
    assert str(caught.value).startswith(f"model.path={folder}: ")


def test_inspection_names_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json; give a folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    folder = save_model("llama", tmp_path)
    (file,) = tensor_files(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="download is incomplete"):
        inspect_checkpoint(folder)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ConfigError, match="no safetensors file"):
        inspect_checkpoint(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors file"):
        inspect_checkpoint(folder)


def test_index_follows_the_files_that_the_checkpoint_names(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    names = list(read_tensor_index(folder))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"no model-00001-of-00001\.safetensors file"):
        read_tensor_index(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / "other.safetensors")
    assert {entry.file.name for entry in read_tensor_index(folder).values()} == {
        "model-00001-of-00001.safetensors"
    }


def test_fingerprint_follows_what_changes_the_cache(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "a")
    first = fingerprint(folder, "auto", 1)
    assert len(first) == 16
    assert first == fingerprint(save_model("llama", tmp_path / "b"), "auto", 1)
    assert first == fingerprint(folder, "float32", 1)
    others = [
        fingerprint(folder, "bfloat16", 1),
        fingerprint(folder, "auto", 2),
        fingerprint(save_model("llama", tmp_path / "c", rope_theta=5e5), "auto", 1),
    ]
    (file,) = tensor_files(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    others.append(fingerprint(folder, "auto", 1))
    assert len({first, *others}) == 5


def test_layout_is_checked_before_anything_starts(tmp_path: Path) -> None:
    info = inspect_checkpoint(save_model("llama", tmp_path / "llama"))
    for tp, pp in ((1, 1), (2, 1), (1, 3), (2, 3)):
        check_layout(info, tp, pp)
    for tp, pp, field, message in (
        (3, 1, "parallel.tp", "does not divide the model's 4 attention heads"),
        (4, 1, "parallel.tp", "does not divide the model's 2 KV heads"),
        (1, 4, "parallel.pp", "limit=3"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            check_layout(info, tp, pp)
        assert caught.value.field == field


def test_layout_of_a_mixture_of_experts_has_one_rank(tmp_path: Path) -> None:
    info = inspect_checkpoint(save_model("mixtral", tmp_path))
    check_layout(info, 1, 3)
    with pytest.raises(ConfigError, match=r"mixtures of experts run with parallel\.tp=1"):
        check_layout(info, 2, 1)


def test_the_gateway_can_import_this_without_torch() -> None:
    code = "import sys, cluster.model.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
