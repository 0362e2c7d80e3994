"""Measures a real cluster for the validation of the simulator.

experiments ► load ► experiments ► load ► ...      a machine that is shared changes its speed:
    └──── predict ────┘                            a run is predicted from what is around it
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from cluster.bench.replay import ReplayPlan, ReplayRun
from cluster.bench.sender import Sender
from cluster.bench.statistics import RequestRecord, summarize
from cluster.bench.validation import (
    LoadPoint,
    Prediction,
    RunFigures,
    make_workload,
    predict,
)
from cluster.bench.validation_calibration import Measured, calibrate
from cluster.bench.validation_experiments import Experiments
from cluster.client import AsyncClient
from cluster.config import ClusterConfig
from cluster.errors import UnavailableError
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.simulator.workload import Workload

_CONNECT_TIMEOUT_S = 10.0
_PAUSE_S = 0.5  # after a replay: streams and reports have ended

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """How much is measured."""

    loads: Sequence[float] = (0.3, 0.6, 0.9)  # of the capacity
    num_rounds: int = 3  # each has all loads
    duration_s: float = 12.0  # of the arrivals at each load, per round
    num_burst: int = 48  # requests at once, to find the capacity
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One replay of a workload, and what was predicted of it."""

    rate_per_s: float  # of the arrivals
    workload: Workload
    records: list[RequestRecord]
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class Validation:
    """All that a validation brought."""

    measured: list[Measured]  # before the first run, and after each
    runs: dict[float, list[ComparedRun]]  # of each round, by load

    def points(self) -> list[LoadPoint]:
        """Return the rounds of each load taken together."""
        return [
            LoadPoint(
                load,
                sum(run.rate_per_s for run in runs) / len(runs),
                sum(len(run.records) for run in runs),
                RunFigures.of_records([run.records for run in runs]),
                RunFigures.of_results([run.prediction.result for run in runs]),
                sum(run.prediction.busy_share for run in runs) / len(runs),
            )
            for load, runs in self.runs.items()
        ]


class ValidationRun:
    """One validation on one cluster.

    Args:
        stub: Of its gateway.
        client: Likewise.
        model: That it serves.
        config: Of the cluster.
        plan: How much is measured.
        on_progress: Told in a few words what goes on.
    """

    def __init__(
        self,
        stub: InferenceStub,
        client: AsyncClient,
        model: pb.Model,
        config: ClusterConfig,
        plan: ValidationPlan,
        on_progress: OnProgress = lambda message: None,
    ) -> None:
        self._stub = stub
        self._model = model
        self._config = config
        self._plan = plan
        self._tell = on_progress
        self._experiments = Experiments(client, model, config.replica.num_replicas)
        self._num_replays = 0

    async def run(self) -> Validation:
        """Return what all rounds brought."""
        plan = self._plan
        self._tell("warming up")
        await self._calibrate()
        measured = [await self._calibrate()]
        replays: list[tuple[float, float, Workload, list[RequestRecord]]] = []
        for index in range(plan.num_rounds):
            self._tell(f"round {index + 1} of {plan.num_rounds}")
            for load in plan.loads:
                rate_per_s = load * measured[-1].requests_per_s
                workload = self._workload(load, rate_per_s)
                replays.append((load, rate_per_s, workload, await self._replay(workload)))
                measured.append(await self._calibrate())
        runs: dict[float, list[ComparedRun]] = {load: [] for load in plan.loads}
        for index, (load, rate_per_s, workload, records) in enumerate(replays):
            prediction = self._predict(workload, measured[index : index + 2])
            runs[load].append(ComparedRun(rate_per_s, workload, records, prediction))
        return Validation(measured, runs)

    def _workload(self, load: float, rate_per_s: float) -> Workload:
        plan = self._plan
        num_requests = max(2, round(rate_per_s * plan.duration_s))
        self._tell(f"load {load:g}: {num_requests} requests at {rate_per_s:.2f}/s")
        return make_workload(num_requests, rate_per_s, seed=plan.seed + self._num_replays)

    def _predict(self, workload: Workload, around: Sequence[Measured]) -> Prediction:
        """Simulate with what was measured right before and right after the real run."""
        return predict(
            workload,
            self._config,
            calibrate(around),
            max_model_len=self._model.max_model_len,
            seed=self._plan.seed,
        )

    async def _calibrate(self) -> Measured:
        """Run the small experiments."""
        burst = make_workload(self._plan.num_burst, 0.0, seed=self._plan.seed + self._num_replays)
        capacity = summarize(await self._replay(burst))["requests_per_s"]
        return await self._experiments.run(capacity)

    async def _replay(self, workload: Workload) -> list[RequestRecord]:
        self._num_replays += 1
        seed = 1000 * self._plan.seed + self._num_replays  # nothing of another run is cached
        plan = ReplayPlan(workload, seed=seed)
        records = await ReplayRun(Sender(self._stub), self._model, plan).run()
        _check(records)
        await asyncio.sleep(_PAUSE_S)
        return records


def _check(records: Sequence[RequestRecord]) -> None:
    failed = [record for record in records if not record.is_ok]
    if failed:
        raise UnavailableError(
            f"{len(failed)} of {len(records)} requests failed, the first with {failed[0].status} "
            f"{failed[0].reason}: nothing is compared"
        )


async def validate(
    address: str,
    config: ClusterConfig,
    plan: ValidationPlan,
    on_progress: OnProgress = lambda message: None,
) -> Validation:
    """Calibrate, then measure and predict each load.

    Args:
        address: host:port of the gateway.
        config: Of the cluster, with cache.num_blocks.
        plan: How much is measured.
        on_progress: Told in a few words what goes on.

    Raises:
        UnavailableError: Requests failed, or leaders report nothing.
    """
    async with grpc.aio.insecure_channel(address) as channel, AsyncClient(address) as client:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        models = await stub.ListModels(pb.ListModelsRequest(), timeout=_CONNECT_TIMEOUT_S)
        run = ValidationRun(stub, client, models.models[0], config, plan, on_progress)
        return await run.run()


def with_fixed_cache(config: ClusterConfig, num_blocks: int) -> ClusterConfig:
    """Return a configuration as the simulator knows it: one tier of so many blocks."""
    cache = config.cache.model_copy(update={"num_blocks": num_blocks, "host_memory_bytes": 0})
    return config.model_copy(update={"cache": cache})
