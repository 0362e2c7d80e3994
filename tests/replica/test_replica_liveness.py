"""Dead, stuck or busy, by hand: no clock, no process."""

from __future__ import annotations

import pytest

from cluster.replica.liveness import Liveness, Silence, teams_of

TICK_S = 0.125  # exact in binary, as all that follows from it
HEARTBEAT_TIMEOUT_S, STUCK_TIMEOUT_S = 1.5, 4.0


def liveness(tp: int = 1, pp: int = 1, *, spins: bool = True) -> Liveness:
    num_workers = tp * pp if tp * pp > 1 else 0
    return Liveness(
        num_workers,
        teams_of(tp, pp, spins=spins),
        heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
        stuck_timeout_s=STUCK_TIMEOUT_S,
        tick_s=TICK_S,
    )


def run(
    judge: Liveness,
    duration_s: float,
    *,
    share: dict[int, float],
    is_stepping: bool = True,
    from_s: float = 0.0,
) -> str:
    """Let time pass while threads use shares of a processor; return the first accusation."""
    num_ticks = round(duration_s / TICK_S)
    for tick in range(1, num_ticks + 1):
        now_s = from_s + tick * TICK_S
        for index, part in share.items():
            judge.beat(index, part * now_s)
        reason = judge.tick(TICK_S, step_age_s=now_s if is_stepping else 0.0)
        if reason:
            return f"{now_s:g}: {reason}"
    return ""


def test_silent_worker_is_named_when_its_time_is_over() -> None:
    judge = liveness(tp=2)
    assert run(judge, 1.5, share={0: 1.0, 2: 0.0}, is_stepping=False) == ""
    reason = run(judge, 1.0, share={0: 1.0, 2: 0.0}, is_stepping=False, from_s=1.5)
    assert reason == "1.625: worker 1 does not answer: replica.heartbeat_timeout_s=1.5"


def test_worker_that_beats_is_not_dead_however_long_its_step_takes() -> None:
    assert run(liveness(tp=2), 60.0, share={0: 1.0, 1: 1.0, 2: 0.0}) == ""


def test_observer_that_stood_still_accuses_nobody() -> None:
    judge = liveness(tp=2)
    for _ in range(5):
        assert judge.tick(3600.0, step_age_s=3600.0) == "", "hours count for two ticks"


def test_engine_that_computes_keeps_its_replica() -> None:
    assert run(liveness(), 60.0, share={0: 0.05}) == ""


def test_engine_that_waits_for_what_never_comes_is_stuck() -> None:
    reason = run(liveness(), 10.0, share={0: 0.001})
    assert reason.startswith("4.25: the engine is stuck"), reason
    assert "replica.stuck_timeout_s=4" in reason


def test_engine_without_a_step_is_idle_and_not_stuck() -> None:
    judge = liveness()
    assert run(judge, 60.0, share={0: 0.0}, is_stepping=False) == ""
    assert run(judge, 4.0, share={0: 0.0}) == "", "what it idled before the step does not count"


def test_steps_that_end_are_not_stuck_though_they_wait() -> None:
    judge = liveness()
    for _ in range(100):
        assert run(judge, 1.0, share={0: 0.0}) == ""


def test_stage_that_waits_for_the_one_before_is_not_stuck() -> None:
    assert run(liveness(pp=2), 60.0, share={0: 1.0, 1: 0.0, 2: 0.0}) == ""


def test_engine_that_plans_is_not_stuck_though_its_workers_wait() -> None:
    assert run(liveness(pp=2), 60.0, share={0: 0.0, 1: 0.0, 2: 1.0}) == ""


@pytest.mark.parametrize(("spins", "is_stuck"), [(True, True), (False, False)])
def test_rank_that_spins_hides_no_stuck_peer(spins: bool, is_stuck: bool) -> None:
    judge = liveness(tp=2, pp=2, spins=spins)
    reason = run(judge, 10.0, share={0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0})
    assert ("stuck" in reason) is is_stuck


def test_teams_are_stages_and_the_engine() -> None:
    assert teams_of(1, 1, spins=True) == [[0]]
    assert teams_of(2, 2, spins=True) == [[0, 1], [2, 3], [4]]
    assert teams_of(2, 1, spins=False) == [[0], [1], [2]]


def test_silence_begins_anew_with_every_word() -> None:
    silence = Silence(1.0, 0.5)
    for _ in range(10):
        silence.tick(0.5)
        silence.tick(0.5)
        assert not silence.is_too_long
        silence.heard()
    for _ in range(3):
        silence.tick(0.5)
    assert silence.is_too_long
