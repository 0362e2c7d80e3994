"""One admitted request: place, stream, end."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from cluster.config import ClusterConfig
from cluster.errors import CancelledError, DeadlineError, OverloadedError, UnavailableError
from cluster.gateway.admission import Admission
from cluster.gateway.answer import Answer
from cluster.gateway.fleet import Fleet
from cluster.gateway.identity import Authenticator
from cluster.gateway.prefixes import Prefixes
from cluster.gateway.rate_limiter import RateLimiter
from cluster.gateway.routing import PromptKeys
from cluster.gateway.status import error_from_engine
from cluster.gateway.tokenizer import Tokenizer
from cluster.gateway.tracing import Tracing, describe, note_replica, note_ttft
from cluster.gateway.waiting import WaitingRoom
from cluster.metrics import Metrics
from cluster.router.dispatcher import Dispatcher
from cluster.router.route import Outcome, RouteRequest
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import SLO, EngineOutput, EngineRequest, FinishReason

_MAX_ATTEMPTS = 2  # replicas asked before their refusal is passed on
_MIN_TTFT_S = 1e-6  # of an objective whose time is over
_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class GatewayParts:
    """What all requests of a gateway share."""

    config: ClusterConfig
    gateway_id: str
    authenticator: Authenticator
    tokenizer: Tokenizer
    prefixes: Prefixes
    fleet: Fleet
    dispatcher: Dispatcher
    waiting: WaitingRoom
    admission: Admission
    rate_limiter: RateLimiter
    metrics: Metrics
    tracing: Tracing
    rng: random.Random  # of seeds and ids that clients leave to the server
    serial: itertools.count[int] = field(default_factory=itertools.count)


@dataclass(frozen=True, slots=True)
class ClientCall:
    """The client's side of a request."""

    request_id: str  # the client's, or a new one
    remaining_s: Callable[[], float | None]  # seconds to the client's deadline; None is no bound
    send: Callable[[inference_pb2.GenerateStreamResponse], Awaitable[None]]
    span: Span = INVALID_SPAN  # of the trace that it belongs to
    arrival_s: float = field(default_factory=time.monotonic)


class Generation:
    """Carries one request to its end.

    Args:
        parts: Of the gateway.
        call: Gets the events.
        request: What the engine gets; id, deadline and objective are set with each attempt.
        session: What the router knows its session by; empty is none.
    """

    def __init__(
        self, parts: GatewayParts, call: ClientCall, request: EngineRequest, *, session: str = ""
    ) -> None:
        self._parts = parts
        self._call = call
        self._request = request
        self._answer = Answer(parts.tokenizer, request.sampling)
        remaining_s = call.remaining_s()
        self._route = RouteRequest(
            request_id=call.request_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            keys=PromptKeys(request.prompt_token_ids, salt=request.salt),
            arrived_s=call.arrival_s,
            slo=request.slo,
            service_class=request.service_class,
            tenant=request.tenant,
            tenant_weight=request.tenant_weight,
            session=session,
            model=parts.config.model.served_name,
            expires_s=math.inf if remaining_s is None else time.monotonic() + remaining_s,
        )
        self._seq = 0
        self._submitted_s = 0.0
        self._first_token_s = 0.0

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self._answer.num_tokens

    async def run(self) -> bool:
        """Send events up to `finished`; return whether the objective was kept.

        A replica that refuses the request, or is lost before its first token, is replaced once by
        another one: nothing of an answer has been seen yet.

        Raises:
            SluiceError: The request has failed.
        """
        try:
            await self._serve()
        finally:
            # Before the last event: a client that does not read it holds no place at a replica.
            self._parts.waiting.end(self._route.request_id)
        return await self._finish()

    async def _place(self) -> Outcome:
        """Return where to go, as soon as a replica takes it."""
        self._remaining_s()
        dispatcher, span = self._parts.dispatcher, self._call.span
        try:
            return await self._parts.waiting.place(self._route, self._tell_place)
        finally:
            if span.is_recording():
                explanation = dispatcher.explain(self._route.request_id)
                describe(span, explanation, policy=self._parts.config.router.policy)

    async def _tell_place(self, outcome: Outcome) -> None:
        await self._send(
            queued=inference_pb2.Queued(position=outcome.position, estimate_s=outcome.estimate_s)
        )

    async def _serve(self) -> None:
        """Have a replica answer; where that fails, another one, on what is known by then."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            outcome = await self._place()
            assert outcome.decision is not None, "what is dispatched goes somewhere"
            replica_id = outcome.decision.replica_id
            try:
                await self._attempt(replica_id, outcome.slo)
                break
            except (OverloadedError, UnavailableError):
                others = self._route._replace(excluded=(replica_id,))
                can_go_on = self._parts.dispatcher.can_place(others)
                if self._answer.num_tokens or attempt == _MAX_ATTEMPTS or not can_go_on:
                    raise
                self._parts.waiting.end(self._route.request_id)
                self._route = others

    async def _attempt(self, replica_id: str, slo: SLO) -> None:
        link = self._parts.fleet.link(replica_id)
        if link is None:
            raise UnavailableError(f"replica {replica_id} is gone: try again")
        # Of this attempt alone: a late output of another one cannot be taken for ours.
        engine_id = f"{self._parts.gateway_id}.{next(self._parts.serial)}"
        if slo.ttft_s is not None:  # what is left of it: the engine counts from its own arrival
            spent_s = time.monotonic() - self._call.arrival_s
            slo = replace(slo, ttft_s=max(_MIN_TTFT_S, slo.ttft_s - spent_s))
        stream = link.submit(
            replace(self._request, request_id=engine_id, deadline_s=self._remaining_s(), slo=slo)
        )
        self._submitted_s = time.monotonic()
        note_replica(self._call.span, replica_id)
        try:
            await self._send(running=inference_pb2.Running(replica_id=replica_id))
            while self._answer.finish_reason is None:
                await self._take(await stream.take())
        finally:
            link.cancel(engine_id)

    async def _take(self, outputs: list[EngineOutput]) -> None:
        last = outputs[-1]
        if last.error is not None or last.finish_reason is FinishReason.CANCELLED:
            outputs = outputs[:-1]
        if outputs:
            delta = self._answer.feed(outputs)
            if delta.token_ids or delta.text:
                self._note_token()
                await self._send(delta=delta)
        if self._answer.finish_reason is not None:
            return
        if last.error is not None:
            raise error_from_engine(last.error)
        if last.finish_reason is FinishReason.CANCELLED:
            raise CancelledError("the replica cancelled the request")

    def _note_token(self) -> None:
        """Note when the first token came, not when a slow client took it."""
        if self._first_token_s:
            return
        self._first_token_s = time.monotonic()
        dispatcher, metrics = self._parts.dispatcher, self._parts.metrics
        dispatcher.on_first_token(self._route.request_id, self._first_token_s)
        for ratio in dispatcher.take_prediction_errors():
            metrics.ttft_prediction.observe(ratio)
        note_ttft(self._call.span, self._first_token_s - self._call.arrival_s)

    async def _finish(self) -> bool:
        answer, now_s = self._answer, time.monotonic()
        assert answer.finish_reason is not None, "an attempt ends with a reason or an error"
        arrival_s = self._call.arrival_s
        ttft_s = (self._first_token_s or now_s) - arrival_s
        is_kept = self._observe(ttft_s=ttft_s, total_s=now_s - arrival_s)
        await self._send(
            finished=inference_pb2.Finished(
                finish_reason=_FINISH_REASONS[answer.finish_reason],
                usage=inference_pb2.Usage(
                    prompt_tokens=len(self._request.prompt_token_ids),
                    completion_tokens=answer.num_tokens,
                    cached_tokens=answer.num_cached_tokens,
                ),
                timings=inference_pb2.Timings(
                    queued_s=self._submitted_s - arrival_s + answer.engine_queued_s,
                    ttft_s=ttft_s,
                    total_s=now_s - arrival_s,
                ),
            )
        )
        return is_kept

    def _observe(self, *, ttft_s: float, total_s: float) -> bool:
        """Count what was finished; return whether the objective that was asked for was kept."""
        metrics, answer = self._parts.metrics, self._answer
        metrics.ttft.observe(ttft_s)
        metrics.duration.observe(total_s)
        tpot_s = (total_s - ttft_s) / max(1, answer.num_tokens - 1)
        slo, is_kept = self._request.slo, True
        if slo.ttft_s is not None:
            is_kept = ttft_s <= slo.ttft_s
            metrics.slo.labels("ttft", str(is_kept).lower()).inc()
        if answer.num_tokens > 1:
            metrics.tpot.observe(tpot_s)
            if slo.tpot_s is not None:
                is_met = tpot_s <= slo.tpot_s
                is_kept &= is_met
                metrics.slo.labels("tpot", str(is_met).lower()).inc()
        metrics.prompt_tokens.inc(len(self._request.prompt_token_ids))
        metrics.cached_tokens.inc(answer.num_cached_tokens)
        metrics.completion_tokens.inc(answer.num_tokens)
        return is_kept

    def _remaining_s(self) -> float | None:
        """Return the seconds to the client's deadline.

        Raises:
            DeadlineError: It is over.
        """
        remaining_s = self._call.remaining_s()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the deadline passed before the answer was complete")
        return remaining_s

    async def _send(self, **event: Any) -> None:
        message = inference_pb2.GenerateStreamResponse(
            request_id=self._call.request_id, seq=self._seq, **event
        )
        self._seq += 1
        await self._call.send(message)
