from __future__ import annotations

import pytest

from cluster.clock import VirtualClock
from cluster.engine.fetch_plan import TransferTime, first_fetched, prefill_seconds
from cluster.types import StepCost

COST = StepCost(0.01, 0.001, (), 0.0, 0.0, 1e-6)


def test_prefill_takes_its_steps_one_after_the_other() -> None:
    times = prefill_seconds(COST, 250, num_computed_tokens=100, step_tokens=100)
    assert times[0] == 0.0 and len(times) == 4
    first = 0.01 + 0.1 + 1e-6 * 100 * 150
    assert times[1] == pytest.approx(first)
    assert times[3] - times[2] == pytest.approx(0.01 + 0.05 + 1e-6 * 50 * 325)


def plan(block_s: float, latency_s: float = 0.0) -> int | None:
    """Ten steps of one second and ten blocks each."""
    prefill_s = [float(second) for second in range(11)]
    return first_fetched(
        prefill_s, num_blocks=100, step_blocks=10, block_s=block_s, latency_s=latency_s
    )


def test_fast_store_gives_everything() -> None:
    assert plan(block_s=0.001) == 0


def test_slow_store_gives_nothing() -> None:
    assert plan(block_s=1.0) is None
    assert plan(block_s=0.001, latency_s=9.5) is None


@pytest.mark.parametrize(("block_s", "start"), [(0.1, 50), (0.05, 30), (0.3, 80)])
def test_both_ends_finish_together(block_s: float, start: int) -> None:
    assert plan(block_s) == start
    computed_s, fetched_s = start / 10, (100 - start) * block_s
    assert abs(computed_s - fetched_s) <= max(1.0, 10 * block_s)


def test_every_border_is_no_better_than_the_chosen_one() -> None:
    prefill_s = prefill_seconds(COST, 1600, num_computed_tokens=0, step_tokens=160)
    for block_s in (0.0001, 0.001, 0.005, 0.01, 0.02, 0.1):
        start = first_fetched(
            prefill_s, num_blocks=100, step_blocks=10, block_s=block_s, latency_s=0.002
        )
        totals = {
            border: max(prefill_s[border // 10], 0.002 + (100 - border) * block_s)
            for border in range(0, 100, 10)
        }
        best_s = min(totals.values())
        if start is None:
            assert best_s >= 0.9 * prefill_s[-1]
        else:
            assert totals[start] == best_s < 0.9 * prefill_s[-1]


def test_transfer_time_follows_what_is_measured() -> None:
    clock = VirtualClock()
    times = TransferTime(clock)
    for _ in range(30):
        times.observe_latency(0.01)
        times.observe_transfer(10_000_000, 0.11)
    assert times.latency_s == pytest.approx(0.01, rel=0.01)
    assert times.seconds(10_000_000) == pytest.approx(0.11, rel=0.05)


def test_transfer_time_forgets_a_bad_time() -> None:
    clock = VirtualClock()
    times = TransferTime(clock)
    prior_s = times.seconds(10**6)
    for _ in range(20):
        times.observe_transfer(10**6, 10.0)
    assert times.seconds(10**6) > 1.0
    for _ in range(31):
        clock.advance(0.1)
        times.observe_latency(0.002)  # what is asked meanwhile says nothing of transfers
    assert times.seconds(10**6) == pytest.approx(prior_s)
    times.observe_latency(1.0)
    assert times.latency_s > 0.1
    clock.advance(3.1)
    assert times.seconds(10**6) == pytest.approx(prior_s)


def test_transfer_of_nothing_teaches_nothing() -> None:
    times = TransferTime(VirtualClock())
    before = times.bytes_per_s
    times.observe_transfer(0, 1.0)
    assert times.bytes_per_s == before
