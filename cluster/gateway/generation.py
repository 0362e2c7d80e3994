"""One admitted request: queue, route, stream, end."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import CancelledError, DeadlineError, OverloadedError, UnavailableError
from cluster.gateway.admission import Admission
from cluster.gateway.answer import Answer
from cluster.gateway.fleet import Fleet
from cluster.gateway.identity import Authenticator
from cluster.gateway.prefixes import Prefixes
from cluster.gateway.routing import PromptRouting
from cluster.gateway.status import error_from_engine
from cluster.gateway.tokenizer import Tokenizer
from cluster.metrics import Metrics
from cluster.router.router import Candidate, Decision, Router
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineOutput, EngineRequest, FinishReason

_MAX_ATTEMPTS = 2  # replicas asked before their refusal is passed on
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
    router: Router
    admission: Admission
    metrics: Metrics
    rng: random.Random  # of seeds and ids that clients leave to the server
    serial: itertools.count[int] = field(default_factory=itertools.count)


@dataclass(frozen=True, slots=True)
class ClientCall:
    """The client's side of a request."""

    request_id: str  # the client's, or a new one
    remaining_s: Callable[[], float | None]  # seconds to the client's deadline; None is no bound
    send: Callable[[inference_pb2.GenerateStreamResponse], Awaitable[None]]
    arrival_s: float = field(default_factory=time.monotonic)


class Generation:
    """Carries one request to its end.

    Args:
        parts: Of the gateway.
        call: Gets the events.
        request: What the engine gets; its id and deadline are set with each attempt.
    """

    def __init__(self, parts: GatewayParts, call: ClientCall, request: EngineRequest) -> None:
        self._parts = parts
        self._call = call
        self._request = request
        self._answer = Answer(parts.tokenizer, request.sampling)
        self._routing = PromptRouting(
            request.prompt_token_ids,
            salt=request.salt,
            fleet=parts.fleet,
            router=parts.router,
            metrics=parts.metrics,
        )
        self._seq = 0
        self._submitted_s = 0.0
        self._first_token_s = 0.0

    async def run(self) -> None:
        """Send events up to `finished`.

        A replica that refuses the request, or is lost before its first token, is replaced once by
        the next best one: nothing of an answer has been seen yet.

        Raises:
            SluiceError: The request has failed.
        """
        decision = await self._place()
        candidates = decision.candidates[:_MAX_ATTEMPTS]
        for index, candidate in enumerate(candidates, start=1):
            try:
                await self._attempt(candidate)
                break
            except (OverloadedError, UnavailableError):
                if self._answer.num_tokens or index == len(candidates):
                    raise
        await self._finish()

    async def _place(self) -> Decision:
        """Return where to go, as soon as a replica is there."""
        decision = self._routing.pick()
        if decision is not None:
            return decision
        timeout_s = self._parts.config.gateway.queue_timeout_s
        give_up_s = time.monotonic() + timeout_s
        with self._parts.admission.queue() as position:
            await self._send(queued=inference_pb2.Queued(position=position))
            while (decision := self._routing.pick()) is None:
                wait_s = give_up_s - time.monotonic()
                remaining_s = self._remaining_s()
                try:
                    await self._parts.fleet.wait_change(
                        wait_s if remaining_s is None else min(wait_s, remaining_s)
                    )
                except TimeoutError:
                    self._remaining_s()
                    raise UnavailableError(
                        f"no replica was ready within gateway.queue_timeout_s={timeout_s:g}: "
                        "try again later"
                    ) from None
        return decision

    async def _attempt(self, candidate: Candidate) -> None:
        link = self._parts.fleet.link(candidate.replica_id)
        if link is None:
            raise UnavailableError(f"replica {candidate.replica_id} is gone: try again")
        # Of this attempt alone: a late output of another one cannot be taken for ours.
        engine_id = f"{self._parts.gateway_id}.{next(self._parts.serial)}"
        stream = link.submit(
            replace(self._request, request_id=engine_id, deadline_s=self._remaining_s())
        )
        self._submitted_s = time.monotonic()
        table = self._parts.fleet.table
        table.on_submit(candidate.replica_id, engine_id, candidate.num_uncached_tokens)
        try:
            await self._send(running=inference_pb2.Running(replica_id=candidate.replica_id))
            while self._answer.finish_reason is None:
                await self._take(await stream.take())
        finally:
            link.cancel(engine_id)
            table.on_end(candidate.replica_id, engine_id)

    async def _take(self, outputs: list[EngineOutput]) -> None:
        last = outputs[-1]
        if last.error is not None or last.finish_reason is FinishReason.CANCELLED:
            outputs = outputs[:-1]
        if outputs:
            delta = self._answer.feed(outputs)
            if delta.token_ids or delta.text:
                self._first_token_s = self._first_token_s or time.monotonic()
                await self._send(delta=delta)
        if self._answer.finish_reason is not None:
            return
        if last.error is not None:
            raise error_from_engine(last.error)
        if last.finish_reason is FinishReason.CANCELLED:
            raise CancelledError("the replica cancelled the request")

    async def _finish(self) -> None:
        answer, now_s = self._answer, time.monotonic()
        assert answer.finish_reason is not None, "an attempt ends with a reason or an error"
        arrival_s = self._call.arrival_s
        ttft_s = (self._first_token_s or now_s) - arrival_s
        self._observe(ttft_s=ttft_s, total_s=now_s - arrival_s)
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

    def _observe(self, *, ttft_s: float, total_s: float) -> None:
        metrics, answer = self._parts.metrics, self._answer
        metrics.ttft.observe(ttft_s)
        metrics.duration.observe(total_s)
        tpot_s = (total_s - ttft_s) / max(1, answer.num_tokens - 1)
        if answer.num_tokens > 1:
            metrics.tpot.observe(tpot_s)
        slo = self._request.slo
        if slo.ttft_s is not None:
            metrics.slo.labels("ttft", str(ttft_s <= slo.ttft_s).lower()).inc()
        if slo.tpot_s is not None and answer.num_tokens > 1:
            metrics.slo.labels("tpot", str(tpot_s <= slo.tpot_s).lower()).inc()
        metrics.prompt_tokens.inc(len(self._request.prompt_token_ids))
        metrics.cached_tokens.inc(answer.num_cached_tokens)
        metrics.completion_tokens.inc(answer.num_tokens)

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
