"""What cannot run quantized is refused from headers, before a process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_fakes import save_model

from cluster.config import DEMO_MODEL_PATH, ModelConfig, ParallelConfig
from cluster.errors import ConfigError
from cluster.kernels import native
from cluster.model.checkpoint import check_quantization, inspect_checkpoint
from cluster.model.quantization.check import check_kernels
from cluster.model.quantization.writer import quantize_checkpoint


def check(folder: Path, tp: int = 1, **model: Any) -> None:
    config = ModelConfig(path=str(folder), **model)
    check_quantization(inspect_checkpoint(folder), config, ParallelConfig(tp=tp))


def test_what_can_run_passes(tmp_path: Path) -> None:
    check(DEMO_MODEL_PATH)
    check(DEMO_MODEL_PATH, tp=2, quantization="int8")
    check(DEMO_MODEL_PATH, quantization="int8", dtype="float32")
    check(DEMO_MODEL_PATH, quantization="int4", quantization_group_size=32)
    check(DEMO_MODEL_PATH, quantization="fp8", device="cuda")
    quantize_checkpoint(DEMO_MODEL_PATH, tmp_path / "out", "int4", 32)
    check(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        (
            {"quantization": "int4"},
            "model.quantization_group_size",
            r"=128 does not divide the 864 inputs of .*down_proj\.weight; use 32$",
        ),
        (
            {"quantization": "int4", "quantization_group_size": 64},
            "model.quantization_group_size",
            r"=64 does not divide the 864 inputs of .*down_proj\.weight; use 32$",
        ),
        (
            {"quantization": "int4", "quantization_group_size": 32, "tp": 2},
            "model.quantization_group_size",
            r"does not divide the 432 inputs per rank of .*down_proj.*; use model\.quantization=",
        ),
        (
            {"quantization": "int8", "device": "cuda"},
            "model.quantization",
            r"int8 runs on model\.device=cpu, not on cuda; on cuda there is fp8$",
        ),
        (
            {"quantization": "fp8"},
            "model.quantization",
            r"fp8 runs on model\.device=cuda, not on cpu; on cpu there is int8 and int4$",
        ),
        (
            {"quantization": "int8", "dtype": "float16"},
            "model.dtype",
            r"model\.dtype=float16: .* set model\.dtype=bfloat16$",
        ),
        (
            {"quantization": "fp8", "device": "cuda", "dtype": "float32"},
            "model.dtype",
            r"are not computed in float32 on cuda",
        ),
    ],
)
def test_what_cannot_run_is_refused(settings: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(DEMO_MODEL_PATH, **settings)
    assert caught.value.field == field


def test_inputs_that_the_products_do_not_take_are_refused(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)  # 48 columns of the MLP
    check(folder, quantization="int8")
    with pytest.raises(
        ConfigError, match=r"down_proj\.weight has 24 inputs per rank of parallel\.tp=2, .* of 16"
    ) as caught:
        check(folder, tp=2, quantization="int8")
    assert caught.value.field == "model.quantization"


def test_experts_are_refused(tmp_path: Path) -> None:
    folder = save_model("mixtral", tmp_path)
    check(folder)
    with pytest.raises(ConfigError, match=r"model_type='mixtral' keeps .* stacks of experts"):
        check(folder, quantization="int8")


def test_a_machine_without_the_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quantize_checkpoint(DEMO_MODEL_PATH, tmp_path / "out", "int8", 32)
    monkeypatch.setattr(native, "_load", lambda: ("", "SLUICE_KERNELS=torch asks for it"))

    def check_machine(folder: Path, **model: Any) -> None:
        check_kernels(inspect_checkpoint(folder), ModelConfig(path=str(folder), **model))

    check_machine(DEMO_MODEL_PATH)
    check_machine(DEMO_MODEL_PATH, quantization="fp8", device="cuda")
    for folder, settings, field in (
        (DEMO_MODEL_PATH, {"quantization": "int8"}, "model.quantization"),
        (tmp_path / "out", {}, "model.path"),
    ):
        with pytest.raises(ConfigError, match=r"int8 needs .* SLUICE_KERNELS=torch") as caught:
            check_machine(folder, **settings)
        assert caught.value.field == field
    monkeypatch.setattr(native, "_load", lambda: ("avx2", ""))
    with pytest.raises(ConfigError, match=r"the kernels for avx2 have no matrix products"):
        check_machine(DEMO_MODEL_PATH, quantization="int4")


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"Old GPU has compute capability \(8, 0\), fp8 needs"):
        check(DEMO_MODEL_PATH, quantization="fp8", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check(DEMO_MODEL_PATH, quantization="fp8", device="cuda")


def test_a_quantized_checkpoint_brings_its_own(tmp_path: Path) -> None:
    source = save_model("llama_tied", tmp_path / "source", intermediate_size=64)
    out = tmp_path / "out"
    quantize_checkpoint(source, out, "int4", 32)
    check(source, tp=2, quantization="int8")
    with pytest.raises(ConfigError, match=r"=int8: the checkpoint in .* is int4 already"):
        check(out, quantization="int8")
    with pytest.raises(
        ConfigError, match=r"^model\.path: int4 runs on model\.device=cpu"
    ) as caught:
        check(out, device="cuda")
    assert caught.value.field == "model.path"
    with pytest.raises(ConfigError, match=r"16 inputs per rank, .* groups of 32 .* fewer ranks"):
        check(out, tp=2)
