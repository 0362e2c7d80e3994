from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_fakes import make_runner, save_model
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.collective import NoCollective
from cluster.model.layout import ShardSpec
from cluster.model.linear import PackedLinear, RowParallelLinear, VocabParallelHead, why_not_packed
from cluster.model.loader import Placement, Stage, load_stage
from cluster.model.memory import peak_rss_bytes, rss_bytes
from cluster.model.stage import SkippedLayer
from cluster.model.weights import ModuleSource, SafetensorsSource

CPU = torch.device("cpu")


def load(folder: Path, shard: ShardSpec, dtype: torch.dtype = torch.float32) -> Stage:
    placement = Placement(shard, dtype, CPU, NoCollective())
    return load_stage(inspect_checkpoint(folder), placement)


def test_a_rank_holds_its_share_of_each_linear(tmp_path: Path) -> None:
    folder = save_model("llama_tied", tmp_path)
    shares = [load(folder, ShardSpec(rank, 2, 0, 1)).model for rank in range(2)]
    for model in shares:
        attention = model.model.layers[0].self_attn
        assert (attention.q_proj.out_features, attention.k_proj.out_features) == (16, 8)
        assert isinstance(attention.o_proj, RowParallelLinear)
        assert isinstance(model.lm_head, VocabParallelHead)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    x = torch.randn(3, 32)
    logits = torch.cat([model.lm_head(x) for model in shares], dim=-1)
    torch.testing.assert_close(logits[:, : len(table)], x @ table.T)
    assert logits.shape == (3, 132)  # 131 rows: two shares of 66, one of them padding
    assert not logits[:, 131].any()


def test_a_stage_holds_its_layers_only(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    first, last = (load(folder, ShardSpec(0, 1, rank, 2)) for rank in range(2))
    assert [*first.layers, *last.layers] == [0, 1, 2]
    for stage in (first, last):
        skipped = [isinstance(layer, SkippedLayer) for layer in stage.model.model.layers]
        assert skipped == [index not in stage.layers for index in range(3)]
        assert not any(p.is_meta for p in stage.model.parameters())
    assert isinstance(first.model.lm_head, torch.nn.Identity)
    assert isinstance(first.model.model.norm, torch.nn.Identity)
    assert isinstance(last.model.model.embed_tokens, torch.nn.Identity)


def test_the_embedding_table_stays_in_the_file(tmp_path: Path) -> None:
    folder = save_model("llama_tied", tmp_path)
    table = load(folder, ShardSpec(0, 1, 0, 1)).model.model.embed_tokens.weight
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [line[0].split("-") for line in maps if line[-1] == str(folder / "model.safetensors")]
    assert any(int(a, 16) <= table.data_ptr() < int(b, 16) for a, b in mapped)
    assert len(mapped) == 1  # nothing else keeps the file mapped


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, ShardSpec(0, 1, 0, 1))


def test_ranks_do_not_each_load_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert load(folder, ShardSpec(0, 1, 0, 1)).layers == range(3)
    with pytest.raises(ConfigError, match=r"parallel\.tp=2: .* to read slices of"):
        load(folder, ShardSpec(0, 2, 0, 1))


def test_sources_read_the_same_slices(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    mapped = SafetensorsSource(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    for part, axis in ((slice(3, 9), 0), (slice(5, 20), 1), (slice(None), 0)):
        held = ModuleSource(load_file(folder / "model.safetensors"))
        assert torch.equal(mapped.read(name, part, axis), held.read(name, part, axis))
        assert not held.has(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_torch(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 16).to(dtype)
    bias = torch.randn(24).to(dtype) if has_bias else None
    linear = PackedLinear(weight, bias)
    assert linear.is_packed == (not why_not_packed(dtype, CPU))
    for shape in ((1, 1, 16), (1, 7, 16), (40, 16)):
        x = torch.randn(shape).to(dtype)
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(linear(x), expected, atol=1e-2, rtol=1e-2)


def test_row_parallel_adds_its_bias_once() -> None:
    class Doubling(NoCollective):
        def all_reduce_(self, tensor: torch.Tensor) -> None:
            tensor.mul_(2)

    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    out = RowParallelLinear(weight, bias, Doubling())(x)
    torch.testing.assert_close(out, 2 * x @ weight.T + bias)


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = [save_model(family, tmp_path / family) for family in ("llama", "mixtral")]
    capfd.readouterr()
    for folder in folders:
        make_runner(folder)
    assert capfd.readouterr() == ("", "")


def test_memory_is_read_from_the_kernel() -> None:
    assert 2**20 < rss_bytes() <= peak_rss_bytes()
