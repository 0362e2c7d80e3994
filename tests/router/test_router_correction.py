"""How far predictions are off: per replica the median, for all of them the risk."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from cluster.router.correction import (
    MAX_LEVEL,
    MIN_LEVEL,
    MIN_REQUESTS,
    NUM_REMEMBERED,
    WINDOW_S,
    Correction,
    RiskModel,
)


def _risk(model: RiskModel, predicted_s: float = 0.7, now_s: float = 0.0) -> float:
    return float(model.risks(np.array([predicted_s]), now_s)[0])


def test_median_says_nothing_until_enough_was_seen() -> None:
    correction = Correction()
    for _ in range(MIN_REQUESTS - 1):
        correction.observe(1.0, 5.0)
    assert correction.median == 1.0
    correction.observe(1.0, 5.0)
    assert correction.median == pytest.approx(5.0, rel=0.05)


def test_median_follows_a_replica_that_becomes_slow_and_recovers() -> None:
    correction = Correction()
    for _ in range(100):
        correction.observe(1.0, 1.0)
    for _ in range(NUM_REMEMBERED // 2 + 1):
        correction.observe(1.0, 3.0)
    assert correction.median == pytest.approx(3.0, rel=0.05)
    for _ in range(NUM_REMEMBERED):
        correction.observe(1.0, 1.0)
    assert correction.median == 1.0


def test_median_is_that_of_the_last_requests() -> None:
    rng, correction = random.Random(0), Correction()
    ratios = [rng.uniform(0.1, 9.0) for _ in range(300)]
    for ratio in ratios:
        correction.observe(0.98, ratio - 0.02)  # the offset is a fiftieth of a second
    expected = sorted(ratios[-NUM_REMEMBERED:])[(NUM_REMEMBERED - 1) // 2]
    assert correction.median == pytest.approx(expected)


def test_median_does_not_mind_outliers_nor_tiny_predictions() -> None:
    correction = Correction()
    for number in range(40):
        correction.observe(1.0, 1e6 if number % 3 == 0 else 1.0)
    assert correction.median == pytest.approx(1.0)
    tiny = Correction()
    for _ in range(40):
        tiny.observe(1e-6, 2e-3)
    assert tiny.median < 1.2


def test_risk_without_experience_is_the_prior_at_the_level() -> None:
    model = RiskModel(0.01)
    assert model.level == MIN_LEVEL
    assert _risk(model) == 1.0
    model.level = MAX_LEVEL
    assert _risk(model, now_s=1.0) == 1.5


def test_level_rises_with_misses_and_falls_with_those_met_within_bounds() -> None:
    model = RiskModel(0.2)
    model.observe(1.0, math.inf, 0.0)
    assert model.level == pytest.approx(MIN_LEVEL + 0.05 * 0.8)
    model.observe(1.0, 1.0, 0.0)
    assert model.level == pytest.approx(MIN_LEVEL + 0.05 * 0.6)
    for _ in range(100):
        model.observe(1.0, math.inf, 0.0)
    assert model.level == MAX_LEVEL
    for _ in range(1000):
        model.observe(1.0, 1.0, 0.0)
    assert model.level == MIN_LEVEL


def test_level_stays_where_as_many_miss_as_may() -> None:
    model = RiskModel(0.2)
    model.level = 0.7
    for number in range(500):
        model.observe(1.0, math.inf if number % 5 == 0 else 1.0, 0.0)
    assert model.level == pytest.approx(0.7, abs=0.06)


def test_risk_is_that_of_requests_of_the_same_size() -> None:
    model = RiskModel(0.01)
    for _ in range(50):
        model.observe(6.0, math.inf, 0.0)
        model.observe(0.1, 0.1, 0.0)
    model.level = 0.8
    assert _risk(model, 6.0) > 10.0
    assert _risk(model, 0.1) < 1.2


def test_risk_forgets_what_is_long_ago() -> None:
    model = RiskModel(0.01)
    for _ in range(50):
        model.observe(0.7, math.inf, 0.0)
    level = model.level
    assert _risk(model, now_s=1.0) > 10.0
    model.level = level
    assert _risk(model, now_s=WINDOW_S + 1.0) <= 1.5


def test_risk_never_makes_a_prediction_shorter() -> None:
    model = RiskModel(0.01)
    for _ in range(100):
        model.observe(1.0, 0.01, 0.0)
    assert _risk(model) == 1.0
