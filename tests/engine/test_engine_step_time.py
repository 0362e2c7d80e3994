"""The step model learns curves that it was not built from: floors and knees anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.step_time import MAX_KINDS, STEPS_PER_KIND, StepTimeModel, max_prompt_tokens
from cluster.types import StepCost, StepShape


@dataclass(frozen=True)
class Machine:
    """A floor (reading the weights), or arithmetic where that takes longer, and attention."""

    floor_s: float = 0.040
    base_s: float = 0.0227
    token_s: float = 0.00208
    sequence_s: float = 2e-4
    context_s: float = 1e-6
    work_s: float = 2.5e-7

    def seconds(self, shape: StepShape) -> float:
        linears_s = max(self.floor_s, self.base_s + self.token_s * shape.num_tokens)
        attention_s = self.context_s * shape.context_tokens + self.work_s * shape.prompt_work
        return linears_s + self.sequence_s * shape.num_sequences + attention_s


MACHINES = {
    "0.5B bf16": Machine(),
    "0.5B int8": Machine(floor_s=0.02, base_s=0.001, token_s=0.0012),
    "tiny": Machine(2e-3, 1e-3, 8e-5, 5e-5, 1e-7, 1e-8),
    "gpu": Machine(8e-3, 1e-3, 3e-5, 1e-6, 1e-9, 1e-10),  # its knee is at 233 tokens
}


def random_shape(rng: random.Random, *, max_prompt: int = 512) -> StepShape:
    shape = StepShape()
    for _ in range(rng.choice([0, 1, 4, 8, 16])):
        shape = shape.with_decode(rng.randrange(20, 1000))
    if shape.num_sequences == 0 or (max_prompt and rng.random() < 0.5):
        shape = shape.with_chunk(rng.randrange(1, max(2, max_prompt)), rng.randrange(2000))
    return shape


def learn(
    model: StepTimeModel,
    seconds: Callable[[StepShape], float],
    rng: random.Random,
    num_steps: int,
    *,
    noise: float = 0.05,
    outliers: float = 0.0,
    max_prompt: int = 512,
) -> None:
    for _ in range(num_steps):
        shape = random_shape(rng, max_prompt=max_prompt)
        stall = rng.uniform(3, 30) if rng.random() < outliers else 1.0
        model.observe(shape, stall * seconds(shape) * max(0.5, rng.gauss(1, noise)))


def worst_error(cost: StepCost | None, seconds: Callable[[StepShape], float]) -> float:
    assert cost is not None
    rng = random.Random("check")
    shapes = [random_shape(rng) for _ in range(200)]
    return max(abs(cost.seconds(shape) / seconds(shape) - 1) for shape in shapes)


@pytest.mark.parametrize("name", MACHINES)
def test_model_converges_through_noise_and_stalls(name: str) -> None:
    model, rng = StepTimeModel(), random.Random(name)
    learn(model, MACHINES[name].seconds, rng, 300, outliers=0.05)
    assert worst_error(model.cost, MACHINES[name].seconds) < 0.16


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_steps=st.integers(1, 60),
    floor_s=st.floats(1e-4, 1.0),
    token_s=st.floats(1e-6, 0.01),
    noise=st.floats(0, 0.5),
)
def test_cost_never_falls_and_is_convex_in_the_tokens(
    seed: int, num_steps: int, floor_s: float, token_s: float, noise: float
) -> None:
    machine = Machine(floor_s, floor_s / 2, token_s)
    model = StepTimeModel()
    learn(model, machine.seconds, random.Random(seed), num_steps, noise=noise, outliers=0.1)
    cost = model.cost
    assert cost is not None
    curve = [cost.seconds(StepShape(tokens, 1)) for tokens in range(0, 700, 7)]
    rises = [after - before for before, after in pairwise(curve)]
    tolerance = 1e-9 * curve[-1]
    assert min(rises) >= -tolerance
    assert all(b >= a - tolerance for a, b in pairwise(rises))
    base = cost.seconds(StepShape(16, 4, 1000, 500.0))
    for more in (StepShape(16, 5, 1000, 500.0), StepShape(16, 4, 1100, 500.0)):
        assert cost.seconds(more) >= base
    assert cost.seconds(StepShape(16, 4, 1000, 600.0)) >= base > 0


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.floats(0.001, 3.0),
    st.integers(0, 3000),
    st.integers(0, 600),
)
def test_inverse_is_the_largest_chunk_that_fits(
    seed: int, limit_s: float, num_computed: int, most: int
) -> None:
    model, rng = StepTimeModel(), random.Random(seed)
    learn(model, Machine().seconds, rng, 30)
    cost, beside = model.cost, random_shape(rng, max_prompt=0)
    assert cost is not None
    found = max_prompt_tokens(cost, limit_s, beside, num_computed_tokens=num_computed, most=most)
    assert 0 <= found <= most
    if found > 0:
        assert cost.seconds(beside.with_chunk(found, num_computed)) <= limit_s
    if found < most:
        assert cost.seconds(beside.with_chunk(found + 1, num_computed)) > limit_s


def test_model_knows_nothing_before_the_first_step_and_something_after_it() -> None:
    model = StepTimeModel()
    assert model.cost is None
    model.observe(StepShape(1, 1), 0.0)  # a fake executor that measures nothing
    assert model.cost is None
    prompt = StepShape().with_chunk(256, 0)
    model.observe(prompt, Machine().seconds(prompt))
    assert model.cost is not None
    assert model.cost.seconds(prompt) == pytest.approx(Machine().seconds(prompt), rel=0.1)
    # Nobody has seen a decode, but it costs neither nothing nor as much as the prompt.
    decode_s = model.cost.seconds(StepShape().with_decode(256))
    assert 0.3 < decode_s / Machine().seconds(StepShape().with_decode(256)) < 3


def test_first_step_that_stalled_is_forgotten_within_a_few() -> None:
    model, shape = StepTimeModel(), StepShape().with_decode(100)
    model.observe(shape, 5.0)
    for _ in range(6):
        model.observe(shape, 0.040)
    assert model.cost is not None
    assert model.cost.seconds(shape) == pytest.approx(0.040, rel=0.1)


def test_short_disturbance_does_not_replace_what_is_known_of_a_kind() -> None:
    model, shape = StepTimeModel(), StepShape().with_decode(100)
    for elapsed_s in [0.040] * 100 + [0.120] * STEPS_PER_KIND:
        model.observe(shape, elapsed_s)
    remembered = [row[-1] for row in model.snapshot()]
    assert len(remembered) == STEPS_PER_KIND
    assert sum(elapsed_s < 1.02 * min(remembered) for elapsed_s in remembered) >= 8


def test_decoding_for_long_does_not_lose_what_prefills_have_taught() -> None:
    model, rng, machine = StepTimeModel(), random.Random(0), Machine()
    learn(model, machine.seconds, rng, 200)
    learn(model, machine.seconds, rng, 3000, max_prompt=0)
    assert worst_error(model.cost, machine.seconds) < 0.1


def test_model_follows_a_machine_that_becomes_slower_within_seconds() -> None:
    model, rng, machine = StepTimeModel(), random.Random(0), Machine()
    learn(model, machine.seconds, rng, 400)
    learn(model, lambda shape: 2 * machine.seconds(shape), rng, 60, max_prompt=0)
    assert worst_error(model.cost, lambda shape: 2 * machine.seconds(shape)) < 0.2


def test_model_keeps_a_bounded_number_of_steps() -> None:
    model, rng = StepTimeModel(), random.Random(0)
    for i in range(4000):
        model.observe(StepShape(1 << i % 20, 1 << i % 11, 1 << i % 17, 4.0 ** (i % 13)), 1.0)
    assert len(model.snapshot()) <= MAX_KINDS * STEPS_PER_KIND
    learn(model, Machine().seconds, rng, 500)
    assert model.num_steps == 4500


def test_restored_model_predicts_as_before_and_goes_on_learning() -> None:
    model, rng, machine = StepTimeModel(), random.Random(0), Machine()
    learn(model, machine.seconds, rng, 300)
    again = StepTimeModel()
    again.restore(model.snapshot())
    assert worst_error(again.cost, machine.seconds) < 0.1
    learn(again, lambda shape: 3 * machine.seconds(shape), rng, 600)
    assert worst_error(again.cost, lambda shape: 3 * machine.seconds(shape)) < 0.15


def test_step_that_the_fit_gives_no_time_is_learned_from_and_no_failure() -> None:
    model = StepTimeModel()
    for _ in range(40):
        model.observe(StepShape(16, 1, 0, 128.0), 0.016)
    model._fitted = StepCost(0.0, 0.0, ((8, 0.002),), 0.0, 0.0, 0.0)
    model.observe(StepShape(4, 4, 100, 0.0), 0.01)
    assert model.num_steps == 41
