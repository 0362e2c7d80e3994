"""What a simulation is run with."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import AutoscalingConfig, ClusterConfig
from cluster.errors import InvalidArgumentError
from cluster.simulator.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a replica."""

    replica: int  # index, from 0
    at_s: float  # virtual seconds
    duration_s: float | None = None  # None: to the end
    slowness: float | None = (
        None  # factor on its steps; None: it dies, and is new after `duration_s`
    )


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """A cluster, its hardware, and what goes wrong."""

    config: ClusterConfig  # policy, admission, engine, block size and blocks per replica
    cost: CostModel
    num_replicas: int = 1
    num_gateways: int = 1
    seed: int = 0
    event_delay_s: float = 0.005  # from an engine to a gateway and back
    max_model_len: int = 2**18  # tokens, prompt and answer together
    max_output_tokens: int = 4096  # what a client asks for: the policy does not know more
    jitter: float = 0.0  # standard deviation of the logarithm of a step's time
    replica_slowness: tuple[float, ...] = ()  # factor on the steps of each; missing ones have 1
    faults: tuple[Fault, ...] = ()
    autoscaling: AutoscalingConfig | None = None  # None: `num_replicas` all the time
    start_s: float = 30.0  # that a new replica needs until it serves
    max_duration_s: float = 86400.0  # virtual: what has not ended by then is cut
    extra: dict[str, object] = field(default_factory=dict)  # echoed in the report

    def __post_init__(self) -> None:
        for name in ("num_replicas", "num_gateways", "max_model_len", "max_output_tokens"):
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "at least 1")
        for name in ("event_delay_s", "jitter", "start_s"):
            if not 0 <= getattr(self, name) <= 3600:
                raise _bad(name, getattr(self, name), "from 0 to 3600")
        if self.config.cache.num_blocks < 1:
            raise _bad("cache.num_blocks", self.config.cache.num_blocks, "at least 1")
        for fault in self.faults:
            if not 0 <= fault.replica < self.num_replicas:
                raise _bad("replica of a fault", fault.replica, f"below {self.num_replicas}")


def _bad(name: str, value: object, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name}={value}, it is {allowed}: change it", field=name)
