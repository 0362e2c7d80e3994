"""What the requests of a load ask of the global scheduler, and what goodput holds them against."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from cluster.bench.statistics import NO_OBJECTIVE, LatencyObjective
from cluster.config import EngineConfig, LatencyConfig
from cluster.errors import InvalidArgumentError
from cluster.rpc.public_route import set_route
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.types import NO_SLO, SLO, ServiceClass


@dataclass(frozen=True, slots=True)
class Aim:
    """The latency that a request asks for, by a class or in seconds."""

    service_class: ServiceClass | None = None
    slo: SLO = NO_SLO  # its own, in place of a class
    objective: LatencyObjective = NO_OBJECTIVE  # that goodput counts

    @classmethod
    def of_class(cls, service_class: ServiceClass, config: EngineConfig) -> Aim:
        """Return that of a class.

        Args:
            service_class: The server has its figures.
            config: Has them too, as far as one can know.
        """
        latency: LatencyConfig = getattr(config, service_class.value)
        slo = SLO(latency.ttft_s or None, latency.tpot_s or None)
        return cls(service_class, objective=LatencyObjective.of(slo))

    @classmethod
    def of_slo(cls, slo: SLO) -> Aim:
        """Return that of a request with an objective of its own, or with none."""
        return cls(slo=slo, objective=LatencyObjective.of(slo))

    @property
    def served_as(self) -> str:
        """The class that a gateway serves it in; empty where it is left to the gateway."""
        if self.service_class is None and self.slo != NO_SLO:
            return ServiceClass.INTERACTIVE.value
        return self.service_class or ""

    def write(self, message: pb.GenerateRequest, session: str = "") -> None:
        """Write it into a request."""
        set_route(
            message,
            service_class=self.service_class,
            ttft_s=self.slo.ttft_s,
            tpot_s=self.slo.tpot_s,
            session=session,
        )

    def figures(self) -> dict[str, object]:
        """Return it as plain data, for JSON."""
        bounds_s = {"ttft_s": self.objective.ttft_s, "tpot_s": self.objective.tpot_s}
        finite_s = {name: None if s == math.inf else s for name, s in bounds_s.items()}
        return {"service_class": self.service_class, **finite_s}


NO_AIM = Aim()


@dataclass(frozen=True, slots=True)
class AimMix:
    """Aims, drawn at random by request; the same seed gives the same ones."""

    shares: dict[Aim, float] = field(default_factory=lambda: {NO_AIM: 1.0})  # relative
    seed: int = 0

    def draw(self, index: int) -> Aim:
        """Return the aim of request `index`."""
        if len(self.shares) == 1:
            return next(iter(self.shares))
        rng = random.Random(f"{self.seed}/{index}/aim")
        return rng.choices(list(self.shares), list(self.shares.values()))[0]

    def figures(self) -> list[dict[str, object]]:
        """Return them with their shares of the requests as plain data, for JSON."""
        total = sum(self.shares.values())
        return [aim.figures() | {"share": share / total} for aim, share in self.shares.items()]


def parse_shares(text: str) -> dict[ServiceClass, float]:
    """Return the shares that a text as `interactive=0.5,batch=0.5` gives to classes.

    Raises:
        InvalidArgumentError: A class is unknown or there twice, or its share is no finite number
            above 0.
    """
    shares: dict[ServiceClass, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in list(ServiceClass) or ServiceClass(name) in shares:
            raise _bad_shares(text, f"{name!r} is no class, or comes twice")
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise _bad_shares(text, f"{value!r} is no finite number above 0")
        shares[ServiceClass(name)] = share
    return shares


def _bad_shares(text: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"classes={text[:80]}: {reason}: give CLASS=SHARE with commas between, classes are "
        f"{', '.join(ServiceClass)}",
        field="classes",
    )
