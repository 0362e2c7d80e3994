"""Percentiles, latencies and goodput against numbers worked out by hand."""

from __future__ import annotations

import pytest

from cluster.bench.statistics import (
    TRUNCATED,
    LatencyObjective,
    RequestRecord,
    goodput_share,
    percentile,
    spread,
    summarize,
)


def ok(scheduled_s: float, *times_s: float, num_tokens: int, end_s: float) -> RequestRecord:
    return RequestRecord(scheduled_s, end_s, "OK", times_s, num_tokens, 10, 4)


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(0, 1.0), (25, 1.75), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4.0)],
)
def test_percentile_is_linear_between_neighbours(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_percentile_of_one_value_is_the_value_and_of_none_is_none() -> None:
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


def test_spread_without_values_is_all_none() -> None:
    assert set(spread([]).values()) == {None}


def test_record_latencies_count_from_the_due_time() -> None:
    record = ok(1.0, 1.5, 1.7, 2.5, num_tokens=6, end_s=2.6)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.tpot_s == pytest.approx(0.2)  # (2.5 - 1.5) / 5
    assert record.e2e_s == pytest.approx(1.6)
    assert record.itl_s == pytest.approx([0.2, 0.8])


def test_record_of_one_token_has_no_time_per_token() -> None:
    record = ok(0.0, 0.5, num_tokens=1, end_s=0.5)
    assert record.tpot_s is None
    assert LatencyObjective(ttft_s=0.5, tpot_s=0.001).is_met(record)


def test_goodput_counts_refused_failed_slow_and_truncated_against_all() -> None:
    records = [
        ok(0.0, 0.2, 0.4, num_tokens=2, end_s=0.4),  # good
        ok(0.0, 0.6, 0.7, num_tokens=2, end_s=0.7),  # first token too late
        ok(0.0, 0.2, 0.9, num_tokens=2, end_s=0.9),  # further token too late
        RequestRecord(0.0, 0.01, "RESOURCE_EXHAUSTED"),
        RequestRecord(0.0, 0.5, TRUNCATED, (0.1, 0.2), 2),
    ]
    assert goodput_share(records, LatencyObjective(0.5, 0.5)) == pytest.approx(1 / 5)
    assert goodput_share(records, LatencyObjective()) == pytest.approx(3 / 5)
    assert goodput_share([], LatencyObjective()) == 0.0


def test_summary_counts_only_whole_answers_and_every_status() -> None:
    records = [
        ok(1.0, 1.5, 2.0, num_tokens=8, end_s=2.0),
        ok(2.0, 2.5, 3.0, num_tokens=4, end_s=5.0),
        RequestRecord(1.5, 4.0, TRUNCATED, (2.0,), 3),
        RequestRecord(1.5, 1.6, "UNAVAILABLE"),
    ]
    summary = summarize(records, LatencyObjective())
    assert summary["status"] == {"OK": 2, TRUNCATED: 1, "UNAVAILABLE": 1}
    assert summary["window_s"] == pytest.approx(4.0)
    assert summary["requests_per_s"] == pytest.approx(0.5)
    assert summary["out_tokens_per_s"] == pytest.approx(3.0)  # 12 tokens, not the truncated 3
    assert summary["total_tokens_per_s"] == pytest.approx(8.0)  # 20 prompt tokens more
    assert summary["cached_token_share"] == pytest.approx(0.4)
    assert summary["goodput"] == pytest.approx(0.5)
    assert summary["ttft_s"]["p50"] == pytest.approx(0.5)
