"""The leader's end, over real sockets; the movers' ends are played by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster.clock import VirtualClock
from cluster.engine.mover import Move, MoveKind, MoveResult
from cluster.replica.channel import Channel, channel_of, channel_pair
from cluster.replica.mover_link import (
    MAX_MOVES,
    MAX_SENT_BLOCKS,
    MIN_RESTART_S,
    SILENCE_S,
    MoverLink,
)

HASHES = tuple(bytes([i]) * 16 for i in range(3))
CLOCK = VirtualClock()


@contextmanager
def link(
    num_movers: int = 2, clock: VirtualClock = CLOCK
) -> Iterator[tuple[MoverLink, list[Channel]]]:
    pairs = [channel_pair(1.0) for _ in range(num_movers)]
    movers = [channel_of(theirs.detach(), send_timeout_s=1.0) for _, theirs in pairs]
    leader = MoverLink([ours for ours, _ in pairs], timeout_s=0.5, clock=clock)
    try:
        yield leader, movers
    finally:
        leader.shutdown()
        for mover in movers:
            mover.close()


def find(move_id: int = 0, num_blocks: int = 3) -> Move:
    return Move(move_id, MoveKind.FIND, (HASHES * num_blocks)[:num_blocks])


def answer(mover: Channel, found: tuple[bool, ...], *rest: object, move_id: int = 0) -> None:
    mover.send("moved", move_id, found, *(rest or (0.0, 0, 0, "")))


def test_move_goes_to_every_mover() -> None:
    with link() as (leader, movers):
        leader.submit(Move(5, MoveKind.PUT, HASHES, (7, 8, 9), is_pinned=True))
        for mover in movers:
            assert mover.receive() == ("move", 5, "put", HASHES, (7, 8, 9), True)


def test_answers_are_merged() -> None:
    with link() as (leader, movers):
        leader.submit(find())
        assert leader.collect(0.0) == []
        answer(movers[1], (True, True, False), 0.25, 10, 2, "")
        assert leader.collect(0.01) == [], "one worker has not answered"
        answer(movers[0], (True, False, True), 0.125, 20, 1, "")
        assert leader.collect(1.0) == [MoveResult(0, (True, False, False), 0.25, 20, 2)]
        assert leader.collect(1.0) == [], "nothing is open: nothing to wait for"


def test_error_of_one_mover_is_the_moves() -> None:
    with link() as (leader, movers):
        leader.submit(find())
        answer(movers[0], (True,) * 3)
        answer(movers[1], (False,) * 3, 0.5, 0, 0, "no answer")
        (result,) = leader.collect(1.0)
        assert (result.found, result.error) == ((False,) * 3, "no answer")


def test_lost_mover_fails_every_move_once_and_the_others_are_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with link() as (leader, movers):
        leader.submit(find(0))
        leader.submit(find(1))
        answer(movers[0], (True,) * 3, move_id=1)
        movers[1].close()
        (result,) = leader.collect(1.0)
        assert result.move_id == 1 and "worker 1 is gone" in result.error
        assert leader.collect(0.01) == [], "worker 0 may still write to the slots of move 0"
        leader.submit(find(2))
        assert [r.move_id for r in leader.collect(0.0)] == [2]
        answer(movers[0], (True,) * 3, move_id=0)
        (result,) = leader.collect(1.0)
        assert result.move_id == 0 and result.found == (False,) * 3 and result.error
        movers[0].close()
        leader.submit(find(3))
        assert leader.collect(1.0)[0].error
    assert len([r for r in caplog.records if "no blocks are stored" in r.message]) == 1


def test_lost_mover_is_no_wait() -> None:
    with link(1) as (leader, movers):
        movers[0].close()
        for move_id in range(3):
            leader.submit(find(move_id))
        assert sorted(r.move_id for r in leader.collect(10.0)) == [0, 1, 2]


def test_mover_that_is_silent_is_given_up() -> None:
    clock = VirtualClock()
    with link(1, clock) as (leader, movers):
        clock.advance(1000)  # nothing was asked: this is no silence
        leader.submit(find(0))
        clock.advance(SILENCE_S)
        leader.submit(find(1))
        answer(movers[0], (True,) * 3)
        assert [r.error for r in leader.collect(1.0)] == [""]
        clock.advance(0.5 + SILENCE_S)
        assert leader.collect(0.0) == []
        clock.advance(0.1)
        (result,) = leader.collect(0.0)
        assert "has not answered for 30.5 s" in result.error


def test_messages_on_their_way_fit_into_a_sockets_buffer() -> None:
    with link(1) as (leader, movers):
        num_moves = 64
        for move_id in range(num_moves):
            leader.submit(find(move_id, MAX_SENT_BLOCKS // 2))  # returns: nobody reads
        received = []
        for _ in range(num_moves):
            message = movers[0].receive()
            received.append(message[1])
            answer(movers[0], (True,) * len(message[3]), move_id=message[1])
            if len(received) % 2 == 0:
                assert len(leader.collect(1.0)) == 2
        assert received == list(range(num_moves))


def test_moves_beyond_all_bounds_fail_at_once() -> None:
    with link(1) as (leader, _):
        for move_id in range(MAX_MOVES + 1):
            leader.submit(find(move_id, 100))
        (result,) = leader.collect(0.0)
        assert result.move_id == MAX_MOVES and "on their way" in result.error


def test_shutdown_is_seen_by_the_movers() -> None:
    with link() as (leader, movers):
        leader.shutdown()
        for mover in movers:
            with pytest.raises(Exception, match="connection is lost"):
                mover.receive()


def test_only_mover_is_started_again_ever_more_rarely() -> None:
    clock = VirtualClock()
    started: list[Channel] = []

    def restart() -> Channel:
        ours, theirs = channel_pair(1.0)
        started.append(channel_of(theirs.detach(), send_timeout_s=1.0))
        return ours

    ours, theirs = channel_pair(1.0)
    theirs.close()  # it ended at once
    leader = MoverLink([ours], timeout_s=0.5, clock=clock, restart=restart)
    try:
        leader.submit(find(0))
        assert leader.collect(1.0)[0].error and not started
        leader.submit(find(1))
        answer(started[0], (True,) * 3, move_id=1)
        assert leader.collect(1.0)[0].found == (True,) * 3
        started[0].close()
        leader.submit(find(2))
        assert leader.collect(1.0)[0].error
        leader.submit(find(3))
        assert leader.collect(0.0)[0].error and len(started) == 1, "started again within a second"
        clock.advance(MIN_RESTART_S)
        leader.submit(find(4))
        assert len(started) == 2
    finally:
        leader.shutdown()
        for mover in started:
            mover.close()
