"""Who computes the steps: the leader's own process, or a group of workers."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.errors import UnavailableError
from cluster.replica.channel import Channel, wait_readable
from cluster.step import StepPlan, StepResult

if TYPE_CHECKING:  # a leader of worker processes needs no torch
    from cluster.model.runner import ModelRunner


class InProcessExecutor:
    """Runs the whole model where the engine runs."""

    max_in_flight = 1

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._plans: deque[StepPlan] = deque()

    @property
    def num_blocks(self) -> int:
        """KV blocks of the model runner."""
        return self._runner.num_blocks

    def submit(self, plan: StepPlan) -> None:
        """Remember the plan; `collect` computes it."""
        self._plans.append(plan)

    def collect(self, timeout_s: float) -> StepResult:
        """Compute and return the oldest plan; cannot be interrupted by the timeout."""
        plan = self._plans.popleft()
        start_s = time.perf_counter()
        tokens = self._runner.execute(plan, None)
        assert isinstance(tokens, dict), "a whole model ends in tokens"
        return StepResult(plan.step_id, tokens, time.perf_counter() - start_s)

    def shutdown(self) -> None:
        """Forget what was submitted."""
        self._plans.clear()


@dataclass(slots=True)
class _StepInFlight:
    started_s: float
    waits_for: set[int]  # workers that have not answered
    result: StepResult | None = None


class GroupExecutor:
    """Sends every plan to all workers of a group; the last stage answers.

    Where a plan moves blocks all workers answer: the slots are theirs until each has done it.

    Args:
        channels: To the workers, by index.
        num_blocks: KV blocks that every worker holds.
        num_stages: Pipeline stages: how many steps can be on their way.
    """

    def __init__(self, channels: Sequence[Channel], *, num_blocks: int, num_stages: int) -> None:
        self._channels = list(channels)
        self._steps: deque[_StepInFlight] = deque()  # oldest first
        self._reporter = len(channels) - len(channels) // num_stages  # the last stage's tp_rank 0
        self.num_blocks = num_blocks
        self.max_in_flight = num_stages

    def submit(self, plan: StepPlan) -> None:
        """Send the plan to every worker.

        Raises:
            UnavailableError: A worker is gone.
        """
        data = plan.encode()
        waits_for = set(range(len(self._channels))) if plan.moves else {self._reporter}
        self._steps.append(_StepInFlight(time.perf_counter(), waits_for))
        for index, channel in enumerate(self._channels):
            try:
                channel.send("plan", data)
            except UnavailableError as error:
                raise UnavailableError(f"worker {index} is gone: {error}") from error

    def collect(self, timeout_s: float) -> StepResult:
        """Wait for the oldest step.

        Raises:
            UnavailableError: A worker is gone, failed, or the step took too long.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._steps or self._steps[0].waits_for:
            ready = wait_readable(self._channels, max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise UnavailableError(
                    f"step took longer than engine.step_timeout_s={timeout_s:g}: a worker hangs"
                )
            for channel in ready:
                self._read(channel)
        result = self._steps.popleft().result
        assert result is not None, "the last stage is among those that were waited for"
        return result

    def _read(self, channel: Channel) -> None:
        index = self._channels.index(channel)
        try:
            kind, value = channel.receive()
        except UnavailableError as error:
            raise UnavailableError(f"worker {index} is gone") from error
        if kind == "error":
            raise UnavailableError(f"worker {index} failed: {value}")
        # Each worker answers in the order of the plans.
        step = next(step for step in self._steps if index in step.waits_for)
        step.waits_for.remove(index)
        elapsed_s = time.perf_counter() - step.started_s
        if index == self._reporter:
            assert kind == "result", kind
            step.result = replace(StepResult.decode(value), elapsed_s=elapsed_s)
        else:
            assert kind == "moved", kind

    def shutdown(self) -> None:
        """Close every channel: a worker ends when its leader is gone."""
        for channel in self._channels:
            with contextlib.suppress(UnavailableError):
                channel.send("stop")
            channel.close()
