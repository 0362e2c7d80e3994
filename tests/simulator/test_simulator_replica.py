from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.simulator.arrival import Arrival
from cluster.simulator.replica import SimulatedReplica, synthetic_steps
from cluster.simulator.settings import SimulationSettings
from cluster.types import NO_SLO, SLO, EngineOutput, FinishReason, StepShape
from tests.simulator.simulated_clusters import PREFILL_S, STEP_S, arrival, settings


def _replica(of: SimulationSettings | None = None, **changes: Any) -> SimulatedReplica:
    values: dict[str, Any] = {"slowness": 1.0, "rng": random.Random(1), "now_s": 10.0}
    return SimulatedReplica("replica-0000", of or settings(), **(values | changes))


def _submit(replica: SimulatedReplica, of: Arrival, now_s: float = 10.0, slo: SLO = NO_SLO) -> None:
    replica.submit(of, hash(of.request_id) & 0xFFFF, slo, None, now_s)


def _run(replica: SimulatedReplica, now_s: float = 10.0) -> list[tuple[float, EngineOutput]]:
    """Return what it brings until it has nothing to do, and when."""
    brought = []
    while replica.has_work:
        now_s, outputs = replica.step(now_s)
        brought += [(now_s, output) for output in outputs]
    return brought


def test_replica_answers_as_the_arrival_says() -> None:
    replica = _replica()
    _submit(replica, arrival())
    assert replica.num_requests == 1
    brought = _run(replica)
    times_s = [time_s for time_s, output in brought if output.tokens]
    assert times_s == pytest.approx([10 + PREFILL_S + i * STEP_S for i in range(5)])
    assert brought[-1][1].finish_reason is FinishReason.STOP
    assert replica.num_requests == 0


def test_replica_takes_commands_between_steps() -> None:
    replica = _replica()
    _submit(replica, arrival())
    end_s, _ = replica.step(10.0)
    _submit(replica, arrival(1), 10.02)  # in the middle of that step
    ids = {output.request_id for output in replica.step(end_s)[1]}
    assert ids == {"r0", "r1"}


def test_replica_stands_still_while_it_has_nothing_to_do() -> None:
    replica = _replica()
    assert not replica.has_work
    _submit(replica, arrival(), 50.0)
    assert replica.step(50.0)[0] == pytest.approx(50 + PREFILL_S)
    assert replica.close(None).busy_s == pytest.approx(PREFILL_S)


def test_replica_objective_is_shorter_by_what_it_waited_for_the_step() -> None:
    replica = _replica()
    _submit(replica, arrival())
    end_s, _ = replica.step(10.0)
    _submit(replica, arrival(1, runs=((9, 4000),)), end_s - 0.1, SLO(1.0))
    replica.step(end_s)
    (due,) = replica.load().due  # of what is left of the prompt, 0.2 s later
    assert due.due_s == pytest.approx(1.0 - 0.1 - 0.2048, abs=0.01)


def test_replica_tells_of_blocks_once() -> None:
    replica = _replica()
    _submit(replica, arrival(num_output_tokens=1))
    _run(replica)
    added, removed = replica.block_events()
    assert len(added) == 1100 // 16 and not removed
    assert replica.block_events() == ([], [])


def test_replica_that_drains_says_so() -> None:
    replica = _replica()
    assert not replica.load().is_draining
    replica.is_draining = True
    assert replica.load().is_draining


@pytest.mark.parametrize(
    ("of", "changes", "code"),
    [
        ("engine.max_num_waiting=1", {}, "RESOURCE_EXHAUSTED"),
        ("cache.num_blocks=60", {}, "INVALID_ARGUMENT"),
    ],
)
def test_replica_tells_what_its_engine_refuses(of: str, changes: Any, code: str) -> None:
    replica = _replica(settings(of, **changes))
    for index in range(2):
        _submit(replica, arrival(index))
    _, outputs = replica.step(10.0)
    refused = [output for output in outputs if output.error is not None]
    assert refused[0].error is not None and refused[0].error.startswith(code)
    assert replica.num_requests == 2 - len(refused)


def test_replica_record_says_what_it_did() -> None:
    replica = _replica()
    _submit(replica, arrival())
    _run(replica)
    _submit(replica, arrival(1, runs=((1, 1100), (9, 20))), 20.0)
    _run(replica, 20.0)
    record = replica.close(30.0)
    assert (record.started_s, record.ended_s) == (10.0, 30.0)
    assert (record.num_requests, record.num_steps, record.num_output_tokens) == (2, 10, 10)
    assert record.num_prefix_query_tokens == 2220
    assert record.num_prefix_hit_tokens == 1088
    assert record.num_prefill_tokens == 2220 - 1088
    assert record.num_preemptions == 0


def test_replica_made_slow_takes_longer_until_it_is_not() -> None:
    replica = _replica(slowness=2.0)
    _submit(replica, arrival(num_output_tokens=1))
    assert replica.step(10.0)[0] == pytest.approx(10 + 2 * PREFILL_S)
    replica.set_slowness(1.0)
    _submit(replica, arrival(1, num_output_tokens=1))
    assert replica.step(20.0)[0] == pytest.approx(20 + PREFILL_S)


def test_replica_knows_its_steps_from_the_begin() -> None:
    of = settings()
    cost = _replica(of).load().step_cost
    assert cost is not None
    for shape in (StepShape(1, 1, 1024), StepShape(1100, 1), StepShape(2048, 4)):
        assert cost.seconds(shape) == pytest.approx(of.cost.step.seconds(shape), rel=0.15)
    assert len(synthetic_steps(of.cost.step)) == 34
