"""A stream that was cut off and goes on here, wherever it was before.

journal ──► whose, where ──► its call here ends ──► place ──► claimed ──► goes on
                │                                                ▲
                └─ refused: nothing has changed                  └─ a call elsewhere ends at
                                                                    its next write
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PoisonError,
    SluiceError,
    SupersededError,
    UnavailableError,
)
from cluster.gateway import validation
from cluster.gateway.generation import Generation
from cluster.gateway.identity import Caller
from cluster.gateway.intake import limits_of
from cluster.gateway.journal_entry import JournalError
from cluster.gateway.journal_record import JournalState, read_state
from cluster.gateway.parts import ClientCall, GatewayParts, Resumption
from cluster.gateway.resume_point import resume_point
from cluster.gateway.status import error_from_engine
from cluster.kvstore.store import Journal, Store
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineRequest

logger = logging.getLogger(__name__)

_SUPERSEDE_TIMEOUT_S = 2.0  # for a call of the same request to end
_JOURNALS_LATE_S = 5.0  # behind an outage of the store: circuit breakers of gateways close first
_LOOK_INTERVAL_S = 0.05  # one that is about to run cannot be stopped before it does


class Resumer:
    """Serves the resumptions of one gateway.

    Args:
        parts: Of the gateway.
        store: Has the journals; stays the caller's.
    """

    def __init__(self, parts: GatewayParts, store: Store) -> None:
        self._parts = parts
        self._store = store

    async def serve(
        self, message: inference_pb2.ResumeRequest, call: ClientCall, caller: Caller
    ) -> None:
        """Go on with a request; returns after its event `finished`.

        Args:
            message: Of the client.
            call: Gets the events.
            caller: Authenticated.

        Raises:
            InvalidArgumentError: The id or a token cannot be one.
            NotFoundError: There is no journal of the request, or none that can be read.
            UnavailableError: The store does not answer, or did not a moment ago: then a journal
                that is missing may still come.
            PermissionDeniedError: It is another tenant's.
            OutOfRangeError: The client is ahead of it.
            FailedPreconditionError: The client contradicts it.
            SluiceError: The request has failed, before or now.
        """
        request_id = call.request_id
        if not request_id:
            raise InvalidArgumentError(
                "request_id is empty: name the request that goes on", field="request_id"
            )
        validation.check_request_id(request_id)
        if message.tokens_received:  # those that the journal does not have yet go to the engine
            validation.check_token_ids(
                message.tokens_received, limits_of(self._parts), field="tokens_received"
            )
        if self._is_here(request_id, caller) or self._parts.journals.has(request_id):
            await self._parts.journals.flush()
        with _asking_the_store():
            journal = await self._store.read_journal(request_id)
        if journal is None and self._parts.fleet.store_up_s < _JOURNALS_LATE_S:
            raise UnavailableError(
                f"request_id={request_id!r} has no journal yet, and the store of journals did not "
                "answer a moment ago: try again"
            )
        resumption = _checked(message, journal, caller)
        if resumption.state.finish_reason is not None:
            # The call that finished it may still try to tell a client who has gone.
            is_here = self._is_here(request_id, caller)
            place = f"{request_id}\0{self._parts.journals.new_owner()}" if is_here else request_id
            with self._parts.admission.admit(place):
                await self._finish(resumption, call, caller)
            return
        was_here = await self._supersede(request_id, caller)
        with self._parts.admission.admit(request_id):
            if was_here:
                await self._parts.journals.flush()
            await self._take_over(message, call, caller)

    def _is_here(self, request_id: str, caller: Caller) -> bool:
        generation = self._parts.running.get(request_id)
        return generation is not None and generation.tenant == caller.tenant

    async def _supersede(self, request_id: str, caller: Caller) -> bool:
        """End the call that carries a request here, if one does; return whether one did.

        Raises:
            UnavailableError: It has not ended in time.
        """
        admission, running = self._parts.admission, self._parts.running
        give_up_s = time.monotonic() + _SUPERSEDE_TIMEOUT_S
        was_here = False
        while not await admission.wait_free(request_id, _LOOK_INTERVAL_S if was_here else 0.0):
            if time.monotonic() >= give_up_s:
                raise UnavailableError(
                    f"another call of request_id={request_id!r} has not ended within "
                    f"{_SUPERSEDE_TIMEOUT_S:g} s: try again"
                )
            was_here = True
            if self._is_here(request_id, caller):
                running[request_id].stop(
                    SupersededError(f"request_id={request_id!r} goes on in another call")
                )
        return was_here

    async def _take_over(
        self, message: inference_pb2.ResumeRequest, call: ClientCall, caller: Caller
    ) -> None:
        """Claim the journal, so that a call at another gateway ends, and go on from it.

        Whether its objective is kept counts for the call that began it, if at all: that one may
        have counted it already, when its client had gone.
        """
        owner = self._parts.journals.new_owner()
        with _asking_the_store():
            journal = await self._store.claim_journal(call.request_id, caller.tenant, owner)
        resumption = _checked(message, journal, caller, owner=owner)
        if resumption.state.finish_reason is not None:  # meanwhile
            await self._finish(resumption, call, caller)
            return
        generation = self._generation(resumption, call, caller)
        num_known = len(resumption.point.tokens)
        async with self._parts.rate_limiter.readmit(
            caller,
            resumption.state.header.sampling.max_tokens - num_known,
            lambda: max(0, generation.num_output_tokens - num_known),
        ):
            await generation.run()

    async def _finish(self, resumption: Resumption, call: ClientCall, caller: Caller) -> None:
        """Send what the client lacks of an answer that is complete."""
        finished = Resumption(resumption.state, resumption.point, owner="")
        self._parts.metrics.resumptions.labels("client").inc()
        await self._generation(finished, call, caller).run()

    def _generation(self, resumption: Resumption, call: ClientCall, caller: Caller) -> Generation:
        header = resumption.state.header
        request = EngineRequest(
            call.request_id,
            header.prompt_token_ids,
            header.sampling,
            salt=caller.salt,
            slo=header.slo,
            service_class=header.service_class,
            tenant=caller.tenant,
            tenant_weight=caller.weight,
        )
        return Generation(self._parts, call, request, session=header.session, resume=resumption)


def _checked(
    message: inference_pb2.ResumeRequest,
    journal: Journal | None,
    caller: Caller,
    *,
    owner: str = "",
) -> Resumption:
    """Return where a request goes on, if its journal is there, the caller's, and fits."""
    state = _state_of(message.request_id, journal, caller)
    after_seq = message.after_seq if message.HasField("after_seq") else None
    return Resumption(state, resume_point(state, after_seq, message.tokens_received), owner)


def _state_of(request_id: str, journal: Journal | None, caller: Caller) -> JournalState:
    if journal is None:
        raise NotFoundError(
            f"request_id={request_id!r} has no journal: it was never begun, or is too long ago; "
            "send the request anew"
        )
    if journal.scope != caller.tenant:
        raise PermissionDeniedError(
            f"request_id={request_id!r} was not begun by you: only who began it may resume it"
        )
    try:
        state = read_state(journal.entries)
    except JournalError:  # which may quote the prompt
        logger.warning("the journal of request %.130r is damaged", request_id)
        raise NotFoundError(
            f"the journal of request_id={request_id!r} is damaged: send the request anew"
        ) from None
    if state.error:
        raise _error_of(state.error)
    return state


def _error_of(text: str) -> SluiceError:
    """Return the error that a request had failed with for good."""
    error = error_from_engine(text)
    # A request that replicas died of is the only one that fails so and leaves a journal.
    return PoisonError(str(error)) if error.code == PoisonError.code else error


@contextmanager
def _asking_the_store() -> Iterator[None]:
    """Keep from clients why the store does not answer: the reason may name hosts and users."""
    try:
        yield
    except UnavailableError as error:
        logger.info("a journal cannot be read: %s", error)
        raise UnavailableError("the store of journals does not answer: try again") from error
