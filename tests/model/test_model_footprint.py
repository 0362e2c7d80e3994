"""What a worker takes, by hand from a model of round numbers, and what there is to take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from cluster.model import footprint
from cluster.model.footprint import available_bytes, check_fits, weight_bytes_of_worker
from cluster.model.model_info import ModelInfo

LAYERS, HEAD, TABLE = 8_000, 2_000, 2_000  # bytes in bfloat16
BLOCK = 2 * 8 * 16 * 2 * 8 * 2  # keys and values, layers, tokens, heads, channels, bytes


def make_info(**changes: Any) -> ModelInfo:
    """Return a model of 8 layers of 500 weights, with a head and a table of 100 x 10."""
    fields: dict[str, Any] = {
        "folder": "nowhere",
        "model_type": "llama",
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "hidden_size": 10,
        "intermediate_size": 20,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": "bfloat16",
        "eos_token_ids": (2,),
        "weight_bytes": LAYERS + HEAD + TABLE,
        "layer_bytes": (LAYERS // 8,) * 8,
        "head_bytes": HEAD,
        "is_tied": False,
        "tp_plan": {},
        "can_be_staged": True,
    }
    return ModelInfo(**{**fields, **changes})


def make_config(*overrides: str) -> ClusterConfig:
    """Return a configuration whose host tier has seven blocks, and a rest that is not taken."""
    host = f"cache.host_memory_bytes={7 * BLOCK + 1}"
    return load_config(None, ["cache.num_blocks=10", host, *overrides])


@pytest.mark.parametrize(
    ("overrides", "num_bytes"),
    [
        ([], LAYERS + HEAD),
        (["parallel.tp=2"], (LAYERS + HEAD) / 2),
        (["parallel.pp=2"], 5 * LAYERS / 8),  # the other stage: 3 layers, and a head like 2
        (["parallel.tp=2", "parallel.pp=2"], 5 * LAYERS / 8 / 2),
        (["model.quantization=int8"], (LAYERS + HEAD) / 2),
        # A head stays at 8 bits; a group of 32 has 3 bytes besides its codes.
        (
            ["model.quantization=int4", "model.quantization_group_size=32"],
            LAYERS / 2 * (0.5 + 3 / 32) + HEAD / 2,
        ),
        # Converted, the table is no longer the file's: every rank of the first stage has all of it.
        (["model.dtype=float32"], 2 * (LAYERS + HEAD + TABLE)),
        (["model.dtype=float32", "parallel.tp=2"], LAYERS + HEAD + 2 * TABLE),
        (["model.dtype=float32", "parallel.pp=2"], 2 * (5 * LAYERS / 8 + TABLE)),
        (["model.device=cuda"], LAYERS + HEAD + TABLE),
        (["model.device=cuda", "model.quantization=fp8"], (LAYERS + HEAD) / 2 + TABLE),
    ],
)
def test_weights_of_the_heaviest_worker(overrides: list[str], num_bytes: float) -> None:
    config = make_config(*overrides)
    assert weight_bytes_of_worker(make_info(), config) == num_bytes
    # A tied head is packed like another: the table beside it stays in the file.
    assert weight_bytes_of_worker(make_info(is_tied=True), config) == num_bytes


def test_quantized_weights_lie_in_memory_as_in_the_file() -> None:
    info = make_info(quantization="int4", quantization_group_size=32)
    assert weight_bytes_of_worker(info, make_config()) == LAYERS + HEAD
    converted = make_config("model.dtype=float32")
    assert weight_bytes_of_worker(info, converted) == LAYERS + HEAD + 2 * TABLE


@pytest.mark.parametrize(
    ("overrides", "num_workers", "worker_bytes"),
    [
        ([], 1, LAYERS + HEAD + 17 * BLOCK),
        (
            [
                "parallel.tp=2",
                "replica.num_replicas=2",
                f"cache.host_memory_bytes={7 * BLOCK // 2}",
            ],
            4,
            (LAYERS + HEAD + 17 * BLOCK) / 2,
        ),
        (
            ['replica.autoscaling={"min_replicas": 1, "max_replicas": 3}'],
            3,
            LAYERS + HEAD + 17 * BLOCK,
        ),
    ],
)
def test_what_all_groups_take_has_to_be_free(
    overrides: list[str], num_workers: int, worker_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, config = make_info(), make_config(*overrides)
    wanted = round(num_workers * worker_bytes)
    monkeypatch.setattr(footprint, "available_bytes", lambda: wanted)
    check_fits(info, config)
    monkeypatch.setattr(footprint, "available_bytes", lambda: wanted - 1)
    with pytest.raises(ConfigError) as caught:
        check_fits(info, config)
    weights = weight_bytes_of_worker(info, config)
    assert caught.value.field == "model.path"
    block = (round(worker_bytes) - weights) // 17
    assert (
        f"{num_workers} workers x ({weights} bytes of weights + {10 * block} bytes of KV cache + "
        f"{7 * block} bytes of host tier) = {wanted} bytes, {wanted - 1} are free"
    ) in str(caught.value)


def test_memory_of_this_machine_does_not_bind_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "available_bytes", lambda: 0)
    check_fits(make_info(), make_config("model.device=cuda"))


def test_cache_without_a_block_is_refused() -> None:
    config = make_config("cache.num_blocks=0", "cache.memory_bytes=1048576")
    wanted = rf"^cache\.memory_bytes=1048576, at least {1024 * BLOCK} are needed"
    with pytest.raises(ConfigError, match=wanted):
        check_fits(make_info(head_dim=1024 * 8), config)


@pytest.mark.parametrize(
    ("limit", "used", "num_bytes"),
    [
        ("1000", "700", 1000 - 700 + 250),
        ("max", "700", 9000),
        ("50000", "700", 9000),  # more than the machine has
        (None, "700", 9000),  # no container
        ("1000", "unreadable", 9000),
    ],
)
def test_a_container_has_its_own_limit(
    limit: str | None, used: str, num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SimpleNamespace(available=9000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: machine)
    monkeypatch.setattr(footprint, "CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text("anon 450\nfile 250\ninactive_file 250\n")
    assert available_bytes() == num_bytes
