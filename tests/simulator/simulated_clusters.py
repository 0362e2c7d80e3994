"""Small simulated clusters, and requests for them, whose times can be computed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.config import load_config
from cluster.simulator.arrival import Arrival
from cluster.simulator.cost_model import from_rates
from cluster.simulator.record import End, RequestRecord, SimulationResult
from cluster.simulator.settings import SimulationSettings
from cluster.simulator.simulator import Simulator
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, Workload

DELAY_S = 0.005
STEP_S = 0.01
"""Of decodes alone, and of up to FREE_TOKENS beside them."""

FREE_TOKENS = 100
TOKEN_S = 1e-4
"""Of each prompt token beyond these."""

PREFILL_S = 0.11
"""Of the 1,100 tokens of a request that is alone."""

IN_TURN = ("router.policy=round_robin", "router.admission='off'")
"""Overrides with which requests go to the replicas in the order of their ids."""


def arrival(index: int = 0, at_s: float = 0.0, **changes: Any) -> Arrival:
    """Return a request of 1,100 tokens that no other one has, and an answer of 5."""
    values: dict[str, Any] = {
        "runs": ((1 + index, 1100),),
        "num_output_tokens": 5,
        "answer_token": FIRST_ANSWER_TOKEN + index,
    }
    return Arrival(f"r{index}", at_s, **(values | changes))


def settings(*overrides: str, **changes: Any) -> SimulationSettings:
    """Return a cluster of 400 blocks of 16 tokens per replica, and steps of 2,048 tokens."""
    sizes = ("cache.block_size=16", "cache.num_blocks=400", "engine.max_num_batched_tokens=2048")
    values: dict[str, Any] = {
        "config": load_config(None, [*sizes, *overrides]),
        "cost": from_rates(prefill_tokens_per_s=1 / TOKEN_S, decode_step_s=STEP_S),
        "event_delay_s": DELAY_S,
        "max_output_tokens": 64,
    }
    return SimulationSettings(**(values | changes))


class CountingSimulator(Simulator):
    """Notes how often each request ends."""

    def __init__(self, workload: Workload, of: SimulationSettings) -> None:
        super().__init__(workload, of)
        self.num_ends: dict[str, int] = {}

    def ended(self, record: RequestRecord, end: End, reason: str = "") -> None:
        request_id = record.arrival.request_id
        self.num_ends[request_id] = self.num_ends.get(request_id, 0) + 1
        super().ended(record, end, reason)


def simulated(work: Workload | Iterable[Arrival], of: SimulationSettings) -> SimulationResult:
    """Return what becomes of requests, each of which ended exactly once unless it was cut."""
    workload = work if isinstance(work, Workload) else Workload.in_order("test", work)
    simulator = CountingSimulator(workload, of)
    result = simulator.run()
    ended = {r.arrival.request_id for r in result.requests if r.end is not End.CUT}
    assert simulator.num_ends == dict.fromkeys(ended, 1)
    return result


def by_id(result: SimulationResult) -> dict[str, RequestRecord]:
    return {record.arrival.request_id: record for record in result.requests}


def spread(values: Iterable[float]) -> float:
    """Return max over mean."""
    numbers = list(values)
    return max(numbers) * len(numbers) / sum(numbers)
