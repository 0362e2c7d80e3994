"""The load generator against a server that answers, refuses, breaks off and cuts short."""

from __future__ import annotations

import asyncio

import pytest

from cluster.bench.aims import Aim, AimMix
from cluster.bench.load import LoadPlan, RequestShape
from cluster.bench.serve import ServeBench, run_serve_bench
from cluster.bench.statistics import TRUNCATED
from cluster.config import EngineConfig
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.types import SLO, ServiceClass
from tests.bench.bench_fakes import RETRY_AFTER_S, FakeInference, serving

pytestmark = pytest.mark.integration

SHAPE = RequestShape(num_input_tokens=12, num_output_tokens=4)


@pytest.mark.parametrize(
    "plan", [LoadPlan(6, None, rate_per_s=200.0), LoadPlan(6, None, concurrency=2)]
)
def test_bench_counts_every_way_in_which_a_stream_ends(plan: LoadPlan) -> None:
    fake = FakeInference(["ok", "refuse", "truncate", "ok", "short", "break"])
    with serving(fake) as address:
        result = asyncio.run(run_serve_bench(ServeBench(address, plan, SHAPE)))
    figures = result.figures["result"]
    assert figures["status"] == {
        "OK": 2,
        "RESOURCE_EXHAUSTED": 1,
        TRUNCATED: 2,
        "UNAVAILABLE": 1,
    }
    assert figures["num_requests"] == 6
    assert figures["goodput"] == pytest.approx(2 / 6)
    assert figures["cached_token_share"] == pytest.approx(3 / 12)
    assert {record.num_tokens for record in result.records if record.is_ok} == {4}


def test_bench_keeps_what_a_refusal_says() -> None:
    fake, plan = FakeInference(["refuse", "shed", "ok"]), LoadPlan(3, None, concurrency=1)
    with serving(fake) as address:
        result = asyncio.run(run_serve_bench(ServeBench(address, plan, SHAPE)))
    said = [(record.reason, record.retry_after_s) for record in result.records]
    assert said == [("QUEUE_FULL", RETRY_AFTER_S), ("", None), ("", None)]
    refusals = result.figures["result"]["refusals"]
    assert refusals["num_requests"] == 2
    assert refusals["reasons"] == {"": 1, "QUEUE_FULL": 1}
    assert refusals["retry_after_s"]["mean"] == RETRY_AFTER_S
    assert result.figures["result"]["goodput"] == pytest.approx(1 / 3)


def test_bench_gives_figures_by_class() -> None:
    batch = Aim.of_class(ServiceClass.BATCH, EngineConfig())
    impossible = Aim.of_slo(SLO(ttft_s=1e-9))  # times of its own: a gateway serves it so
    aims, plan = AimMix({batch: 1.0, impossible: 1.0}), LoadPlan(12, None, concurrency=2)
    with serving(FakeInference(["ok"] * 12)) as address:
        result = asyncio.run(run_serve_bench(ServeBench(address, plan, SHAPE, aims)))
    classes = result.figures["classes"]
    assert set(classes) == {"batch", "interactive"}
    assert sum(figures["num_requests"] for figures in classes.values()) == 12
    assert classes["batch"]["goodput"] == 1.0
    assert classes["interactive"]["goodput"] == 0.0
    share = classes["batch"]["num_requests"] / 12
    assert result.figures["result"]["goodput"] == pytest.approx(share)


def test_bench_open_loop_does_not_wait_for_slow_answers() -> None:
    fake = FakeInference(["ok"] * 8, delay_s=0.3)
    plan = LoadPlan(8, None, rate_per_s=400.0)
    with serving(fake) as address:
        result = asyncio.run(run_serve_bench(ServeBench(address, plan, SHAPE)))
    assert fake.max_num_open == 8
    assert result.figures["result"]["window_s"] < 8 * 0.3


def test_bench_closed_loop_keeps_the_concurrency() -> None:
    fake = FakeInference(["ok"] * 9, delay_s=0.02)
    plan = LoadPlan(9, None, concurrency=3)
    with serving(fake) as address:
        asyncio.run(run_serve_bench(ServeBench(address, plan, SHAPE)))
    assert fake.max_num_open == 3


def test_bench_warmup_is_sent_and_not_counted() -> None:
    fake = FakeInference(["refuse", "refuse", "ok", "ok", "ok"])
    plan = LoadPlan(3, None, concurrency=1)
    with serving(fake) as address:
        bench = ServeBench(address, plan, SHAPE, num_warmup=2)
        result = asyncio.run(run_serve_bench(bench))
    assert result.figures["result"]["status"] == {"OK": 3}
    assert len({tuple(prompt) for prompt in fake.prompts}) == 5


def test_bench_refuses_what_the_context_cannot_hold() -> None:
    shape = RequestShape(num_input_tokens=500, num_output_tokens=13)
    plan = LoadPlan(1, None, concurrency=1)
    with (
        serving(FakeInference([])) as address,
        pytest.raises(InvalidArgumentError, match="= 513, limit=512"),
    ):
        asyncio.run(run_serve_bench(ServeBench(address, plan, shape)))


def test_bench_refuses_an_unknown_model() -> None:
    plan = LoadPlan(1, None, concurrency=1)
    with (
        serving(FakeInference([])) as address,
        pytest.raises(InvalidArgumentError, match="name one of those served: fake"),
    ):
        asyncio.run(run_serve_bench(ServeBench(address, plan, SHAPE, model="other")))


def test_bench_without_a_server_says_so() -> None:
    bench = ServeBench("127.0.0.1:1", LoadPlan(1, None, concurrency=1), SHAPE)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        asyncio.run(run_serve_bench(bench))
