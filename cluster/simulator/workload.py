"""What a simulation replays: arrivals in order, and ways to change them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from cluster.errors import InvalidArgumentError
from cluster.simulator.arrival import Arrival
from cluster.types import SLO, ServiceClass

Key = TypeVar("Key")

MAX_NUM_REQUESTS = 2_000_000
"""Of a workload; an arrival with its prompt's runs takes a few hundred bytes and more."""

FIRST_ANSWER_TOKEN = 2**31
"""Token ids of prompts are below; request number i of a workload answers with this one plus i."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests and when they come.

    One that follows another has no time of its own. Its place in the order is where it would come
    if answers took no time, so it always stands after the one that it follows.
    """

    name: str
    arrivals: tuple[Arrival, ...]  # in order of time; the same time: as they were made
    block_size: int = 512  # tokens; prompts share whole blocks of so many
    num_skipped: int = 0  # rows of a trace that were left out because they are invalid
    description: str = ""  # one line for reports

    @classmethod
    def in_order(
        cls,
        name: str,
        arrivals: Iterable[Arrival],
        *,
        block_size: int = 512,
        num_skipped: int = 0,
        description: str = "",
    ) -> Workload:
        """Return a workload of arrivals that come in any order, a followed one before its follower.

        Raises:
            InvalidArgumentError: There are none, or more than MAX_NUM_REQUESTS.
        """
        made = list(arrivals)
        if not 0 < len(made) <= MAX_NUM_REQUESTS:
            raise InvalidArgumentError(
                f"{name}: {len(made)} requests, a workload has 1 to {MAX_NUM_REQUESTS}: change its "
                "length or its rate",
                field="workload",
            )
        times_s = begin_times_s(made)
        order = sorted(range(len(made)), key=times_s.__getitem__)
        return cls(name, tuple(made[i] for i in order), block_size, num_skipped, description)


def begin_times_s(arrivals: Iterable[Arrival]) -> list[float]:
    """Return when each would come if answers took no time, seconds from the workload's begin."""
    by_id: dict[str, float] = {}
    for arrival in arrivals:
        assert arrival.request_id not in by_id, f"{arrival.request_id} comes twice"
        begin_s = by_id[arrival.follows] if arrival.follows else 0.0
        by_id[arrival.request_id] = begin_s + arrival.arrived_s
    return list(by_id.values())


def scaled(workload: Workload, rate_scale: float) -> Workload:
    """Return the workload at `rate_scale` times its rate; who waited to ask again waits as long.

    Raises:
        InvalidArgumentError: The scale is no finite number above 0.
    """
    _check_positive("rate_scale", rate_scale)
    changed = (
        arrival if arrival.follows else replace(arrival, arrived_s=arrival.arrived_s / rate_scale)
        for arrival in workload.arrivals
    )
    return _with_arrivals(workload, changed)


def first(
    workload: Workload, *, num_requests: int | None = None, duration_s: float | None = None
) -> Workload:
    """Return the beginning of a workload.

    Args:
        workload: Stays as it is.
        num_requests: At the most so many; None is all.
        duration_s: Those that come earlier than this; None is all.

    Raises:
        InvalidArgumentError: A bound is not above 0.
    """
    arrivals = workload.arrivals
    if num_requests is not None:
        _check_positive("num_requests", num_requests)
        arrivals = arrivals[:num_requests]
    if duration_s is not None:
        _check_positive("duration_s", duration_s)
        times_s = begin_times_s(arrivals)
        arrivals = tuple(a for a, s in zip(arrivals, times_s, strict=True) if s < duration_s)
    return _with_arrivals(workload, arrivals)


@dataclass(frozen=True, slots=True)
class SloRule:
    """The objective of a request by the length of its prompt; None is no objective."""

    ttft_s: float | None = 2.0  # seconds to the first token of any prompt, and ...
    ttft_per_input_token_s: float = 1e-4  # ... seconds more per token of it
    tpot_s: float | None = 0.05  # seconds per further token

    def __post_init__(self) -> None:
        for name in ("ttft_s", "ttft_per_input_token_s", "tpot_s"):
            value = getattr(self, name)
            # Of the three only what a token adds may be 0.
            if value is not None and not (name == "ttft_per_input_token_s" and value == 0):
                _check_positive(name, value)

    def slo(self, num_prompt_tokens: int) -> SLO:
        """Return the objective of a request."""
        ttft_s = self.ttft_s
        if ttft_s is not None:
            ttft_s += self.ttft_per_input_token_s * num_prompt_tokens
        return SLO(ttft_s, self.tpot_s)


_NO_RULES: Mapping[ServiceClass, SloRule] = {}


def with_slo(
    workload: Workload,
    rule: SloRule,
    by_class: Mapping[ServiceClass, SloRule] = _NO_RULES,
) -> Workload:
    """Return the workload with an objective for each request: of its class, else of `rule`."""
    changed = (
        replace(a, slo=by_class.get(a.service_class, rule).slo(a.num_prompt_tokens))
        for a in workload.arrivals
    )
    return _with_arrivals(workload, changed)


def with_classes(
    workload: Workload, shares: Mapping[ServiceClass, float], *, seed: int
) -> Workload:
    """Return the workload with each request in a class drawn at random.

    The turns of a session are in one class. Raises what `with_tenants` raises.

    Args:
        workload: Stays as it is.
        shares: How often each class comes, relative to the others.
        seed: Of the draw.
    """
    classes = _draw(workload, shares, seed, "classes")
    pairs = zip(workload.arrivals, classes, strict=True)
    return _with_arrivals(workload, (replace(a, service_class=drawn) for a, drawn in pairs))


def with_tenants(workload: Workload, shares: Mapping[str, float], *, seed: int) -> Workload:
    """Return the workload with each request of a tenant drawn at random; of a session, of one.

    Args:
        workload: Stays as it is.
        shares: How often each tenant comes, relative to the others.
        seed: Of the draw.

    Raises:
        InvalidArgumentError: There is no share, one is negative or no number, or all are 0.
    """
    tenants = _draw(workload, shares, seed, "tenants")
    pairs = zip(workload.arrivals, tenants, strict=True)
    return _with_arrivals(workload, (replace(a, tenant=drawn) for a, drawn in pairs))


def _draw(workload: Workload, shares: Mapping[Key, float], seed: int, name: str) -> list[Key]:
    """Return one key for each arrival, drawn by its share; a follower has that of the one before.

    A request gets its number before its session is looked at: what changes one leaves the others.
    """
    weights = np.array(list(shares.values()), dtype=float)
    if not (weights.size and np.isfinite(weights).all() and weights.min() >= 0 and weights.any()):
        raise InvalidArgumentError(
            f"{name}: shares {dict(shares)}, they are finite numbers from 0 on and not all 0: "
            "change them",
            field=name,
        )
    indices = np.random.default_rng(seed).choice(
        len(weights), size=len(workload.arrivals), p=weights / weights.sum()
    )
    keys = list(shares)
    drawn: dict[str, Key] = {}
    for arrival, index in zip(workload.arrivals, indices.tolist(), strict=True):
        drawn[arrival.request_id] = drawn[arrival.follows] if arrival.follows else keys[index]
    return list(drawn.values())


def _with_arrivals(workload: Workload, arrivals: Iterable[Arrival]) -> Workload:
    return Workload.in_order(
        workload.name,
        arrivals,
        block_size=workload.block_size,
        num_skipped=workload.num_skipped,
        description=workload.description,
    )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidArgumentError(
            f"{name}={value:g}, it is a finite number above 0: change it", field=name
        )
