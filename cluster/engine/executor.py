"""What an engine needs from whoever computes its steps."""

from __future__ import annotations

from typing import Protocol

from cluster.step import StepPlan, StepResult


class Executor(Protocol):
    """Computes steps, in the order in which they were submitted.

    One in the leader's process for 1x1, tp x pp worker processes otherwise (replica/executor.py);
    a fake one in tests, in the simulator and in `sluice bench gateway`.
    """

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted and not collected: the number of pipeline stages."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks that every worker holds."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begin a step.

        Raises:
            UnavailableError: A worker is gone; the group has to end.
        """
        ...

    def collect(self, timeout_s: float) -> StepResult:
        """Return the result of the oldest step that was not collected yet.

        Raises:
            UnavailableError: A worker is gone, failed, or took longer than `timeout_s` seconds.
        """
        ...

    def shutdown(self) -> None:
        """End the workers; further calls are not allowed."""
        ...
