"""Arrivals and prompts: seeded, of the right rate and shape."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from cluster.bench.load import LoadPlan, RequestShape, poisson_arrivals
from cluster.bench.serve import ServeBench
from cluster.errors import InvalidArgumentError
from cluster.rpc.sluice.v1 import inference_pb2 as pb


def test_arrivals_start_at_zero_and_keep_the_rate() -> None:
    due_s = list(islice(poisson_arrivals(20.0, seed=1), 4001))
    gaps_s = [later - earlier for earlier, later in pairwise(due_s)]
    assert due_s[0] == 0.0
    assert min(gaps_s) > 0.0
    assert due_s[-1] / 4000 == pytest.approx(1 / 20, rel=0.05)
    # Of a Poisson process, deviation and mean of the gaps are equal.
    mean_s = due_s[-1] / 4000
    deviation_s = (sum((gap - mean_s) ** 2 for gap in gaps_s) / 4000) ** 0.5
    assert deviation_s == pytest.approx(mean_s, rel=0.1)


def test_arrivals_repeat_with_the_seed_and_differ_without() -> None:
    def first(seed: int) -> list[float]:
        return list(islice(poisson_arrivals(3.0, seed), 10))

    assert first(7) == first(7)
    assert first(7) != first(8)


def test_prompts_share_exactly_the_prefix_and_stay_in_the_vocabulary() -> None:
    shape = RequestShape(num_input_tokens=40, num_shared_prefix_tokens=24, seed=3)
    one, two = shape.prompt(0, 1000), shape.prompt(1, 1000)
    assert len(one) == len(two) == 40
    assert one[:24] == two[:24]
    assert one[24:] != two[24:]
    assert set(one + two) <= set(range(1000))
    assert one == shape.prompt(0, 1000)


def test_request_asks_for_an_exact_number_of_tokens() -> None:
    model = pb.Model(name="m", vocab_size=50, max_model_len=100)
    request = RequestShape(8, 5).request(0, model).request
    assert request.model == "m"
    assert request.sampling.max_tokens == 5
    assert request.sampling.ignore_eos


def test_plan_ends_by_number_or_by_time() -> None:
    assert list(LoadPlan(3, None, rate_per_s=1.0).indices()) == [0, 1, 2]
    assert not LoadPlan(3, None, rate_per_s=1.0).is_over(1e9)
    assert LoadPlan(None, 2.0, rate_per_s=1.0).is_over(2.1)
    assert not LoadPlan(None, 2.0, rate_per_s=1.0).is_over(1.9)


def test_bench_refuses_a_prefix_longer_than_the_prompt() -> None:
    shape = RequestShape(num_input_tokens=10, num_shared_prefix_tokens=11)
    with pytest.raises(InvalidArgumentError, match="shared-prefix-tokens=11, limit=10"):
        ServeBench("localhost:1", LoadPlan(1, None, concurrency=1), shape)
