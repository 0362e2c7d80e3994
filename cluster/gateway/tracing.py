"""One OpenTelemetry span per request, with the decision about it; nothing where nobody collects.

Where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, spans go there; the
SDK itself reads its other variables: sampler, headers, name of the service. Elsewhere they go to
the provider that the process has set up, if it has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.errors import SluiceError
from cluster.gateway.identity import Caller
from cluster.router.dispatcher import Explanation
from cluster.router.route import Candidate

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider  # of the extra `tracing`

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PARENT_KEYS = ("traceparent", "tracestate")
_STOP_TIMEOUT_S = 5.0  # for spans that have not left yet


class Tracing:
    """Makes the spans of one gateway.

    Args:
        provider: Gets them; None is the one that the process has set up, if it has.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = trace.get_tracer("sluice", tracer_provider=provider)
        self._propagator = TraceContextTextMapPropagator()

    async def stop(self) -> None:
        """Send what has not left yet, for a moment."""
        if self._provider is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await asyncio.to_thread(self._provider.shutdown)

    @contextmanager
    def request(
        self, metadata: Iterable[tuple[str, str | bytes]], request_id: str, caller: Caller
    ) -> Iterator[trace.Span]:
        """Hold the span of a request; it fails with the request.

        Args:
            metadata: Of the call; W3C's `traceparent` names the span that this one belongs to.
            request_id: Of the request.
            caller: Authenticated.
        """
        carrier = {
            key: value for key, value in metadata if key in _PARENT_KEYS and isinstance(value, str)
        }
        span = self._tracer.start_span(
            "sluice.request",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={"sluice.request_id": request_id, "sluice.tenant": caller.tenant},
        )
        status = "INTERNAL"
        try:
            yield span
            status = "OK"
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except SluiceError as error:
            status = error.code
            raise
        finally:
            span.set_attribute("sluice.status", status)
            if status not in ("OK", "CANCELLED"):
                span.set_status(trace.StatusCode.ERROR, status)
            span.end()


def open_provider(gateway_id: str) -> TracerProvider | None:
    """Return what sends spans where the environment says; None where it says nothing.

    Args:
        gateway_id: Named with every span.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no traces (%s): install the extra `tracing`", error)
        return None
    resource = Resource.create({"service.instance.id": gateway_id})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # nobody named it
        resource = resource.merge(Resource({"service.name": "sluice"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def describe(span: trace.Span, explanation: Explanation | None, *, policy: str) -> None:
    """Add the decision about a request to its span: what was weighed, without the prompt."""
    if explanation is None:
        return
    outcome, decision = explanation.outcome, explanation.outcome.decision
    span.set_attributes(
        {
            "sluice.route.policy": policy,
            "sluice.admission.outcome": outcome.kind.value,
            "sluice.admission.reason": outcome.reason,
        }
    )
    if decision is not None:
        candidates = [_summary(candidate) for candidate in decision.candidates]
        span.set_attribute("sluice.route.candidates", json.dumps(candidates))


def note_replica(span: trace.Span, replica_id: str) -> None:
    """Add where a request was sent to its span; the last place stands."""
    span.set_attribute("sluice.route.replica_id", replica_id)


def note_ttft(span: trace.Span, ttft_s: float) -> None:
    """Add the seconds to the first token to a request's span."""
    span.set_attribute("sluice.ttft_s", ttft_s)


def _summary(candidate: Candidate) -> dict[str, str | float]:
    return {
        "replica_id": candidate.replica_id,
        "score": round(candidate.score, 6),
        "cached_tokens": candidate.num_cached_tokens,
        "wait_s": round(candidate.wait_s, 6),
        "ttft_p50_s": round(candidate.ttft_p50_s, 6),
        "ttft_high_s": round(candidate.ttft_high_s, 6),
    }
