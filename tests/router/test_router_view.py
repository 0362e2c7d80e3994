"""What a decision sees: predictions add up, and say nothing that is not known."""

from __future__ import annotations

import math

import pytest
from route_fakes import IDLE, STEP_S, TOKEN_S, Pool, cost, info, load, request

from cluster.router.replica_table import Sent
from cluster.router.view import UNKNOWN_TOKEN_S
from cluster.types import ReplicaLoad


def test_prediction_is_wait_own_work_and_a_step() -> None:
    pool = Pool({"a": load(work_s=2.0, due_s=1.0)}).cache(a=[1, 2])
    pool.table.on_submit("a", "x", Sent(50, 0, 0.5, 1.0))
    chosen = pool.pick(request(160, [1, 2, 3], ttft_s=5.0)).chosen
    assert chosen.num_cached_tokens == 32
    assert chosen.num_uncached_tokens == 128
    assert chosen.wait_s == pytest.approx(2.5)
    assert chosen.own_s == pytest.approx(128 * TOKEN_S)
    assert chosen.ttft_p50_s == pytest.approx(2.5 + 128 * TOKEN_S + STEP_S)
    assert chosen.num_requests == 1


def test_own_work_grows_with_what_each_token_looks_at() -> None:
    quadratic = cost(prompt_work_s=1e-5)
    pool = Pool({"a": load(step_cost=quadratic)}).cache(a=list(range(5)))
    chosen = pool.pick(request(100, list(range(5)))).chosen
    assert chosen.own_s == pytest.approx(20 * TOKEN_S + 1e-5 * 20 * (80 + 10))


def test_wait_counts_only_what_is_due_before() -> None:
    pool = Pool({"a": load(work_s=2.0, due_s=3.0, late_s=10.0)})
    assert pool.pick(request(ttft_s=2.9)).chosen.wait_s == 0.0
    assert pool.pick(request(ttft_s=3.0)).chosen.wait_s == pytest.approx(2.0)
    assert pool.pick(request()).chosen.wait_s == pytest.approx(12.0)


def test_unknown_speed_is_the_mean_of_the_others() -> None:
    loads = {"a": load(prefill_token_s=1e-3), "b": load(prefill_token_s=3e-3), "new": ReplicaLoad()}
    view = Pool(loads).view(request(100))
    assert view.token_s.tolist() == pytest.approx([1e-3, 3e-3, 2e-3])
    assert Pool({"new": ReplicaLoad()}).view(request()).token_s.tolist() == [UNKNOWN_TOKEN_S]


def test_median_of_a_replica_corrects_its_prediction() -> None:
    pool = Pool("ab")
    for _ in range(20):
        pool.table.on_first_token("b", predicted_s=1.0, actual_s=3.0)
    view = pool.view(request(1000))
    assert view.ttft_p50_s[0] == pytest.approx(1000 * TOKEN_S + STEP_S)
    assert view.ttft_p50_s[1] == pytest.approx(3.0 * view.ttft_p50_s[0], rel=0.05)


def test_tpot_is_that_of_a_step_with_this_sequence_in_it() -> None:
    step = cost(token_s=1e-4, sequence_s=2e-4, context_s=1e-6)
    view = Pool({"a": load(step_cost=step)}).view(request(1000))
    assert view.tpot_s.tolist() == pytest.approx([STEP_S + 3e-4 + 1e-3])


@pytest.mark.parametrize(
    ("slo", "is_in_time"),
    [
        ({}, True),
        ({"ttft_s": 0.2}, True),
        ({"ttft_s": 0.1}, False),
        ({"tpot_s": 0.02}, True),
        ({"tpot_s": 0.005}, False),
        ({"ttft_s": 0.2, "tpot_s": 0.005}, False),
        ({"expires_s": 0.1}, False),
        ({"expires_s": 0.2}, True),
        ({"ttft_s": 1.0, "expires_s": 0.1}, False),
        ({"ttft_s": 1.2, "arrived_s": -1.1}, False),  # it has waited in the gateway's queue
        ({"ttft_s": 1.3, "arrived_s": -1.1}, True),
    ],
)
def test_objective_holds_from_arrival_and_within_the_deadline(
    slo: dict[str, float], is_in_time: bool
) -> None:
    # 160 tokens: 0.17 s with the step.
    decision = Pool("a").pick(request(160, **slo))  # type: ignore[arg-type]
    assert decision.meets_slo is is_in_time


def test_high_quantile_decides_whether_the_objective_is_kept() -> None:
    pool = Pool("a")
    assert pool.pick(request(160, ttft_s=0.3)).meets_slo
    for _ in range(40):
        pool.table.risk.observe(0.17, math.inf, now_s=0.0)
    decision = pool.pick(request(160, ttft_s=0.3), now_s=1.0)
    assert not decision.meets_slo
    assert decision.chosen.ttft_p50_s < 0.3 < decision.chosen.ttft_high_s


def test_blocks_that_are_not_there_make_wait() -> None:
    pool = Pool({"a": load(num_free_blocks=11), "b": load(num_free_blocks=0)})
    view = pool.view(request(160))
    assert view.wait_s[0] == 0.0
    assert view.wait_s[1] > 1.0
    pool.table.on_submit("a", "x", Sent(80, num_blocks=6))
    assert 0.0 < pool.view(request(160)).backlog_s[0] < view.backlog_s[1]


def test_blocks_that_are_not_there_make_wait_whatever_the_size_of_others_blocks() -> None:
    pool = Pool()
    pool.add(info("large", block_size=512), load(num_free_blocks=20))
    pool.add(info("small", block_size=16), load(num_free_blocks=20))
    wait_s = pool.view(request(1024)).wait_s
    assert wait_s[0] == 0.0
    assert wait_s[1] > 1.0


def test_replica_is_full_only_where_others_wait_for_blocks_already() -> None:
    none_free = {"a": load(num_free_blocks=0), "b": load(num_free_blocks=0, num_waiting=1)}
    assert Pool(none_free).view(request(160)).is_full.tolist() == [False, True]
    assert Pool({"a": load(num_waiting=9)}).view(request(160)).is_full.tolist() == [False]


def test_figures_belong_to_the_replicas_that_can_take_the_request() -> None:
    pool = Pool({"a": load(is_draining=True), "b": load(work_s=1.0), "c": IDLE})
    view = pool.view(request())
    assert [view.replica_id(at) for at in range(len(view))] == ["b", "c"]
    assert view.wait_s.tolist() == pytest.approx([1.0, 0.0])
    assert view.backlog_s.tolist() == pytest.approx([1.0, 0.0])


def test_full_prefix_is_what_some_replica_has_and_this_one_has_not() -> None:
    pool = Pool("abc").cache(a=[1, 2, 3, 4], b=[1, 2])
    view = pool.view(request(100, [1, 2, 3, 4, 5]))
    assert view.full_s.tolist() == pytest.approx([0.0, 32 * TOKEN_S, 64 * TOKEN_S])


def test_replicas_without_the_model_are_not_seen() -> None:
    pool = Pool()
    pool.add(info("a", model="m1"))
    pool.add(info("b", model="m2"))
    assert len(pool.view(request(model="m2"))) == 1
