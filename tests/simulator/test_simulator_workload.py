from __future__ import annotations

import math
from collections import Counter

import pytest

from cluster.errors import InvalidArgumentError
from cluster.simulator.arrival import Arrival
from cluster.simulator.summary import describe
from cluster.simulator.workload import (
    FIRST_ANSWER_TOKEN,
    SloRule,
    Workload,
    begin_times_s,
    first,
    scaled,
    with_classes,
    with_slo,
    with_tenants,
)
from cluster.types import NO_SLO, SLO, ServiceClass


def _arrival(name: str, arrived_s: float, *runs: tuple[int, int], follows: str = "") -> Arrival:
    answer = FIRST_ANSWER_TOKEN + sum(name.encode())
    return Arrival(name, arrived_s, runs or ((1, 10),), 3, answer, follows=follows)


def _session() -> Workload:
    """A session whose later turns stand among two other requests."""
    made = [
        _arrival("a0", 4.0),
        _arrival("a1", 3.0, follows="a0"),
        _arrival("a2", 3.0, follows="a1"),
        _arrival("c", 8.0),
        _arrival("b", 1.0),
    ]
    return Workload.in_order("session", made)


def _ids(workload: Workload) -> list[str]:
    return [arrival.request_id for arrival in workload.arrivals]


def test_workload_is_in_order_of_time_as_if_answers_took_none() -> None:
    workload = _session()
    assert _ids(workload) == ["b", "a0", "a1", "c", "a2"]
    assert begin_times_s(workload.arrivals) == [1.0, 4.0, 7.0, 8.0, 10.0]


def test_workload_keeps_the_order_of_equal_times() -> None:
    workload = Workload.in_order("equal", [_arrival(name, 2.0) for name in "xzya"])
    assert _ids(workload) == ["x", "z", "y", "a"]


def test_workload_without_requests_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="0 requests"):
        Workload.in_order("nothing", [])


def test_workload_scaled_divides_times_and_leaves_think_times() -> None:
    workload = scaled(_session(), 4.0)
    assert {a.request_id: a.arrived_s for a in workload.arrivals} == {
        "b": 0.25,
        "a0": 1.0,
        "c": 2.0,
        "a1": 3.0,
        "a2": 3.0,
    }
    assert _ids(workload) == ["b", "a0", "c", "a1", "a2"]


@pytest.mark.parametrize("rate_scale", [0.0, -1.0, math.nan, math.inf])
def test_workload_scaled_refuses_what_is_no_rate(rate_scale: float) -> None:
    with pytest.raises(InvalidArgumentError, match="rate_scale="):
        scaled(_session(), rate_scale)


def test_workload_first_takes_the_beginning() -> None:
    workload = _session()
    assert _ids(first(workload, num_requests=3)) == ["b", "a0", "a1"]
    assert _ids(first(workload, duration_s=8.0)) == ["b", "a0", "a1"]
    assert _ids(first(workload, num_requests=2, duration_s=8.5)) == ["b", "a0"]
    assert first(workload) == workload


@pytest.mark.parametrize("bound", [{"num_requests": 0}, {"duration_s": math.nan}])
def test_workload_first_refuses_what_is_no_bound(bound: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(bound))):
        first(_session(), **bound)


def test_workload_slo_grows_with_the_prompt() -> None:
    made = [_arrival("short", 0.0, (1, 100)), _arrival("long", 0.0, (1, 1000), (2, 9000))]
    short, long = with_slo(Workload.in_order("two", made), SloRule()).arrivals
    assert short.slo.ttft_s == pytest.approx(2.01)
    assert long.slo.ttft_s == pytest.approx(3.0)
    assert short.slo.tpot_s == long.slo.tpot_s == 0.05


def test_workload_slo_of_a_class_goes_before_the_general_one() -> None:
    workload = with_classes(_session(), {ServiceClass.BATCH: 1.0}, seed=0)
    nothing = SloRule(ttft_s=None, ttft_per_input_token_s=0.0, tpot_s=None)
    changed = with_slo(workload, SloRule(), {ServiceClass.BATCH: nothing})
    assert {a.slo for a in changed.arrivals} == {NO_SLO}
    changed = with_slo(workload, SloRule(1.0, 0.0, 0.1), {ServiceClass.INTERACTIVE: nothing})
    assert {a.slo for a in changed.arrivals} == {SLO(1.0, 0.1)}


@pytest.mark.parametrize("name", ["ttft_s", "ttft_per_input_token_s", "tpot_s"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_workload_slo_that_is_no_time_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}=.*change it") as caught:
        SloRule(**{name: value})
    assert caught.value.field == name


def test_workload_classes_come_by_their_shares() -> None:
    made = [_arrival(f"{i}", float(i)) for i in range(4000)]
    shares = {ServiceClass.INTERACTIVE: 3.0, ServiceClass.STANDARD: 0.0, ServiceClass.BATCH: 1.0}
    workload = with_classes(Workload.in_order("many", made), shares, seed=7)
    counts = Counter(arrival.service_class for arrival in workload.arrivals)
    assert set(counts) == {ServiceClass.INTERACTIVE, ServiceClass.BATCH}
    assert 2880 < counts[ServiceClass.INTERACTIVE] < 3120  # 3,000 within 4.4 deviations


def test_workload_draws_are_those_of_the_seed() -> None:
    workload = Workload.in_order("many", [_arrival(f"{i}", float(i)) for i in range(50)])
    shares = {"red": 1.0, "blue": 1.0}
    once, again, other = (with_tenants(workload, shares, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_workload_session_has_one_tenant_and_one_class() -> None:
    made = [
        _arrival(f"{i}.{k}", 1.0 * i, follows=f"{i}.{k - 1}" if k else "")
        for i in range(40)
        for k in range(3)
    ]
    workload = Workload.in_order("sessions", made)
    workload = with_tenants(workload, {"red": 1.0, "blue": 1.0}, seed=3)
    workload = with_classes(workload, dict.fromkeys(ServiceClass, 1.0), seed=3)
    found: dict[str, set[tuple[str, ServiceClass]]] = {}
    for arrival in workload.arrivals:
        session = arrival.request_id.partition(".")[0]
        found.setdefault(session, set()).add((arrival.tenant, arrival.service_class))
    assert all(len(pairs) == 1 for pairs in found.values())
    assert len({pair for pairs in found.values() for pair in pairs}) > 3


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.0}, {"a": 2.0, "b": -1.0}, {"a": math.nan}, {"a": math.inf}]
)
def test_workload_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="tenants: shares"):
        with_tenants(_session(), shares, seed=0)


def test_workload_describe_counts_leading_blocks_seen_before() -> None:
    made = [
        _arrival("0", 0.0, (1, 512), (2, 512), (3, 100)),
        _arrival("1", 1.0, (1, 512), (2, 512), (3, 100)),  # all 3 of it
        _arrival("2", 2.0, (9, 512), (2, 512)),  # the second block follows another one
        _arrival("3", 3.0, (1, 512), (2, 512), (3, 99)),  # 2: the last one is shorter
        _arrival("4", 4.0, (1, 1024)),  # 1
    ]
    summary = describe(Workload.in_order("five", made))
    assert (summary.num_recurring_blocks, summary.num_blocks) == (6, 13)
    assert summary.recurring == 6 / 13
    assert summary.duration_s == 4.0


def test_workload_describe_sees_blocks_whatever_the_runs() -> None:
    made = [_arrival("0", 0.0, (1, 300), (1, 300)), _arrival("1", 1.0, (1, 600), (2, 5))]
    summary = describe(Workload.in_order("two", made))
    assert (summary.num_recurring_blocks, summary.num_blocks) == (1, 4)


def test_workload_describe_counts_a_repeated_answer_as_cached() -> None:
    question = _arrival("0", 0.0, (1, 510))
    history = ((1, 510), (question.answer_token, question.num_output_tokens))
    made = [question, _arrival("1", 1.0, *history, (2, 20))]
    summary = describe(Workload.in_order("two", made))
    assert (summary.num_recurring_blocks, summary.num_blocks) == (1, 3)


def test_workload_describe_gives_percentiles_of_lengths() -> None:
    made = [_arrival(f"{i}", 0.0, (i, i)) for i in range(1, 102)]
    summary = describe(Workload.in_order("many", made))
    inputs = summary.input_tokens
    assert (inputs.mean, inputs.p50, inputs.p90, inputs.p99) == (51.0, 51.0, 91.0, 100.0)
    assert summary.output_tokens.p99 == 3.0
