"""The latency that a request asks for: by a class, or in seconds."""

from __future__ import annotations

from cluster.config import EngineConfig
from cluster.errors import InvalidArgumentError
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import NO_SLO, SLO, ServiceClass

_MAX_TIME_S = 1e6  # eleven days: beyond that it is a mistake of unit


def read_slo(
    message: inference_pb2.GenerateRequest, config: EngineConfig
) -> tuple[SLO, ServiceClass]:
    """Return the objective of a request, its class's, its own or none, and its class.

    A request with times of its own is interactive: somebody cares when its tokens come.

    Args:
        message: Anything.
        config: Has the objectives of the classes.

    Raises:
        InvalidArgumentError: The class is unknown, or a time is out of bounds or missing.
    """
    if message.WhichOneof("objective") == "latency":
        latency = message.latency
        slo = SLO(_read_time(latency, "ttft_s"), _read_time(latency, "tpot_s"))
        if slo == NO_SLO:
            raise InvalidArgumentError(
                "latency has no time: give ttft_s or tpot_s", field="latency"
            )
        return slo, ServiceClass.INTERACTIVE
    if message.service_class == inference_pb2.SERVICE_CLASS_UNSPECIFIED:
        return NO_SLO, ServiceClass.STANDARD
    classes = {
        inference_pb2.SERVICE_CLASS_INTERACTIVE: (ServiceClass.INTERACTIVE, config.interactive),
        inference_pb2.SERVICE_CLASS_STANDARD: (ServiceClass.STANDARD, config.standard),
        inference_pb2.SERVICE_CLASS_BATCH: (ServiceClass.BATCH, config.batch),
    }
    if message.service_class not in classes:
        raise InvalidArgumentError(
            f"service_class={message.service_class} is unknown: take interactive (1), standard (2) "
            "or batch (3)",
            field="service_class",
        )
    service_class, figures = classes[message.service_class]
    return SLO(figures.ttft_s or None, figures.tpot_s or None), service_class


def _read_time(message: inference_pb2.LatencyObjective, name: str) -> float | None:
    if not message.HasField(name):
        return None
    value: float = getattr(message, name)
    if not 0 < value <= _MAX_TIME_S:
        raise InvalidArgumentError(
            f"{name}={value:g}, it is above 0 and at most {_MAX_TIME_S:g} seconds: "
            "change it or leave it out",
            field=f"latency.{name}",
        )
    return value
