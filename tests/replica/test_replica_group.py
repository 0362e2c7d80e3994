"""The life of a group, driven by hand and by hypothesis."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.clock import VirtualClock
from cluster.config import ParallelConfig
from cluster.replica.group import GroupLifecycle, GroupState
from cluster.replica.placement import bundles, group_num_cpus, ranks_of, threads_per_worker


def make(num_workers: int = 2) -> tuple[GroupLifecycle, VirtualClock]:
    clock = VirtualClock()
    group = GroupLifecycle(num_workers, start_timeout_s=10, drain_timeout_s=5, clock=clock)
    return group, clock


def make_ready() -> tuple[GroupLifecycle, VirtualClock]:
    group, clock = make()
    group.worker_ready(0)
    group.worker_ready(1)
    return group, clock


def test_group_is_ready_when_all_workers_are() -> None:
    group, _ = make()
    group.worker_ready(1)
    assert not group.accepts_requests
    group.worker_ready(0)
    assert group.accepts_requests


def test_group_fails_when_a_worker_is_late_and_names_it() -> None:
    group, clock = make()
    group.worker_ready(0)
    clock.advance(10)
    group.tick(0)
    assert group.state is GroupState.FAILED
    assert "workers 1 " in group.reason
    assert "replica.start_timeout_s" in group.reason


def test_group_fails_as_a_whole_with_its_first_reason() -> None:
    group, _ = make_ready()
    group.worker_lost(1, "killed")
    group.worker_lost(0, "killed too")
    assert group.is_over
    assert group.reason == "worker 1: killed"


def test_group_drains_until_it_is_idle() -> None:
    group, clock = make_ready()
    group.drain()
    group.tick(num_requests=3)
    assert group.state is GroupState.DRAINING
    assert not group.accepts_requests
    clock.advance(1)
    group.tick(num_requests=0)
    assert group.state is GroupState.STOPPED


def test_group_drain_ends_at_its_deadline() -> None:
    group, clock = make_ready()
    group.drain()
    clock.advance(5)
    group.tick(num_requests=3)
    assert group.state is GroupState.STOPPED


class GroupMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.group, self.clock = make(3)
        self.was_over = False

    @rule(index=st.integers(0, 2))
    def ready(self, index: int) -> None:
        self.group.worker_ready(index)

    @rule(index=st.integers(0, 2))
    def lost(self, index: int) -> None:
        self.group.worker_lost(index, "died")
        assert self.group.is_over

    @rule()
    def drain(self) -> None:
        self.group.drain()
        assert not self.group.accepts_requests

    @rule(delta_s=st.floats(0, 4), num_requests=st.integers(0, 2))
    def tick(self, delta_s: float, num_requests: int) -> None:
        self.clock.advance(delta_s)
        self.group.tick(num_requests)

    @invariant()
    def holds(self) -> None:
        self.group.check_invariants()
        assert self.group.is_over or not self.was_over, "what is over stays over"
        self.was_over = self.group.is_over


TestGroupMachine = GroupMachine.TestCase


def test_placement_numbers_workers_stage_by_stage() -> None:
    assert [ranks_of(index, 2) for index in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_placement_reserves_a_leader_and_one_bundle_per_worker() -> None:
    assert bundles(ParallelConfig()) is None
    reserved = bundles(ParallelConfig(tp=2, pp=2, num_gpus_per_worker=1))
    assert reserved is not None
    assert len(reserved) == 5
    assert all(bundle["GPU"] == 1 for bundle in reserved[1:])
    assert group_num_cpus(ParallelConfig(tp=2, pp=2)) == sum(b["CPU"] for b in reserved)


def test_placement_shares_cores_between_groups_and_never_gives_zero_threads() -> None:
    assert threads_per_worker(ParallelConfig(), 8, 2) == 4
    assert threads_per_worker(ParallelConfig(tp=2, pp=2), 2, 2) == 1
    assert threads_per_worker(ParallelConfig(threads_per_worker=3), 2, 2) == 3
