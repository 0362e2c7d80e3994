"""What `sluice bench chaos` says of the memory of processes, from lives made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.bench.chaos_memory import MIB, Life, memory_figures, memory_leaks

LOAD = (20.0, 620.0)


def life(
    kind: str, seconds: float, held_mib: Callable[[float], float], born_s: float = 20.0
) -> Life:
    """A life that was looked at every 2 s; `held_mib` of its age."""
    found = Life(kind, 1, born_s)
    for step in range(int(seconds / 2) + 1):
        found.add(born_s + step * 2.0, int(held_mib(step * 2.0) * MIB))
    return found


def growing(kind: str, seconds: float, mib_per_min: float, born_s: float = 20.0) -> Life:
    return life(kind, seconds, lambda age_s: 500 + mib_per_min * age_s / 60, born_s)


def rate(one: Life) -> float | None:
    growth = one.growth(*LOAD)
    return None if growth is None else growth.bytes_per_min / MIB


def test_growth_is_the_slope_behind_the_warm_up() -> None:
    def held_mib(age_s: float) -> float:
        return 400 + 2 * min(age_s, 60.0) + 5 * age_s / 60

    assert rate(life("gateway", 120, held_mib)) == pytest.approx(5.0, rel=0.01)
    assert rate(life("gateway", 118, held_mib)) is None, "too short a life"


def test_leader_warms_up_for_longer() -> None:
    def held_mib(age_s: float) -> float:
        return 500 + 1.5 * min(age_s, 150.0)

    assert rate(life("leader", 210, held_mib)) == pytest.approx(0.0, abs=0.01)
    assert rate(life("leader", 208, held_mib)) is None
    assert rate(life("gateway", 150, held_mib)) == pytest.approx(90.0)


def test_growth_counts_under_load_only() -> None:
    early = growing("gateway", 300, 5.0, born_s=-200.0)
    assert rate(early) is None, "80 s under load, 60 of them to warm up"
    late = growing("gateway", 300, 5.0, born_s=510.0)
    assert rate(late) is None, "110 s under load, then idle"
    assert rate(growing("gateway", 300, 5.0, born_s=500.0)) == pytest.approx(5.0)
    growth = growing("gateway", 700, 5.0, born_s=0.0).growth(*LOAD)
    assert growth is not None and growth.seconds == 540.0


def test_redis_is_held_against_its_budgets_instead() -> None:
    assert rate(growing("redis", 600, 50.0)) is None


def test_memory_leaks_beyond_one_step_of_an_allocator() -> None:
    def one_step(kind: str, step_mib: float, at_s: float) -> Life:
        return life(kind, at_s + 30, lambda age_s: 500 + step_mib * (age_s > at_s))

    steps = [one_step("gateway", 4.0, 90.0), one_step("leader", 12.0, 180.0)]
    assert memory_leaks(steps, *LOAD) == []
    assert memory_leaks([growing("gateway", 360, 4.5)], *LOAD) == []
    assert memory_leaks([growing("gateway", 360, 5.0)], *LOAD) == [
        "gateway 1 grows by 5.0 MiB a minute over 300 s, limit 4.8"
    ]
    assert memory_leaks([growing("leader", 210, 21.0)], *LOAD) == [
        "leader 1 grows by 21.0 MiB a minute over 60 s, limit 20.0"
    ]


def test_figures_say_how_many_lives_were_measured_and_what_could_not_be_seen() -> None:
    lives = [growing("gateway", n, per_min) for n, per_min in ((120, 1.0), (360, 2.0), (110, 9.0))]
    figures = memory_figures([*lives, growing("leader", 100, 1.0)], *LOAD)
    assert list(figures) == ["gateway", "leader"]
    gateway, leader = figures["gateway"], figures["leader"]
    assert (gateway["num_lives"], gateway["num_measured"]) == (3, 2)
    assert gateway["growth_max_bytes_per_min"] == pytest.approx(2.0 * MIB, rel=0.01)
    assert gateway["allowed_min_bytes_per_min"] == pytest.approx(4.8 * MIB)
    assert (leader["num_lives"], leader["num_measured"]) == (1, 0)
    assert leader["growth_max_bytes_per_min"] is leader["allowed_min_bytes_per_min"] is None


def test_lives_of_the_last_third_are_compared_with_those_of_the_first_at_equal_age() -> None:
    def at_60_s(held: int, seconds: float = 100.0) -> Life:
        return life("leader", seconds, lambda age_s: held + age_s - 60.0)

    held = (500, 510, 590, 501, 502, 503, 530, 540, 520)
    lives = [*(at_60_s(each) for each in held), at_60_s(900, 50.0)]
    (figures,) = memory_figures(lives, *LOAD).values()
    assert (figures["num_lives"], figures["num_of_that_age"]) == (10, 9)
    assert figures["first_third_bytes"] == 510 * MIB and figures["last_third_bytes"] == 530 * MIB
    assert figures["difference_bytes"] == 20 * MIB
    (few,) = memory_figures(lives[:2], *LOAD).values()
    assert few["difference_bytes"] is None


def test_figures_of_a_life_have_its_curve_in_steps_of_ten_seconds() -> None:
    figures = growing("gateway", 125, 6.0).figures(*LOAD)
    assert [sample["age_s"] for sample in figures["samples"]] == [10.0 * n for n in range(13)]
    assert figures["samples"][1]["rss_bytes"] == 501 * MIB
    assert figures["growth_bytes_per_min"] == pytest.approx(6.0 * MIB, rel=0.01)
    assert figures["allowed_bytes_per_min"] > 4 * MIB
    assert growing("gateway", 110, 6.0).figures(*LOAD)["allowed_bytes_per_min"] is None
