"""One simulation as plain data: what a command line says, and what a sweep sends to its tasks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, load_config
from cluster.errors import InvalidArgumentError
from cluster.simulator.cost_model import CostModel, from_hardware, from_rates, read_cost
from cluster.simulator.record import SimulationResult
from cluster.simulator.report import make_report
from cluster.simulator.settings import Fault, SimulationSettings
from cluster.simulator.simulator import simulate
from cluster.simulator.sweep import GridPoint
from cluster.simulator.synthetic import from_spec
from cluster.simulator.traces import read_trace
from cluster.simulator.workload import SloRule, Workload, first, scaled, with_slo
from cluster.types import ServiceClass

SLO_POLICY = "slo"
"""The policy that runs with admission, and with engines that order prompts by slack."""

DEFAULT_NUM_REPLICAS = 16
_TTFT_PER_TOKEN_S = 1e-4

_FAIL = re.compile(r"(\d+)@([\d.]+)(?::([\d.]+))?")
_SLOW = re.compile(r"(\d+)@([\d.]+):([\d.]+)(?::([\d.]+))?")
_AUTOSCALE = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A cluster, its hardware, its load, and what goes wrong; JSON holds every field."""

    trace: str = ""  # path of a trace; this or `workload`
    workload: str = ""  # description of a synthetic one
    skip_invalid: bool = False  # rows of the trace
    num_requests: int | None = None  # the first so many; None: all
    duration_s: float | None = None  # those of the first so many seconds, before scaling
    rate_scale: float = 1.0
    policy: str = SLO_POLICY
    admission: str = ""  # on, off; empty: on for slo, off for the others
    engine_order: str = ""  # slack, fcfs; empty: slack for slo, fcfs for the others
    seed: int = 0
    num_replicas: int | None = None  # None: 16, or the fewest of `autoscale`
    num_gateways: int = 1
    autoscale: str = ""  # fewest:most replicas
    prefill_tokens_per_s: float = 9000.0
    decode_step_s: float = 0.03
    cost_model: str = ""  # path of a fit, in place of the two rates
    hardware: str = ""  # name, likewise: an estimate, for the next three
    num_parameters: float = 8.03e9
    kv_bytes_per_token: int = 131072
    num_devices: int = 1
    num_blocks: int = 800  # per replica
    block_size: int = 512  # tokens
    max_num_batched_tokens: int = 2048
    slo_ttft_s: float = 2.0  # 0: none
    slo_ttft_per_token_s: float = _TTFT_PER_TOKEN_S  # more, per token of the prompt
    slo_tpot_s: float = 0.05  # 0: none
    event_delay_s: float = 0.005
    fails: tuple[str, ...] = ()  # replica@seconds[:seconds until a new one serves]
    slows: tuple[str, ...] = ()  # replica@seconds:factor[:seconds]
    overrides: tuple[str, ...] = ()  # a.b=value
    usd_per_hour: float | None = None  # of one replica

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                message = f"{name}={value}, it is a finite number: change it"
                raise InvalidArgumentError(message, field=name)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Scenario:
        """Return the scenario that `asdict` and JSON made plain data of."""
        lists = {name: tuple(value) for name, value in tree.items() if isinstance(value, list)}
        return cls(**{**tree, **lists})


def load_workload(scenario: Scenario) -> Workload:
    """Return the requests at the rate at which they come, each with its objective.

    Raises:
        InvalidArgumentError: Trace, description or a number cannot be used, or there is not
            exactly one workload.
    """
    if bool(scenario.trace) == bool(scenario.workload):
        raise InvalidArgumentError(
            f"--trace={scenario.trace} --workload={scenario.workload}: give exactly one of the two",
            field="trace",
        )
    if scenario.trace:
        whole = read_trace(scenario.trace, skip_invalid=scenario.skip_invalid)
        whole = replace(whole, name=Path(scenario.trace).name)
    else:
        whole = from_spec(scenario.workload, seed=scenario.seed)
    part = first(whole, num_requests=scenario.num_requests, duration_s=scenario.duration_s)
    nothing = SloRule(None, 0.0, None)
    admitted = _as_admitted(scaled(part, scenario.rate_scale))
    return with_slo(admitted, _rule(scenario), {ServiceClass.BATCH: nothing})


def _rule(scenario: Scenario) -> SloRule:
    per_token_s = scenario.slo_ttft_per_token_s
    # The default is for those who have a TTFT objective: without one it says nothing.
    if not scenario.slo_ttft_s and per_token_s not in (0.0, _TTFT_PER_TOKEN_S):
        raise InvalidArgumentError(
            f"--slo-ttft-ms-per-token={per_token_s * 1e3:g} with --slo-ttft-s=0, no objective: it "
            "is added to that one, give both",
            field="slo-ttft-ms-per-token",
        )
    return SloRule(scenario.slo_ttft_s or None, per_token_s, scenario.slo_tpot_s or None)


def _as_admitted(workload: Workload) -> Workload:
    """Return requests of no particular class as interactive: so a gateway takes their objective."""
    arrivals = tuple(
        replace(arrival, service_class=ServiceClass.INTERACTIVE)
        if arrival.service_class is ServiceClass.STANDARD
        else arrival
        for arrival in workload.arrivals
    )
    return replace(workload, arrivals=arrivals)


def make_settings(scenario: Scenario) -> SimulationSettings:
    """Return the cluster of a scenario.

    Raises:
        InvalidArgumentError: A value cannot be used; names it.
    """
    config = _config(scenario)
    cost = _cost(scenario)
    scaling = config.replica.autoscaling
    fewest = DEFAULT_NUM_REPLICAS if scaling is None else scaling.min_replicas
    num_replicas = fewest if scenario.num_replicas is None else scenario.num_replicas
    if scaling and not scaling.min_replicas <= num_replicas <= scaling.max_replicas:
        raise InvalidArgumentError(
            f"--replicas={num_replicas} --autoscale={scenario.autoscale}: begin with a number of "
            "replicas between the two",
            field="replicas",
        )
    return SimulationSettings(
        config=config,
        cost=cost,
        num_replicas=num_replicas,
        num_gateways=scenario.num_gateways,
        seed=scenario.seed,
        event_delay_s=scenario.event_delay_s,
        faults=(*map(_fail, scenario.fails), *map(_slow, scenario.slows)),
        autoscaling=scaling,
        extra={
            **asdict(scenario),
            "num_replicas": num_replicas,
            "cost": cost.source,
            "config": config.model_dump(mode="json", include={"cache", "engine", "router"}),
        },
    )


def run_workload(
    scenario: Scenario, workload: Workload, on_progress: Callable[[float], None] | None = None
) -> SimulationResult:
    """Return what becomes of the workload of a scenario.

    Args:
        scenario: What to simulate.
        workload: As `load_workload` returns it.
        on_progress: Told the virtual time now and then, seconds.

    Raises:
        InvalidArgumentError: A value of the scenario cannot be used.
    """
    result = simulate(workload, make_settings(scenario), on_progress)
    result.rate_scale = scenario.rate_scale
    return result


def at_point(scenario: Scenario, point: GridPoint) -> Scenario:
    """Return the scenario of one point of a grid."""
    return replace(scenario, policy=point.policy, rate_scale=point.rate_scale, seed=point.seed)


def run_point(scenario: Scenario, point: GridPoint) -> dict[str, Any]:
    """Return the report of one point of a grid as plain data. Raises as `check_scenario`."""
    own = at_point(scenario, point)
    result = run_workload(own, load_workload(own))
    return make_report(result, usd_per_hour=own.usd_per_hour).to_dict()


def check_scenario(scenario: Scenario, grid: Sequence[GridPoint]) -> None:
    """Do nothing where a grid can be run: asked before it is.

    Raises:
        InvalidArgumentError: A value cannot be used; names it.
    """
    load_workload(at_point(scenario, grid[0]))
    for policy in dict.fromkeys(point.policy for point in grid):
        make_settings(replace(scenario, policy=policy))


def _config(scenario: Scenario) -> ClusterConfig:
    is_slo = scenario.policy == SLO_POLICY
    values = {
        "router.policy": scenario.policy,
        "router.admission": scenario.admission or ("on" if is_slo else "off"),
        "engine.order": scenario.engine_order or ("slack" if is_slo else "fcfs"),
        "engine.max_num_batched_tokens": scenario.max_num_batched_tokens,
        "cache.num_blocks": scenario.num_blocks,
        "cache.block_size": scenario.block_size,
    }
    if scenario.autoscale:
        fewest, most = _parse(_AUTOSCALE, scenario.autoscale, "autoscale", "fewest:most as 4:32")
        values["replica.autoscaling"] = {"min_replicas": int(fewest), "max_replicas": int(most)}
    own = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    return load_config(None, [*own, *scenario.overrides])


def _cost(scenario: Scenario) -> CostModel:
    if scenario.cost_model and scenario.hardware:
        raise InvalidArgumentError(
            f"--cost-model={scenario.cost_model} --hardware={scenario.hardware}: give one of them",
            field="cost-model",
        )
    if scenario.cost_model:
        return read_cost(Path(scenario.cost_model))
    if scenario.hardware:
        return from_hardware(
            scenario.hardware,
            num_parameters=scenario.num_parameters,
            kv_bytes_per_token=scenario.kv_bytes_per_token,
            num_devices=scenario.num_devices,
        )
    return from_rates(
        prefill_tokens_per_s=scenario.prefill_tokens_per_s, decode_step_s=scenario.decode_step_s
    )


def _fail(text: str) -> Fault:
    form = "replica@seconds or replica@seconds:seconds-until-a-new-one-serves, as 3@600:60"
    replica, at_s, duration_s = _parse(_FAIL, text, "fail", form)
    return Fault(int(replica), float(at_s), float(duration_s) if duration_s else None)


def _slow(text: str) -> Fault:
    form = "replica@seconds:factor or replica@seconds:factor:seconds, as 3@600:2.5:60"
    replica, at_s, factor, duration_s = _parse(_SLOW, text, "slow", form)
    slowness = float(factor)
    if not 0 < slowness <= 1e6:
        raise InvalidArgumentError(
            f"--slow={text}: factor {slowness:g}, it is above 0, at most 1e6: change it",
            field="slow",
        )
    return Fault(int(replica), float(at_s), float(duration_s) if duration_s else None, slowness)


def _parse(pattern: re.Pattern[str], text: str, name: str, form: str) -> tuple[str, ...]:
    """Return the groups of a pattern that the whole text matches; numbers among them are finite."""
    match = pattern.fullmatch(text)
    if match is None or not all(_is_number(group) for group in match.groups() if group):
        raise InvalidArgumentError(f"--{name}={text}: give {form}", field=name)
    return match.groups()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
