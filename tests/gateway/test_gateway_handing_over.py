"""Requests leave a draining replica a few at a time, and only where another one takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.handing_over import MAX_MOVES, HandOvers


@dataclass(eq=False)
class Request:
    replica_id: str = "old"
    can_move: bool = True
    num_asked: int = 0


@dataclass
class Scene:
    requests: list[Request]
    draining: set[str] = field(default_factory=lambda: {"old"})

    def __post_init__(self) -> None:
        for request in self.requests:
            request.hand_over = lambda r=request: setattr(r, "num_asked", r.num_asked + 1)  # type: ignore[attr-defined]
        self.timers: list[Callable[[], None]] = []
        self.moves = HandOvers(
            lambda: self.requests,  # type: ignore[arg-type,return-value]
            lambda name: name in self.draining,
            lambda _, call: self.timers.append(call),
        )

    def asked(self) -> list[Request]:
        return [request for request in self.requests if request.num_asked]


def test_few_move_at_once_and_each_that_has_arrived_lets_the_next_one_go() -> None:
    scene = Scene([Request() for _ in range(3 * MAX_MOVES)])
    scene.moves.poke()
    scene.moves.poke()
    assert len(scene.asked()) == MAX_MOVES
    for _ in range(2 * MAX_MOVES):
        arrived = next(r for r in scene.asked() if r.replica_id == "old")
        arrived.replica_id = "new"
        scene.moves.done(arrived)
    assert all(request.num_asked == 1 for request in scene.requests)
    assert scene.moves.num_moving == MAX_MOVES


def test_nobody_leaves_a_replica_that_does_not_drain_or_without_another_one() -> None:
    staying = [Request("other"), Request(""), Request(can_move=False)]
    scene = Scene(staying)
    scene.moves.poke()
    assert not scene.asked()
    staying[2].can_move = True  # a replica has come
    scene.moves.poke()
    assert scene.asked() == [staying[2]]


def test_requests_whose_clients_read_nothing_hold_up_the_others_for_a_moment_only() -> None:
    scene = Scene([Request() for _ in range(2 * MAX_MOVES)])
    scene.moves.poke()
    assert len(scene.asked()) == MAX_MOVES
    for timer in scene.timers[:3]:
        timer()
    assert len(scene.asked()) == MAX_MOVES + 3
    assert all(request.num_asked <= 1 for request in scene.requests)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_everybody_leaves_in_the_end_however_moves_end(ends: list[bool]) -> None:
    scene = Scene([Request() for _ in range(30)])
    scene.moves.poke()
    for has_ended in ends * 30:
        moving = [r for r in scene.asked() if r.replica_id == "old"]
        if not moving:
            break
        if has_ended:
            scene.requests.remove(moving[0])
        moving[0].replica_id = "new"
        scene.moves.done(moving[0])
        assert scene.moves.num_moving <= MAX_MOVES
    assert not [r for r in scene.requests if r.replica_id == "old"]
    assert scene.moves.num_moving == 0
