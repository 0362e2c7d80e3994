from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.simulator.record import End, ReplicaRecord
from cluster.simulator.report import Report, make_report
from cluster.simulator.tables import report_tables
from cluster.types import NO_SLO, SLO, ServiceClass
from tests.simulator.simulation_results import random_result, refused, request, result


def report_of(*requests: Any, usd_per_hour: float | None = None, **changes: Any) -> Report:
    return make_report(result(list(requests), **changes), usd_per_hour=usd_per_hour)


def test_report_counts_ends_and_goodput_over_all_arrivals() -> None:
    report = report_of(
        request(0),
        request(1, slo=SLO(0.9, 0.5)),  # its first token came after 1 s
        refused(2),
        request(3, end=End.EXPIRED),
        request(4, end=End.FAILED),
        request(5, end=End.CUT),
        request(6, slo=NO_SLO),
        refused(7),
        request(8, end=End.FAILED),
    )
    assert report.num_requests == 9
    assert (report.num_finished, report.num_refused, report.num_expired) == (3, 2, 1)
    assert (report.num_failed, report.num_cut) == (2, 1)
    assert report.goodput == 2 / 9
    assert report.goodput_per_s == 2 / 100
    assert report.refused_share == 2 / 9


def test_report_latencies_are_of_finished_requests() -> None:
    ttfts_s = [index / 10 for index in range(1, 102)]
    requests = [
        request(i, first_token_s=ttft_s, last_token_s=ttft_s + 0.01 * i)
        for i, ttft_s in enumerate(ttfts_s)
    ]
    report = report_of(*requests, request(200, end=End.CUT, first_token_s=1e6))
    assert report.ttft_s.p50 == pytest.approx(5.1)
    assert report.ttft_s.p90 == pytest.approx(9.1)
    assert report.ttft_s.p95 == pytest.approx(9.6)
    assert report.ttft_s.p99 == pytest.approx(10.0)
    assert report.ttft_s.mean == pytest.approx(5.1)
    assert report.tpot_s.p90 == pytest.approx(0.01 * 90 / 10)  # ten tokens after the first
    assert report.end_to_end_s.p50 == pytest.approx(5.6)


def test_report_of_nothing_has_no_figures_and_no_nan() -> None:
    empty = make_report(
        result([], [], duration_s=0.0, wall_s=0.0, num_replicas_over_time=[]), usd_per_hour=1.0
    )
    plain = json.loads(json.dumps(empty.to_dict(), allow_nan=False))
    for name in (
        *("goodput", "goodput_per_s", "offered_per_s", "refused_share", "prefix_hit_rate"),
        *("input_tokens_per_s", "output_tokens_per_s", "num_replicas_mean"),
        *("usd_per_million_tokens", "usd_per_million_good_output_tokens", "virtual_s_per_wall_s"),
    ):
        assert plain[name] is None, name
    assert set(plain["ttft_s"].values()) == set(plain["spread"].values()) == {None}
    assert plain["prediction"].pop("num_predicted") == 0
    assert set(plain["prediction"].values()) == {None}


def test_report_of_refusals_alone_has_a_goodput_and_no_latencies() -> None:
    report = report_of(refused(0), refused(1, arrived_s=1.0))
    assert report.goodput == 0.0 and report.refused_share == 1.0
    assert report.ttft_s.p50 is None
    assert report.offered_per_s == 1.0


def test_report_keys_are_stable() -> None:
    assert list(report_of(request()).to_dict()) == [
        *("policy", "workload", "rate_scale", "seed", "num_gateways"),
        *("num_requests", "num_finished", "num_refused", "num_expired", "num_failed", "num_cut"),
        "reasons",
        *("refused_share", "goodput", "goodput_per_s", "offered_per_s", "classes", "tenants"),
        *("ttft_s", "tpot_s", "end_to_end_s", "input_tokens_per_s", "output_tokens_per_s"),
        *("prefix_hit_rate", "spread", "prediction", "num_preemptions"),
        *("num_replicas_mean", "num_replicas_max", "replica_hours", "usd_per_hour"),
        *("usd_per_million_tokens", "usd_per_million_good_output_tokens"),
        *("duration_s", "wall_s", "virtual_s_per_wall_s", "settings"),
    ]


def test_report_counts_reasons_that_differ_in_numbers_as_one() -> None:
    late = [refused(i, reason=f"TTFT {0.31 * i:.3g} s, objective=2 s") for i in range(1, 4)]
    lost = [request(i, end=End.FAILED, reason=f"replica-{i} died") for i in (7, 8)]
    report = report_of(
        *lost,
        *late,
        request(20, end=End.EXPIRED),
        request(21, end=End.FINISHED, reason="served without its objective"),
        request(22, end=End.CUT, reason="not over"),
    )
    assert list(report.reasons.items()) == [
        ("TTFT # s, objective=# s", 3),
        ("replica-# died", 2),
        ("no reason given", 1),
    ]
    (table,) = (table for table in report_tables(report) if table.title.startswith("Why"))
    assert table.rows[0] == ("TTFT # s, objective=# s", "3")
    assert not any(table.title.startswith("Why") for table in report_tables(report_of(request())))


def test_report_names_five_reasons_at_most() -> None:
    many = [refused(i, reason=letter) for i, letter in enumerate("abcdefgg")]
    assert report_of(*many).reasons == {"g": 2, "a": 1, "b": 1, "c": 1, "d": 1}


def test_report_groups_requests_by_class_and_tenant() -> None:
    batch = ServiceClass.BATCH
    report = report_of(
        request(0, tenant="a", num_cached_tokens=40),
        refused(1, tenant="a"),
        request(2, tenant="b", service_class=batch),
        request(3, tenant="b", service_class=batch, slo=SLO(0.5)),
    )
    assert list(report.tenants) == ["a", "b"]
    assert list(report.classes) == ["batch", "standard"]
    group = report.tenants["a"]
    assert (group.num_requests, group.num_finished, group.num_refused) == (2, 1, 1)
    assert group.goodput == 0.5
    assert group.num_computed_tokens == 100 - 40 + 11
    assert report.classes["batch"].goodput == 0.5
    assert report.classes["batch"].num_computed_tokens == 2 * 111
    assert report.classes["standard"].ttft_p90_s == 1.0


def test_report_token_rates_count_what_was_served() -> None:
    cut = request(1, end=End.CUT, num_output_tokens=4)
    report = report_of(request(0), cut, refused(2))
    assert report.input_tokens_per_s == 2 * 100 / 100
    assert report.output_tokens_per_s == (11 + 4) / 100


def test_report_hit_rate_and_preemptions_are_the_engines() -> None:
    replicas = [
        ReplicaRecord("a", num_prefix_query_tokens=100, num_prefix_hit_tokens=90),
        ReplicaRecord(
            "b", num_prefix_query_tokens=300, num_prefix_hit_tokens=10, num_preemptions=3
        ),
    ]
    report = report_of(replicas=replicas)
    assert report.prefix_hit_rate == 0.25
    assert report.num_preemptions == 3


def test_report_spread_is_busiest_over_mean() -> None:
    replicas = [
        ReplicaRecord("a", busy_s=30.0, num_requests=1, num_prefill_tokens=10),
        ReplicaRecord("b", busy_s=10.0, num_requests=1, num_output_tokens=20),
    ]
    spread = report_of(replicas=replicas).spread
    assert spread.busy_s == 1.5
    assert spread.num_requests == 1.0
    assert spread.num_computed_tokens == pytest.approx(20 / 15)


def test_report_prediction_compares_from_dispatch() -> None:
    # From dispatch to the first token it takes 0.5 s in each.
    requests = [
        request(i, predicted_ttft_s=0.5 / times, predicted_ttft_high_s=high_s)
        for i, (times, high_s) in enumerate([(0.5, 2.0), (1.0, 0.6), (2.0, 0.6), (4.0, 0.4)])
    ]
    waiting = request(8, end=End.CUT, first_token_s=None, predicted_ttft_s=1.0)
    errors = report_of(*requests, request(9), waiting).prediction
    assert errors.num_predicted == 4
    assert errors.ttft_ratio_p50 == pytest.approx(1.5)
    assert errors.ttft_ratio_p10 == pytest.approx(0.65)
    assert errors.ttft_ratio_p90 == pytest.approx(3.4)
    assert errors.above_high_share == 1 / 4


def test_report_has_no_prediction_of_a_policy_that_says_nothing() -> None:
    silent = request(0, predicted_ttft_s=0.0, predicted_ttft_high_s=0.0)
    errors = report_of(silent).prediction
    assert errors.num_predicted == 0
    assert errors.ttft_ratio_p50 is None and errors.above_high_share is None


def test_report_compares_predicted_and_found_prefixes() -> None:
    known = request(0, num_cached_tokens=32, num_predicted_cached_tokens=64)
    errors = report_of(known, refused(1), request(2)).prediction
    assert errors.predicted_cached_share == 0.32
    assert errors.cached_share == 0.16


def test_report_replicas_over_time_and_cost() -> None:
    replicas = [
        ReplicaRecord("a"),
        ReplicaRecord("b", started_s=10.0, ended_s=46.0),
        ReplicaRecord("c", started_s=64.0),
    ]
    report = report_of(
        request(0),
        request(1, slo=SLO(0.1)),
        replicas=replicas,
        num_replicas_over_time=[(0.0, 1), (10.0, 2), (40.0, 1), (64.0, 2)],
        usd_per_hour=3.6,
    )
    assert report.num_replicas_max == 2
    assert report.num_replicas_mean == pytest.approx(1.66)
    assert report.replica_hours == pytest.approx((100 + 36 + 36) / 3600)
    usd = 172 * 0.001
    assert report.usd_per_million_tokens == pytest.approx(usd / (2 * 111) * 1e6)
    assert report.usd_per_million_good_output_tokens == pytest.approx(usd / 11 * 1e6)


def test_report_without_a_price_has_no_cost() -> None:
    report = report_of(request(0))
    assert report.usd_per_hour is None and report.usd_per_million_tokens is None


def test_report_says_how_it_was_run() -> None:
    report = make_report(random_result(50))
    assert (report.policy, report.seed, report.virtual_s_per_wall_s) == ("slo", 7, 610 / 4)
    assert report.settings["num_replicas"] == 16
