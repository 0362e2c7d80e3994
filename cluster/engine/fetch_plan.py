"""Fetch or recompute: which of the blocks that a store has are worth waiting for.

    blocks of the store   |  0 .. start  |  start .. n  |
                          |   computed   |   fetched    |     both at once, one end each

Whoever computes begins at the front, because a token's keys depend on all before it; so what is
fetched is the end. The best border is where both finish together.
"""

from __future__ import annotations

from cluster.clock import Clock
from cluster.types import StepCost, StepShape

WORTH_IT = 0.9
"""A fetch that is not predicted to take less than this share of the computation is left alone."""

_PRIOR_LATENCY_S = 0.002
_PRIOR_BYTES_PER_S = 500e6
_FORGET_S = 3.0
"""Without a call what was measured counts no more: who finds the store too slow asks nothing, and
would not learn that a bad time is over. What trying again costs is one short wait of a request."""

_WEIGHT = 0.3  # of the newest measurement


class TransferTime:
    """How long the store takes, measured as it is used.

    Args:
        clock: Tells how old the measurements are.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latency_s = _PRIOR_LATENCY_S
        self._bytes_per_s = _PRIOR_BYTES_PER_S
        # Apart: searches go on where transfers do not pay, and must not keep what those taught.
        self._latency_measured_s = self._rate_measured_s = clock.now()

    @property
    def latency_s(self) -> float:
        """Of a call that moves nothing."""
        self._forget()
        return self._latency_s

    @property
    def bytes_per_s(self) -> float:
        """Of a call beyond its latency."""
        self._forget()
        return self._bytes_per_s

    def seconds(self, num_bytes: int) -> float:
        """Return how long a transfer takes."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def observe_latency(self, elapsed_s: float) -> None:
        """Learn from a call that moved nothing."""
        self._forget()
        self._latency_s += _WEIGHT * (elapsed_s - self._latency_s)
        self._latency_measured_s = self._clock.now()

    def observe_transfer(self, num_bytes: int, elapsed_s: float) -> None:
        """Learn from a transfer; its rate is at least what it would be without latency."""
        if not num_bytes or elapsed_s <= 0:
            return
        self._forget()
        moving_s = max(elapsed_s - self._latency_s, 0.1 * elapsed_s)
        # The mean of seconds per byte: one slow transfer must not hide behind fast ones.
        s_per_byte = 1 / self._bytes_per_s
        s_per_byte += _WEIGHT * (moving_s / num_bytes - s_per_byte)
        self._bytes_per_s = 1 / s_per_byte
        self._rate_measured_s = self._clock.now()

    def _forget(self) -> None:
        now_s = self._clock.now()
        if now_s - self._latency_measured_s > _FORGET_S:
            self._latency_s = _PRIOR_LATENCY_S
        if now_s - self._rate_measured_s > _FORGET_S:
            self._bytes_per_s = _PRIOR_BYTES_PER_S


def prefill_seconds(
    cost: StepCost, num_tokens: int, *, num_computed_tokens: int, step_tokens: int
) -> list[float]:
    """Return the seconds after which each further step's tokens are computed, from 0.0 on.

    Args:
        cost: Of a step.
        num_tokens: To compute.
        num_computed_tokens: Before them, in the KV cache.
        step_tokens: That one step takes.

    Returns:
        `ceil(num_tokens / step_tokens) + 1` ascending times.
    """
    times = [0.0]
    for start in range(0, num_tokens, step_tokens):
        chunk = min(step_tokens, num_tokens - start)
        shape = StepShape().with_chunk(chunk, num_computed_tokens + start)
        times.append(times[-1] + cost.seconds(shape))
    return times


def first_fetched(
    prefill_s: list[float], *, num_blocks: int, step_blocks: int, block_s: float, latency_s: float
) -> int | None:
    """Return the first block to fetch, to the end; None where computing all is not slower.

    Args:
        prefill_s: Of `prefill_seconds`, `step_blocks` blocks per step.
        num_blocks: That the store has.
        step_blocks: Blocks that one step computes.
        block_s: To transfer one block.
        latency_s: Of the transfer.
    """
    best, best_s = 0, float("inf")
    for step, computed_s in enumerate(prefill_s[:-1]):
        start = step * step_blocks
        total_s = max(computed_s, latency_s + (num_blocks - start) * block_s)
        if total_s < best_s:
            best, best_s = start, total_s
    return best if best_s < WORTH_IT * prefill_s[-1] else None
