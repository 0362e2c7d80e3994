"""Many simulations over a grid of policies, rates and seeds, and the rate that each policy holds.

    goodput
      1 |ooo--o
        |      \\
    0.9 |. . . . x . . . .   target; x is the knee, between two rates of the grid
        |         \\
        |          o--o
        +----------------- rate

Pure: what runs a point is passed in (here, or in Ray tasks: ray_sweep.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from cluster.errors import InvalidArgumentError, SluiceError, UnavailableError

DEFAULT_TARGET = 0.9
"""Share of all arrivals that must meet their objective."""

MAX_POINTS = 2000
"""Of one grid."""

_EPSILON = 1e-9  # of a step: `1:2:0.1` has eleven rates though 0.1 has no exact form


@dataclass(frozen=True, slots=True, order=True)
class GridPoint:
    """One simulation of a grid."""

    policy: str
    rate_scale: float
    seed: int

    def __str__(self) -> str:
        return f"policy={self.policy} rate_scale={self.rate_scale:g} seed={self.seed}"


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One simulation of a grid, with what came of it."""

    policy: str
    rate_scale: float
    seed: int
    report: dict[str, Any]  # `Report.to_dict`: it has crossed processes

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data that JSON holds."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Knee:
    """The highest rate at which a policy reaches the target."""

    target: float  # goodput
    rate_scale: float | None  # linear between neighbours of the grid; None: at no rate of it
    grid_rate_scale: float | None  # highest of the grid itself
    is_beyond_grid: bool  # the grid's highest rate reaches it still: the knee lies further up


RunPoint = Callable[[GridPoint], dict[str, Any]]
OnPoint = Callable[[SweepPoint, int, int], None]
"""Told of each point that is done, how many are, and of how many."""


def make_grid(
    policies: Sequence[str], rate_scales: Sequence[float], seeds: Sequence[int]
) -> list[GridPoint]:
    """Return every combination, policy by policy.

    Raises:
        InvalidArgumentError: A name or number stands twice, or they are none, or too many.
    """
    for field, values in (("policy", policies), ("rate-scale", rate_scales), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            listed = ",".join(map(str, values))
            message = f"--{field}={listed}: give at least one, and each only once"
            raise InvalidArgumentError(message, field=field)
    num_points = len(policies) * len(rate_scales) * len(seeds)
    if num_points > MAX_POINTS:
        raise InvalidArgumentError(
            f"{num_points} simulations, limit={MAX_POINTS}: ask for fewer policies, rates or seeds",
            field="rate-scale",
        )
    return [
        GridPoint(policy, rate_scale, seed)
        for policy in policies
        for rate_scale in sorted(rate_scales)
        for seed in seeds
    ]


def parse_rates(text: str) -> list[float]:
    """Return the rates of `4`, `1,2,4` or `1:8:0.5` (first, last, step; both ends count).

    Raises:
        InvalidArgumentError: The text is neither, or a number is not above 0.
    """
    try:
        if ":" not in text:
            rates = [float(part) for part in text.split(",")]
        else:
            first, last, step = map(float, text.split(":"))
            if not (step > 0 and first <= last <= first + MAX_POINTS * step):
                raise ValueError
            num_steps = int((last - first) / step + _EPSILON)
            rates = [round(first + index * step, 9) for index in range(num_steps + 1)]
    except (ValueError, OverflowError):
        rates = []
    if not rates or not all(0 < rate <= _MAX_RATE_SCALE for rate in rates):
        raise InvalidArgumentError(
            f"--rate-scale={text}: give one as 4, several as 1,2,4 or as first:last:step as "
            f"1:8:0.5; each above 0, at most {_MAX_RATE_SCALE:g}",
            field="rate-scale",
        )
    return rates


_MAX_RATE_SCALE = 1e6


def run_serial(
    grid: Sequence[GridPoint], run: RunPoint, on_point: OnPoint | None = None
) -> list[SweepPoint]:
    """Run one point after the other in this process.

    Raises:
        SluiceError: A point failed; the message names it.
    """
    points = []
    for point in grid:
        try:
            report = run(point)
        except Exception as error:
            raise point_error(point, error) from error
        points.append(SweepPoint(point.policy, point.rate_scale, point.seed, report))
        if on_point is not None:
            on_point(points[-1], len(points), len(grid))
    return points


def point_error(point: GridPoint, error: BaseException) -> SluiceError:
    """Return what a failed point is reported as."""
    if isinstance(error, InvalidArgumentError):
        return InvalidArgumentError(f"{point}: {error}", field=error.field)
    reason = str(error) if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
    return UnavailableError(f"{point}: {reason}")


def goodput_by_rate(points: Sequence[SweepPoint], policy: str) -> list[tuple[float, float]]:
    """Return (rate, goodput), rates ascending, of one policy; the mean where there are seeds."""
    return figure_by_rate(points, policy, lambda report: report["goodput"])


def figure_by_rate(
    points: Sequence[SweepPoint],
    policy: str,
    figure_of: Callable[[dict[str, Any]], float | None],
) -> list[tuple[float, float]]:
    """Return (rate, figure), rates ascending, of one policy; the mean where there are seeds.

    Args:
        points: Of a sweep.
        policy: Whose.
        figure_of: Gives the figure of a report; a rate at which one is None is left out.
    """
    figures: dict[float, list[float | None]] = {}
    for point in points:
        if point.policy == policy:
            figures.setdefault(point.rate_scale, []).append(figure_of(point.report))
    by_rate = []
    for rate_scale in sorted(figures):
        known = [value for value in figures[rate_scale] if value is not None]
        if len(known) == len(figures[rate_scale]):
            by_rate.append((rate_scale, sum(known) / len(known)))
    return by_rate


def knee(by_rate: Sequence[tuple[float, float]], target: float = DEFAULT_TARGET) -> Knee:
    """Return the highest rate at which goodput reaches the target.

    Args:
        by_rate: (rate, goodput), rates ascending, of one policy.
        target: Goodput to reach, in (0, 1].
    """
    assert 0 < target <= 1, f"{target=}"
    assert all(low < high for (low, _), (high, _) in pairwise(by_rate)), "rates must ascend"
    holds = [index for index, (_, goodput) in enumerate(by_rate) if goodput >= target]
    if not holds:
        return Knee(target, None, None, is_beyond_grid=False)
    rate_scale, goodput = by_rate[holds[-1]]
    if holds[-1] == len(by_rate) - 1:
        return Knee(target, rate_scale, rate_scale, is_beyond_grid=True)
    next_rate_scale, next_goodput = by_rate[holds[-1] + 1]
    share = (goodput - target) / (goodput - next_goodput)
    between = rate_scale + share * (next_rate_scale - rate_scale)
    return Knee(target, between, rate_scale, is_beyond_grid=False)


def knees(points: Sequence[SweepPoint], target: float = DEFAULT_TARGET) -> dict[str, Knee]:
    """Return the knee of each policy of a sweep, in the order of the points."""
    policies = dict.fromkeys(point.policy for point in points)
    return {policy: knee(goodput_by_rate(points, policy), target) for policy in policies}
