"""An executor that computes nothing: a step takes what the cost model says, in virtual time."""

from __future__ import annotations

import random
from collections import deque

from cluster.clock import VirtualClock
from cluster.step import StepPlan, StepResult
from cluster.types import SampledToken, StepCost, StepShape

EOS_TOKEN = 2**32 - 1
"""The model's end-of-text token, which ends an answer that is long enough."""


class SimulatedExecutor:
    """Answers every position with the token of its request, until the answer is complete.

    Args:
        cost: Seconds of a step.
        num_blocks: KV blocks.
        clock: Of the replica alone: a step moves it to the step's end.
        overhead_s: Of each step, beside what the cost model says, seconds.
        jitter: Standard deviation of the logarithm of a step's time.
        rng: Of the jitter.
    """

    max_in_flight = 1

    def __init__(
        self,
        cost: StepCost,
        *,
        num_blocks: int,
        clock: VirtualClock,
        overhead_s: float,
        jitter: float,
        rng: random.Random,
    ) -> None:
        self.num_blocks = num_blocks
        self.slowness = 1.0  # factor on every step
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self._cost = cost
        self._clock = clock
        self._overhead_s = overhead_s
        self._jitter = jitter
        self._rng = rng
        # By seed of the request: its token, and the position of its last one.
        self._answers: dict[int, tuple[SampledToken, int]] = {}
        self._in_flight: deque[tuple[StepPlan, float]] = deque()

    def expect(self, seed: int, token: int, last_position: int) -> None:
        """Learn how a request is to be answered: `token` up to `last_position`, then the end."""
        self._answers[seed] = (SampledToken(token), last_position)

    def forget(self, seed: int) -> None:
        """Forget a request that has ended."""
        self._answers.pop(seed, None)

    def submit(self, plan: StepPlan) -> None:
        """Begin a step."""
        num_tokens = context = 0
        work = 0.0
        for step in plan.sequences:
            num_new, num_computed = len(step.token_ids), step.num_computed_tokens
            num_tokens += num_new
            if num_new == 1 and step.sample is not None:
                context += num_computed
            else:
                work += num_new * (num_computed + num_new / 2)
                self.num_prefill_tokens += num_new
        shape = StepShape(num_tokens, len(plan.sequences), context, work)
        elapsed_s = self._cost.seconds(shape) * self.slowness
        if self._jitter:
            elapsed_s *= self._rng.lognormvariate(0.0, self._jitter)
        self._in_flight.append((plan, elapsed_s))

    def collect(self, timeout_s: float) -> StepResult:
        """End the oldest step."""
        del timeout_s
        plan, elapsed_s = self._in_flight.popleft()
        self._clock.advance(elapsed_s + self._overhead_s)
        self.busy_s += elapsed_s + self._overhead_s
        self.num_steps += 1
        tokens = {}
        for step in plan.sequences:
            spec = step.sample
            if spec is not None:
                token, last = self._answers[spec.seed]
                tokens[step.seq_id] = token if spec.position < last else SampledToken(EOS_TOKEN)
        return StepResult(plan.step_id, tokens, elapsed_s)

    def shutdown(self) -> None:
        """Nothing is to be ended."""
