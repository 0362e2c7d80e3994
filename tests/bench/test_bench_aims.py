"""What a load asks of the scheduler, and what its requests are held against."""

from __future__ import annotations

import math

import pytest

from cluster.bench.aims import Aim, AimMix, parse_shares
from cluster.bench.objectives import Objectives, choose_objectives
from cluster.bench.statistics import LatencyObjective
from cluster.config import EngineConfig, LatencyConfig
from cluster.errors import InvalidArgumentError
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.simulator.arrival import Arrival
from cluster.simulator.workload import SloRule, Workload
from cluster.types import SLO, ServiceClass

CONFIG = EngineConfig(interactive=LatencyConfig(ttft_s=0.5, tpot_s=0.0))


def test_aim_of_a_class_sends_the_class_and_counts_its_figures() -> None:
    aim, message = Aim.of_class(ServiceClass.INTERACTIVE, CONFIG), pb.GenerateRequest()
    aim.write(message)
    assert message == pb.GenerateRequest(service_class=pb.SERVICE_CLASS_INTERACTIVE)
    assert aim.objective == LatencyObjective(0.5, math.inf)  # 0 in the configuration is none
    assert aim.figures() == {"service_class": "interactive", "ttft_s": 0.5, "tpot_s": None}


def test_aim_of_times_sends_them_and_counts_them() -> None:
    aim, message = Aim.of_slo(SLO(tpot_s=0.1)), pb.GenerateRequest()
    aim.write(message, session="s")
    assert message == pb.GenerateRequest(latency=pb.LatencyObjective(tpot_s=0.1), session="s")
    assert aim.objective == LatencyObjective(math.inf, 0.1)
    assert (aim.served_as, Aim().served_as) == ("interactive", "")


def test_mix_draws_by_share_and_repeats_with_the_seed() -> None:
    batch = Aim.of_class(ServiceClass.BATCH, CONFIG)
    interactive = Aim.of_class(ServiceClass.INTERACTIVE, CONFIG)
    mix = AimMix({interactive: 3.0, batch: 1.0}, seed=5)
    drawn = [mix.draw(index) for index in range(2000)]
    assert drawn.count(batch) / 2000 == pytest.approx(0.25, abs=0.03)
    assert drawn == [AimMix({interactive: 3.0, batch: 1.0}, seed=5).draw(i) for i in range(2000)]
    assert drawn != [AimMix({interactive: 3.0, batch: 1.0}, seed=6).draw(i) for i in range(2000)]
    assert [row["share"] for row in mix.figures()] == [0.75, 0.25]


def test_shares_are_read() -> None:
    assert parse_shares("interactive=0.5, batch = 2") == {
        ServiceClass.INTERACTIVE: 0.5,
        ServiceClass.BATCH: 2.0,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is no class"),
        ("urgent=1", "'urgent' is no class"),
        ("batch=1,batch=2", "'batch' is no class, or comes twice"),
        ("batch", "'' is no finite number above 0"),
        ("batch=x", "'x' is no finite number"),
        ("batch=0", "'0' is no finite number"),
        ("batch=-1", "'-1' is no finite number"),
        ("batch=nan", "'nan' is no finite number"),
        ("batch=inf", "'inf' is no finite number"),
    ],
)
def test_shares_that_are_none_are_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        parse_shares(text)
    assert caught.value.field == "classes"


def test_objectives_by_length_add_time_for_each_prompt_token() -> None:
    objectives = choose_objectives(None, None, (2.0, 0.05, 0.1), CONFIG)
    (aim,) = objectives.mix(1000, seed=0).shares
    assert aim.slo == SLO(pytest.approx(2.1), 0.05)
    arrivals = (Arrival("0", 0.0, ((1, 5000),), 4, 9), Arrival("1", 1.0, ((2, 10),), 4, 10))
    given = objectives.given_to(Workload("w", arrivals), seed=0)
    assert [a.slo.ttft_s for a in given.arrivals] == pytest.approx([2.5, 2.001])


def test_objectives_of_one_class_are_those_of_the_configuration() -> None:
    objectives = choose_objectives(ServiceClass.INTERACTIVE, None, (None, None, 0.0), CONFIG)
    (aim,) = objectives.mix(1000, seed=0).shares
    assert aim == Aim.of_class(ServiceClass.INTERACTIVE, CONFIG)
    arrivals = (Arrival("0", 0.0, ((1, 10),), 4, 9),)
    (arrival,) = objectives.given_to(Workload("w", arrivals), seed=0).arrivals
    assert arrival.service_class is ServiceClass.INTERACTIVE


def test_objectives_left_out_ask_for_nothing() -> None:
    objectives = choose_objectives(None, None, (None, None, 0.0), CONFIG)
    assert objectives == Objectives(config=CONFIG)
    (aim,) = objectives.mix(10, seed=0).shares
    message = pb.GenerateRequest()
    aim.write(message)
    assert message == pb.GenerateRequest()


def test_objectives_of_tpot_alone_have_no_first_token() -> None:
    objectives = choose_objectives(None, None, (None, 0.2, 0.0), CONFIG)
    assert objectives.rule == SloRule(None, 0.0, 0.2)
