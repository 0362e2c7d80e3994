"""What a workload is like, in figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.simulator.arrival import Run
from cluster.simulator.workload import Workload, begin_times_s


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Of prompts or of answers, tokens."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    """A workload in figures."""

    num_requests: int
    duration_s: float  # from the begin to the last arrival, as if answers took no time
    input_tokens: LengthSummary
    output_tokens: LengthSummary
    num_blocks: int  # of all prompts, partial ones too
    num_recurring_blocks: int  # that a cache without bound has when the prompt comes

    @property
    def recurring(self) -> float:
        """Share of the prompts' blocks that recur."""
        return self.num_recurring_blocks / self.num_blocks


def describe(workload: Workload) -> WorkloadSummary:
    """Return the figures of a workload.

    A block recurs if an earlier prompt, or one with its answer, begins with all that this prompt
    has up to the block's end. A partial last block counts like the others, as in Mooncake's ids.
    """
    seen = _PrefixTree()
    num_blocks = num_recurring = 0
    for arrival in workload.arrivals:
        blocks = _blocks(arrival.runs, workload.block_size)
        num_blocks += len(blocks)
        num_recurring += seen.add(blocks)
        answered = (*arrival.runs, (arrival.answer_token, arrival.num_output_tokens))
        seen.add(_blocks(answered, workload.block_size))
    return WorkloadSummary(
        num_requests=len(workload.arrivals),
        duration_s=max(begin_times_s(workload.arrivals)),
        input_tokens=_lengths([a.num_prompt_tokens for a in workload.arrivals]),
        output_tokens=_lengths([a.num_output_tokens for a in workload.arrivals]),
        num_blocks=num_blocks,
        num_recurring_blocks=num_recurring,
    )


class _PrefixTree:
    """Which chains of blocks have been seen: a node is a block after all that is before it."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, tuple[Run, ...]], int] = {}

    def add(self, blocks: list[tuple[Run, ...]]) -> int:
        """Add a chain and return how many of its blocks were known."""
        num_known = node = 0
        for block in blocks:
            num_nodes = len(self._nodes)
            node = self._nodes.setdefault((node, block), num_nodes + 1)
            num_known += node <= num_nodes
        return num_known


def _blocks(runs: tuple[Run, ...], block_size: int) -> list[tuple[Run, ...]]:
    """Return the pieces of runs in each block, in order; equal tokens give equal pieces."""
    blocks: list[tuple[Run, ...]] = []
    pieces: list[Run] = []
    num_free = block_size
    for token, count in runs:
        while count:
            taken = min(count, num_free)
            if pieces and pieces[-1][0] == token:
                pieces[-1] = (token, pieces[-1][1] + taken)
            else:
                pieces.append((token, taken))
            count -= taken
            num_free -= taken
            if not num_free:
                blocks.append(tuple(pieces))
                pieces, num_free = [], block_size
    if pieces:
        blocks.append(tuple(pieces))
    return blocks


def _lengths(values: list[int]) -> LengthSummary:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return LengthSummary(float(np.mean(values)), p50, p90, p99)
