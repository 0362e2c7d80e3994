from __future__ import annotations

from dataclasses import replace
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
from cluster.errors import ConfigError
from cluster.model.collective import NoCollective
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import BlockMoves, SequenceStep, StepPlan

NUM_TOKENS = 24


def make_slots(block_nbytes: int) -> torch.Tensor:
    return torch.zeros(3, block_nbytes, dtype=torch.uint8)


def runners_over_one_host_tier(
    folder: Path, cache_dtype: str
) -> tuple[ModelRunner, ModelRunner, torch.Tensor]:
    nbytes = make_runner(folder, cache_dtype=cache_dtype).block_nbytes
    slots = make_slots(nbytes)
    here, there = (make_runner(folder, cache_dtype=cache_dtype, slots=slots) for _ in range(2))
    return here, there, slots


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


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_runner_moves_blocks_before_it_computes(cache_dtype: str, tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path)
    here, there, slots = runners_over_one_host_tier(folder, cache_dtype)
    prompt = tuple(prompts()[3][: 2 * BLOCK_SIZE])
    here.execute(StepPlan(0, (SequenceStep(0, prompt, 0, (5, 3), None),)), None)
    slots.fill_(255)
    assert here.execute(StepPlan(1, (), BlockMoves(((5, 2), (3, 0)))), None) == {}
    assert bool((slots[1] == 255).all()) and not bool((slots[[0, 2]] == 255).all())
    last = (9,)
    steps = [
        (SequenceStep(1, last, 2 * BLOCK_SIZE, (*table, 1), greedy_spec(9)),)
        for table in ((5, 3), (60, 61))
    ]
    restores = BlockMoves(restores=((2, 60), (0, 61)))
    expected = here.execute(StepPlan(2, steps[0]), None)
    assert there.execute(StepPlan(2, steps[1], restores), None) == expected


def test_stage_moves_its_own_part(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)  # three layers
    prompt = tuple(prompts()[3][:BLOCK_SIZE])
    whole = SequenceStep(0, prompt, 0, (5,), greedy_spec(BLOCK_SIZE))
    last = SequenceStep(1, (9,), BLOCK_SIZE, (7, 8), greedy_spec(BLOCK_SIZE + 1))
    stages, sizes = [], []
    for pp_rank in range(2):
        shard = ShardSpec(0, 1, pp_rank, 2)
        nbytes = make_runner(folder, shard=shard).block_nbytes
        stages.append(make_runner(folder, shard=shard, slots=make_slots(nbytes)))
        sizes.append(nbytes)
    assert sorted(sizes)[1] == 2 * sorted(sizes)[0]
    step = run_pipeline(stages)
    plain = run_pipeline([make_runner(folder)])
    assert step(StepPlan(0, (whole,), BlockMoves())) == plain(StepPlan(0, (whole,)))
    moves = BlockMoves(((5, 1),), ((1, 7),))
    expected = plain(StepPlan(1, (replace(last, block_table=(5, 8)),)))
    assert step(StepPlan(1, (last,), moves)) == expected


def test_runner_refuses_slots_of_another_layout(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="made for another model"):
        make_runner(folder, slots=make_slots(7))


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
