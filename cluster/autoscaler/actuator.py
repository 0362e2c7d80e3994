"""Serve's autoscaling, told by our policy. Serve calls it in its controller; it must not block."""

from __future__ import annotations

from typing import Any

from cluster.autoscaler.policy import ScalingPolicy
from cluster.config import AutoscalingConfig, ClusterConfig

# Serve's replicas send their statistics this often only if this variable says so.
PUSH_INTERVAL_VARIABLE = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"


class ServePolicy:
    """A policy as Serve calls it: context in, number of replicas and state out.

    Args:
        options: Fields of `AutoscalingConfig`.
    """

    def __init__(self, **options: Any) -> None:
        self._policy = ScalingPolicy(AutoscalingConfig(**options))

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of groups that there should be."""
        series = (context.raw_metrics or {}).get("load", {})
        running = set(context.running_replicas)
        load = sum(
            points[-1].value for replica, points in series.items() if points and replica in running
        )
        target = self._policy.decide(context.current_time, context.target_num_replicas, load)
        return target, {}


def scaling_options(config: ClusterConfig) -> dict[str, Any]:
    """Return Serve's deployment options for a fixed or an autoscaled number of groups."""
    scaling = config.replica.autoscaling
    if scaling is None:
        return {"num_replicas": config.replica.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "initial_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "metrics_interval_s": scaling.metrics_interval_s,
            "look_back_period_s": 2 * scaling.metrics_interval_s,
            "upscale_delay_s": 0.0,  # the policy has its own delays
            "downscale_delay_s": 0.0,
            "policy": {
                "policy_function": "cluster.autoscaler.actuator:ServePolicy",
                "policy_kwargs": scaling.model_dump(),
            },
        }
    }


def environment(config: ClusterConfig) -> dict[str, str]:
    """Return the variables that a replica's process needs to be heard in time."""
    scaling = config.replica.autoscaling
    return {PUSH_INTERVAL_VARIABLE: str(scaling.metrics_interval_s)} if scaling else {}
