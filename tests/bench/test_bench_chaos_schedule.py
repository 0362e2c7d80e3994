"""What `sluice bench chaos` does to whom, and what its clients ask: the same for the same seed."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest

from cluster.bench.chaos_memory import Life
from cluster.bench.chaos_plan import ChaosPlan
from cluster.bench.chaos_requests import (
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    MIN_ANSWER_TOKENS,
    Manner,
    catalogue,
    visits,
)
from cluster.bench.chaos_schedule import (
    KINDS,
    FaultQueue,
    PlannedFault,
    Standing,
    Target,
    fault_kinds,
    plan_faults,
)
from cluster.errors import InvalidArgumentError


def kind_of(name: str) -> list[PlannedFault]:
    (kind,) = fault_kinds(name)
    return [PlannedFault(number, kind, 10.0 * (number + 1), 0.6) for number in range(3)]


def standing(num_replicas: int = 3, num_gateways: int = 2) -> Standing:
    replicas = tuple(f"r{n}" for n in range(num_replicas))
    return Standing(replicas, tuple(f"g{n}" for n in range(num_gateways)), 3, 2)


def test_plan_is_that_of_its_seed_with_a_fault_per_interval() -> None:
    faults = plan_faults(KINDS, seed=3, seconds=300.0, interval_s=10.0)
    assert faults == plan_faults(KINDS, seed=3, seconds=300.0, interval_s=10.0)
    assert faults != plan_faults(KINDS, seed=4, seconds=300.0, interval_s=10.0)
    assert len(faults) == 29 and [fault.number for fault in faults] == list(range(29))
    assert all(5.0 < b.at_s - a.at_s < 15.0 for a, b in pairwise(faults))
    assert faults[-1].at_s < 300.0 - 5.0, "what the last one does is seen"


def test_plan_has_every_kind_before_any_comes_again() -> None:
    faults = plan_faults(KINDS, seed=0, seconds=400.0, interval_s=10.0)
    assert len(KINDS) == 13 and len(faults) == 39
    for round_of in (faults[:13], faults[13:26], faults[26:]):
        assert {fault.kind.name for fault in round_of} == {kind.name for kind in KINDS}


def test_fault_kinds_are_chosen_by_name_and_unknown_ones_refused() -> None:
    for num_workers, left_out in ((1, "kill-worker"), (2, "kill-mover")):
        possible = fault_kinds("", num_workers)
        assert {kind.name for kind in KINDS} - {kind.name for kind in possible} == {left_out}
    names = [kind.name for kind in fault_kinds("stop-redis,kill-leader")]
    assert names == ["kill-leader", "stop-redis"]
    with pytest.raises(InvalidArgumentError, match="'kill-all': choose from kill-leader,") as found:
        fault_kinds("kill-leader,kill-all")
    assert found.value.field == "faults"


def test_queue_gives_a_fault_when_it_is_due_and_a_victim_that_serves() -> None:
    queue = FaultQueue(kind_of("kill-leader"), 5.0)
    assert queue.take(9.9, standing()) is None
    taken = queue.take(10.0, standing())
    assert taken is not None and (taken[0].number, taken[1]) == (0, "r1")
    assert queue.take(14.9, standing()) is None and len(queue.left) == 2
    assert FaultQueue(kind_of("flush-redis"), 5.0).take(10.0, standing(0, 0)) is not None


@pytest.mark.parametrize("name", ["kill-leader", "kill-gateway"])
def test_queue_never_takes_the_last_one_but_waits_until_all_are_back(name: str) -> None:
    queue = FaultQueue(kind_of(name)[:1], 0.0)
    last, some, whole = standing(1, 1), standing(2, 2), standing(3, 2)
    assert queue.take(10.0, last) is None and queue.waited == {0}
    assert queue.take(11.0, some) is None, "two are enough only for one that did not wait"
    assert queue.take(12.0, whole) is not None
    fresh = FaultQueue(kind_of("kill-leader")[:1], 0.0)
    assert fresh.take(10.0, some) is not None and not fresh.waited


def test_queue_lets_others_pass_while_one_waits_and_keeps_its_spacing() -> None:
    faults = [*kind_of("kill-gateway")[:1], *kind_of("cut-network")[1:]]
    queue = FaultQueue(faults, 5.0)
    alone = standing(num_gateways=1)
    assert queue.take(10.0, alone) is None
    taken = queue.take(20.0, alone)
    assert taken is not None and taken[0].number == 1 and taken[1] == ""
    assert queue.take(24.9, standing()) is None
    late = queue.take(25.0, standing())
    assert late is not None and late[0].number == 0
    assert [fault.number for fault in queue.left] == [2] and queue.waited == {0}


@pytest.mark.parametrize("name", ["kill-leader", "kill-gateway"])
def test_queue_spares_the_first_one_until_its_memory_has_been_measured(name: str) -> None:
    (kind,) = fault_kinds(name)
    faults = [PlannedFault(number, kind, 1.0 * number, 0.0) for number in range(4)]

    def victims(spared_s: float) -> list[str]:
        queue, found = FaultQueue(faults, 0.0, {kind.target: spared_s}), []
        for now_s in (0.0, 1.0, 2.0, 3.0):
            taken = queue.take(now_s, standing())
            assert taken is not None
            found.append(taken[1][1:])
        return found

    assert victims(0.0) == ["0", "0", "0", "0"]
    assert victims(2.0) == ["1", "1", "0", "0"]


def test_spared_one_stays_the_same_when_others_come() -> None:
    queue = FaultQueue(kind_of("kill-leader"), 0.0, {Target.REPLICA: 99.0})
    assert queue.take(10.0, Standing(("c", "d"), (), 2, 0)) is not None
    taken = queue.take(20.0, Standing(("a", "c"), (), 2, 0))
    assert taken is not None and taken[1] == "a"


def test_plan_spares_only_in_a_run_that_has_to_measure_memory() -> None:
    assert ChaosPlan(minutes=4.9).spared_s == {}
    for target, kind in ((Target.REPLICA, "leader"), (Target.GATEWAY, "gateway")):
        spared_s = ChaosPlan(minutes=5.0).spared_s[target]
        life = Life(kind, 1, -30.0)
        for time_s in range(0, int(spared_s), 2):
            life.add(float(time_s), 1)
        assert life.growth(0.0, 300.0) is not None, "it has lived long enough then"
        assert spared_s < 300.0


def test_end_of_a_gateway_by_a_signal_is_said_to_be_no_drain() -> None:
    (kind,) = fault_kinds("term-gateway")
    assert "no drain" in kind.meaning


def test_plan_refuses_what_could_never_happen() -> None:
    for fields, field in (
        ({"num_replicas": 1}, "replicas"),
        ({"num_gateways": 1}, "gateways"),
        ({"minutes": 0.3}, "minutes"),
        ({"kinds": fault_kinds("kill-worker")}, "workers"),
        ({"kinds": fault_kinds("kill-mover"), "num_workers": 2}, "workers"),
    ):
        with pytest.raises(InvalidArgumentError) as found:
            ChaosPlan(**fields)
        assert found.value.field == field
    lone = ChaosPlan(num_replicas=1, num_gateways=1, kinds=fault_kinds("cut-network,stop-redis"))
    assert all(kind.target in (Target.NETWORK, Target.STORE) for kind in lone.kinds)


def test_catalogue_is_that_of_its_seed_within_its_bounds() -> None:
    asks = catalogue(70, seed=1, vocab_size=4096)
    assert asks == catalogue(70, seed=1, vocab_size=4096) != catalogue(70, seed=2, vocab_size=4096)
    assert len(Counter(ask.name for ask in asks)) == 7
    for ask in asks:
        assert 20 <= len(ask.prompt) <= MAX_PROMPT_TOKENS
        assert MIN_ANSWER_TOKENS <= ask.sampling.max_tokens <= MAX_ANSWER_TOKENS
        assert max(ask.prompt) < 4096
    heads = Counter(ask.prompt[:16] for ask in asks)
    assert max(heads.values()) > 3, "prefixes are shared"
    every = asks[6].sampling
    assert every.stop and every.min_tokens and every.num_logprobs == 3 and every.top_p < 1
    assert every.has_penalties


def test_visits_of_a_stream_repeat_and_some_clients_go_away() -> None:
    first = list(islice(visits(70, seed=1, stream=0), 400))
    assert first == list(islice(visits(70, seed=1, stream=0), 400))
    assert first != list(islice(visits(70, seed=1, stream=1), 400))
    manners = Counter(visit.manner for visit in first)
    assert 220 < manners[Manner.STAYS] < 340
    assert min(manners[Manner.LEAVES], manners[Manner.DETACHES]) > 30
    gone = [visit for visit in first if visit.manner is not Manner.STAYS]
    assert all(0 < visit.num_tokens < MIN_ANSWER_TOKENS for visit in gone)
    assert {visit.has_memory for visit in gone} == {True, False}
