from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_fakes import (
    BLOCK_SIZE,
    FAMILIES,
    drive,
    generate_reference,
    greedy_spec,
    make_runner,
    prompts,
    run_pipeline,
    save_model,
    spec,
)

from cluster.config import CacheConfig, ModelConfig
from cluster.errors import ConfigError, InvalidArgumentError
from cluster.model.collective import NoCollective
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import SequenceStep, StepPlan

NUM_TOKENS = 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_runner_greedy_output_equals_transformers(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    expected = [generate_reference(folder, prompt, NUM_TOKENS) for prompt in prompts()]
    runner = make_runner(folder)
    assert drive(run_pipeline([runner]), prompts(), NUM_TOKENS) == expected


def test_references_are_no_constant_texts(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    assert len(set(generate_reference(folder, prompts()[3], NUM_TOKENS))) > NUM_TOKENS // 3


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "phi", "mixtral"])
def test_runner_of_two_stages_equals_one(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    whole = drive(run_pipeline([make_runner(folder)]), prompts(), NUM_TOKENS)
    stages = [make_runner(folder, shard=ShardSpec(0, 1, rank, 2)) for rank in range(2)]
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, True)]
    assert drive(run_pipeline(stages), prompts(), NUM_TOKENS) == whole


def test_runner_output_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    runner = make_runner(save_model("qwen3", tmp_path))

    def sampled(position: int) -> object:
        return spec(position=position, seed=11, temperature=0.8, top_p=0.9, top_k=40)

    together = drive(run_pipeline([runner]), prompts(), NUM_TOKENS, make_spec=sampled)
    for prompt, expected in zip(prompts(), together, strict=True):
        alone = drive(
            run_pipeline([runner]), [prompt], NUM_TOKENS, chunk_sizes=(64,), make_spec=sampled
        )
        assert alone == [expected]


def test_runner_runs_bfloat16_of_a_float32_checkpoint(tmp_path: Path) -> None:
    folder = save_model("llama_tied", tmp_path)
    runner = make_runner(folder, dtype="bfloat16")
    (tokens,) = drive(run_pipeline([runner]), [prompts()[2]], 4)
    assert runner.dtype is torch.bfloat16
    assert tokens[0] == generate_reference(folder, prompts()[2], 1)[0]


def test_runner_takes_an_empty_plan(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    assert make_runner(folder).execute(StepPlan(0, ()), None) == {}
    hidden = make_runner(folder, shard=ShardSpec(0, 1, 0, 2)).execute(StepPlan(0, ()), None)
    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape == (0, 32)


def test_runner_samples_only_where_a_plan_asks(tmp_path: Path) -> None:
    runner = make_runner(save_model("llama", tmp_path))
    chunk = SequenceStep(7, (3, 4, 5), 0, (9,), None)
    assert runner.execute(StepPlan(0, (chunk,)), None) == {}
    end = SequenceStep(7, (6,), 3, (9,), greedy_spec(4))
    other = SequenceStep(8, (3, 4), 0, (2,), None)
    assert list(runner.execute(StepPlan(1, (other, end)), None)) == [7]  # type: ignore[arg-type]


def test_runner_blocks_travel_bit_exact(tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path)
    here, there = make_runner(folder), make_runner(folder)
    prompt = tuple(prompts()[3][: 2 * BLOCK_SIZE])
    here.execute(StepPlan(0, (SequenceStep(0, prompt, 0, (5, 3), None),)), None)
    for source, target in ((5, 60), (3, 61)):
        data = here.read_block(source)
        assert len(data) == here.block_nbytes
        there.write_block(target, data)
        assert there.read_block(target) == data
    last = (9,)
    plans = [
        StepPlan(1, (SequenceStep(0, last, 2 * BLOCK_SIZE, (*table, 1), greedy_spec(9)),))
        for table in ((5, 3), (60, 61))
    ]
    assert here.execute(plans[0], None) == there.execute(plans[1], None)


def test_runner_refuses_a_block_of_another_layout(tmp_path: Path) -> None:
    runner = make_runner(save_model("llama", tmp_path))
    with pytest.raises(InvalidArgumentError, match=f"expected {runner.block_nbytes}"):
        runner.write_block(0, b"short")


@pytest.mark.parametrize(
    ("model", "field"),
    [({"max_model_len": 129}, "model.max_model_len"), ({"device": "cuda"}, "model.device")],
)
def test_runner_refuses_what_cannot_work(
    model: dict[str, object], field: str, tmp_path: Path
) -> None:
    if model.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = ModelConfig(path=str(save_model("llama", tmp_path)), **model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        ModelRunner(
            config,
            CacheConfig(),
            ShardSpec(0, 1, 0, 1),
            NoCollective(),
            max_model_len=config.max_model_len or 128,
            num_blocks=8,
        )
    assert caught.value.field == field
