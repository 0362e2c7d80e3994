"""How often a prefix was asked for of late."""

from __future__ import annotations

import math

import pytest

from cluster.router.hot_prefixes import MAX_PREFIXES, HotPrefixes


def test_hot_prefix_counts_uses_of_each_key() -> None:
    hot = HotPrefixes(20.0)
    for _ in range(3):
        hot.use(1, 0.0)
    hot.use(2, 0.0)
    assert [hot.uses(key, 0.0) for key in (1, 2, 3)] == [3.0, 1.0, 0.0]
    assert hot.uses(1, 0.0) == 3.0  # to ask is no use


def test_hot_prefix_fades_with_its_window() -> None:
    hot = HotPrefixes(10.0)
    for _ in range(9):
        hot.use(1, 0.0)
    assert hot.uses(1, 10.0) == pytest.approx(9 * math.exp(-1))
    assert hot.uses(1, 1000.0) == pytest.approx(0.0)


def test_hot_prefix_under_steady_use_counts_rate_times_window() -> None:
    hot = HotPrefixes(20.0)
    for number in range(2000):
        hot.use(1, number / 5)
    assert hot.uses(1, 400.0) == pytest.approx(5 * 20.0, rel=0.02)


def test_hot_prefixes_are_bounded_and_the_least_recent_goes() -> None:
    hot = HotPrefixes(1e9)
    for key in (-1, -2, *range(MAX_PREFIXES - 2), -1):
        hot.use(key, 0.0)
    hot.use(10**6, 0.0)  # one too many: -2 is the least recent
    assert (hot.uses(-1, 0.0), hot.uses(-2, 0.0)) == (2.0, 0.0)
    assert len(hot._uses) == MAX_PREFIXES
