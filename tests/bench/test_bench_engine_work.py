"""Bytes, operations and shares on numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.engine_drive import StepTime
from cluster.bench.engine_work import Alone, ModelWork, full_decodes, model_work, shares
from cluster.bench.hardware import HardwarePeaks, matrix_kind, matrix_peak, read_bandwidth
from cluster.model.checkpoint import inspect_checkpoint
from tests.model.model_fakes import save_model

WORK = ModelWork(
    weight_bytes=1000,
    kv_bytes_per_token=10.0,
    linear_params=400,
    head_params=100,
    attention_width=5,
)
PEAKS = HardwarePeaks(read_bytes_per_s=40_000.0, matrix_flop_per_s=50_000.0, matrix_kind="float32")
ALONE = Alone(num_prompt_tokens=9, ttft_s=0.5, tokens_per_s=20.0, num_context_tokens=20.0)


def step(num_sequences: int, num_tokens: int, wall_s: float = 0.1) -> StepTime:
    return StepTime(num_sequences, num_tokens, 50, wall_s, wall_s * 0.9, wall_s * 0.75)


def test_work_counts_weights_context_and_attention() -> None:
    assert WORK.step_bytes(50) == 1000 + 500
    # 9 tokens through 400 weights, one through the head; 45 pairs of query and key, 5 channels
    assert WORK.prefill_flop(9) == 2 * (3600 + 100) + 4 * 5 * 45


def test_shares_are_what_is_reached_of_what_was_measured() -> None:
    found = shares(WORK, PEAKS, ALONE, [step(4, 4), step(4, 4), step(1, 9)])
    assert found["memory_bandwidth_share"] == pytest.approx(1200 * 20 / 40_000)
    assert found["batch_memory_bandwidth_share"] == pytest.approx(1500 / 0.1 / 40_000)
    assert found["matrix_peak_share"] == pytest.approx(8300 / 0.5 / 50_000)
    assert found["engine_overhead_share"] == pytest.approx(0.25)
    assert found["scheduling_share"] == pytest.approx(0.1)
    assert found["decode_batch"] == 4


def test_prompt_that_was_in_part_found_says_nothing_of_arithmetic() -> None:
    found = shares(WORK, PEAKS, replace(ALONE, num_cached_tokens=1), [step(4, 4)])
    assert found["matrix_peak_share"] is None
    assert found["memory_bandwidth_share"] == pytest.approx(1200 * 20 / 40_000)


def test_overhead_is_unknown_where_the_time_of_the_model_is() -> None:
    found = shares(WORK, PEAKS, ALONE, [replace(step(4, 4), forward_s=None)])
    assert found["engine_overhead_share"] is None
    assert found["scheduling_share"] == pytest.approx(0.1)


def test_shares_of_an_unknown_work_leave_the_limits_out() -> None:
    found = shares(None, PEAKS, ALONE, [step(4, 4)])
    assert found["memory_bandwidth_share"] is None and found["matrix_peak_share"] is None
    assert found["engine_overhead_share"] == pytest.approx(0.25)


def test_full_decodes_are_the_steps_with_the_largest_batch() -> None:
    steps = [step(8, 20), step(3, 3), step(6, 6, 0.2), step(6, 6, 0.3), step(1, 1)]
    assert [s.wall_s for s in full_decodes(steps)] == [0.2, 0.3]
    assert full_decodes([step(2, 7)]) == []


def test_model_work_counts_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    work = model_work(inspect_checkpoint(save_model("llama", tmp_path)), 123, 4.0)
    assert work is not None
    per_layer = 32 * 32 * 2 + 2 * 16 * 32 + 3 * 48 * 32  # q and out, k and v, gate, up, down
    assert work.linear_params == 3 * per_layer
    assert work.head_params == 131 * 32
    assert work.attention_width == 3 * 32
    assert work.weight_bytes == 123


def test_model_work_of_experts_is_unknown(tmp_path: Path) -> None:
    assert model_work(inspect_checkpoint(save_model("mixtral", tmp_path)), 1, 1.0) is None


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_hardware_probes_measure_something(kind: str) -> None:
    assert 1e6 < matrix_peak("cpu", kind, (64, 128, 64)) < 1e15


def test_hardware_reads_memory() -> None:
    assert 1e7 < read_bandwidth("cpu", 2**20) < 1e13


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [("none", "bfloat16"), ("int8", "int8"), ("int4", "int8"), ("fp8", "bfloat16")],
)
def test_matrix_kind_is_what_the_weights_are_multiplied_as(quantization: str, kind: str) -> None:
    assert matrix_kind("bfloat16", quantization) == kind
