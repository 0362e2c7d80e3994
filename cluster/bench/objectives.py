"""The objectives of a whole load as a command line gives them: classes, times, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.bench.aims import Aim, AimMix, parse_shares
from cluster.config import EngineConfig
from cluster.errors import InvalidArgumentError
from cluster.simulator.workload import SloRule, Workload, with_classes, with_slo
from cluster.types import ServiceClass


@dataclass(frozen=True, slots=True)
class Objectives:
    """Classes with shares or times by the length of the prompt; not both."""

    shares: Mapping[ServiceClass, float] = field(default_factory=dict)  # relative; empty: none
    rule: SloRule | None = None
    config: EngineConfig = field(default_factory=EngineConfig)  # has the classes' objectives

    def mix(self, num_prompt_tokens: int, seed: int) -> AimMix:
        """Return what requests with prompts of one length ask for."""
        if self.shares:
            classes = {Aim.of_class(c, self.config): share for c, share in self.shares.items()}
            return AimMix(classes, seed)
        if self.rule is not None:
            return AimMix({Aim.of_slo(self.rule.slo(num_prompt_tokens)): 1.0})
        return AimMix()

    def given_to(self, workload: Workload, seed: int) -> Workload:
        """Return a workload whose requests have them; without any it stays as it is."""
        if self.shares:
            return with_classes(workload, self.shares, seed=seed)
        return workload if self.rule is None else with_slo(workload, self.rule)


def choose_objectives(
    service_class: ServiceClass | None,
    classes: str | None,
    times: tuple[float | None, float | None, float],
    config: EngineConfig,
) -> Objectives:
    """Return the objectives that options give.

    Args:
        service_class: Of all requests.
        classes: As `parse_shares` takes it.
        times: Seconds to the first token, seconds per further token, and milliseconds to the first
            token more for each token of the prompt.
        config: Has the objectives of the classes.

    Raises:
        InvalidArgumentError: They exclude each other, or one of them cannot be one.
    """
    ttft_s, tpot_s, ttft_ms_per_token = times
    if ttft_ms_per_token and ttft_s is None:
        raise InvalidArgumentError(
            f"--ttft-ms-per-token={ttft_ms_per_token:g} without --ttft-s: it is added to that one, "
            "give both",
            field="ttft-ms-per-token",
        )
    has_times = ttft_s is not None or tpot_s is not None
    if (service_class is not None) + (classes is not None) + has_times > 1:
        raise InvalidArgumentError(
            "--class, --classes, and --ttft-s with --tpot-s exclude each other: a class has an "
            "objective of its own",
            field="class",
        )
    shares = {} if service_class is None else {service_class: 1.0}
    if classes is not None:
        shares = parse_shares(classes)
    rule = SloRule(ttft_s, ttft_ms_per_token / 1e3, tpot_s) if has_times else None
    return Objectives(shares, rule, config)
