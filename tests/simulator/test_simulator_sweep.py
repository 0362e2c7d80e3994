from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.simulator.sweep import (
    MAX_POINTS,
    GridPoint,
    SweepPoint,
    goodput_by_rate,
    knee,
    knees,
    make_grid,
    parse_rates,
    run_serial,
)


def point(policy: str, rate_scale: float, goodput: float | None, seed: int = 0) -> SweepPoint:
    return SweepPoint(policy, rate_scale, seed, {"goodput": goodput})


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("4", [4.0]),
        ("1,2.5,4", [1.0, 2.5, 4.0]),
        ("1:3:0.5", [1.0, 1.5, 2.0, 2.5, 3.0]),
        ("1:2:0.1", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]),
        ("0.1:0.3:0.1", [0.1, 0.2, 0.3]),
        ("1:2:0.6", [1.0, 1.6]),
        ("2:2:1", [2.0]),
    ],
)
def test_rates_are_one_several_or_a_range(text: str, rates: list[float]) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1,", "0", "-1", "nan", "inf", "1:2", "1:2:0", "2:1:0.5", "1:inf:1", "1:2:-1"),
        *("1:2:nan", "1e7", f"1:{MAX_POINTS * 2}:1", "1:2:3:4", "-1:1:0.5"),
    ],
)
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"--rate-scale=.*1:8:0\.5") as caught:
        parse_rates(text)
    assert caught.value.field == "rate-scale"


def test_grid_has_every_combination_policy_by_policy() -> None:
    grid = make_grid(["b", "a"], [2.0, 1.0], [0, 1])
    assert grid[:5] == [
        GridPoint("b", 1.0, 0),
        GridPoint("b", 1.0, 1),
        GridPoint("b", 2.0, 0),
        GridPoint("b", 2.0, 1),
        GridPoint("a", 1.0, 0),
    ]
    assert len(grid) == 8


@pytest.mark.parametrize(
    ("policies", "rates", "seeds", "field"),
    [
        (["a", "a"], [1.0], [0], "policy"),
        ([], [1.0], [0], "policy"),
        (["a"], [1.0, 1.0], [0], "rate-scale"),
        (["a"], [1.0], [3, 3], "seed"),
        (["a"], [float(i) for i in range(1, 1002)], [0, 1], "rate-scale"),
    ],
)
def test_grid_refuses_repeats_and_too_many(
    policies: list[str], rates: list[float], seeds: list[int], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make_grid(policies, rates, seeds)
    assert caught.value.field == field


def test_knee_lies_between_the_rates_around_the_target() -> None:
    found = knee([(1.0, 1.0), (2.0, 0.95), (3.0, 0.75), (4.0, 0.1)])
    assert found.rate_scale == pytest.approx(2.25)
    assert found.grid_rate_scale == 2.0
    assert not found.is_beyond_grid


def test_knee_is_the_highest_rate_even_after_a_dip() -> None:
    found = knee([(1.0, 0.95), (2.0, 0.85), (3.0, 0.92), (4.0, 0.88)])
    assert found.rate_scale == pytest.approx(3.5)


def test_knee_beyond_the_grid_says_so() -> None:
    found = knee([(1.0, 1.0), (2.0, 0.9)])
    assert found.is_beyond_grid
    assert found.rate_scale == found.grid_rate_scale == 2.0


@pytest.mark.parametrize("by_rate", [[], [(1.0, 0.89), (2.0, 0.5)]])
def test_knee_of_a_policy_that_never_holds_is_none(by_rate: list[tuple[float, float]]) -> None:
    found = knee(by_rate)
    assert found.rate_scale is None and found.grid_rate_scale is None
    assert not found.is_beyond_grid


def test_knee_follows_the_target() -> None:
    by_rate = [(1.0, 1.0), (2.0, 0.5)]
    assert knee(by_rate, 0.75).rate_scale == pytest.approx(1.5)
    assert knee(by_rate, 0.5).is_beyond_grid


def test_knees_are_of_each_policy_over_the_mean_of_its_seeds() -> None:
    points = [
        point("slo", 2.0, 0.8, seed=0),
        point("slo", 1.0, 1.0, seed=0),
        point("slo", 2.0, 0.6, seed=1),
        point("slo", 1.0, 0.9, seed=1),
        point("random", 1.0, 0.1),
    ]
    assert goodput_by_rate(points, "slo") == [(1.0, 0.95), (2.0, 0.7)]
    found = knees(points)
    assert list(found) == ["slo", "random"]
    assert found["slo"].rate_scale == pytest.approx(1.2)
    assert found["random"].rate_scale is None


def test_rates_without_a_figure_are_left_out() -> None:
    points = [point("slo", 1.0, 1.0), point("slo", 2.0, None), point("slo", 2.0, 0.5, seed=1)]
    assert goodput_by_rate(points, "slo") == [(1.0, 1.0)]


def test_serial_sweep_runs_every_point_in_order() -> None:
    grid = make_grid(["slo", "random"], [1.0, 2.0], [0])
    told: list[tuple[str, int, int]] = []

    def run(at: GridPoint) -> dict[str, Any]:
        return {"goodput": at.rate_scale / 4}

    points = run_serial(grid, run, lambda done, n, total: told.append((done.policy, n, total)))
    assert [(p.policy, p.rate_scale, p.report["goodput"]) for p in points] == [
        ("slo", 1.0, 0.25),
        ("slo", 2.0, 0.5),
        ("random", 1.0, 0.25),
        ("random", 2.0, 0.5),
    ]
    assert told == [("slo", 1, 4), ("slo", 2, 4), ("random", 3, 4), ("random", 4, 4)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("boom"), UnavailableError),
        (InvalidArgumentError("too low", field="x"), InvalidArgumentError),
    ],
)
def test_serial_sweep_names_the_point_that_failed(error: Exception, kind: type) -> None:
    def run(at: GridPoint) -> dict[str, Any]:
        if at.rate_scale == 2.0:
            raise error
        return {"goodput": 1.0}

    with pytest.raises(kind, match=r"policy=slo rate_scale=2 seed=5.*(boom|too low)"):
        run_serial(make_grid(["slo"], [1.0, 2.0], [5]), run)
