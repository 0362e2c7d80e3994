"""What an engine needs from whoever moves blocks between host tier and store.

A move runs beside the computation and ends on its own: done, or failed when its deadline passes.
Until its result is collected the host slots that it names belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class MoveKind(StrEnum):
    """What is done with blocks in the store."""

    FIND = "find"  # is each there? Marks none as used
    GET = "get"  # store to slots
    PUT = "put"  # slots to store; what is there already is marked as used, not written again


@dataclass(frozen=True, slots=True)
class Move:
    """One call of the store, by every worker for its own part of the blocks."""

    move_id: int
    kind: MoveKind
    hashes: tuple[bytes, ...]  # of the blocks, a chain in order; none asks whether it answers
    slots: tuple[int, ...] = ()  # of the host tier, one per block; none for FIND
    is_pinned: bool = False  # of PUT: keep these until they are released


@dataclass(frozen=True, slots=True)
class MoveResult:
    """How a move ended.

    `found`, one per block: FIND: it is there. GET: the slot holds it. PUT: the store has it now.
    A block counts where every worker says so.
    """

    move_id: int
    found: tuple[bool, ...]  # all False where `error` is set
    elapsed_s: float  # of the slowest worker
    num_bytes: int = 0  # that one worker read or wrote
    num_corrupt: int = 0  # blocks that came and did not verify
    error: str = ""  # why the store could not be asked; "" where it answered


class BlockMover(Protocol):
    """Moves blocks of one replica group; a lost one answers every move with an error."""

    def submit(self, move: Move) -> None:
        """Begin a move. Neither blocks nor raises."""
        ...

    def collect(self, timeout_s: float) -> list[MoveResult]:
        """Return the results that are there; waits up to `timeout_s` seconds for the first."""
        ...

    def shutdown(self) -> None:
        """End the movers; further calls are not allowed."""
        ...
