"""CUDA graphs of decode steps: launched by one call instead of a thousand.

    plan --pad to a captured size--> tokens, tables (int32) --replay--> output[:num_sequences]

    tokens  [n, 3]   token id, position, slot
    tables  [n, B]   blocks of each sequence; as many columns are copied as the step needs

A captured graph reads and writes fixed addresses: the two above, activations of the stage before,
the output. Padding rows are sequences of one token in a scratch block of their own, behind the
cache's last one, so they read what they wrote themselves. One graph per size, largest first, share
one memory pool. Only steps in which every sequence has one token are replayed; the rest runs
eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.ops import PagedBatch
from cluster.step import StepPlan

Capture = Callable[[Callable[[], None]], Callable[[], Any]]
"""Takes work on fixed tensors and returns what repeats it."""


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes to capture, rising: 1, 2, 4, then every eighth, then the largest."""
    small = (n for n in (1, 2, 4) if n < max_num_seqs)
    return (*small, *range(8, max_num_seqs, 8), max_num_seqs)


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What captured steps can hold."""

    max_num_seqs: int
    max_num_blocks: int  # of one sequence's block table
    block_size: int  # slots
    scratch_block: int  # written by padding rows, read by nothing else


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One token of each of n sequences, at fixed addresses."""

    token_ids_1n: Tensor | None  # int64; None behind the first stage
    hidden_1nD: Tensor | None  # activations of the stage before; None on the first
    batch: PagedBatch


def decode_arrays(
    plan: StepPlan, size: int, limits: GraphLimits
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return a step in which every sequence has one token, padded to `size`.

    Returns:
        Tokens [size, 3] and tables [size, blocks of the longest one].
    """
    width = max((len(seq.block_table) for seq in plan.sequences), default=1)
    tokens, tables = np.zeros((size, 3), np.int32), np.zeros((size, width), np.int32)
    for row, seq in enumerate(plan.sequences):
        position = seq.num_computed_tokens
        block, offset = divmod(position, limits.block_size)
        slot = seq.block_table[block] * limits.block_size + offset
        tokens[row] = seq.token_ids[0], position, slot
        tables[row, : len(seq.block_table)] = seq.block_table
    tokens[len(plan.sequences) :, 2] = limits.scratch_block * limits.block_size
    tables[len(plan.sequences) :, 0] = limits.scratch_block
    return tokens, tables


class DecodeGraphs:
    """Captured decode steps of one stage.

    Args:
        forward: Computes a step: [n, columns], the logits of every row or activations.
        limits: What is captured.
        device: Where.
        hidden: Columns and dtype of the activations that come in; None on the first stage.
        capture: Makes a repeatable call of a step.
    """

    def __init__(
        self,
        forward: Callable[[DecodeInputs], Tensor],
        limits: GraphLimits,
        device: torch.device,
        *,
        hidden: tuple[int, torch.dtype] | None,
        capture: Capture,
    ) -> None:
        self._limits = limits
        self._sizes = graph_sizes(limits.max_num_seqs)
        tokens, tables = decode_arrays(StepPlan(0, ()), limits.max_num_seqs, limits)
        self._tokens = torch.from_numpy(tokens).to(device)
        self._tables = F.pad(torch.from_numpy(tables), (0, limits.max_num_blocks - 1)).to(device)
        self._hidden: Tensor | None = None
        if hidden is not None:
            shape = (limits.max_num_seqs, hidden[0])
            self._hidden = torch.zeros(shape, dtype=hidden[1], device=device)
        with torch.inference_mode():
            self._output = torch.empty_like(forward(self._inputs(limits.max_num_seqs)))
            # The largest first: the smaller ones fit into the memory that it leaves to the pool.
            self._replays = {
                size: capture(self._work(forward, size)) for size in reversed(self._sizes)
            }

    def run(self, plan: StepPlan, hidden_TD: Tensor | None) -> Tensor | None:
        """Replay a step.

        Args:
            plan: At least one sequence.
            hidden_TD: Activations of the stage before, in the order of the plan.

        Returns:
            [n, columns], a row per sequence, valid until the next call; None for a step that is
            not captured and has to run eagerly.
        """
        size = self.size_for(plan)
        if size is None:
            return None
        tokens, tables = decode_arrays(plan, size, self._limits)
        _fill(self._tokens[:size], tokens)
        _fill(self._tables[:size, : tables.shape[1]], tables)
        if self._hidden is not None:
            assert hidden_TD is not None, "a stage behind the first needs activations"
            self._hidden[: hidden_TD.shape[0]].copy_(hidden_TD, non_blocking=True)
        self._replays[size]()
        return self._output[: len(plan.sequences)]

    def size_for(self, plan: StepPlan) -> int | None:
        """Return the captured size that holds a step; None where it runs eagerly."""
        num_seqs = len(plan.sequences)
        if not 0 < num_seqs <= self._limits.max_num_seqs:
            return None
        for seq in plan.sequences:
            if len(seq.token_ids) != 1 or len(seq.block_table) > self._limits.max_num_blocks:
                return None
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    def _inputs(self, size: int) -> DecodeInputs:
        """Return a step's inputs, all made from what lies at fixed addresses."""
        limits, hidden = self._limits, self._hidden
        ids_n, positions_n, slots_n = self._tokens[:size].long().t().contiguous().unbind(0)
        batch = PagedBatch(
            slots_T=slots_n,
            positions_T=positions_n,
            query_starts_n1=torch.arange(size + 1, dtype=torch.int32, device=ids_n.device),
            context_lens_n=(positions_n + 1).int(),
            block_tables_nB=self._tables[:size],
            max_query_len=1,
            max_context_len=limits.max_num_blocks * limits.block_size,
            block_size=limits.block_size,
        )
        if hidden is None:
            return DecodeInputs(ids_n[None], None, batch)
        return DecodeInputs(None, hidden[None, :size], batch)

    def _work(self, forward: Callable[[DecodeInputs], Tensor], size: int) -> Callable[[], None]:
        def work() -> None:
            self._output[:size].copy_(forward(self._inputs(size)))

        return work


def _fill(target: Tensor, array: npt.NDArray[np.int32]) -> None:
    """Copy to a fixed address without waiting; torch keeps pinned memory until it was read."""
    source = torch.from_numpy(array)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
