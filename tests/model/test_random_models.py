from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import cluster.model
from cluster.errors import InvalidArgumentError
from cluster.model import random_models
from cluster.model.random_models import SHAPES, write_random_model

DEMO = Path(cluster.model.__file__).parent / "demo"


def test_tiny_loads_in_transformers_with_every_weight(tmp_path: Path) -> None:
    total_bytes = write_random_model("tiny", tmp_path / "m", tokenizer_from=DEMO)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) * 2 == total_bytes
    weights = model.model.layers[1].mlp.gate_proj.weight.float()
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert weights.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert torch.all(model.model.norm.weight == 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    logits_TV = model(**tokenizer("def f(x):", return_tensors="pt")).logits[0]
    assert logits_TV.shape[1] == SHAPES["tiny"].vocab and torch.isfinite(logits_TV).all()


def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_random_model("tiny", tmp_path / name, seed=seed, tokenizer_from=DEMO)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize("dtype", sorted(random_models.DTYPES))
def test_dtype_is_that_of_the_file(tmp_path: Path, dtype: str) -> None:
    write_random_model("tiny", tmp_path / "m", dtype=dtype, tokenizer_from=DEMO)
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {random_models.DTYPES[dtype]}


def test_shards_stay_within_the_limit_and_hold_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model("tiny", tmp_path / "whole", tokenizer_from=DEMO)
    monkeypatch.setattr(random_models, "MAX_SHARD_BYTES", 50_000)
    total_bytes = write_random_model("tiny", tmp_path / "split", tokenizer_from=DEMO)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total_bytes
    shards = sorted((tmp_path / "split").glob("*.safetensors"))
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    # The embedding alone is over the limit and has a file of its own.
    too_large = [s.name for s in shards if s.stat().st_size > 50_000 + 4096]
    assert too_large == [index["weight_map"]["model.embed_tokens.weight"]]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    split = AutoModelForCausalLM.from_pretrained(tmp_path / "split").state_dict()
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total_bytes = write_random_model(
        "tiny",
        tmp_path / "m",
        tokenizer_from=DEMO,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) == len(SHAPES["tiny"].tensors())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {total_bytes}
    assert seen[-1] == (total_bytes, total_bytes)


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    [
        ("llama-0.5b", 494_005_120),  # Qwen2.5-0.5B's 494,032,768 less its q, k and v biases
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_shape_has_the_size_of_the_published_model(shape: str, num_parameters: int) -> None:
    assert SHAPES[shape].num_bytes(torch.bfloat16) == num_parameters * 2


def test_unknown_shape_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="llama-9t") as caught:
        write_random_model("llama-9t", tmp_path / "m", tokenizer_from=DEMO)
    assert all(name in str(caught.value) for name in SHAPES)
    assert caught.value.field == "shape"
    assert not (tmp_path / "m").exists()


def test_folder_in_use_is_an_error_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        write_random_model("tiny", tmp_path, tokenizer_from=DEMO)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_unknown_dtype_and_missing_tokenizer_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="float8"):
        write_random_model("tiny", tmp_path / "m", dtype="float8", tokenizer_from=DEMO)
    with pytest.raises(InvalidArgumentError, match=r"tokenizer\.json"):
        write_random_model("tiny", tmp_path / "m", tokenizer_from=tmp_path)
    assert not (tmp_path / "m").exists()
