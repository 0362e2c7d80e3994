"""What a run of `sluice bench chaos` is to do."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.bench.chaos_memory import MEASURED_RUN_S
from cluster.bench.chaos_requests import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS
from cluster.bench.chaos_schedule import FaultKind, Target, fault_kinds
from cluster.errors import InvalidArgumentError

SPARED_S = {Target.REPLICA: 240.0, Target.GATEWAY: 150.0}
"""Until the memory of one that lived from the beginning has been measured."""


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """One run."""

    minutes: float = 5.0  # of load
    seed: int = 0
    interval_s: float = 10.0  # between two faults, on average
    num_replicas: int = 3
    num_gateways: int = 2
    num_workers: int = 1  # of a group: tensor-parallel ranks
    num_streams: int = 16  # at once
    num_asks: int = 70  # different requests
    kinds: tuple[FaultKind, ...] = fault_kinds("")

    def __post_init__(self) -> None:
        """Check what cannot go together.

        Raises:
            InvalidArgumentError: A fault could never happen, or there is no time for one.
        """
        numbers = {Target.REPLICA: self.num_replicas, Target.GATEWAY: self.num_gateways}
        for kind in self.kinds:
            if numbers.get(kind.target, 2) < 2:
                raise InvalidArgumentError(
                    f"--{kind.target}s={numbers[kind.target]} with {kind.name}, which never takes "
                    "the last one: ask for 2, or leave that fault out of --faults",
                    field=f"{kind.target}s",
                )
            if self.num_workers not in kind.num_workers:
                raise InvalidArgumentError(
                    f"--workers={self.num_workers} with {kind.name}, which is for groups of "
                    f"{kind.num_workers.start} to {kind.num_workers.stop - 1}: leave it out of "
                    "--faults",
                    field="workers",
                )
        if self.seconds < 2 * self.interval_s:
            raise InvalidArgumentError(
                f"--minutes={self.minutes:g} with --interval={self.interval_s:g} has no room for a "
                f"fault: ask for at least {2 * self.interval_s / 60:g} minutes",
                field="minutes",
            )

    @property
    def seconds(self) -> float:
        """Of load."""
        return 60.0 * self.minutes

    @property
    def spared_s(self) -> dict[Target, float]:
        """How long one replica and one gateway are no victims."""
        return dict(SPARED_S) if self.seconds >= MEASURED_RUN_S else {}

    @property
    def num_blocks(self) -> int:
        """KV blocks of a replica: for half of the streams, so that the last replica preempts."""
        per_stream = -(-(MAX_PROMPT_TOKENS + MAX_ANSWER_TOKENS) // 16)
        return per_stream * max(2, self.num_streams // 2)
