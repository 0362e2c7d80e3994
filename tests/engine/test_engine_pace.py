"""Running streams keep their TPOT objective while prompts are computed: under a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from engine_fakes import Bench, make_request

from cluster.clock import VirtualClock
from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.pace import step_limit_s
from cluster.engine.sequence import ModelTraits, Sequence
from cluster.types import StepShape
from tests.fakes import TimedExecutor

FASTEST_S = 0.05
TRAITS = ModelTraits(16, 4096, 1000, frozenset(), b"model")


def stream(*, num_outputs: int, max_tokens: int = 100, tpot_s: float | None = 0.1) -> Sequence:
    """A sequence whose first token came at 10 s."""
    request = make_request(max_tokens=max_tokens, tpot_s=tpot_s)
    sequence = Sequence(0, request, TRAITS, 0.0)
    for _ in range(num_outputs):
        sequence.append(1)
    sequence.first_token_s = 10.0
    return sequence


def limit_s(now_s: float, *streams: Sequence) -> float:
    return step_limit_s(streams, now_s, reserve=0.1, fastest_s=FASTEST_S)


def test_limit_is_the_tightest_objective_less_the_reserve() -> None:
    on_time = stream(num_outputs=5)  # its fifth token was due at 10.4
    assert limit_s(10.4, on_time) == pytest.approx(0.09)
    assert limit_s(10.4, on_time, stream(num_outputs=8, tpot_s=0.06)) == pytest.approx(0.054)
    assert limit_s(10.4, stream(num_outputs=5, tpot_s=None)) == math.inf
    assert limit_s(10.4) == math.inf


def test_limit_is_not_raised_by_a_lead_and_lowered_by_what_a_stream_lost() -> None:
    sequence = stream(num_outputs=5)
    assert limit_s(10.1, sequence) == pytest.approx(0.09)
    assert limit_s(10.42, sequence) == pytest.approx(0.07)
    assert limit_s(10.9, sequence) < 0


def test_limit_of_a_resumed_stream_counts_from_its_first_token_here() -> None:
    request = replace(make_request(max_tokens=100, tpot_s=0.1), output_token_ids=(1,) * 30)
    sequence = Sequence(0, request, TRAITS, 0.0)
    assert limit_s(10.0, sequence) == pytest.approx(0.09)  # it has got no token here
    sequence.append(1)
    sequence.append(1)
    sequence.first_token_s = 10.0
    assert limit_s(10.15, sequence) == pytest.approx(0.04)


def test_limit_does_not_chase_what_cannot_be_made_up() -> None:
    # Each further token makes up 0.05 s at the most: 2 of them 0.1 s, 20 of them 1 s.
    assert limit_s(10.9, stream(num_outputs=5, max_tokens=7)) == pytest.approx(0.09)
    assert limit_s(10.9, stream(num_outputs=5, max_tokens=25)) < 0


def test_limit_leaves_prompts_a_share_beside_an_objective_below_any_step() -> None:
    hopeless = stream(num_outputs=5, tpot_s=0.001)
    assert limit_s(10.4, hopeless) == pytest.approx(FASTEST_S / 0.7)
    # Another stream's objective, which can be kept, still holds.
    assert limit_s(10.4, hopeless, stream(num_outputs=8, tpot_s=0.06)) == pytest.approx(0.054)


class Mixed:
    """Streams with an objective, and prompts without, on a machine with a known step time."""

    def __init__(
        self,
        tpot_s: float | None,
        *,
        seconds: Callable[[StepShape], float] | None = None,
        num_streams: int = 8,
        config: EngineConfig | None = None,
        prefix_caching: bool = False,
    ) -> None:
        self.clock = VirtualClock()
        self.executor = TimedExecutor(self.clock, seconds or self.machine_s)
        self.engine = Engine(
            config or EngineConfig(),
            executor=self.executor,
            block_size=16,
            max_model_len=4096,
            fingerprint=b"model",
            eos_token_ids=frozenset(),
            vocab_size=100_000,
            prefix_caching=prefix_caching,
            clock=self.clock,
        )
        self.times: dict[str, list[float]] = {}
        for index in range(num_streams):
            self.add(f"stream{index}", 32, 150, tpot_s)
        while not all(self.times.values()):
            self.step()

    @staticmethod
    def machine_s(shape: StepShape) -> float:
        return max(0.040, 0.0227 + 0.00208 * shape.num_tokens) + 2.5e-7 * shape.prompt_work

    def add(self, name: str, num_tokens: int, max_tokens: int, tpot_s: float | None = None) -> None:
        request = make_request(name, range(num_tokens), max_tokens=max_tokens, tpot_s=tpot_s)
        self.engine.add(request)
        self.times[name] = []

    def step(self) -> None:
        for output in self.engine.step():
            assert output.error is None
            self.times[output.request_id] += [self.clock.now()] * len(output.tokens)
        self.engine.check_invariants()

    def run(self) -> float:
        """Add 4 long prompts and finish all; return how long that took."""
        began_s = self.clock.now()
        for index in range(4):
            self.add(f"prompt{index}", 1000, 1)
        while self.engine.has_work:
            self.step()
        return self.clock.now() - began_s

    def tpots(self) -> list[float]:
        streams = [times for name, times in self.times.items() if name.startswith("stream")]
        return [(times[-1] - times[0]) / (len(times) - 1) for times in streams]

    def prompt_tokens(self) -> list[int]:
        """Prompt tokens of every step that had decodes too."""
        shapes = [shape for shape in self.executor.shapes if shape.context_tokens]
        return [shape.num_tokens - 8 for shape in shapes if shape.prompt_work]


def longest_gap(times: list[float]) -> float:
    return max(after - before for before, after in pairwise(times))


def test_streams_keep_their_objective_at_little_cost() -> None:
    free, paced = Mixed(None), Mixed(0.2)
    free_s, paced_s = free.run(), paced.run()
    assert max(longest_gap(free.times[f"stream{i}"]) for i in range(8)) > 0.9
    assert max(longest_gap(paced.times[f"stream{i}"]) for i in range(8)) <= 0.2
    assert max(paced.tpots()) < 0.2
    assert free_s / paced_s >= 0.9
    # A step that takes 0.18 s has 67 prompt tokens on this machine, less attention's time.
    assert 40 < sorted(paced.prompt_tokens())[len(paced.prompt_tokens()) // 2] <= 67


def test_sequences_without_an_objective_do_not_constrain() -> None:
    free = Mixed(None)
    free.run()
    assert max(free.prompt_tokens()) == 504


def test_prompts_do_not_starve_under_an_objective_that_cannot_be_kept() -> None:
    config = EngineConfig(min_prefill_tokens=20)
    impossible = Mixed(0.001, config=config)
    impossible.run()
    sizes = impossible.prompt_tokens()
    assert min(sizes[:-1]) == 20 == sorted(sizes)[len(sizes) // 2]
    assert all(impossible.times[f"prompt{i}"] for i in range(4))


def test_cached_prefixes_of_waiting_prompts_count_as_context() -> None:
    paced = Mixed(0.2, prefix_caching=True)
    paced.add("first", 3000, 1)
    while not paced.times["first"]:
        paced.step()
    began_s = paced.clock.now()
    for index in range(4):
        paced.add(f"like it {index}", 3090, 1)
    while paced.engine.has_work:
        paced.step()
    assert paced.executor.shapes[-1].num_tokens == 8  # the streams outlived the prompts
    for index in range(8):
        later = [t for t in paced.times[f"stream{index}"] if t >= began_s]
        assert len(later) > 8 and longest_gap(later) <= 0.2


def test_budget_stays_below_the_largest_step() -> None:
    patient = Mixed(100.0, config=EngineConfig(max_num_batched_tokens=64))
    patient.run()
    assert max(shape.num_tokens for shape in patient.executor.shapes) == 64


def test_streams_make_up_for_a_stall_that_nobody_foresaw() -> None:
    stalls = iter([1.0] * 30 + [40.0] + [1.0] * 1000)

    def seconds(shape: StepShape) -> float:
        return Mixed.machine_s(shape) * (next(stalls) if shape.prompt_work else 1.0)

    stalled = Mixed(0.2, seconds=seconds)
    stalled.run()
    assert max(longest_gap(stalled.times[f"stream{i}"]) for i in range(8)) > 2
    assert max(stalled.tpots()) < 0.2


def test_step_times_are_learned_from_the_plans_that_ran() -> None:
    mixed = Mixed(0.2)
    mixed.run()
    cost = mixed.engine.load().step_cost
    assert cost is not None
    for shape, elapsed_s in zip(mixed.executor.shapes, mixed.executor.elapsed_s, strict=True):
        if shape.context_tokens:
            assert cost.seconds(shape) == pytest.approx(elapsed_s, rel=0.15)


def test_engine_that_measured_nothing_does_not_limit() -> None:
    bench = Bench(config=EngineConfig(max_num_batched_tokens=16))
    bench.add("stream", [1, 2], max_tokens=9)
    bench.step()
    bench.add("prompt", range(40), max_tokens=1)
    bench.run()
    assert bench.engine.load().step_cost is None
    assert bench.plan_sizes()[1] == [1, 15]
