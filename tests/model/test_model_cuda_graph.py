"""Decode steps through `DecodeGraphs`.

Without a GPU a capture is the work itself, repeated: sizes, padding, buffers and the scratch block
are tested. That the work can be recorded on a GPU is shown by the tests marked gpu alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fakes import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    drive,
    generate_reference,
    make_runner,
    prompts,
    run_pipeline,
    save_model,
)

from cluster.config import CacheConfig, ModelConfig
from cluster.kernels.kv_cache import KVCache
from cluster.model.collective import NoCollective
from cluster.model.cuda_capture import CudaCapture, capture_decode, make_forward
from cluster.model.cuda_graph import (
    DecodeGraphs,
    DecodeInputs,
    GraphLimits,
    decode_arrays,
    graph_sizes,
)
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import SequenceStep, StepPlan
from cluster.types import SampledToken

LIMITS = GraphLimits(
    max_num_seqs=12, max_num_blocks=32, block_size=BLOCK_SIZE, scratch_block=NUM_BLOCKS
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def repeat(work: Callable[[], None]) -> Callable[[], None]:
    return work


def plan_of(*sequences: tuple[int, int, tuple[int, ...]]) -> StepPlan:
    """Return a plan of (token, tokens before, block table)."""
    steps = [
        SequenceStep(i, (token,), old, table, None)
        for i, (token, old, table) in enumerate(sequences)
    ]
    return StepPlan(0, tuple(steps))


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
    ],
)
def test_sizes_rise_to_the_limit(limit: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(limit) == sizes


def test_arrays_hold_a_step_and_padding_stays_in_the_scratch_block() -> None:
    tokens, tables = decode_arrays(plan_of((7, 5, (9, 2)), (8, 0, (4,))), 4, LIMITS)
    scratch = LIMITS.scratch_block
    assert tokens.dtype == tables.dtype == np.int32
    assert tokens.tolist() == [
        [7, 5, 2 * BLOCK_SIZE + 5 - BLOCK_SIZE],
        [8, 0, 4 * BLOCK_SIZE],
        [0, 0, scratch * BLOCK_SIZE],
        [0, 0, scratch * BLOCK_SIZE],
    ]
    assert tables.tolist() == [[9, 2], [4, 0], [scratch, 0], [scratch, 0]]


def make_graphs(runner: ModelRunner) -> DecodeGraphs:
    """Return the graphs of a runner, whose cache becomes one block larger: the scratch block."""
    old = runner._cache.numbers_L2BSKH
    layers, _, num_blocks, *shape = old.shape
    assert num_blocks == NUM_BLOCKS == LIMITS.scratch_block
    cache = KVCache(old.new_full((layers, 2, num_blocks + 1, *shape), torch.nan), None)
    runner._cache = cache
    forward = make_forward(runner._model, cache, runner._layers.start, is_last=runner.is_last)
    hidden = None if runner.is_first else (runner.hidden_size, runner.dtype)
    capture = CudaCapture() if old.is_cuda else repeat
    return DecodeGraphs(forward, LIMITS, old.device, hidden=hidden, capture=capture)


def test_steps_that_are_not_captured_run_eagerly(tmp_path: Path) -> None:
    graphs = make_graphs(make_runner(save_model("llama", tmp_path)))
    one = (7, 0, (1,))
    assert [graphs.size_for(plan_of(*[one] * n)) for n in (1, 2, 3, 4, 5, 9, 12)] == [
        *(1, 2, 4, 4, 8, 12, 12)
    ]
    assert graphs.size_for(plan_of(*[one] * 13)) is None
    assert graphs.size_for(StepPlan(0, ())) is None
    assert graphs.size_for(plan_of((7, 0, tuple(range(33))))) is None
    chunk = SequenceStep(1, (3, 4), 0, (2,), None)
    assert graphs.run(StepPlan(0, (*plan_of(one).sequences, chunk)), None) is None


def through_graphs(
    runner: ModelRunner, graphs: DecodeGraphs, replayed: list[int]
) -> Callable[[StepPlan, torch.Tensor | None], torch.Tensor | dict[int, SampledToken]]:
    """Return a stage's step that replays what it can; `replayed` notes the sizes."""

    def execute(
        plan: StepPlan, hidden: torch.Tensor | None
    ) -> torch.Tensor | dict[int, SampledToken]:
        with torch.inference_mode():
            rows = graphs.run(plan, hidden)
        if rows is None:
            return runner.execute(plan, hidden)
        replayed.append(len(rows))
        if not runner.is_last:
            return rows.clone()
        tokens = rows.argmax(-1).tolist()
        pairs = zip(plan.sequences, tokens, strict=True)
        return {seq.seq_id: SampledToken(token) for seq, token in pairs if seq.sample is not None}

    return execute


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_replayed_decode_equals_transformers(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    runner, replayed = make_runner(folder), list[int]()
    execute = through_graphs(runner, make_graphs(runner), replayed)

    def step(plan: StepPlan) -> dict[int, SampledToken]:
        tokens = execute(plan, None)
        assert isinstance(tokens, dict)
        return tokens

    expected = [generate_reference(folder, prompt, 16) for prompt in prompts()]
    assert drive(step, prompts(), 16) == expected
    assert 3 in replayed or 5 in replayed  # sizes that were padded
    assert len(replayed) > 10


def test_replayed_stages_equal_whole_model(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    whole = drive(run_pipeline([make_runner(folder)]), prompts(), 12)
    stages = [make_runner(folder, shard=ShardSpec(0, 1, rank, 2)) for rank in range(2)]
    replayed = list[int]()
    first, last = (through_graphs(stage, make_graphs(stage), replayed) for stage in stages)

    def step(plan: StepPlan) -> dict[int, SampledToken]:
        hidden = first(plan, None)
        assert isinstance(hidden, torch.Tensor)
        tokens = last(plan, hidden)
        assert isinstance(tokens, dict)
        return tokens

    assert drive(step, prompts(), 12) == whole
    assert replayed


def make_gpu_runner(folder: Path, dtype: str, max_num_seqs: int = 0) -> ModelRunner:
    return ModelRunner(
        ModelConfig(path=str(folder), dtype=dtype, device="cuda"),  # type: ignore[arg-type]
        CacheConfig(block_size=BLOCK_SIZE),
        ShardSpec(0, 1, 0, 1),
        NoCollective(),
        max_model_len=128,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=max_num_seqs,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_runner_captures_by_itself_and_its_tokens_are_the_eager_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(family, tmp_path)
    eager = make_gpu_runner(folder, "float32")
    assert eager._graphs is None and not eager.has_graphs
    captured = make_gpu_runner(folder, "float32", max_num_seqs=12)
    graphs = captured._graphs
    assert graphs is not None and captured.has_graphs
    replayed = list[bool]()
    run_graphs = graphs.run

    def counted(plan: StepPlan, hidden: torch.Tensor | None) -> torch.Tensor | None:
        rows = run_graphs(plan, hidden)
        replayed.append(rows is not None)
        return rows

    monkeypatch.setattr(graphs, "run", counted)
    expected = drive(run_pipeline([eager]), prompts(), 16)
    assert drive(run_pipeline([captured]), prompts(), 16) == expected
    assert sum(replayed) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_greedy_output_on_a_gpu_equals_the_one_on_a_cpu(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    expected = [generate_reference(folder, prompt, 16) for prompt in prompts()]
    runner = make_gpu_runner(folder, "float32")
    assert drive(run_pipeline([runner]), prompts(), 16) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_captured_decode_on_a_gpu_equals_the_cpu(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    expected = [generate_reference(folder, prompt, 16) for prompt in prompts()]
    runner, replayed = make_gpu_runner(folder, "float32"), list[int]()
    execute = through_graphs(runner, make_graphs(runner), replayed)

    def step(plan: StepPlan) -> dict[int, SampledToken]:
        tokens = execute(plan, None)
        assert isinstance(tokens, dict)
        return tokens

    assert drive(step, prompts(), 16) == expected
    assert len(replayed) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_logits_in_bfloat16_equal_eager_ones(tmp_path: Path) -> None:
    runner = make_gpu_runner(save_model("llama", tmp_path), "bfloat16")
    graphs = make_graphs(runner)
    runner._cache.numbers_L2BSKH.normal_()
    plan = plan_of((7, 5, (9, 2)), (8, 0, (4,)), (11, 30, tuple(range(20, 28))))
    forward = make_forward(runner._model, runner._cache, 0, is_last=True)
    with torch.inference_mode():
        captured = graphs.run(plan, None)
        assert captured is not None
        eager = forward(graphs._inputs(4))[:3]  # the same buffers
    torch.testing.assert_close(captured, eager, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_looks_at_numbers_on_the_host_is_not_captured(tmp_path: Path) -> None:
    runner = make_gpu_runner(save_model("llama", tmp_path), "float32")
    forward = make_forward(runner._model, runner._cache, 0, is_last=True)

    def nosy(step: DecodeInputs) -> torch.Tensor:
        logits = forward(step)
        return logits * float(logits.max())

    limits = replace(LIMITS, scratch_block=NUM_BLOCKS - 1)
    assert (
        capture_decode(nosy, runner._cache, limits, dtype=torch.float32, hidden_size=None) is None
    )
    assert torch.ones(3, device="cuda").sum().item() == 3  # the device goes on
