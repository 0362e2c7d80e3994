from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.engine.block_events import BlockEvents
from cluster.engine.host_tier import HostTier
from cluster.engine.use_counter import UseCounter


def keep(host: HostTier, name: bytes, uses: int = 1) -> int:
    slot = host.reserve()
    for _ in range(uses):
        host.uses.add(name)
    assert slot is not None and host.commit(slot, name)
    return slot


def test_host_tier_gives_up_what_is_used_least() -> None:
    host = HostTier(2, BlockEvents())
    keep(host, b"often", uses=3)
    keep(host, b"once")
    keep(host, b"new")
    assert b"often" in host and b"once" not in host
    assert host.num_evictions == 1


def test_held_blocks_stay_until_they_are_released() -> None:
    host = HostTier(1, BlockEvents())
    slot = keep(host, b"a")
    assert host.hold(b"a") == slot == host.hold(b"a")
    assert host.reserve() is None and host.num_available == 0
    host.release(b"a")
    assert host.reserve() is None
    host.release(b"a")
    assert host.reserve() == slot
    assert b"a" not in host


def test_known_block_gives_its_second_slot_back() -> None:
    host = HostTier(2, BlockEvents())
    keep(host, b"a")
    slot = host.reserve()
    assert slot is not None and not host.commit(slot, b"a")
    host.check_invariants()
    assert host.num_available == 2


def test_block_is_filled_when_its_step_is_over() -> None:
    host = HostTier(2, BlockEvents())
    keep(host, b"a")
    assert host.is_filled(b"a")
    host.fill(b"a")
    assert not host.is_filled(b"a") and host.some_filled() is None
    host.copied(b"a")
    assert host.is_filled(b"a") and host.some_filled() == b"a"


def test_clear_spares_what_is_held() -> None:
    events = BlockEvents()
    host = HostTier(3, events)
    keep(host, b"a")
    keep(host, b"b")
    host.hold(b"a")
    assert host.clear() == 1
    assert events.hashes() == [b"a"]
    host.check_invariants()


def test_events_tell_the_first_tier_that_holds_a_block_and_the_last() -> None:
    events = BlockEvents()
    events.enter(b"a")
    events.enter(b"a")
    events.enter(b"b")
    assert events.take() == ([b"a", b"b"], [])
    events.leave(b"a")
    events.leave(b"b")
    assert events.take() == ([], [b"b"])
    events.leave(b"a")
    events.enter(b"a")
    assert events.take() == ([], [])
    events.check_invariants()


def test_uses_are_counted_for_those_used_last() -> None:
    uses = UseCounter(2)
    assert (uses.add(b"a"), uses.add(b"a"), uses.add(b"b")) == (1, 2, 1)
    uses.add(b"c")
    assert (uses.uses(b"a"), uses.uses(b"b"), uses.uses(b"c")) == (0, 1, 1)


class HostTierMachine(RuleBasedStateMachine):
    """Random histories of a small host tier."""

    def __init__(self) -> None:
        super().__init__()
        self.events = BlockEvents()
        self.host = HostTier(4, self.events)
        self.reserved: list[int] = []
        self.held: list[tuple[bytes, bool]] = []

    @rule()
    def reserve(self) -> None:
        num_available = self.host.num_available
        slot = self.host.reserve()
        assert (slot is None) == (num_available == 0)
        if slot is not None:
            assert slot not in self.reserved
            self.reserved.append(slot)

    @precondition(lambda self: self.reserved)
    @rule(name=st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"]), uses=st.integers(1, 20))
    def commit(self, name: bytes, uses: int) -> None:
        for _ in range(uses):
            self.host.uses.add(name)
        self.host.commit(self.reserved.pop(), name)
        assert name in self.host

    @precondition(lambda self: self.reserved)
    @rule()
    def cancel(self) -> None:
        self.host.cancel(self.reserved.pop())

    @precondition(lambda self: self.events.hashes())
    @rule(index=st.integers(0, 5), fills=st.booleans())
    def hold(self, index: int, fills: bool) -> None:
        names = self.events.hashes()
        name = names[index % len(names)]
        (self.host.fill if fills else self.host.hold)(name)
        self.held.append((name, fills))

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        name, fills = self.held.pop(0)
        (self.host.copied if fills else self.host.release)(name)

    @rule()
    def clear(self) -> None:
        self.host.clear()

    @invariant()
    def is_sound(self) -> None:
        self.host.check_invariants()
        assert {name for name, _ in self.held} <= set(self.events.hashes())
        assert self.host.num_blocks == len(self.events.hashes())


TestHostTierMachine = HostTierMachine.TestCase
TestHostTierMachine.settings = settings(max_examples=50, deadline=None)
