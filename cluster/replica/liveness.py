"""Tells dead from busy, as a pure decision: who says nothing, and what computes nothing.

    says nothing       the process is killed, stopped, or cut off: it ends the group
    computes nothing   the processes answer, and a step is under way that uses no processor: stuck
    neither            busy, however long a step takes

Silence is counted in the observer's own ticks, each of which counts for twice its length at most:
an observer that stood still itself, with its whole machine maybe, accuses nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_USE_S = 0.02
"""Of processor time, within the time after which a step counts as stuck: one that waits for what
never comes uses none, and hardly any where it looks for it now and then."""


class Silence:
    """For how long somebody has said nothing.

    Args:
        limit_s: Longer is too long.
        tick_s: Between two ticks, as planned.
    """

    def __init__(self, limit_s: float, tick_s: float) -> None:
        self.limit_s = limit_s
        self._max_credit_s = 2 * tick_s
        self._silent_s = 0.0

    @property
    def is_too_long(self) -> bool:
        """Whether the limit is passed."""
        return self._silent_s > self.limit_s

    def heard(self) -> None:
        """It said something."""
        self._silent_s = 0.0

    def tick(self, elapsed_s: float) -> None:
        """Let time pass: so long since the tick before, by the observer's clock."""
        self._silent_s += min(elapsed_s, self._max_credit_s)


class Liveness:
    """Judges a group, from the beats of its threads that compute.

    On a GPU the thread of a worker spins while it waits for the device, which counts as use: a
    device that hangs is noticed by engine.step_timeout_s alone.

    Args:
        num_workers: Whose beats come from other processes; thread 0 ... num_workers - 1 are theirs.
            Thread `num_workers` is the engine's, in the observer's own process.
        teams: Threads that go on only together, such as the ranks of a stage, which wait for each
            other in a loop that uses the processor. Every thread is in one.
        heartbeat_timeout_s: A worker that is silent for longer is dead.
        stuck_timeout_s: A step during which no whole team uses the processor for so long is stuck.
        tick_s: Between two ticks, as planned.
    """

    def __init__(
        self,
        num_workers: int,
        teams: Sequence[Sequence[int]],
        *,
        heartbeat_timeout_s: float,
        stuck_timeout_s: float,
        tick_s: float,
    ) -> None:
        assert sorted(index for team in teams for index in team) == list(range(num_workers + 1))
        self._teams = teams
        self._workers = [Silence(heartbeat_timeout_s, tick_s) for _ in range(num_workers)]
        self._cpu_s = [0.0] * (num_workers + 1)
        self._cpu_before_s = [0.0] * (num_workers + 1)  # when the step was last seen to go on
        self._idle = Silence(stuck_timeout_s, tick_s)

    def beat(self, index: int, cpu_s: float) -> None:
        """A thread's process lives.

        Args:
            index: Of the thread.
            cpu_s: Processor time that the thread has used since its start.
        """
        self._cpu_s[index] = cpu_s
        if index < len(self._workers):
            self._workers[index].heard()

    def tick(self, elapsed_s: float, *, step_age_s: float) -> str:
        """Let time pass; return why the group has failed, or nothing.

        Args:
            elapsed_s: Since the tick before.
            step_age_s: Of the step that is under way; 0 where there is none.
        """
        for index, worker in enumerate(self._workers):
            worker.tick(elapsed_s)
            if worker.is_too_long:
                limit_s = worker.limit_s
                return f"worker {index} does not answer: replica.heartbeat_timeout_s={limit_s:g}"
        self._idle.tick(elapsed_s)
        # A step that began after the tick before has not been idle for longer than it lasts.
        if step_age_s <= elapsed_s or any(self._goes_on(team) for team in self._teams):
            self._idle.heard()
            self._cpu_before_s = list(self._cpu_s)
        if self._idle.is_too_long:
            return (
                "the engine is stuck: its step has used no processor for "
                f"replica.stuck_timeout_s={self._idle.limit_s:g}"
            )
        return ""

    def _goes_on(self, team: Sequence[int]) -> bool:
        return all(self._cpu_s[i] - self._cpu_before_s[i] >= MIN_USE_S for i in team)


def teams_of(tp: int, pp: int, *, spins: bool) -> list[list[int]]:
    """Return the threads of a group that go on only together, as `Liveness` wants them.

    Args:
        tp: Ranks of a stage.
        pp: Stages.
        spins: Whether a rank that waits for another one of its stage uses the processor. Ranks on
            GPUs do not always: only the one that reports waits for the device.
    """
    num_workers = tp * pp if tp * pp > 1 else 0  # a group of one computes in its leader
    size = tp if spins else 1
    stages = [list(range(first, first + size)) for first in range(0, num_workers, size)]
    return [*stages, [num_workers]]
