"""The simulator against a real cluster: workload, prediction, comparison. Pure functions.

Nothing that is compared is used to calibrate: see validation_calibration.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.bench.statistics import RequestRecord, percentile
from cluster.bench.validation_calibration import Calibration
from cluster.config import ClusterConfig
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.simulator.arrival import Arrival, Run
from cluster.simulator.cost_model import CostModel
from cluster.simulator.record import End, SimulationResult
from cluster.simulator.settings import SimulationSettings
from cluster.simulator.simulator import simulate
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, Workload

TOLERANCE = 0.15
"""Predicted over measured may be so far from 1."""

COMPARED = ("ttft_p50_s", "tpot_p50_s", "out_tokens_per_s")

_PROMPT_TOKENS = (50, 600)
_OUTPUT_TOKENS = (16, 96)
_NUM_PREFIXES = 6
_PREFIX_TOKENS = 128
_SHARED = 0.5  # of the prompts that are long enough begin with one of the prefixes
_MAX_PASSES = 8
_PASS_TOLERANCE = 0.005  # of the share of time in which a replica is busy


def make_workload(num_requests: int, rate_per_s: float, *, seed: int) -> Workload:
    """Return a Poisson stream of short prompts and answers; half of the prompts share a prefix.

    Args:
        num_requests: Of the workload, at least 1.
        rate_per_s: Requests; 0: all of them come at once.
        seed: Of all that is random.

    Raises:
        InvalidArgumentError: There would be no request.
    """
    rng = random.Random(f"{seed}/validation")
    due_s = 0.0
    arrivals = []
    for index in range(num_requests):
        num_prompt = rng.randint(*_PROMPT_TOKENS)
        prefix: tuple[Run, ...] = ()
        if num_prompt > _PREFIX_TOKENS and rng.random() < _SHARED:
            prefix = ((1 + rng.randrange(_NUM_PREFIXES), _PREFIX_TOKENS),)
        own = (1 + _NUM_PREFIXES + index, num_prompt - sum(count for _, count in prefix))
        arrivals.append(
            Arrival(
                str(index),
                due_s,
                (*prefix, own),
                rng.randint(*_OUTPUT_TOKENS),
                FIRST_ANSWER_TOKEN + index,
            )
        )
        due_s += rng.expovariate(rate_per_s) if rate_per_s else 0.0
    return Workload.in_order("validation", arrivals, block_size=_PREFIX_TOKENS)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A simulated run."""

    result: SimulationResult
    busy_share: float  # of the time, that a replica has a step


def predict(
    workload: Workload,
    config: ClusterConfig,
    calibration: Calibration,
    *,
    max_model_len: int,
    seed: int = 0,
) -> Prediction:
    """Simulate a workload with the cost that steps have at the load that it brings.

    How long a step takes depends on how busy the other replicas are, and that on how long steps
    take: simulated until the two agree.

    Args:
        workload: That the real cluster gets too.
        config: Of the real cluster, with cache.num_blocks.
        calibration: Of the real cluster.
        max_model_len: Of the model, tokens.
        seed: Of the policy.
    """
    share = 0.5
    for _ in range(_MAX_PASSES):
        settings = SimulationSettings(
            config=config,
            cost=CostModel(calibration.cost_at(share), "measured from outside"),
            num_replicas=config.replica.num_replicas,
            seed=seed,
            event_delay_s=calibration.way_s / 2,
            jitter=calibration.jitter,
            max_model_len=max_model_len,
            max_output_tokens=max(arrival.num_output_tokens for arrival in workload.arrivals),
        )
        result = simulate(workload, settings)
        busy_s = sum(replica.busy_s for replica in result.replicas)
        before, share = share, busy_s / (len(result.replicas) * result.duration_s)
        if abs(share - before) <= _PASS_TOLERANCE:
            break
    return Prediction(result, share)


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What is compared of a run."""

    ttft_p50_s: float
    tpot_p50_s: float
    out_tokens_per_s: float  # from the first arrival to the last token
    num_finished: int

    @classmethod
    def of_records(cls, runs: Sequence[Sequence[RequestRecord]]) -> RunFigures:
        """Return those of real runs with one load, taken together. Raises as `of_results`."""
        good = [[record for record in run if record.is_ok] for run in runs]
        return cls._of(
            [record.ttft_s for run in good for record in run],
            [record.tpot_s for run in good for record in run],
            sum(record.num_tokens for run in good for record in run),
            sum(_window_s([r.scheduled_s for r in run], [r.end_s for r in run]) for run in good),
        )

    @classmethod
    def of_results(cls, results: Sequence[SimulationResult]) -> RunFigures:
        """Return those of simulated runs with one load, taken together.

        Raises:
            UnavailableError: No request finished.
        """
        good = [[r for r in result.requests if r.end is End.FINISHED] for result in results]
        return cls._of(
            [record.ttft_s for run in good for record in run],
            [record.tpot_s for run in good for record in run],
            sum(record.num_output_tokens for run in good for record in run),
            sum(
                _window_s([r.arrived_s for r in run], [r.last_token_s for r in run]) for run in good
            ),
        )

    @classmethod
    def _of(
        cls,
        ttfts_s: Sequence[float | None],
        tpots_s: Sequence[float | None],
        num_tokens: int,
        window_s: float,
    ) -> RunFigures:
        ttft_p50_s = percentile([s for s in ttfts_s if s is not None], 50)
        tpot_p50_s = percentile([s for s in tpots_s if s is not None], 50)
        if ttft_p50_s is None or tpot_p50_s is None:
            raise UnavailableError("no request of a run finished: look at the cluster's logs")
        return cls(ttft_p50_s, tpot_p50_s, num_tokens / window_s, len(ttfts_s))


def _window_s(begins_s: Sequence[float], ends_s: Sequence[float | None]) -> float:
    ends = [end_s for end_s in ends_s if end_s is not None]
    return max(ends) - min(begins_s) if ends else 0.0


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One load, measured and predicted."""

    load: float  # of the capacity
    rate_per_s: float  # requests
    num_requests: int
    measured: RunFigures
    predicted: RunFigures
    busy_share: float  # of a replica's time, predicted, mean

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted over measured by the names of `COMPARED`."""
        return {
            name: getattr(self.predicted, name) / getattr(self.measured, name) for name in COMPARED
        }


def is_within(ratio: float) -> bool:
    """Return whether predicted over measured is within the tolerance."""
    return abs(ratio - 1) <= TOLERANCE


def parse_loads(text: str) -> list[float]:
    """Return the loads that a text as `0.3,0.6,0.9` names, each a share of the capacity.

    Raises:
        InvalidArgumentError: One of them is no number above 0 and at most 2.
    """
    loads = []
    for part in text.split(","):
        try:
            load = float(part)
        except ValueError:
            load = 0.0
        if not 0 < load <= 2:
            raise InvalidArgumentError(
                f"loads={text[:80]}: {part[:20]!r} is no share of the capacity above 0 and at most "
                "2: give numbers with commas between",
                field="loads",
            )
        loads.append(load)
    return loads


def point_figures(point: LoadPoint) -> dict[str, Any]:
    """Return a point as plain data, for JSON."""
    within = all(map(is_within, point.ratios.values()))
    return {**asdict(point), "ratios": point.ratios, "is_within": within}
