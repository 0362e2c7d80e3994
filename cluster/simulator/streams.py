"""Synthetic workloads without histories: a stream, bursts, one hot prefix, two classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InvalidArgumentError
from cluster.simulator.arrival import Arrival, Run
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, MAX_NUM_REQUESTS, Workload
from cluster.types import ServiceClass

_SIGMA = 0.8  # of the logarithm of a length: the 99th percentile is 4.7 times the mean


Floats = NDArray[np.float64]


class SyntheticSpec(BaseModel):
    """Numbers that describe a synthetic workload; unknown ones are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PoissonSpec(SyntheticSpec):
    """Independent requests with prompts of their own."""

    rate_per_s: float = Field(1.0, gt=0, le=1e5, description="requests, mean")
    duration_s: float = Field(600.0, gt=0, le=1e6, description="of the arrivals")
    input_tokens: float = Field(2000.0, ge=1, le=1e6, description="of a prompt, mean")
    output_tokens: float = Field(200.0, ge=1, le=1e5, description="of an answer, mean")


class BurstSpec(PoissonSpec):
    """Likewise, with times at which many more come."""

    factor: float = Field(10.0, ge=1, le=1e4, description="rate in a burst over that outside")
    burst_s: float = Field(10.0, gt=0, le=1e6, description="length of a burst")
    period_s: float = Field(60.0, gt=0, le=1e6, description="from burst to burst; first after one")


class HotPrefixSpec(SyntheticSpec):
    """Requests that all begin with the same long prefix and end with a short text of their own."""

    rate_per_s: float = Field(20.0, gt=0, le=1e5, description="requests, mean")
    duration_s: float = Field(120.0, gt=0, le=1e6, description="of the arrivals")
    prefix_tokens: int = Field(4000, ge=1, le=1_000_000, description="that all have in common")
    tail_tokens: float = Field(100.0, ge=1, le=1e6, description="of a request's own text, mean")
    output_tokens: float = Field(100.0, ge=1, le=1e5, description="of an answer, mean")


class OverloadSpec(SyntheticSpec):
    """More interactive work than there is capacity for, and batch work beside it.

    Capacity is counted in prompt tokens: answers should be short, or the capacity stated lower.
    """

    capacity_tokens_per_s: float = Field(
        9000.0, gt=0, le=1e9, description="of prefill, that the replicas have together"
    )
    interactive_load: float = Field(2.0, gt=0, le=100, description="arriving work over capacity")
    batch_load: float = Field(1.0, ge=0, le=100, description="likewise of batch requests")
    backlog: int = Field(100, ge=0, le=100_000, description="batch requests at the begin")
    duration_s: float = Field(300.0, gt=0, le=1e6, description="of the arrivals")
    input_tokens: float = Field(2000.0, ge=1, le=1e6, description="of a prompt, mean")
    output_tokens: float = Field(50.0, ge=1, le=1e5, description="of an answer, mean")


def poisson(spec: PoissonSpec, *, seed: int) -> Workload:
    """Return independent requests.

    Raises:
        InvalidArgumentError: There would be none, or too many.
    """
    rng = np.random.default_rng(seed)
    times_s = poisson_times_s(rng, spec.rate_per_s, spec.duration_s)
    arrivals = _distinct(rng, times_s, spec.input_tokens, spec.output_tokens)
    return Workload.in_order(
        "poisson", arrivals, description=f"{spec.rate_per_s:g} independent requests per second"
    )


def burst(spec: BurstSpec, *, seed: int) -> Workload:
    """Return independent requests with bursts.

    Raises:
        InvalidArgumentError: There would be none, or too many; a burst is not below the period.
    """
    quiet_s = spec.period_s - spec.burst_s
    if quiet_s <= 0:
        raise InvalidArgumentError(
            f"burst_s={spec.burst_s:g}, it is below period_s={spec.period_s:g}: shorten the bursts",
            field="burst_s",
        )
    rng = np.random.default_rng(seed)
    base_s = poisson_times_s(rng, spec.rate_per_s, spec.duration_s)
    # What comes more in bursts is a stream of its own, on a clock that stands still between them.
    num_periods, rest_s = divmod(spec.duration_s, spec.period_s)
    bursting_s = num_periods * spec.burst_s + max(0.0, rest_s - quiet_s)
    more_s = poisson_times_s(rng, (spec.factor - 1) * spec.rate_per_s, bursting_s)
    more_s += quiet_s * (1 + more_s // spec.burst_s)
    times_s = np.sort(np.concatenate([base_s, more_s]))
    arrivals = _distinct(rng, times_s, spec.input_tokens, spec.output_tokens)
    return Workload.in_order(
        "burst",
        arrivals,
        description=f"{spec.rate_per_s:g} requests per second, every {spec.period_s:g} s "
        f"{spec.factor:g} times as many for {spec.burst_s:g} s",
    )


def hot_prefix(spec: HotPrefixSpec, *, seed: int) -> Workload:
    """Return requests that share one prefix.

    Raises:
        InvalidArgumentError: There would be none, or too many.
    """
    rng = np.random.default_rng(seed)
    times_s = poisson_times_s(rng, spec.rate_per_s, spec.duration_s)
    arrivals = _distinct(
        rng, times_s, spec.tail_tokens, spec.output_tokens, prefix=((0, spec.prefix_tokens),)
    )
    return Workload.in_order(
        "hot_prefix",
        arrivals,
        description=f"{spec.rate_per_s:g} requests per second with the same "
        f"{spec.prefix_tokens} first tokens",
    )


def overload_classes(spec: OverloadSpec, *, seed: int) -> Workload:
    """Return interactive requests beyond the capacity, and batch requests beside them.

    Raises:
        InvalidArgumentError: There would be none, or too many.
    """
    rng = np.random.default_rng(seed)
    capacity_per_s = spec.capacity_tokens_per_s / spec.input_tokens
    interactive_s = poisson_times_s(rng, spec.interactive_load * capacity_per_s, spec.duration_s)
    batch_s = poisson_times_s(rng, spec.batch_load * capacity_per_s, spec.duration_s)
    both_s = np.concatenate([interactive_s, np.zeros(spec.backlog), batch_s])
    arrivals = [
        replace(arrival, service_class=service_class)
        for arrival, service_class in zip(
            _distinct(rng, both_s, spec.input_tokens, spec.output_tokens),
            [ServiceClass.INTERACTIVE] * len(interactive_s)
            + [ServiceClass.BATCH] * (spec.backlog + len(batch_s)),
            strict=True,
        )
    ]
    return Workload.in_order(
        "overload_classes",
        arrivals,
        description=f"interactive load of {spec.interactive_load:g} x capacity, batch load of "
        f"{spec.batch_load:g} x and {spec.backlog} requests before",
    )


def poisson_times_s(rng: np.random.Generator, rate_per_s: float, duration_s: float) -> Floats:
    """Return when events of a Poisson process come, in order.

    Raises:
        InvalidArgumentError: More than MAX_NUM_REQUESTS are expected.
    """
    num_expected = rate_per_s * duration_s
    if num_expected > MAX_NUM_REQUESTS:
        raise InvalidArgumentError(
            f"{rate_per_s:g} requests per second over {duration_s:g} s are {num_expected:.0f}, "
            f"limit={MAX_NUM_REQUESTS}: lower one of them",
            field="rate_per_s",
        )
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(num_expected)))


def lengths(rng: np.random.Generator, mean: float, num_lengths: int) -> list[int]:
    """Return lognormal numbers of tokens, each at least 1."""
    values = rng.lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA, num_lengths)
    return [max(1, round(value)) for value in values.tolist()]


def _distinct(
    rng: np.random.Generator,
    times_s: Floats,
    input_tokens: float,
    output_tokens: float,
    *,
    prefix: tuple[Run, ...] = (),
) -> list[Arrival]:
    """Return requests whose prompts have nothing in common after `prefix`, of the token 0."""
    inputs = lengths(rng, input_tokens, len(times_s))
    outputs = lengths(rng, output_tokens, len(times_s))
    return [
        Arrival(
            request_id=str(index),
            arrived_s=arrived_s,
            runs=(*prefix, (1 + index, num_input)),
            num_output_tokens=num_output,
            answer_token=FIRST_ANSWER_TOKEN + index,
        )
        for index, (arrived_s, num_input, num_output) in enumerate(
            zip(times_s.tolist(), inputs, outputs, strict=True)
        )
    ]
