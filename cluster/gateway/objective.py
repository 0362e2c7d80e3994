"""The latency that a request asks for: by a class, or in seconds."""

from __future__ import annotations

import math

from cluster.config import EngineConfig, LatencyConfig
from cluster.errors import InvalidArgumentError
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import SLO


def read_slo(message: inference_pb2.GenerateRequest, config: EngineConfig) -> SLO:
    """Return the objective of a request: its class's, its own, or none.

    Args:
        message: Anything.
        config: Has the objectives of the classes.

    Raises:
        InvalidArgumentError: The class is unknown, or a time is not above 0.
    """
    if message.WhichOneof("objective") == "latency":
        return SLO(_read_time(message.latency, "ttft_s"), _read_time(message.latency, "tpot_s"))
    classes = {
        inference_pb2.SERVICE_CLASS_UNSPECIFIED: LatencyConfig(),
        inference_pb2.SERVICE_CLASS_INTERACTIVE: config.interactive,
        inference_pb2.SERVICE_CLASS_STANDARD: config.standard,
        inference_pb2.SERVICE_CLASS_BATCH: config.batch,
    }
    latency = classes.get(message.service_class)
    if latency is None:
        raise InvalidArgumentError(
            f"service_class={message.service_class} is unknown: take interactive (1), standard (2) "
            "or batch (3)",
            field="service_class",
        )
    return SLO(latency.ttft_s or None, latency.tpot_s or None)


def _read_time(message: inference_pb2.LatencyObjective, name: str) -> float | None:
    if not message.HasField(name):
        return None
    value: float = getattr(message, name)
    if not 0 < value < math.inf:
        raise InvalidArgumentError(
            f"{name}={value:g}, it is a finite time above 0, seconds: change it or leave it out",
            field=f"latency.{name}",
        )
    return value
