"""Results of simulations made by hand or at random, for tests of what is made of them."""

from __future__ import annotations

import math
import random
from typing import Any

from cluster.simulator.arrival import Arrival
from cluster.simulator.record import End, ReplicaRecord, RequestRecord, SimulationResult
from cluster.types import SLO, ServiceClass


def request(index: int = 0, *, arrived_s: float = 0.0, **changes: Any) -> RequestRecord:
    """Return a request of 100 prompt tokens that was good: TTFT 1 s, 0.1 s per further token."""
    of_arrival: dict[str, Any] = {"slo": SLO(2.0, 0.5), "runs": ((index, 100),)}
    for name in ("slo", "service_class", "tenant", "runs"):
        of_arrival[name] = changes.pop(name, of_arrival.get(name))
    chosen = {name: value for name, value in of_arrival.items() if value is not None}
    arrival = Arrival(
        request_id=f"r{index}",
        arrived_s=arrived_s,
        num_output_tokens=11,
        answer_token=2**31 + index,
        **chosen,
    )
    record = RequestRecord(
        arrival,
        arrived_s,
        End.FINISHED,
        replica_id="replica-0",
        dispatched_s=arrived_s + 0.5,
        first_token_s=arrived_s + 1.0,
        last_token_s=arrived_s + 2.0,
        num_output_tokens=11,
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def refused(index: int = 0, *, arrived_s: float = 0.0, **changes: Any) -> RequestRecord:
    nothing = {"dispatched_s": None, "first_token_s": None, "last_token_s": None}
    none_out = {"num_output_tokens": 0, "replica_id": "", "end": End.REFUSED}
    return request(index, arrived_s=arrived_s, **nothing, **none_out, **changes)


def result(
    requests: list[RequestRecord], replicas: list[ReplicaRecord] | None = None, **changes: Any
) -> SimulationResult:
    """Return a simulation of 100 virtual seconds."""
    made = SimulationResult(
        policy="slo",
        seed=7,
        workload="by hand",
        rate_scale=1.0,
        duration_s=100.0,
        wall_s=4.0,
        requests=requests,
        replicas=replicas if replicas is not None else [ReplicaRecord("replica-0")],
        num_replicas_over_time=[(0.0, 1)],
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def random_result(num_requests: int = 6000, num_replicas: int = 16) -> SimulationResult:
    """Return a simulation with something to see in every chart."""
    rng = random.Random(3)
    requests = []
    for index in range(num_requests):
        arrived_s = index * 600 / num_requests
        tokens = int(rng.lognormvariate(9, 1))
        wait_s = 0.3 + 0.8 * (1 + math.sin(arrived_s / 60)) * rng.random()
        ttft_s = wait_s + tokens / 9000
        chosen = {
            "slo": SLO(2 + 1e-4 * tokens, 0.05),
            "runs": ((index, tokens),),
            "tenant": f"tenant-{index % 3}",
            "service_class": ServiceClass.BATCH if index % 4 == 0 else ServiceClass.STANDARD,
        }
        if rng.random() < 0.1 * (1 + math.sin(arrived_s / 60)):
            requests.append(refused(index, arrived_s=arrived_s, reason="late", **chosen))
            continue
        first_s = arrived_s + ttft_s
        times = {
            "dispatched_s": arrived_s + 0.01,
            "first_token_s": first_s,
            "last_token_s": first_s + 10 * rng.gauss(0.042, 0.004),
            "predicted_ttft_s": ttft_s * rng.lognormvariate(0, 0.25),
            "predicted_ttft_high_s": ttft_s * 1.4,
            "num_cached_tokens": tokens // 3,
            "num_predicted_cached_tokens": tokens // 3 + 16,
        }
        requests.append(request(index, arrived_s=arrived_s, **chosen, **times))
    replicas = [
        ReplicaRecord(
            f"replica-{index}",
            busy_s=500 + rng.random() * 50,
            num_requests=num_requests // num_replicas,
            num_prefill_tokens=int(2e6 * (1 + 0.2 * rng.random())),
            num_output_tokens=int(1e5 * (1 + rng.random())),
            num_prefix_query_tokens=3_000_000,
            num_prefix_hit_tokens=1_000_000,
        )
        for index in range(num_replicas)
    ]
    load = [
        (5.0 * i, max(0, int(20 * math.sin(i / 12))), int(30 + 20 * math.sin(i / 10)), 200 + i)
        for i in range(120)
    ]
    over_time = [(0.0, num_replicas), (240.0, num_replicas - 1), (300.0, num_replicas)]
    return result(
        requests,
        replicas,
        duration_s=610.0,
        load_over_time=load,
        num_replicas_over_time=over_time,
        settings={"num_replicas": num_replicas, "note": "<b>&"},
    )
