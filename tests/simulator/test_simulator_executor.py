from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.clock import VirtualClock
from cluster.simulator.executor import EOS_TOKEN, SimulatedExecutor
from cluster.step import SampleSpec, SequenceStep, StepPlan, StepResult
from cluster.types import SampledToken, StepCost

COST = StepCost(1.0, 0.01, ((100, 0.1),), 0.001, 1e-5, 1e-6)
SEED = 77


def _executor(**changes: Any) -> tuple[SimulatedExecutor, VirtualClock]:
    clock = VirtualClock(5.0)
    values: dict[str, Any] = {"overhead_s": 0.0, "jitter": 0.0, "rng": random.Random(1)}
    return SimulatedExecutor(COST, num_blocks=8, clock=clock, **(values | changes)), clock


def _sample(position: int) -> SampleSpec:
    return SampleSpec(SEED, position, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, -1)


def _chunk(num_tokens: int, num_computed: int, *, is_last: bool = False) -> SequenceStep:
    sample = _sample(num_computed + num_tokens) if is_last else None
    return SequenceStep(1, (3,) * num_tokens, num_computed, (0,), sample)


def _decode(num_computed: int) -> SequenceStep:
    return SequenceStep(2, (3,), num_computed, (0,), _sample(num_computed + 1))


def _step(executor: SimulatedExecutor, *sequences: SequenceStep) -> StepResult:
    executor.submit(StepPlan(1, sequences))
    return executor.collect(1.0)


def test_executor_takes_what_prompts_and_decodes_cost() -> None:
    executor, clock = _executor()
    executor.expect(SEED, 9, 10**6)
    result = _step(executor, _chunk(200, 1000), _decode(5000))
    # 201 tokens of which 101 are beyond the hinge; two sequences; what each of them reads.
    work = 200 * (1000 + 100)
    expected_s = 1.0 + 201 * 0.01 + 101 * 0.1 + 2 * 0.001 + 5000 * 1e-5 + work * 1e-6
    assert result.elapsed_s == pytest.approx(expected_s)
    assert clock.now() == pytest.approx(5.0 + expected_s)
    assert executor.busy_s == pytest.approx(expected_s)
    assert (executor.num_steps, executor.num_prefill_tokens) == (1, 200)


def test_executor_does_not_tell_the_engine_of_the_overhead() -> None:
    executor, clock = _executor(overhead_s=0.5)
    result = _step(executor, _chunk(10, 0))
    assert clock.now() - 5.0 == pytest.approx(result.elapsed_s + 0.5)
    assert executor.busy_s == pytest.approx(result.elapsed_s + 0.5)


def test_executor_made_slow_takes_as_many_times_longer() -> None:
    executor, _ = _executor()
    usual_s = _step(executor, _chunk(10, 0)).elapsed_s
    executor.slowness = 3.0
    assert _step(executor, _chunk(10, 0)).elapsed_s == pytest.approx(3 * usual_s)


def test_executor_jitter_is_that_of_its_rng() -> None:
    def times_s(seed: int) -> list[float]:
        executor, _ = _executor(jitter=0.1, rng=random.Random(seed))
        return [_step(executor, _chunk(10, 0)).elapsed_s for _ in range(200)]

    once = times_s(1)
    assert once == times_s(1) != times_s(2)
    assert len(set(once)) == 200
    mean_s = sum(once) / 200
    assert mean_s == pytest.approx(_step(_executor()[0], _chunk(10, 0)).elapsed_s, rel=0.05)


def test_executor_answers_with_the_token_up_to_the_last_position() -> None:
    executor, _ = _executor()
    executor.expect(SEED, 9, 12)  # a prompt of 10 tokens, an answer of 3
    chosen = [_step(executor, _decode(position - 1)).tokens[2] for position in (10, 11, 12)]
    assert chosen == [SampledToken(9), SampledToken(9), SampledToken(EOS_TOKEN)]


def test_executor_chooses_nothing_before_the_end_of_a_prompt() -> None:
    executor, _ = _executor()
    executor.expect(SEED, 9, 12)
    assert _step(executor, _chunk(5, 0)).tokens == {}
    assert _step(executor, _chunk(5, 5, is_last=True)).tokens == {1: SampledToken(9)}


def test_executor_forgets_requests_that_have_ended() -> None:
    executor, _ = _executor()
    executor.expect(SEED, 9, 12)
    executor.forget(SEED)
    executor.forget(SEED)
    with pytest.raises(KeyError):
        _step(executor, _decode(10))
