"""The sliding window: what it lets pass, and when it says to come again."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cluster.gateway.rate_limit import WINDOW_S, Window


def test_window_lets_the_previous_minute_fade() -> None:
    most = [Window(100, 60, elapsed_s).most for elapsed_s in (0.0, 15.0, 30.0, 59.0)]
    assert most == [40, 55, 70, 99]
    assert Window(100, 0, 0.0).most == 100
    assert Window(100, 250, 0.0).most == -150  # the limit was lowered meanwhile
    assert Window(100, -5, 0.0).most == 100


@pytest.mark.parametrize(
    ("window", "num_present", "amount", "expected_s"),
    [
        (Window(100, 100, 0.0), 0, 1, 0.6),  # one of the previous hundred has to fade
        (Window(100, 100, 30.0), 50, 10, 6.0),
        (Window(100, 0, 15.0), 100, 1, 45.6),  # the next minute, then one of this one's
        (Window(100, 0, 15.0), 60, 100, 105.0),  # everything has to be gone
    ],
)
def test_window_names_the_time_to_try_again(
    window: Window, num_present: int, amount: int, expected_s: float
) -> None:
    assert window.retry_after_s(num_present, amount) == pytest.approx(expected_s, abs=0.011)


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.floats(0, WINDOW_S, exclude_max=True),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
)
def test_window_passes_at_the_time_it_names_and_not_before(
    limit, num_previous, elapsed_s, num_present, amount
) -> None:
    def passes(at_s: float) -> bool:
        if at_s < WINDOW_S:
            return num_present + amount <= Window(limit, num_previous, at_s).most
        if at_s < 2 * WINDOW_S:
            return amount <= Window(limit, num_present, at_s - WINDOW_S).most
        return amount <= limit

    assume(amount <= limit and not passes(elapsed_s))
    wait_s = Window(limit, num_previous, elapsed_s).retry_after_s(num_present, amount)
    assert 0 < wait_s <= 2 * WINDOW_S + 0.01
    assert passes(elapsed_s + wait_s)
    assert not passes(elapsed_s + wait_s - 0.02) or wait_s < 0.02


@given(st.integers(1, 40), st.lists(st.floats(0, 20), max_size=200))
def test_window_lets_at_most_twice_the_limit_pass_in_any_minute(limit, gaps_s) -> None:
    counts: dict[int, int] = {}
    recent: deque[float] = deque()
    now_s = 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        minute = int(now_s // WINDOW_S)
        window = Window(limit, counts.get(minute - 1, 0), now_s % WINDOW_S)
        passes = counts.get(minute, 0) + 1 <= window.most
        while recent and recent[0] <= now_s - WINDOW_S:
            recent.popleft()
        if passes:
            counts[minute] = counts.get(minute, 0) + 1
            recent.append(now_s)
        assert len(recent) <= 2 * limit


def test_window_lets_a_steady_rate_below_the_limit_pass() -> None:
    counts: dict[int, int] = {}
    for number in range(600):
        now_s = number * WINDOW_S / 58  # evenly; the limit lets 60 pass
        minute = int(now_s // WINDOW_S)
        window = Window(60, counts.get(minute - 1, 0), now_s % WINDOW_S)
        assert counts.get(minute, 0) + 1 <= window.most
        counts[minute] = counts.get(minute, 0) + 1
