from __future__ import annotations

import pytest

from cluster.clock import VirtualClock
from cluster.kvstore.breaker import BreakerState, CircuitBreaker


def opened(clock: VirtualClock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock, max_failures=3, min_open_s=0.25, max_open_s=2.0)
    for _ in range(3):
        assert breaker.allow()
        breaker.failed()
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = CircuitBreaker(VirtualClock(), max_failures=3)
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    breaker.failed()
    breaker.failed()
    assert breaker.allow()
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow()


def test_breaker_lets_one_probe_through_when_its_time_is_over() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    clock.advance(0.2)
    assert not breaker.allow()
    clock.advance(0.05)
    assert breaker.state is BreakerState.OPEN
    assert breaker.allow()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allow()
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow()


def test_breaker_open_time_doubles_to_its_limit_and_begins_anew() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    for open_s in (0.25, 0.5, 1.0, 2.0, 2.0, 2.0):
        clock.advance(open_s - 0.125)
        assert not breaker.allow()
        clock.advance(0.125)
        assert breaker.allow()
        breaker.failed()
        assert breaker.state is BreakerState.OPEN
    clock.advance(2.0)
    assert breaker.allow()
    breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    clock.advance(0.25)
    assert breaker.allow()


def test_breaker_probe_that_never_reports_is_given_up() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    clock.advance(0.25)
    assert breaker.allow()
    clock.advance(1.75)
    assert not breaker.allow()
    clock.advance(0.25)
    assert breaker.allow()
    assert not breaker.allow()


def test_breaker_late_reports_of_calls_before_it_opened_change_nothing() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    breaker.succeeded()
    assert breaker.state is BreakerState.OPEN
    breaker.failed()
    clock.advance(0.25)
    assert breaker.allow()  # its time did not begin anew


@pytest.mark.parametrize("knobs", [{"max_failures": 0}, {"min_open_s": 0.0}, {"min_open_s": 3.0}])
def test_breaker_refuses_knobs_that_make_no_sense(knobs: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        CircuitBreaker(VirtualClock(), **knobs)  # type: ignore[arg-type]
