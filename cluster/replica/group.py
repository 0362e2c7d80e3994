"""The life of a replica group, as a pure state machine.

    STARTING ──all workers ready──► READY ──drain──► DRAINING ──idle, or out of time──► STOPPED
        │                             │                  │
        └─────── a worker is lost, or the time to start is over ──────► FAILED

A group is one thing: with one worker lost all of it has failed, and whoever owns it ends every
process of it. It is never repaired; Ray Serve builds a new one.
"""

from __future__ import annotations

from enum import StrEnum

from cluster.clock import Clock


class GroupState(StrEnum):
    """Where a group is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class GroupLifecycle:
    """Takes what happened to a group and tells what the group is now.

    Args:
        num_workers: tp x pp; 0 workers are not a group.
        start_timeout_s: All workers have to be ready within this time.
        drain_timeout_s: Requests may finish for this long after a drain began.
        clock: Where the time comes from.
    """

    def __init__(
        self, num_workers: int, *, start_timeout_s: float, drain_timeout_s: float, clock: Clock
    ) -> None:
        assert num_workers > 0, f"a group has workers: {num_workers=}"
        self._waiting_for = set(range(num_workers))
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._deadline_s = clock.now() + start_timeout_s
        self.state = GroupState.STARTING
        self.reason = ""  # why it failed

    @property
    def accepts_requests(self) -> bool:
        """Whether new requests may come in."""
        return self.state is GroupState.READY

    @property
    def is_over(self) -> bool:
        """Whether every process of the group has to end."""
        return self.state in (GroupState.STOPPED, GroupState.FAILED)

    def worker_ready(self, index: int) -> None:
        """A worker has loaded its shard and joined its peers."""
        self._waiting_for.discard(index)
        if self.state is GroupState.STARTING and not self._waiting_for:
            self.state = GroupState.READY

    def worker_lost(self, index: int, reason: str) -> None:
        """A worker died, failed, or does not answer."""
        self.fail(f"worker {index}: {reason}")

    def fail(self, reason: str) -> None:
        """The group cannot go on; the first reason counts."""
        if not self.is_over:
            self.state = GroupState.FAILED
            self.reason = reason

    def drain(self) -> None:
        """Take no new requests and stop when the present ones are done."""
        if self.state is GroupState.READY:
            self.state = GroupState.DRAINING
            self._deadline_s = self._clock.now() + self._drain_timeout_s
        elif self.state is GroupState.STARTING:
            self.state = GroupState.STOPPED

    def tick(self, num_requests: int) -> None:
        """Let time pass.

        Args:
            num_requests: Requests that the group still works on.
        """
        is_late = self._clock.now() >= self._deadline_s
        if self.state is GroupState.STARTING and is_late:
            missing = ", ".join(str(index) for index in sorted(self._waiting_for))
            self.fail(f"workers {missing} were not ready in time: raise replica.start_timeout_s")
        elif self.state is GroupState.DRAINING and (num_requests == 0 or is_late):
            self.state = GroupState.STOPPED

    def check_invariants(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        assert (self.state is GroupState.FAILED) == bool(self.reason)
        if self.state in (GroupState.READY, GroupState.DRAINING):
            assert not self._waiting_for
