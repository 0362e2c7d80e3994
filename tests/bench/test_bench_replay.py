"""A workload of no model becomes requests to a model; a replay keeps their times and chains."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.bench.aims import NO_AIM, Aim
from cluster.bench.replay import (
    ReplayPlan,
    ReplayRun,
    clipped,
    fitted_lengths,
    prompt_of,
)
from cluster.bench.sender import PlannedRequest, Sender
from cluster.bench.statistics import RequestRecord
from cluster.clock import VirtualClock
from cluster.config import EngineConfig
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.simulator.arrival import Arrival
from cluster.simulator.workload import Workload
from cluster.types import SLO, ServiceClass

MODEL = pb.Model(name="m", vocab_size=300, max_model_len=512)


def prompt(*runs: tuple[int, int], num_tokens: int = 10**6, **options: Any) -> list[int]:
    return prompt_of(runs, num_tokens, **{"vocab_size": 300, "seed": 0, "answers": {}, **options})


def test_prompts_share_what_the_workload_says() -> None:
    whole = prompt((7, 512), (8, 512), (9, 100))
    assert len(whole) == 1124 and set(whole) <= set(range(300))
    assert prompt((7, 512), (8, 200)) == whole[:712]  # a partial block is a prefix of a whole one
    assert prompt((7, 200), (7, 312), (8, 512)) == whole[:1024]  # however a run is cut
    other = prompt((7, 512), (10, 512))
    assert other[:512] == whole[:512]
    assert sum(a == b for a, b in zip(other[512:], whole[512:1024], strict=True)) < 20
    assert prompt((7, 512), seed=1) != whole[:512]
    assert prompt((2**32 - 1, 3), vocab_size=1) == [0, 0, 0]


def test_prompt_repeats_what_the_cluster_answered() -> None:
    plain = prompt((7, 8), (99, 4), (8, 2))
    repeated = prompt((7, 8), (99, 4), (8, 2), answers={99: [1, 2, 3, 4, 5]})
    assert repeated == [*plain[:8], 1, 2, 3, 4, *plain[12:]]
    cut_off = prompt((7, 8), (99, 4), (8, 2), answers={99: [1]})
    assert cut_off[8] == 1 and len(cut_off) == 14


def test_prompt_is_clipped_at_its_end() -> None:
    whole = prompt((7, 8), (8, 8))
    assert prompt((7, 8), (8, 8), num_tokens=11) == whole[:11]
    assert prompt((7, 8), (8, 8), num_tokens=8) == whole[:8]


@pytest.mark.parametrize(
    ("lengths", "fitted"),
    [
        ((10, 5), (10, 5)),
        ((507, 5), (507, 5)),
        ((508, 5), (507, 5)),
        ((1000, 5), (507, 5)),
        ((10, 400), (10, 256)),
        ((1000, 400), (256, 256)),
    ],
)
def test_lengths_fit_the_context(lengths: tuple[int, int], fitted: tuple[int, int]) -> None:
    num_input, num_output = lengths
    assert fitted_lengths(Arrival("0", 0.0, ((1, num_input),), num_output, 9), 512) == fitted


def test_clipped_counts_requests_and_tokens() -> None:
    sizes = [(10, 5), (1000, 5), (1000, 400)]
    arrivals = [Arrival(str(i), i, ((1, n),), out, 9) for i, (n, out) in enumerate(sizes)]
    assert clipped(Workload("w", tuple(arrivals)), 512) == {
        "num_requests": 2,
        "num_prompts": 2,
        "num_prompt_tokens": 493 + 744,
        "num_outputs": 1,
        "num_output_tokens": 144,
    }


@pytest.mark.parametrize(
    ("service_class", "slo", "sends_standard", "aim"),
    [
        (ServiceClass.STANDARD, SLO(), False, NO_AIM),
        (ServiceClass.STANDARD, SLO(), True, ServiceClass.STANDARD),
        (ServiceClass.INTERACTIVE, SLO(), False, ServiceClass.INTERACTIVE),
        (ServiceClass.INTERACTIVE, SLO(1.0, 0.1), False, SLO(1.0, 0.1)),
        (ServiceClass.STANDARD, SLO(1.0), True, SLO(1.0)),
        (ServiceClass.BATCH, SLO(1.0), False, ServiceClass.BATCH),
    ],
)
def test_arrival_asks_for_its_times_else_for_its_class(
    service_class: ServiceClass, slo: SLO, sends_standard: bool, aim: Aim | SLO | ServiceClass
) -> None:
    arrival = Arrival("0", 0.0, ((1, 4),), 2, 9, slo=slo, service_class=service_class)
    plan = ReplayPlan(Workload("w", (arrival,)), sends_standard=sends_standard)
    if isinstance(aim, ServiceClass):
        aim = Aim.of_class(aim, EngineConfig())
    assert plan.aim(arrival) == (Aim.of_slo(aim) if isinstance(aim, SLO) else aim)


class VirtualSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Lets a loop's time pass at once instead of waiting."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        self._clock.advance(timeout or 0.0)
        return super().select(0)


def virtual_loop() -> asyncio.AbstractEventLoop:
    clock = VirtualClock()
    loop = asyncio.SelectorEventLoop(VirtualSelector(clock))
    loop.time = clock.now  # type: ignore[method-assign]
    return loop


class FakeSender(Sender):
    """Answers each request after a while with tokens that name it."""

    def __init__(self, answer_s: float) -> None:
        self.sent: list[tuple[PlannedRequest, float]] = []
        self.records: list[RequestRecord] = []
        self._answer_s = answer_s

    def start(self) -> None:
        self._start_s = asyncio.get_running_loop().time()

    def now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._start_s

    async def send(self, planned: PlannedRequest, due_s: float) -> list[int]:
        assert self.now_s() == pytest.approx(due_s), "sent when it is due"
        self.sent.append((planned, due_s))
        await asyncio.sleep(self._answer_s)
        self.records.append(RequestRecord(due_s, self.now_s(), "OK"))
        return [200 + int(planned.request_id)] * planned.message.sampling.max_tokens


def replay(arrivals: Sequence[Arrival], **options: Any) -> FakeSender:
    sender = FakeSender(answer_s=20.0)
    plan = ReplayPlan(Workload("w", tuple(arrivals)), **options)
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        records = runner.run(ReplayRun(sender, MODEL, plan).run())
    assert records is sender.records and len(records) == len(arrivals)
    return sender


def test_replay_sends_each_request_when_it_is_due() -> None:
    arrivals = [Arrival(str(i), 10.0 * i, ((i, 6 + i),), 3, 10**6 + i) for i in range(4)]
    sender = replay(arrivals, timeout_s=9.0)
    assert [due_s for _, due_s in sender.sent] == [0.0, 10.0, 20.0, 30.0]
    for planned, _ in sender.sent:
        message = planned.message
        assert len(message.token_ids.ids) == 6 + int(planned.request_id)
        assert (message.sampling.max_tokens, message.sampling.ignore_eos) == (3, True)
        assert (message.model, planned.timeout_s) == ("m", 9.0)


def test_replay_lets_a_turn_wait_for_the_one_before_and_repeat_its_answer() -> None:
    first = Arrival("0", 0.0, ((1, 5),), 3, 10**6, session="s", deadline_s=4.0)
    second = Arrival("1", 30.0, ((1, 5), (10**6, 3), (2, 4)), 2, 10**6 + 1, follows="0")
    third = Arrival(
        "2", 0.0, ((1, 5), (10**6, 3), (2, 4), (10**6 + 1, 2)), 2, 10**6 + 2, follows="1"
    )
    sender = replay([first, second, third])
    (one, one_s), (two, two_s), (three, three_s) = sender.sent
    assert one.message.session == "s" and one.timeout_s == 4.0
    assert [one_s, two_s, three_s] == pytest.approx([0.0, 20.0 + 30.0, 50.0 + 20.0])
    prompts = [list(planned.message.token_ids.ids) for planned in (one, two, three)]
    assert prompts[1][:8] == prompts[0] + [200] * 3
    assert prompts[2] == prompts[1] + [201] * 2


def test_replay_of_one_seed_is_the_same_and_of_another_is_not() -> None:
    arrivals = [Arrival("0", 0.0, ((1, 50),), 1, 10**6)]
    one, same, other = (replay(arrivals, seed=seed).sent[0][0].message for seed in (1, 1, 2))
    assert one == same
    assert list(one.token_ids.ids) != list(other.token_ids.ids)
