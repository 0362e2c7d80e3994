"""The leader's end of its group's movers: one move for all, one result from all."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.engine.mover import Move, MoveResult
from cluster.errors import UnavailableError
from cluster.replica.channel import Channel, wait_readable

logger = logging.getLogger(__name__)

MAX_SENT_BLOCKS = 4096
"""Of moves that were sent and not answered: their messages, and the answers, fit into the buffer of
a socket (about 200 KB) whole, so that neither side ever waits for the other to read."""

MAX_MOVES = 1024
"""Sent and waiting; more fail at once."""

MIN_RESTART_S, MAX_RESTART_S = 1.0, 60.0
"""Between two starts of a mover that ends again and again."""

SILENCE_S = 30.0
"""A mover that has work and says nothing for this long beyond the store's deadline is given up."""


@dataclass(slots=True)
class _Open:
    """A move that some movers have not answered yet."""

    move: Move
    waits_for: set[int]  # workers
    result: MoveResult


class MoverLink:
    """Implements `engine.mover.BlockMover` over one channel per worker; for one thread.

    Once a mover is gone, every move fails, for its part of any block is missing; until it was
    started again, where it can be.

    Args:
        channels: To the movers, by worker; closed by `shutdown`.
        timeout_s: The store's deadline.
        clock: Tells how long a mover is silent.
        restart: Starts the only mover anew, or returns None; without it a loss is for good.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        *,
        timeout_s: float,
        clock: Clock,
        restart: Callable[[], Channel | None] | None = None,
    ) -> None:
        assert restart is None or len(channels) == 1, "movers of a group start with their workers"
        self._restart = restart
        self._restart_due_s = 0.0
        self._restart_wait_s = MIN_RESTART_S
        self._live = dict(enumerate(channels))
        self._clock = clock
        self._patience_s = timeout_s + SILENCE_S
        self._heard_s = [0.0] * len(channels)  # from each, or when it last had nothing to say
        self._open: dict[int, _Open] = {}
        self._unsent: deque[Move] = deque()
        self._num_sent_blocks = 0
        self._results: list[MoveResult] = []
        self._loss = ""  # why the store is off

    def submit(self, move: Move) -> None:
        """Begin a move. Neither blocks nor raises."""
        if self._loss:
            self._try_restart()
        if self._loss:
            self._results.append(_failed(move, self._loss))
        elif len(self._open) + len(self._unsent) >= MAX_MOVES:
            self._results.append(_failed(move, f"{MAX_MOVES} moves are on their way"))
        else:
            self._unsent.append(move)
            self._send_what_fits()

    def collect(self, timeout_s: float) -> list[MoveResult]:
        """Return the results that are there; waits up to `timeout_s` seconds for the first."""
        deadline_s = time.monotonic() + timeout_s
        self._read_all(0.0)
        while self._open and not self._results and (left_s := deadline_s - time.monotonic()) > 0:
            self._read_all(left_s)
        self._give_up_silent()
        results, self._results = self._results, []
        return results

    def shutdown(self) -> None:
        """End the movers; further calls are not allowed."""
        for channel in self._live.values():
            channel.close()
        self._live.clear()

    def _try_restart(self) -> None:
        now_s = self._clock.now()
        if self._restart is None or self._open or now_s < self._restart_due_s:
            return
        self._restart_due_s = now_s + self._restart_wait_s
        self._restart_wait_s = min(2 * self._restart_wait_s, MAX_RESTART_S)
        channel = self._restart()
        if channel is not None:
            logger.warning("the mover was started again")
            self._live = {0: channel}
            self._heard_s = [now_s]
            self._loss = ""

    def _send_what_fits(self) -> None:
        while self._unsent and not self._loss:
            num_blocks = len(self._unsent[0].hashes)
            if self._open and self._num_sent_blocks + num_blocks > MAX_SENT_BLOCKS:
                return
            self._send(self._unsent.popleft())

    def _send(self, move: Move) -> None:
        nothing = MoveResult(move.move_id, (True,) * len(move.hashes), 0.0)
        item = _Open(move, set(self._live), nothing)
        for index in self._live:
            if not any(index in other.waits_for for other in self._open.values()):
                self._heard_s[index] = self._clock.now()
        self._open[move.move_id] = item
        self._num_sent_blocks += len(move.hashes)
        for index, channel in list(self._live.items()):
            try:
                channel.send(
                    "move",
                    move.move_id,
                    move.kind.value,
                    move.hashes,
                    move.slots,
                    move.is_pinned,
                )
            except UnavailableError as error:
                self._lose(index, str(error))

    def _read_all(self, timeout_s: float) -> None:
        """Take every answer that is there; waits for one up to `timeout_s` seconds."""
        while ready := wait_readable(self._live.values(), timeout_s) if self._live else []:
            for index, channel in list(self._live.items()):
                if channel in ready:
                    self._read(index, channel)
            self._send_what_fits()
            timeout_s = 0.0

    def _read(self, index: int, channel: Channel) -> None:
        try:
            kind, *row = channel.receive()
        except UnavailableError as error:
            self._lose(index, str(error))
            return
        assert kind == "moved", kind
        self._heard_s[index] = self._clock.now()
        result = MoveResult(*row)
        item = self._open[result.move_id]
        item.result = _merged(item.result, result)
        self._answered(item, index)

    def _answered(self, item: _Open, index: int) -> None:
        item.waits_for.discard(index)
        if item.waits_for:
            return
        del self._open[item.move.move_id]
        self._num_sent_blocks -= len(item.move.hashes)
        error = item.result.error
        self._results.append(_failed(item.move, error) if error else item.result)

    def _give_up_silent(self) -> None:
        now_s = self._clock.now()
        for index in list(self._live):
            is_asked = any(index in item.waits_for for item in self._open.values())
            if is_asked and now_s - self._heard_s[index] > self._patience_s:
                self._lose(index, f"it has not answered for {self._patience_s:g} s")

    def _lose(self, index: int, reason: str) -> None:
        """A mover is gone. What the others still move into slots is waited for."""
        if not self._loss:
            self._loss = f"the mover of worker {index} is gone: {reason}"
            logger.warning("no blocks are stored or fetched any more: %s", self._loss)
        self._live.pop(index).close()
        for item in list(self._open.values()):
            if index in item.waits_for:
                item.result = _merged(item.result, _failed(item.move, self._loss))
                self._answered(item, index)
        self._results += [_failed(move, self._loss) for move in self._unsent]
        self._unsent.clear()


def _merged(one: MoveResult, other: MoveResult) -> MoveResult:
    return MoveResult(
        one.move_id,
        tuple(a and b for a, b in zip(one.found, other.found, strict=True)),
        max(one.elapsed_s, other.elapsed_s),
        max(one.num_bytes, other.num_bytes),
        max(one.num_corrupt, other.num_corrupt),
        one.error or other.error,
    )


def _failed(move: Move, error: str) -> MoveResult:
    return MoveResult(move.move_id, (False,) * len(move.hashes), 0.0, error=error)
