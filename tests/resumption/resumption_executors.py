"""An executor that a request kills. Named by `Layout.executor`, it runs in leaders' processes."""

from __future__ import annotations

import os
import signal

from cluster.engine.executor import Executor
from cluster.step import StepPlan, StepResult

POISON = (4001, 4003, 4002)  # token ids that a prompt begins with


class PoisonableExecutor:
    """Ends its process as a crash in a kernel would, once it is to compute a poisonous prompt."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    @property
    def max_in_flight(self) -> int:
        return self._executor.max_in_flight

    @property
    def num_blocks(self) -> int:
        return self._executor.num_blocks

    def submit(self, plan: StepPlan) -> None:
        if any(sequence.token_ids[: len(POISON)] == POISON for sequence in plan.sequences):
            os.kill(os.getpid(), signal.SIGKILL)
        self._executor.submit(plan)

    def collect(self, timeout_s: float) -> StepResult:
        return self._executor.collect(timeout_s)

    def shutdown(self) -> None:
        self._executor.shutdown()
