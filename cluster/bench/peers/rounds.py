"""The rounds: everyone takes a turn in each row, again and again, so that drift hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.bench.peers.comparison import Run
from cluster.bench.peers.processes import RunFailedError
from cluster.bench.peers.rows import Row

Measure = Callable[[Row, str, int], Mapping[str, float]]
"""Runs a peer (by name) in a row, in the given round; raises RunFailedError."""

_STARTUP_S = 45.0
_PREFILL_TOKENS_PER_S = 250.0
_DECODE_TOKENS_PER_S = 50.0


@dataclass(frozen=True, slots=True)
class Turn:
    """A run that is due."""

    row: Row
    peer: str
    round: int  # from 1


def turns(rows: Sequence[Row], num_rounds: int) -> Iterator[Turn]:
    """Yield every run in its order: peers take turns within a row, rows within a round."""
    for number in range(1, num_rounds + 1):
        for row in rows:
            for peer in row.peers:
                yield Turn(row, peer, number)


def run_rounds(due: Sequence[Turn], measure: Measure, on_run: Callable[[Run], None]) -> list[Run]:
    """Run all turns; an interrupt ends them, and what was measured until then is returned.

    Who fails in a row is not tried in that row again; the others go on.
    """
    runs: list[Run] = []
    failed: set[tuple[str, str]] = set()
    for turn in due:
        if (turn.row.name, turn.peer) in failed:
            continue
        try:
            figures = measure(turn.row, turn.peer, turn.round)
            run = Run(turn.row.name, turn.peer, turn.round, dict(figures))
        except RunFailedError as error:
            failed.add((turn.row.name, turn.peer))
            run = Run(turn.row.name, turn.peer, turn.round, error=str(error))
        except KeyboardInterrupt:
            break
        runs.append(run)
        on_run(run)
    return runs


@dataclass(slots=True)
class Estimate:
    """Guesses how long a turn takes: as long as the last of its kind, else by its tokens."""

    _seen_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def record(self, row: str, peer: str, wall_s: float) -> None:
        """Remember how long a run took, seconds."""
        self._seen_s[row, peer] = wall_s

    def remaining_s(self, due: Sequence[Turn]) -> float:
        """Return how long these turns will take, seconds."""
        return sum(
            self._seen_s.get((turn.row.name, turn.peer)) or _guess_s(turn.row) for turn in due
        )


def _guess_s(row: Row) -> float:
    work = row.work
    prefill_s = work.input_len / _PREFILL_TOKENS_PER_S
    decode_s = work.output_len / _DECODE_TOKENS_PER_S
    return _STARTUP_S + work.num_requests * (prefill_s + decode_s)
