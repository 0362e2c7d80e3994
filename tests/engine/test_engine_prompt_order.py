"""Which prompt is next: what is due first and can still be met; the others have a share."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
from engine_fakes import FINGERPRINT
from hypothesis import given, settings

from cluster.config import EngineConfig
from cluster.engine.prompt_order import IMPLIED_TTFT_S, LATE, REVIEW_S, PromptOrder, Seconds
from cluster.engine.sequence import ModelTraits, Sequence
from cluster.types import MAX_DUE_WORKS, SLO, EngineRequest, SamplingParams, ServiceClass

TRAITS = ModelTraits(4, 10_000, 1000, frozenset(), FINGERPRINT)
INTERACTIVE, STANDARD, BATCH = ServiceClass
_ids = itertools.count()


def sequence(
    num_tokens: int = 10,
    *,
    ttft_s: float | None = None,
    arrived_s: float = 0.0,
    service_class: ServiceClass = STANDARD,
    tenant: str = "",
    weight: float = 1.0,
) -> Sequence:
    number = next(_ids)
    request = EngineRequest(
        f"r{number}",
        tuple(range(num_tokens)),
        SamplingParams(max_tokens=9),
        slo=SLO(ttft_s),
        service_class=service_class,
        tenant=tenant,
        tenant_weight=weight,
    )
    return Sequence(number, request, TRAITS, arrived_s)


def order_of(*sequences: Sequence, **knobs: object) -> PromptOrder:
    order = PromptOrder(EngineConfig.model_validate(knobs))
    for one in sequences:
        order.add(one)
    order.check_invariants()
    return order


def per_token(token_s: float) -> Seconds:
    return lambda one: token_s * one.num_tokens


def late_ones(order: PromptOrder, sequences: list[Sequence]) -> list[Sequence]:
    return [one for one in sequences if order.is_late(one)]


def test_soonest_due_is_first() -> None:
    loose, none, tight = sequence(ttft_s=9.0), sequence(), sequence(arrived_s=5.0, ttft_s=1.0)
    endless = sequence(ttft_s=IMPLIED_TTFT_S + 1)
    assert list(order_of(endless, none, loose, tight)) == [tight, loose, none, endless]


def test_preempted_sequence_with_an_answer_is_first_again() -> None:
    begun, tight = sequence(), sequence(ttft_s=0.1)
    begun.append(7)
    assert list(order_of(tight, begun)) == [begun, tight]


def test_fcfs_is_the_order_of_arrival_whoever_it_is() -> None:
    sequences = [
        sequence(5000, tenant="flood", service_class=BATCH),
        sequence(5000, tenant="flood", ttft_s=9.0),
        sequence(5000, tenant="flood", ttft_s=0.1),
        sequence(tenant="modest", ttft_s=0.01, service_class=INTERACTIVE),
    ]
    order = order_of(*sequences, order="fcfs", fair_burst_tokens=1)
    assert list(order) == sequences
    order.charge(sequences[0], 100_000)
    order.review(99.0, lambda: per_token(1.0))
    assert list(order) == sequences
    works, late_s = order.work(0.0, per_token(0.001))
    assert late_s == 0.0
    assert math.fsum(work.work_s for work in works) == pytest.approx(15.01)
    assert all(work.due_s <= 0.0 for work in works)  # before whatever arrives now


def test_whose_work_does_not_fit_any_more_is_late_and_comes_after_the_others() -> None:
    short, long, other = sequence(1, ttft_s=1.0), sequence(20, ttft_s=2.0), sequence(1, ttft_s=3.0)
    order = order_of(short, long, other)
    order.review(0.0, lambda: per_token(1.0))
    assert late_ones(order, [short, long, other]) == [long]
    order.check_invariants()
    order.discard(long)
    assert not order.is_late(long) and long not in order and len(order) == 2


def test_longest_becomes_late_rather_than_two_short_ones() -> None:
    long, *short = [sequence(5, ttft_s=5.0), *(sequence(2, ttft_s=5.5) for _ in range(2))]
    order = order_of(long, *short)
    order.review(0.0, lambda: per_token(1.0))
    assert late_ones(order, [long, *short]) == [long]


def test_late_ones_yield_to_those_in_time_but_get_their_share() -> None:
    late = [sequence(ttft_s=0.1, service_class=INTERACTIVE) for _ in range(2)]
    order = order_of(*late, fair_burst_tokens=10, late_weight=0.5)
    order.review(1.0, lambda: per_token(0.01))
    in_time = [sequence(ttft_s=100.0 + n, service_class=INTERACTIVE) for n in range(200)]
    for one in in_time:
        order.add(one)
    ranks = {one.seq_id: rank for rank, one in enumerate(order)}
    assert ranks[late[1].seq_id] > 10  # it is charged 10 tokens / 0.5, others 10 / 8
    assert ranks[late[1].seq_id] < 100  # but it waits for nobody for ever


def test_without_objective_nobody_is_late() -> None:
    old = sequence(1000)
    order = order_of(old)
    order.review(1e6, lambda: per_token(1.0))
    assert not order.is_late(old)


def test_review_looks_when_there_is_news_or_time_has_passed() -> None:
    order = order_of(sequence(ttft_s=10.0))
    calls = 0

    def make() -> Seconds:
        nonlocal calls
        calls += 1
        return per_token(0.01)

    order.review(0.0, make)
    order.review(0.1, make)
    assert calls == 1
    order.add(sequence(ttft_s=11.0))
    order.review(0.1, make)
    assert calls == 2
    order.review(0.1 + REVIEW_S * 1.01, make)
    assert calls == 3
    order.review(10.1, make)  # the head is late
    assert calls == 4
    order_of(sequence()).review(99.0, make)  # nobody here can be late
    assert calls == 4


def test_work_tells_when_it_is_due_and_what_yields() -> None:
    order = order_of(
        sequence(10, ttft_s=4.0),
        sequence(20, ttft_s=2.0),
        sequence(30, service_class=BATCH),
        sequence(40),
    )
    late = sequence(50, ttft_s=0.5)
    order.add(late)
    order.review(1.0, lambda: per_token(1e-3))
    works, late_s = order.work(1.0, per_token(0.1))
    assert [work.due_s for work in works] == pytest.approx([1.0, 3.0, IMPLIED_TTFT_S - 1.0])
    assert [work.work_s for work in works] == pytest.approx([2.0, 1.0, 4.0])
    assert late_s == pytest.approx(8.0)


def test_work_of_many_is_added_up_at_the_earliest_of_a_group() -> None:
    order = order_of(*(sequence(1, ttft_s=1.0 + n) for n in range(100)))
    works, _ = order.work(0.0, per_token(1.0))
    assert len(works) <= MAX_DUE_WORKS
    assert math.fsum(work.work_s for work in works) == 100.0
    for until_s in range(100):
        told = math.fsum(work.work_s for work in works if work.due_s <= until_s)
        assert told >= until_s  # never less than there is


def test_tenants_get_tokens_by_their_weights() -> None:
    order = order_of(fair_burst_tokens=100)
    weights = {"one": 1.0, "three": 3.0}
    served = dict.fromkeys(weights, 0)
    waiting: dict[str, list[Sequence]] = {tenant: [] for tenant in weights}
    for _ in range(1000):
        for tenant, weight in weights.items():  # both always have more than they get
            while len(waiting[tenant]) < 3:
                waiting[tenant].append(sequence(10, tenant=tenant, weight=weight))
                order.add(waiting[tenant][-1])
        first = next(iter(order))
        order.charge(first, 10)
        order.discard(first)
        waiting[first.tenant].remove(first)
        served[first.tenant] += 10
    assert served["three"] / served["one"] == pytest.approx(3.0, rel=0.05)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 25)), min_size=1, max_size=7))
def test_as_few_are_late_as_any_order_can_make_late(jobs: list[tuple[int, int]]) -> None:
    sequences = [sequence(work, ttft_s=float(due)) for work, due in jobs]
    order = order_of(*sequences)
    order.review(0.0, lambda: per_token(1.0))
    num_in_time = len(jobs) - len(late_ones(order, sequences))
    best = max(
        len(kept)
        for size in range(len(jobs) + 1)
        for kept in itertools.combinations(jobs, size)
        if _fits(kept)
    )
    assert num_in_time == best
    assert _fits([job for job, one in zip(jobs, sequences, strict=True) if not order.is_late(one)])
    order.check_invariants()


def _fits(jobs: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> bool:
    """Return whether all of them are in time in the order of due times."""
    end = 0
    for work, due in sorted(jobs, key=lambda job: job[1]):
        end += work
        if end > due:
            return False
    return True


def test_late_is_a_class_of_its_own_that_no_request_can_ask_for() -> None:
    assert LATE not in set(ServiceClass)
