"""One admitted request: placed, streamed, cut and placed again, until it ends.

    place ──► attempt ──► tokens ──► finished
      ▲          │
      └── cut ◄──┘  the replica was lost, hands the request over, or refuses it

What a client has been sent is never taken back: the next replica goes on behind it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import (
    CancelledError,
    DeadlineError,
    FailedPreconditionError,
    OverloadedError,
    PoisonError,
    ReplicaLostError,
    SluiceError,
    SupersededError,
    UnavailableError,
)
from cluster.gateway.answer import Answer, finished_event
from cluster.gateway.answer_times import AnswerTimes
from cluster.gateway.comeback import Comeback, ContradictionError, fingerprint_of
from cluster.gateway.journal import RequestJournal
from cluster.gateway.journal_record import JournalHeader
from cluster.gateway.leader_link import LeaderLink
from cluster.gateway.parts import ClientCall, GatewayParts, Resumption
from cluster.gateway.request_life import RequestLife, RequestState, is_final
from cluster.gateway.routing import rest_of, route_of
from cluster.gateway.status import error_from_engine
from cluster.gateway.suspicion import Suspicion
from cluster.gateway.tracing import describe, note_replica, note_ttft
from cluster.gateway.trial import Trial
from cluster.router.route import Outcome, RouteRequest
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import SLO, EngineOutput, EngineRequest, FinishReason, SampledToken

_MAX_REFUSALS = 2  # of replicas, until the last one is passed on
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.05, 1.0  # between refusals of a request that was admitted before
_MIN_TTFT_S = 1e-6  # of an objective whose time is over
_LOST = "LOST: "  # begins the error of a replica whose group has failed


class _Moved(Exception):
    """The replica hands the request over."""


class Generation:
    """Carries one request to its end.

    Args:
        parts: Of the gateway.
        call: Gets the events.
        request: What the engine gets; id, deadline, objective and the answer so far are set with
            each attempt.
        session: What the router knows its session by; empty is none.
        resume: Where it goes on; None begins it.
    """

    def __init__(
        self,
        parts: GatewayParts,
        call: ClientCall,
        request: EngineRequest,
        *,
        session: str = "",
        resume: Resumption | None = None,
    ) -> None:
        self._parts = parts
        self._call = call
        self._request = request
        self._resume = resume
        self._answer = Answer(parts.tokenizer, request.sampling)
        self._life = RequestLife()
        self._suspicion = Suspicion()
        self._suspect_of = ""  # replica that was lost with it, until the next token
        self._trial = Trial(parts.trial, timeout_s=parts.config.gateway.queue_timeout_s)
        age_s = 0.0
        if resume is not None:  # clocks of gateways may differ
            age_s = max(0.0, time.time() - resume.state.header.arrived_unix_s)
        self._times = AnswerTimes(call.arrival_s - age_s)
        remaining_s = call.remaining_s()
        self._route = route_of(
            replace(request, request_id=call.request_id),
            model=parts.config.model.served_name,
            session=session,
            arrived_s=self._times.arrival_s,
            expires_s=math.inf if remaining_s is None else time.monotonic() + remaining_s,
        )
        self._num_lost = 0  # replicas
        self._dead: tuple[str, ...] = ()  # of these, those that will not be there again
        self._stop_error: SluiceError | None = None
        self._task: asyncio.Task[Any] | None = None
        self._link: LeaderLink | None = None  # of the present attempt
        self._engine_id = ""
        self._fingerprint = ""  # of the model that the answer is from
        self._has_progress = False  # a token came in the present attempt
        self._seq = 0
        self._comeback: Comeback | None = None  # until the answer has what the client has

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self._request.tenant

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self._answer.num_tokens

    @property
    def replica_id(self) -> str:
        """Replica that it runs at; empty: none."""
        return self._link.info.replica_id if self._link is not None else ""

    @property
    def can_move(self) -> bool:
        """Whether another replica would take it now."""
        return self._parts.dispatcher.can_place(self._next_route())

    def hand_over(self) -> None:
        """Ask the replica to let it go, so that it goes on at another one."""
        if self._link is not None:
            self._link.hand_over(self._engine_id)

    def stop(self, error: SluiceError) -> None:
        """End it from outside: `run` raises the error; one that has ended is left alone."""
        if self._task is not None and not self._life.is_over and self._stop_error is None:
            self._stop_error = error
            self._task.cancel()

    async def run(self) -> bool:
        """Send events up to `finished`; return whether the objective was kept.

        Raises:
            SluiceError: The request has failed, or was stopped.
        """
        parts, request_id = self._parts, self._call.request_id
        self._task = asyncio.current_task()
        parts.running[request_id] = self
        self._journal = self._open_journal()
        try:
            try:
                await self._serve()
            finally:
                # Before the last event: a client that does not read it holds no place at a replica.
                parts.waiting.end(request_id)
            return await self._finish()
        except asyncio.CancelledError:
            if self._stop_error is None or self._task is None or self._task.uncancel() > 0:
                self._end(RequestState.CANCELLED)
                raise
            self._end(RequestState.FAILED, self._stop_error)
            raise self._stop_error from None
        except SluiceError as error:
            self._end(RequestState.FAILED, error)
            raise
        except BaseException:
            self._end(RequestState.FAILED)
            raise
        finally:
            if parts.running.get(request_id) is self:
                del parts.running[request_id]
            parts.hand_overs.done(self)

    def _end(self, state: RequestState, error: SluiceError | None = None) -> None:
        """Enter an end that is not `finished`; the client may resume, unless it is final."""
        if self._life.is_over:  # it went away while it was told of the end
            return
        if isinstance(error, SupersededError):
            state = RequestState.SUPERSEDED
            self._parts.metrics.superseded.inc()
        self._life.go(state)
        if isinstance(error, PoisonError):
            self._parts.metrics.quarantined.inc()
        if error is not None and is_final(error, was_admitted=self._route.is_resumed):
            self._journal.fail(error)
        self._journal.close()

    def _open_journal(self) -> RequestJournal:
        request, resume, journals = self._request, self._resume, self._parts.journals
        superseded = SupersededError(
            f"request_id={self._call.request_id}: its client goes on with it in another call"
        )

        def on_superseded() -> None:
            self.stop(superseded)

        if resume is not None:
            return journals.go_on(resume.state, resume.owner, on_superseded=on_superseded)
        arrived_unix_s = time.time() - (time.monotonic() - self._times.arrival_s)
        header = JournalHeader.of(request, self._route, arrived_unix_s=arrived_unix_s)
        return journals.begin(header, on_superseded=on_superseded)

    async def _serve(self) -> None:
        """Have the answer completed, by as many replicas as it takes."""
        if self._resume is not None:
            await self._come_back(self._resume)
        refusals = 0
        while self._answer.finish_reason is None:
            if self._suspicion.needs_trial:
                await self._trial.begin()
            try:
                outcome = await self._place()
                assert outcome.decision is not None, "what is dispatched goes somewhere"
                replica_id = outcome.decision.replica_id
                try:
                    await self._attempt(replica_id, outcome.slo)
                except _Moved:
                    self._cut("moved")
                except ContradictionError:
                    self._comeback = None
                    self._cut("client")
                except ReplicaLostError as error:
                    self._note_lost(replica_id, error)
                    if not error.may_return:
                        self._dead += (replica_id,)
                    self._cut("lost")
                except (OverloadedError, UnavailableError) as error:
                    refusals = 0 if self._has_progress else refusals + 1
                    await self._refused(replica_id, refusals, error)
            finally:
                self._trial.end()

    async def _come_back(self, resume: Resumption) -> None:
        """Bring the answer to where its client has it; send what that lacks."""
        state, times = resume.state, self._times
        self._seq = resume.point.next_seq
        self._fingerprint = fingerprint_of(resume, self._parts.fleet.table.kinds)
        times.queued_s = state.queued_s
        times.first_token_s = times.arrival_s + state.ttft_s if state.ttft_s else 0.0
        times.on_cut("client", at_s=self._call.arrival_s)
        has_logprobs = self._request.sampling.num_logprobs >= 0
        comeback = Comeback(resume, self._answer, self._journal, has_logprobs=has_logprobs)
        for delta in comeback.replay():
            # Not noted: the journal takes an event to bring all that it has.
            await self._send(is_noted=False, delta=delta)
            await asyncio.sleep(0)  # a long answer is not all that this gateway has to do
        self._comeback = comeback if self._answer.finish_reason is None else None
        if resume.has_run:
            self._route = self._next_route()

    def _note_lost(self, replica_id: str, error: ReplicaLostError) -> None:
        """Hold the loss of a replica against the request.

        Raises:
            PoisonError: It has lost one after the other.
            ReplicaLostError: It has lost as many as it may.
        """
        suspicion, others = self._suspicion, self._parts.running.values()
        mine = 0 if self._has_progress else suspicion.num_blank + 1
        self._suspect_of = replica_id
        # Of requests of other gateways there nothing is known.
        is_alone = not self._parts.fleet.has_peers and all(
            x is self or x.num_blank_with(replica_id) < mine for x in others
        )
        suspicion.on_lost(gave_token=self._has_progress, is_alone=is_alone)
        self._num_lost += 1
        limit = self._parts.config.gateway.max_attempts
        if self._num_lost >= limit:
            raise ReplicaLostError(
                f"{limit} replicas were lost with it, gateway.max_attempts={limit}: {error}"
            )

    def num_blank_with(self, replica_id: str) -> int:
        """Return how many replicas in a row gave it no token, if this one is lost; -1: not its."""
        if self._suspect_of == replica_id:
            return self._suspicion.num_blank
        if self.replica_id != replica_id:
            return -1
        return 0 if self._has_progress else self._suspicion.num_blank + 1

    async def _refused(self, replica_id: str, refusals: int, error: SluiceError) -> None:
        """Let another replica have the request, or the same one later where it was admitted before.

        Raises:
            SluiceError: The error: there is no other one, or enough have refused.
        """
        others = self._route._replace(excluded=(*self._route.excluded, replica_id))
        has_others = self._parts.dispatcher.can_place(others)
        if not (self._route.is_resumed or self._has_progress):
            if refusals >= _MAX_REFUSALS or not has_others:
                raise error
            self._leave(others)
            return
        pause_s = min(_MAX_PAUSE_S, _MIN_PAUSE_S * 2 ** (refusals - 1))
        if refusals * pause_s > self._parts.config.gateway.queue_timeout_s:
            raise error
        self._cut("lost")
        if has_others:
            self._route = self._route._replace(excluded=others.excluded)
        else:
            await asyncio.sleep(pause_s)

    def _cut(self, cause: str) -> None:
        """Leave the present replica; where to go next follows from what is known by now."""
        self._times.on_cut(cause)
        self._leave(self._next_route())

    def _leave(self, route: RouteRequest) -> None:
        self._parts.waiting.end(self._route.request_id)
        self._life.go(RequestState.CUT)
        self._life.go(RequestState.WAITING)
        self._route = route

    def _next_route(self) -> RouteRequest:
        """Return what another replica would be asked for: the rest of the answer."""
        return rest_of(
            self._route,
            self._request,
            self._answer.token_ids,
            fingerprint=self._fingerprint,
            excluded=self._dead,
        )

    async def _place(self) -> Outcome:
        """Return where to go, as soon as a replica takes it."""
        self._remaining_s()
        dispatcher, span = self._parts.dispatcher, self._call.span
        try:
            return await self._parts.waiting.place(self._route, self._tell_place)
        except UnavailableError as error:
            if error.reason or not self._is_outdated():
                raise
            raise FailedPreconditionError(
                "the answer was begun by another version of the model, and no replica serves that "
                "one any more: send the request anew"
            ) from error
        finally:
            if span.is_recording():
                explanation = dispatcher.explain(self._route.request_id)
                describe(span, explanation, policy=self._parts.config.router.policy)

    def _is_outdated(self) -> bool:
        """Return whether there are replicas, but none of the version that began the answer."""
        dispatcher, route = self._parts.dispatcher, self._route
        return bool(
            route.fingerprint
            and not dispatcher.can_place(route)
            and dispatcher.can_place(route._replace(fingerprint=""))
        )

    async def _tell_place(self, outcome: Outcome) -> None:
        await self._send(
            queued=inference_pb2.Queued(position=outcome.position, estimate_s=outcome.estimate_s)
        )

    async def _attempt(self, replica_id: str, slo: SLO) -> None:
        """Have one replica go on with the answer, to its end.

        Raises:
            _Moved: It hands the request over.
            ContradictionError: It goes on otherwise than the client has it.
            ReplicaLostError: It was lost.
            OverloadedError: It does not take the request.
            UnavailableError: Likewise.
        """
        self._life.go(RequestState.RUNNING)
        self._has_progress = False
        link = self._parts.fleet.link(replica_id)
        if link is None:
            raise UnavailableError(f"replica {replica_id} is gone: try again")
        # Of this attempt alone: a late output of another one cannot be taken for ours.
        self._engine_id = f"{self._parts.gateway_id}.{next(self._parts.serial)}"
        stream = link.submit(self._engine_request(slo))
        self._link = link
        if not self._answer.num_tokens:  # noted with `running`, before a client can have a token
            self._fingerprint = link.info.fingerprint
        self._times.on_submit(time.monotonic())
        self._journal.timings(self._times.queued_s, 0.0)
        note_replica(self._call.span, replica_id)
        try:
            await self._send(running=inference_pb2.Running(replica_id=replica_id))
            while self._answer.finish_reason is None:
                await self._take(await stream.take())
        finally:
            self._link = None
            link.cancel(self._engine_id)

    def _engine_request(self, slo: SLO) -> EngineRequest:
        if slo.ttft_s is not None:  # what is left of it: the engine counts from its own arrival
            spent_s = time.monotonic() - self._times.arrival_s
            slo = replace(slo, ttft_s=max(_MIN_TTFT_S, slo.ttft_s - spent_s))
        if self._route.is_resumed:
            slo = SLO(None, self._request.slo.tpot_s)
        return replace(
            self._request,
            request_id=self._engine_id,
            deadline_s=self._remaining_s(),
            slo=slo,
            output_token_ids=tuple(self._answer.token_ids),
        )

    async def _take(self, outputs: list[EngineOutput]) -> None:
        last = outputs[-1]
        ends_early = last.finish_reason in (FinishReason.CANCELLED, FinishReason.MOVED)
        if last.error is not None or ends_early:
            outputs = outputs[:-1]
        if outputs:
            if any(output.tokens for output in outputs):
                self._note_tokens()
            delta = self._feed(outputs)
            if delta.token_ids or delta.text:
                await self._send(self._answer.new_tokens, delta=delta)
        if self._answer.finish_reason is not None:
            return
        if last.error is not None:
            if last.error.startswith(_LOST):
                raise ReplicaLostError(last.error.removeprefix(_LOST), may_return=False)
            raise error_from_engine(last.error)
        if last.finish_reason is FinishReason.MOVED:
            raise _Moved
        if last.finish_reason is FinishReason.CANCELLED:
            raise CancelledError("the replica cancelled the request")

    def _feed(self, outputs: list[EngineOutput]) -> inference_pb2.TokenDelta:
        """Take outputs; return what their client has not seen."""
        if self._comeback is None:
            return self._answer.feed(outputs)
        delta = self._comeback.feed(outputs)
        if self._comeback.is_over:
            self._comeback = None
        return delta

    def _note_tokens(self) -> None:
        """Note when tokens came, not when a slow client took them."""
        times, is_first = self._times, not self._times.first_token_s
        now_s = time.monotonic()
        times.on_tokens(now_s, self._parts.metrics)
        if is_first:
            note_ttft(self._call.span, times.ttft_s(now_s))
            self._journal.timings(times.queued_s, times.ttft_s(now_s))
        if not self._has_progress:
            self._has_progress = True
            self._note_progress(now_s)

    def _note_progress(self, now_s: float) -> None:
        """Note the first token of an attempt: the replica lives with the request."""
        parts = self._parts
        self._suspicion.on_token()
        self._suspect_of = ""
        self._trial.end()
        parts.hand_overs.done(self)
        parts.dispatcher.on_first_token(self._route.request_id, now_s)
        for ratio in parts.dispatcher.take_prediction_errors():
            parts.metrics.ttft_prediction.observe(ratio)

    async def _finish(self) -> bool:
        answer, times, metrics = self._answer, self._times, self._parts.metrics
        now_s, num_prompt_tokens = time.monotonic(), len(self._request.prompt_token_ids)
        assert answer.finish_reason is not None, "an attempt ends with a reason or an error"
        is_kept = True
        if self._resume is None or self._resume.owner:  # else it was counted when it finished
            num_tokens = answer.num_tokens
            is_kept = times.observe(metrics, self._request.slo, num_tokens=num_tokens, now_s=now_s)
            metrics.prompt_tokens.inc(num_prompt_tokens)
            metrics.cached_tokens.inc(answer.num_cached_tokens)
            metrics.completion_tokens.inc(num_tokens)
        self._life.go(RequestState.FINISHED)
        self._journal.finish(self._seq, answer.finish_reason)
        await self._send(
            finished=finished_event(
                answer,
                num_prompt_tokens=num_prompt_tokens,
                # Of an answer that went on elsewhere the engine's share is that of its last part.
                queued_s=times.queued_s + (0 if self._route.is_resumed else answer.engine_queued_s),
                ttft_s=times.ttft_s(now_s),
                total_s=now_s - times.arrival_s,
            )
        )
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

    async def _send(
        self, tokens: Sequence[SampledToken] = (), *, is_noted: bool = True, **event: Any
    ) -> None:
        """Send the next event.

        Args:
            tokens: Of it, that the journal does not have.
            is_noted: Whether the journal learns of it.
            **event: One field of the message.
        """
        seq = self._seq
        self._seq += 1
        if is_noted and not self._life.is_over:
            self._journal.note(
                seq,
                tokens,
                fingerprint=self._fingerprint,
                num_cached_tokens=self._answer.num_cached_tokens,
            )
        await self._call.send(
            inference_pb2.GenerateStreamResponse(request_id=self._call.request_id, seq=seq, **event)
        )
