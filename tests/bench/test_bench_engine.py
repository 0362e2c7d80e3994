"""`sluice bench engine` on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.bench import engine as engine_module
from cluster.bench.engine import EngineLoad, profile_round, run_engine_bench
from cluster.bench.engine_report import engine_report, profile_table
from cluster.bench.engine_setup import attention_of
from cluster.bench.hardware import HardwarePeaks
from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.kernels import cuda, native
from cluster.model.checkpoint import inspect_checkpoint
from tests.cli.cli_run import error_of, run
from tests.model.model_fakes import save_model

CONTRACT = {
    "out_tokens_per_s",
    "total_tokens_per_s",
    "wall_s",
    "load_s",
    "ttft_s",
    "single_stream_tokens_per_s",
    "peak_rss_bytes",
    "weight_bytes",
    "kv_cache_bytes",
    "memory_bandwidth_share",
    "matrix_peak_share",
    "engine_overhead_share",
    "batch_ttft_s",
    "batch_tpot_s",
}
SMALL = ["--requests=3", "--input-len=20", "--output-len=4", "--threads=1", "--dtype=float32"]


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes take seconds; they have tests of their own."""
    monkeypatch.setattr(
        engine_module, "measure_peaks", lambda device, kind: HardwarePeaks(1e9, 1e9, kind)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def command(folder: Path, *more: str) -> dict[str, Any]:
    result = run("bench", "engine", f"--model={folder}", *SMALL, *more, "--json")
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def test_bench_engine_prints_the_contract_and_its_figures_agree(folder: Path) -> None:
    figures = command(folder, "--rounds=2")
    result = figures["result"]
    assert result.keys() >= CONTRACT
    plain = [result[name] for name in CONTRACT if not name.startswith("batch_")]
    assert all(math.isfinite(value) and value > 0 for value in plain)
    assert result["num_requests"] == 2 * 3
    assert result["num_out_tokens"] == 2 * 3 * 4
    assert len(result["rounds_out_tokens_per_s"]) == 2
    ratio = result["total_tokens_per_s"] / result["out_tokens_per_s"]
    assert ratio == pytest.approx((20 + 4) / 4)
    assert result["cached_token_share"] == 0.0
    assert result["decode_batch"] == 3
    assert 0 < result["scheduling_share"] <= result["engine_overhead_share"] < 1
    assert figures["engine"]["threads"] == 1
    assert figures["engine"]["attention"] == ("native" if native.isa() else "plain")
    assert figures["engine"]["decode_graphs"] is False
    # 3 requests of 24 tokens in blocks of 16, float32 keys and values of 3 layers, 2 heads of 8
    assert figures["engine"]["num_blocks"] == 3 * 2
    assert result["kv_cache_bytes"] == 3 * 2 * 16 * 2 * 3 * 2 * 8 * 4
    assert figures["provenance"]["command"]


def test_bench_engine_shared_prefix_comes_from_the_cache(folder: Path) -> None:
    figures = command(folder, "--shared-prefix-len=16", "--num-blocks=32")
    # The first request of the warm-up has computed the block that all have in common.
    assert figures["result"]["cached_token_share"] == pytest.approx(16 / 20)
    assert figures["result"]["matrix_peak_share"] is None


def test_bench_engine_settings_of_the_user_come_last(folder: Path) -> None:
    figures = command(folder, "--set=engine.max_num_seqs=2", "--set=cache.block_size=8")
    assert figures["engine"]["max_num_seqs"] == 2
    assert figures["engine"]["num_blocks"] == 3 * 3
    assert figures["result"]["decode_batch"] == 2


def test_bench_engine_profile_adds_up_to_the_round(folder: Path) -> None:
    overrides = [f"model.path={folder}", "parallel.threads_per_worker=1", "cache.num_blocks=8"]
    load = EngineLoad(2, 12, 3, num_warmups=0)
    result = run_engine_bench(load_config(None, overrides), load)
    rows = profile_round(result.bench, "cpu", num_rows=10**6)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert any("sluice" in row["name"] or "aten" in row["name"] for row in rows)
    assert profile_table(rows).row_count == len(rows)
    assert engine_report(result.figures)


def test_bench_engine_refuses_what_cannot_be_served(folder: Path) -> None:
    model = f"--model={folder}"
    assert "limit=128" in error_of("bench", "engine", model, "--input-len=128")
    assert "at least 2" in error_of("bench", "engine", model, *SMALL, "--num-blocks=1")
    assert "model.dtype" in error_of("bench", "engine", model, "--dtype=int3")
    error = error_of("bench", "engine", model, *SMALL, "--set=parallel.tp=2")
    assert "parallel.tp=2" in error
    missing = error_of("bench", "engine", "--model=/nowhere", *SMALL)
    assert "/nowhere" in missing


def test_bench_engine_refuses_what_this_machine_cannot_hold_or_multiply(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("bench", "engine", f"--model={folder}", *SMALL)
    monkeypatch.setattr(
        "cluster.model.native_linear.why_not_native", lambda *_: "there is no compiler"
    )
    error = error_of(*command, "--quantization=int8")
    assert "int8 needs the kernels" in error and "there is no compiler" in error
    monkeypatch.setattr("cluster.model.footprint.available_bytes", lambda: 10_000)
    assert "10000 are free" in " ".join(error_of(*command).split())


@pytest.mark.parametrize(
    ("dtype", "softcap", "cache_dtype", "attention"),
    [
        (torch.bfloat16, None, "auto", "flash"),
        (torch.float32, None, "auto", "triton"),
        (torch.bfloat16, 50.0, "auto", "triton"),
        (torch.bfloat16, None, "int8", "triton"),
    ],
)
def test_attention_of_a_gpu_is_named_as_the_kernels_choose_it(
    dtype: torch.dtype,
    softcap: float | None,
    cache_dtype: str,
    attention: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cuda, "_activate_flash", lambda _: "")
    monkeypatch.setattr(cuda, "why_not_triton", lambda: "")
    model = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=softcap))
    runner: Any = SimpleNamespace(model=model, dtype=dtype)
    overrides = [f"model.path={folder}", "model.device=cuda", f"cache.dtype={cache_dtype}"]
    config, info = load_config(None, overrides), inspect_checkpoint(folder)
    assert attention_of(runner, info, config) == attention
    monkeypatch.setattr(cuda, "why_not_triton", lambda: "Triton is not installed")
    without = "flash" if attention == "flash" else "plain"
    assert attention_of(runner, info, config) == without


def test_engine_load_needs_two_tokens_to_tell_a_rate() -> None:
    assert "output-len" in error_of("bench", "engine", "--output-len=1")
    with pytest.raises(ConfigError):
        load_config(None, ["engine.max_num_seqs=0"])
