from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cluster.errors import InvalidArgumentError
from cluster.simulator.arrival import Arrival
from cluster.simulator.summary import describe
from cluster.simulator.synthetic import SPECS, from_spec, mix64
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, Workload
from cluster.types import ServiceClass


def _times_s(workload: Workload) -> np.ndarray:
    return np.array([arrival.arrived_s for arrival in workload.arrivals])


def _sessions(workload: Workload) -> list[list[Arrival]]:
    found: dict[str, list[Arrival]] = {}
    for arrival in workload.arrivals:
        found.setdefault(arrival.session, []).append(arrival)
    return list(found.values())


@pytest.mark.parametrize("name", SPECS)
def test_workload_synthetic_is_that_of_the_seed(name: str) -> None:
    once, again, other = (from_spec(f"{name}:duration=400", seed=seed) for seed in (3, 3, 4))
    assert once == again
    assert [a.runs for a in once.arrivals] != [a.runs for a in other.arrivals]


@pytest.mark.parametrize("name", SPECS)
def test_workload_synthetic_is_valid(name: str) -> None:
    text = f"{name}:duration=400"
    workload = from_spec(text)
    assert workload.name == text
    assert workload.description
    assert len({a.request_id for a in workload.arrivals}) == len(workload.arrivals)
    assert len({a.answer_token for a in workload.arrivals}) == len(workload.arrivals)
    earlier: set[str] = set()
    for arrival in workload.arrivals:
        assert arrival.follows in earlier or not arrival.follows
        earlier.add(arrival.request_id)
        assert arrival.arrived_s >= 0
        assert arrival.num_output_tokens >= 1
        assert FIRST_ANSWER_TOKEN <= arrival.answer_token < 2**32
        assert all(0 <= token < 2**32 and count >= 1 for token, count in arrival.runs)
        assert type(arrival.num_prompt_tokens) is type(arrival.num_output_tokens) is int


@pytest.mark.parametrize("seed", range(2))
def test_workload_mix64_is_as_it_says(seed: int) -> None:
    summary = describe(mix64(seed=seed))
    assert summary.recurring == pytest.approx(0.64, abs=0.02)
    assert summary.input_tokens.mean == pytest.approx(12_000, rel=0.01)
    assert summary.input_tokens.p99 > 4 * summary.input_tokens.mean
    assert summary.output_tokens.mean == pytest.approx(340, rel=0.08)
    assert summary.num_requests == pytest.approx(3.4 * 3600, rel=0.15)
    assert 3500 < summary.duration_s < 3600


@pytest.mark.parametrize(
    ("numbers", "recurring"),
    [
        ("recurring=0.2", 0.2),
        ("recurring=0.85", 0.85),
        ("duration=400", 0.64),
        ("duration=900,recurring=0.5,block_size=16,input=900,output=40", 0.5),
        ("duration=900,recurring=0.5,clients=1,burstiness=0.5", 0.5),
    ],
)
def test_workload_mix_reaches_other_shares(numbers: str, recurring: float) -> None:
    summary = describe(from_spec(f"mix64:{numbers}", seed=1))
    assert summary.recurring == pytest.approx(recurring, abs=0.02)


def test_workload_mix_has_few_clients_with_most_requests_and_bursts() -> None:
    workload = from_spec("mix64:skew=1.5,burstiness=3")
    clients = Counter(a.runs[0][0] for a in workload.arrivals)
    assert clients.most_common(1)[0][1] > 0.25 * len(workload.arrivals)
    per_minute = np.bincount((_times_s(workload) // 60).astype(int))
    calm = np.bincount((_times_s(from_spec("mix64:burstiness=0.2")) // 60).astype(int))
    assert per_minute.var() / per_minute.mean() > 2 * calm.var() / calm.mean()


def test_workload_mix_turns_repeat_history_and_answers() -> None:
    num_further = 0
    for turns in _sessions(from_spec("mix64:duration=600")):
        for before, after in pairwise(turns):
            told = (*before.runs, (before.answer_token, before.num_output_tokens))
            assert after.runs[: len(told)] == told
            assert len(after.runs) == len(told) + 1
            assert after.arrived_s > before.arrived_s
            num_further += 1
    assert num_further > 500


BAD_MIXES = [
    ("recurring=0.99", "recurring=0.99, with this seed and these lengths it is 0.0.* to 0.8"),
    ("recurring=0.64,duration=60", "recurring=0.64, .*lengthen duration_s"),
    ("rate=1e4,duration=1e6", "requests, limit=150000"),
    ("rate=0.001,duration=1,think=0,burstiness=0.1", "makes no request"),
    ("input=200,output=2000,recurring=0.8", "input_tokens=200, .* the mean is"),
]


@pytest.mark.parametrize(("numbers", "message"), BAD_MIXES)
def test_workload_mix_that_cannot_be_is_refused(numbers: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        from_spec(f"mix64:{numbers}")


def test_workload_sessions_follow_and_repeat() -> None:
    workload = from_spec("sessions:turns=4,rate=2,duration=300,think=10", seed=2)
    conversations = _sessions(workload)
    gaps_s = []
    for turns in conversations:
        assert not turns[0].follows
        for before, after in pairwise(turns):
            assert after.follows == before.request_id
            told = (*before.runs, (before.answer_token, before.num_output_tokens))
            assert after.runs[: len(told)] == told
            gaps_s.append(after.arrived_s)
    assert len(conversations) == pytest.approx(600, rel=0.15)
    assert len(workload.arrivals) / len(conversations) == pytest.approx(4, rel=0.15)
    assert np.mean(gaps_s) == pytest.approx(10, rel=0.1)
    assert {turns[0].runs[0] for turns in conversations} == {(0, 1000)}


def test_workload_sessions_share_the_system_prompt_as_far_as_asked() -> None:
    workload = from_spec("sessions:shared=0.5,rate=2,duration=300", seed=2)
    systems = Counter(turns[0].runs[0][0] for turns in _sessions(workload))
    assert systems[0] == pytest.approx(300, rel=0.2)
    assert all(count == 1 for token, count in systems.items() if token)
    bare = from_spec("sessions:system=0", seed=2)
    assert all(len(turns[0].runs) == 1 for turns in _sessions(bare))


def test_workload_sessions_end_where_the_context_is_full() -> None:
    workload = from_spec("sessions:turns=50,max_input=3000")
    assert max(a.num_prompt_tokens for a in workload.arrivals) <= 3000
    assert len(workload.arrivals) > 2 * len(_sessions(workload))


def test_workload_hot_prefix_is_shared_by_all() -> None:
    workload = from_spec("hot_prefix:prefix=4000,rate=20,tail=50")
    assert {a.runs[0] for a in workload.arrivals} == {(0, 4000)}
    tails = [a.runs[1] for a in workload.arrivals]
    assert len({token for token, _ in tails}) == len(tails) == len(workload.arrivals)
    assert np.mean([count for _, count in tails]) == pytest.approx(50, rel=0.1)
    assert len(tails) == pytest.approx(2400, rel=0.1)


def test_workload_poisson_has_its_rate_and_gaps_without_memory() -> None:
    times_s = _times_s(from_spec("poisson:rate=10,duration=1000"))
    gaps_s = np.diff(times_s)
    assert len(times_s) == pytest.approx(10_000, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.05)


def test_workload_burst_has_its_rate_inside_and_outside() -> None:
    text = "burst:rate=5,factor=8,burst_s=5,period=20,duration=1990"
    times_s = _times_s(from_spec(text))
    is_burst = times_s % 20 >= 15
    assert np.sum(~is_burst) / (100 * 15 - 5) == pytest.approx(5, rel=0.05)
    assert np.sum(is_burst) / (99 * 5) == pytest.approx(40, rel=0.05)
    assert times_s.max() < 1990
    assert (np.diff(times_s) >= 0).all()


def test_workload_overload_has_both_loads_and_the_backlog() -> None:
    workload = from_spec("overload_classes:capacity=10000,input=500,duration=200,backlog=40")
    tokens = Counter[ServiceClass]()
    for arrival in workload.arrivals:
        tokens[arrival.service_class] += arrival.num_prompt_tokens
    assert tokens[ServiceClass.INTERACTIVE] / 200 == pytest.approx(20_000, rel=0.05)
    assert tokens[ServiceClass.BATCH] / 200 == pytest.approx(10_000, rel=0.08)
    begin = [a.service_class for a in workload.arrivals if a.arrived_s == 0.0]
    assert begin == [ServiceClass.BATCH] * 40


BAD_SPECS = [
    ("", "workload '' is unknown: take one of mix64, sessions"),
    ("mooncake", "workload 'mooncake' is unknown"),
    ("poisson:speed=3", "'speed=3' is no key=value of it: its keys are rate_per_s"),
    ("poisson:rate", "'rate' is no key=value"),
    ("poisson:rate=1,,duration=3", "'' is no key=value"),
    ("poisson:rate=1,rate_per_s=2", "rate_per_s comes twice"),
    ("poisson:rate=-1", "rate_per_s=-1: Input should be greater than 0"),
    ("poisson:rate=nan", "rate_per_s=nan: Input should be"),
    ("poisson:rate=fast", "rate_per_s=fast: Input should be a valid number"),
    ("poisson:rate=", "rate_per_s=: Input should be a valid number"),
    ("hot_prefix:prefix=1.5", "prefix_tokens=1.5: Input should be a valid integer"),
    ("sessions:shared=1.1", "shared=1.1: Input should be less than or equal to 1"),
    ("poisson:rate=1e5,duration=1e6", "limit=2000000: lower one of them"),
    ("poisson:rate=1e-9", "0 requests, a workload has"),
    ("sessions:rate=1000,duration=1000,turns=100", "turns=100 in .* lower rate_per_s"),
    ("burst:burst=60,period=60", "burst_s=60, it is below period_s=60"),
]


@pytest.mark.parametrize(("text", "message"), BAD_SPECS)
def test_workload_text_that_describes_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        from_spec(text)
    assert caught.value.field


def test_workload_negative_seed_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="seed=-1, it is 0 or more"):
        from_spec("poisson", seed=-1)
