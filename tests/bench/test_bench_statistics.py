"""Percentiles, latencies and goodput against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.records import write_records
from cluster.bench.statistics import (
    REFUSED,
    TRUNCATED,
    LatencyObjective,
    RequestRecord,
    goodput_share,
    percentile,
    spread,
    summarize,
    summarize_classes,
)
from cluster.errors import ConfigError
from cluster.types import SLO


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


def test_goodput_holds_a_record_against_its_own_objective() -> None:
    slow = ok(0.0, 0.6, 0.7, num_tokens=2, end_s=0.7)
    own = replace(slow, objective=LatencyObjective(ttft_s=1.0))
    strict = LatencyObjective(ttft_s=0.5)
    assert goodput_share([slow, own], strict) == pytest.approx(1 / 2)
    assert summarize([slow, own], strict)["good_requests_per_s"] == pytest.approx(1 / 0.7)


def test_objective_of_an_slo_is_endless_where_it_says_nothing() -> None:
    assert LatencyObjective.of(SLO()) == LatencyObjective()
    assert LatencyObjective.of(SLO(0.5, 0.1)) == LatencyObjective(0.5, 0.1)


def test_summary_counts_refusals_by_reason() -> None:
    records = [
        ok(0.0, 0.5, num_tokens=1, end_s=0.5),
        RequestRecord(0.0, 0.1, REFUSED, reason="QUEUE_FULL", retry_after_s=2.0),
        RequestRecord(0.0, 0.1, REFUSED, reason="RATE_LIMITED", retry_after_s=4.0),
        RequestRecord(0.0, 0.1, REFUSED),
        RequestRecord(0.0, 0.1, "UNAVAILABLE", reason="UNAVAILABLE"),
    ]
    summary = summarize(records)
    assert summary["refusals"]["num_requests"] == 3
    assert summary["refusals"]["reasons"] == {"": 1, "QUEUE_FULL": 1, "RATE_LIMITED": 1}
    assert summary["refusals"]["retry_after_s"]["mean"] == pytest.approx(3.0)
    assert summary["goodput"] == pytest.approx(1 / 5)


def test_classes_are_summed_up_by_themselves() -> None:
    records = [
        replace(ok(0.0, 0.5, num_tokens=1, end_s=0.5), service_class="batch"),
        RequestRecord(0.0, 0.1, REFUSED, service_class="interactive"),
        ok(0.0, 0.5, num_tokens=1, end_s=0.5),
    ]
    classes = summarize_classes(records)
    assert {name: figures["goodput"] for name, figures in classes.items()} == {
        "": 1.0,
        "batch": 1.0,
        "interactive": 0.0,
    }


def test_records_are_written_in_the_order_of_their_due_times(tmp_path: Path) -> None:
    records = [
        replace(ok(1.0, 1.5, 2.5, num_tokens=3, end_s=2.5), request_id="b"),
        RequestRecord(0.0, 0.1, REFUSED, request_id="a", objective=LatencyObjective(0.5)),
    ]
    write_records(records, tmp_path / "records.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [row["request_id"] for row in rows] == ["a", "b"]
    refused, whole = rows
    assert (refused["end"], refused["ttft_s"], refused["meets_slo"]) == (REFUSED, None, False)
    assert (refused["ttft_slo_s"], refused["tpot_slo_s"]) == (0.5, None)
    assert (whole["arrived_s"], whole["ttft_s"], whole["tpot_s"]) == (1.0, 0.5, 0.5)
    assert (whole["num_output_tokens"], whole["num_prompt_tokens"]) == (3, 10)
    with pytest.raises(ConfigError, match="--records /nowhere/records"):
        write_records(records, Path("/nowhere/records.jsonl"))
